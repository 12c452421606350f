"""The models' answers, grouped by prompt; for classifiers, the misclassified texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from drkl.display import as_number, clean
from drkl.evaluation.result import MODELS
from drkl.reporting.inputs import TITLES, Run, run_labels
from drkl.reporting.plotting import Line
from drkl.reporting.text import Clipped, clip, count, percent, short

PROMPTS_OPEN = 8
TEXT_LIMIT = 1_500
# Bytes of text: of the prompts that stand in the page, and of the prompt picker's data.
PAGE_BUDGET = 450_000
PICKER_BUDGET = 1_800_000
PREDICTIONS = 12
"""Rows of a table of predictions."""


@dataclass(frozen=True)
class Column:
    """Whose answers: a model of the run, or the student of one run; ``color`` is a CSS variable."""

    title: str
    subtitle: str
    color: str


@dataclass(frozen=True)
class Sample:
    """One generated text; ``note`` says its length, and whether the limit stopped it."""

    text: Clipped
    note: str


@dataclass
class PromptSamples:
    """All models' answers to one prompt; ``answers`` by column and sampling temperature."""

    prompt: Clipped
    references: list[Clipped]
    suite: str = ""
    answers: dict[str, dict[float, list[Sample]]] = field(default_factory=dict)

    def at(self, temperature: float) -> dict[str, list[Sample]]:
        """The answers at one temperature; of a model that has none there, those at its first."""
        return {key: by.get(temperature) or next(iter(by.values())) for key, by in self.answers.items()}


@dataclass(frozen=True)
class SampleTable:
    """``unfolded`` prompts stand open, ``folded`` ones can be opened, ``left_out`` are in the file or the picker only.

    ``main`` is the temperature of the answers in the page; ``picker`` is the data of the prompt picker, safe inside a
    ``<script>``, and ``picker_note`` says what it leaves out.
    """

    columns: dict[str, Column]
    main: float
    unfolded: list[PromptSamples]
    folded: list[PromptSamples]
    left_out: int
    temperatures: list[float]
    picker: Markup
    picker_note: str


def sample_table(
    runs: Sequence[Run],
    lines: Mapping[str, Line],
    *,
    page_budget: int = PAGE_BUDGET,
    picker_budget: int = PICKER_BUDGET,
) -> SampleTable | None:
    """Group the lines of ``samples.jsonl`` by prompt, in the file's order, up to a number of bytes; None without any.

    Of several runs: the first run's teacher and the student of each, for the prompts with the same id and text.
    """
    groups: dict[Any, PromptSamples] = {}
    for run, row, column in _rows(runs):
        key = (row.get("suite"), row["prompt_id"], row["prompt"] if len(runs) > 1 else None)
        group = groups.setdefault(key, _new_group(row))
        answers = group.answers.setdefault(column, {})
        limit = as_number(run.settings.get("max_new_tokens"))
        answers.setdefault(float(row["sampling_temperature"]), []).append(_sample(row, limit))
    if not groups:
        return None
    prompts = [*groups.values()]
    columns = {
        key: column for key, column in _columns(runs, lines).items() if any(key in group.answers for group in prompts)
    }
    for group in prompts:
        group.answers = {key: group.answers[key] for key in columns if key in group.answers}
    temperatures = sorted({t for group in prompts for by in group.answers.values() for t in by})
    goal = as_number(runs[0].settings.get("sampling_temperature"))
    main = min(temperatures, key=lambda t: (abs(t - (1.0 if goal is None else goal)), t))
    kept = _fitting(prompts, lambda group: _size(group, main), page_budget) or prompts[:1]
    picker, note = _picker(prompts, columns, temperatures, main, picker_budget)
    left_out = len(prompts) - len(kept)
    return SampleTable(columns, main, kept[:PROMPTS_OPEN], kept[PROMPTS_OPEN:], left_out, temperatures, picker, note)


def _columns(runs: Sequence[Run], lines: Mapping[str, Line]) -> dict[str, Column]:
    if len(runs) == 1:
        details = runs[0].subtitles | {"teacher": "", "before": ""}
        return {model: Column(TITLES[model], details[model], model) for model in MODELS}
    columns = {"teacher": Column(TITLES["teacher"], "", "teacher")}
    for place, label in enumerate(run_labels(runs)):
        key = f"run-{place}"
        columns[key] = Column(label, "", lines[key].color if key in lines else "before")
    return columns


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Mapping[str, Any], str]]:
    for place, run in enumerate(runs):
        for row in run.evaluation.samples if run.evaluation is not None else ():
            model = row["model"]
            if len(runs) == 1 or (model == "teacher" and place == 0):
                yield run, row, model
            elif model == "student":
                yield run, row, f"run-{place}"


def _new_group(row: Mapping[str, Any]) -> PromptSamples:
    reference = row["reference"]
    several = reference if isinstance(reference, list) else [] if reference is None else [reference]
    suite = row.get("suite")
    return PromptSamples(
        prompt=clip(str(row["prompt"]), TEXT_LIMIT),
        references=[clip(str(text), TEXT_LIMIT) for text in several[:5]],
        suite=short(str(suite), 40) if suite else "",
    )


