"""The content of a report as data, which page and Markdown draw. Every answer is a finding of `drkl.evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from drkl.errors import DrklError
from drkl.evaluation.comparison import Comparison, Standing, compare, side_by_side
from drkl.evaluation.findings import BETTER, Finding
from drkl.evaluation.paired import MATCHED
from drkl.reporting.facts import unevaluated
from drkl.reporting.inputs import Run, run_labels
from drkl.reporting.plotting import Line
from drkl.reporting.tables import MetricTable, PlainTable, config_differences, run_table
from drkl.reporting.text import count

HEADLINES = {
    "generation": ("closer", "better_on_data", "as_good"),
    "classification": ("as_good", "better_on_data", "closer"),
}
"""Ids of the findings that can head a page; the first that applies does."""
STANDINGS = {
    "generation": ("rkl", "fkl", "agreement", "entropy", "rouge_l", *MATCHED),
    "classification": ("accuracy", "ece", "agreement"),
}
"""The metrics by which the runs are compared in words."""


@dataclass(frozen=True)
class RunAnswer:
    """One answer to a question: of the run ``run``, which the page calls ``label`` (empty: it is about one run)."""

    run: str
    label: str
    finding: Finding


@dataclass(frozen=True)
class Question:
    """A question with the answer of each run that has one."""

    text: str
    answers: list[RunAnswer]


@dataclass(frozen=True)
class Headline:
    """The headline of the report: a finding of its only run, or words about several runs or about none evaluated."""

    title: str
    text: str
    answer: RunAnswer | None = None


@dataclass(frozen=True)
class Content:
    """The findings and the comparisons of a report."""

    headline: Headline
    questions: list[Question]
    not_applicable: list[Question]
    """Questions that have no meaning for any of the runs."""
    analysis_questions: list[Question]
    several: SideBySide | None
    concerns: list[str]
    """What went wrong with the answers that were sampled in training."""


@dataclass(frozen=True)
class SideBySide:
    """Several runs: the table, the paired test in words, and what makes numbers incomparable."""

    notices: list[str]
    standings: list[str]
    table: MetricTable | None
    pairs: list[tuple[str, list[str]]]
    """For each run but the first: what it is compared with, and what the paired test says."""
    differences: PlainTable | None


def content_of(runs: Sequence[Run], lines: Mapping[str, Line]) -> Content:
    """Return the content of a report on ``runs``; ``lines`` are their curves by key, for the heads of columns."""
    beside = _several(runs, lines)
    head = _headline(runs, beside)
    headlined = head.answer.finding.id if head.answer else ""
    questions = _questions(runs, lambda run: [finding for finding in run.findings if finding.id != headlined])
    applies = [any(answer.finding.answer != "not_applicable" for answer in question.answers) for question in questions]
    return Content(
        headline=head,
        questions=[question for question, yes in zip(questions, applies, strict=True) if yes],
        not_applicable=[question for question, yes in zip(questions, applies, strict=True) if not yes],
        analysis_questions=_questions(runs, lambda run: run.analysis_findings),
        several=beside,
        concerns=[
            f"{label}: {text}" if len(runs) > 1 else text
            for run, label in zip(runs, run_labels(runs), strict=True)
            for text in run.concerns
        ],
    )


def _headline(runs: Sequence[Run], beside: SideBySide | None) -> Headline:
    """The finding, or the words, that head a report."""
    if beside is not None:
        return Headline(
            f"{count(len(runs), 'run')} side by side",
            (beside.standings or beside.notices or ["They have no number in common."])[0],
        )
    run = runs[0]
    if run.evaluation is None:
        return Headline("Not evaluated", unevaluated(run))
    known = {finding.id: finding for finding in run.findings if finding.answer != "not_applicable"}
    finding = next((known[id] for id in HEADLINES[run.task] if id in known), None)
    if finding is None:
        return Headline("Evaluated", "Only the student was evaluated, so there is nothing to compare it with.")
    return Headline(finding.question, finding.text, RunAnswer(run.name, "", finding))


def _questions(runs: Sequence[Run], of: Callable[[Run], Sequence[Finding]]) -> list[Question]:
    """Findings of all runs, by question."""
    labels = run_labels(runs) if len(runs) > 1 else [""]
    answered = [
        RunAnswer(run.name, label, finding) for run, label in zip(runs, labels, strict=True) for finding in of(run)
    ]
    order = {id: place for place, id in enumerate(dict.fromkeys(answer.finding.id for answer in answered))}
    answered.sort(key=lambda answer: order[answer.finding.id])
    grouped = [list(group) for _, group in groupby(answered, key=lambda answer: answer.finding.id)]
    return [Question(group[0].finding.question, group) for group in grouped]


def _several(runs: Sequence[Run], lines: Mapping[str, Line]) -> SideBySide | None:
    """The runs side by side; None for one."""
    if len(runs) < 2:
        return None
    labels = run_labels(runs)
    notices = [f"{label} has not been evaluated: `drkl evaluate` does that." for label in _unevaluated(runs)]
    compared: dict[int, Comparison] = {}
    first = runs[0].evaluation
    for place, run in list(enumerate(runs))[1:]:
        if first is None or run.evaluation is None:
            continue
        try:
            compared[place] = compare(first, run.evaluation)
        except DrklError as error:
            notices.append(f"{labels[0]} and {labels[place]} are not comparable: {error}")
    for place, comparison in compared.items():
        notices += [f"A is {labels[0]}, B is {labels[place]}: {warning}" for warning in comparison.warnings]
    standings = _standings(runs)
    findings = {
        (place, finding.id.removeprefix(BETTER)): finding
        for place, comparison in compared.items()
        for finding in reversed(comparison.findings)  # of a metric the first table's, at the main temperature, counts
    }
    winners = {key: standing.winner for key, standing in standings.items()}
    known = [standings[key] for key in STANDINGS[runs[0].task] if key in standings]
    # Where no pair could be tested, the notices say why, once.
    texts = [standing.text(labels) for standing in known if standing.better or not (standing.reason and notices)]
    return SideBySide(
        notices=notices,
        standings=texts,
        table=run_table(runs, lines, winners, findings),
        pairs=[
            (f"{labels[0]} (A) and {labels[place]} (B)", comparison.summary()) for place, comparison in compared.items()
        ],
        differences=config_differences(runs),
    )


def _unevaluated(runs: Sequence[Run]) -> list[str]:
    return [label for run, label in zip(runs, run_labels(runs), strict=True) if run.evaluation is None]


def _standings(runs: Sequence[Run]) -> dict[str, Standing]:
    """By metric, how the evaluated runs compare; the runs are numbered as in ``runs``."""
    places = [place for place, run in enumerate(runs) if run.evaluation is not None]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    if len(evaluations) < 2:
        return {}
    by_metric = {}
    for standing in side_by_side(evaluations):
        values = {places[run]: value for run, value in standing.values.items()}
        better = {(places[near], places[far]): decided for (near, far), decided in standing.better.items()}
        by_metric[standing.metric.key] = Standing(standing.metric, values, better, standing.reason)
    return by_metric