def _sample(row: Mapping[str, Any], limit: float | None) -> Sample:
    tokens = as_number(row["num_tokens"])
    note = "" if tokens is None else count(tokens, "token")
    if tokens is not None and limit is not None and tokens >= limit:
        note += ", stopped by the limit"
    return Sample(clip(str(row["text"]), TEXT_LIMIT), note)


def _fitting(
    prompts: Sequence[PromptSamples], size: Callable[[PromptSamples], int], budget: int
) -> list[PromptSamples]:
    """The first prompts whose sizes add up to no more than ``budget``."""
    kept: list[PromptSamples] = []
    for prompt in prompts:
        budget -= size(prompt)
        if budget < 0:
            break
        kept.append(prompt)
    return kept


def _size(group: PromptSamples, main: float) -> int:
    answers = [sample.text for samples in group.at(main).values() for sample in samples]
    # Markup around a text weighs about as much as a short answer.
    return sum(len(escape(clean(text.text)).encode()) + 250 for text in (group.prompt, *group.references, *answers))


def _picker(
    prompts: Sequence[PromptSamples],
    columns: Mapping[str, Column],
    temperatures: Sequence[float],
    main: float,
    budget: int,
) -> tuple[Markup, str]:
    """The picker's data, of as many prompts as fit, and a sentence on what does not."""
    entries = {id(group): _entry(group, place, columns, temperatures) for place, group in enumerate(prompts)}
    kept = _fitting(prompts, lambda group: len(_json(entries[id(group)])), budget)
    if not kept:
        return Markup(""), ""
    data = {
        "columns": [[clean(column.title), clean(column.subtitle), column.color] for column in columns.values()],
        "temperatures": [f"{temperature:g}" for temperature in temperatures],
        "main": temperatures.index(main),
        "prompts": [entries[id(group)] for group in kept],
    }
    note = ""
    if len(kept) < len(prompts):
        note = (
            f"Only the first {len(kept):,} of {count(len(prompts), 'prompt')} fit into this page; all of them are in "
            "`samples.jsonl`."
        )
    return Markup(_json(data).decode()), note


def _entry(
    group: PromptSamples, place: int, columns: Mapping[str, Column], temperatures: Sequence[float]
) -> dict[str, Any]:
    suite = f"{group.suite}: " if group.suite else ""
    answers = [
        [[[*_pair(sample.text), sample.note] for sample in group.answers.get(key, {}).get(t, ())] for t in temperatures]
        for key in columns
    ]
    return {
        "label": clean(f"{place + 1}. {suite}{short(group.prompt.text, 70)}"),
        "prompt": _pair(group.prompt),
        "references": [_pair(text) for text in group.references],
        "answers": answers,
    }


def _pair(text: Clipped) -> list[Any]:
    return [clean(text.text), text.hidden]


_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def _json(value: Any) -> bytes:
    """JSON that cannot end the ``<script>`` around it, nor open a comment in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES).encode()


@dataclass(frozen=True)
class PredictionTable:
    """Texts of one kind: each with its label and, for each of ``models``, the class, its probability and a tick."""

    title: str
    lead: str
    models: list[str]
    rows: list[tuple[Clipped, str, list[tuple[str, str]]]]


def prediction_tables(run: Run) -> list[PredictionTable]:
    """The texts where student and teacher differ, and those whose label the student finds least likely."""
    lines = run.evaluation.predictions if run.evaluation is not None else []
    models = ["student", "teacher"] if any("teacher" in line for line in lines) else ["student"]
    tables = []
    differ = [line for line in lines if "teacher" in models and line["student"] != line.get("teacher")]
    if differ:
        differ.sort(key=lambda line: -(as_number(line["student_confidence"]) or 0.0))
        right = Counter(model for line in differ for model in models if line.get(model) == line["label"])
        lead = (
            f"They differ on {len(differ):,} of {count(len(lines), 'text')}; of these the teacher is right on "
            f"{right['teacher']:,}, the student on {right['student']:,}. The texts on which the student is most "
            "confident come first."
        )
        tables.append(_predictions("Where student and teacher differ", lead, models, differ))
    wrong = [line for line in lines if line["student"] != line["label"]]
    if wrong:
        wrong.sort(key=lambda line: -(as_number(line["nll"]) or 0.0))
        pairs = Counter((short(str(line["label"])), short(str(line["student"]))) for line in wrong).most_common(3)
        confused = "; ".join(f"{label} as {predicted} ({times})" for (label, predicted), times in pairs)
        lead = (
            f"The student is wrong on {len(wrong):,} of {count(len(lines), 'text')}, most often: {confused}. The texts "
            "whose label it finds least likely come first; the label in the data may be the mistake."
        )
        tables.append(_predictions("The hardest texts", lead, models, wrong))
    return tables


def _predictions(title: str, lead: str, models: list[str], lines: Sequence[Mapping[str, Any]]) -> PredictionTable:
    rows = []
    for line in lines[:PREDICTIONS]:
        by = []
        for model in models:
            tick = " ✓" if line.get(model) == line["label"] else ""
            sure = percent(as_number(line.get(f"{model}_confidence")), 0)
            by.append((short(str(line.get(model)), 60), f"{sure}{tick}"))
        rows.append((clip(str(line["text"]), 400), short(str(line["label"]), 60), by))
    more = f" {len(lines) - PREDICTIONS:,} more are in `predictions.jsonl`." if len(lines) > PREDICTIONS else ""
    return PredictionTable(title, lead + more, models, rows)
