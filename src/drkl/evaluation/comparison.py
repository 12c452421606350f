"""Two or more evaluated students side by side: `drkl compare`, and what the page says where runs stand together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from drkl.display import number
from drkl.errors import DrklError
from drkl.evaluation.answers import AnswerTable
from drkl.evaluation.bootstrap import RESAMPLES, Metrics, Resampled
from drkl.evaluation.class_scores import ClassScores
from drkl.evaluation.declared import ANSWER_KEYS, CLASS_KEYS, TOKEN_KEYS, Metric, metrics_of
from drkl.evaluation.findings import Finding, of_comparison
from drkl.evaluation.paired import (
    AS_VARIED,
    MATCHED,
    MIN_UNITS,
    Curve,
    Difference,
    Side,
    Verdict,
    decide,
    mostly,
    paired,
    settled,
    when_as_varied,
)
from drkl.evaluation.result import Evaluation
from drkl.evaluation.row_sums import RowSums

SIZES = ("num_tokens", "num_answers", "num_rows")
CHANCE = 0.05
"""The share of 95 % intervals that leave out the truth."""
SAMPLING = (
    "sampling_temperature", "max_new_tokens", "samples_per_prompt", "seeds", "seed", "protocol", "template", "gamma",
)  # fmt: skip
"""Settings that two evaluations should share."""

Line = Mapping[str, Any]
Pair = tuple[Evaluation, Evaluation]
Place = tuple[str | None, float | None]
"""A suite and a sampling temperature."""
Sets = dict[Place, dict[str, list[Line]]]
"""The lines of each model on each set; sets without lines of the student are left out."""


@dataclass(frozen=True)
class Unit:
    """A unit of resampling: the file of its lines, the field that names it, and fields that both evaluations share."""

    plural: str
    file: str
    id: str
    same: tuple[str, ...]
    keys: tuple[str, ...]
    """The keys of the metrics."""
    lacking: str
    """Why a number of ``eval.json`` has no paired difference."""
    metrics: Callable[[list[Line], Evaluation, str], Metrics]
    """From the lines of a model to its metrics."""


def _answers(lines: list[Line], run: Evaluation, model: str) -> Metrics:
    return AnswerTable.from_samples(lines, run.settings.get("max_new_tokens") or 0).metrics


ROWS = Unit(
    "held-out rows", "heldout", "row_id", ("num_tokens",), TOKEN_KEYS, "not in heldout.jsonl",
    lambda lines, run, model: RowSums.of_lines(lines).metrics,
)  # fmt: skip
PROMPTS = Unit(
    "prompts", "samples", "prompt_id", ("prompt", "reference"), ANSWER_KEYS,
    "cannot be resampled by prompt", _answers,
)  # fmt: skip
TEXTS = Unit(
    "texts", "predictions", "id", ("text", "label"), CLASS_KEYS, "not in predictions.jsonl",
    lambda lines, run, model: ClassScores.of_lines(lines, model).metrics,
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The comparison on one set at one sampling temperature (None: nothing sampled)."""

    suite: str | None
    sampling_temperature: float | None
    units: dict[str, int] = field(default_factory=dict)
    """The number of held-out rows, prompts or texts that were resampled."""
    differences: list[Difference] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    """Metrics that cannot be paired, and why."""

    @property
    def place(self) -> str:
        """The suite and the sampling temperature in words; empty for the only set without answers."""
        where = [] if self.suite is None else [self.suite]
        if self.sampling_temperature is not None:
            where.append(f"sampling temperature {self.sampling_temperature:g}")
        return ", ".join(where)


@dataclass(frozen=True)
class Comparison:
    """B against A; the table of the main sampling temperature stands first."""

    a: Evaluation
    b: Evaluation
    seed: int
    tables: list[Table]
    warnings: list[str]

    @property
    def task(self) -> str:
        """generation or classification."""
        return self.a.task

    @property
    def findings(self) -> list[Finding]:
        """Is B better than A? One finding for each metric with a verdict, for each set and sampling temperature."""
        several = len(self.tables) > 1
        return [
            finding
            for table in self.tables
            for finding in of_comparison(table.differences, table.place if several else "")
        ]

    def summary(self) -> list[str]:
        """Return sentences: what is decided, what is not, and the limits of that."""
        lines = [sentence for table in self.tables for sentence in _decided(table)]
        verdicts = [d.verdict for table in self.tables for d in table.differences if d.verdict is not None]
        units = " and ".join(dict.fromkeys(name for table in self.tables for name in table.units))
        lines.append(
            f"The intervals are over {units}, not over training seeds: train each run with several seeds before saying "
            "that one objective is better than another."
        )
        if verdicts:
            expected = CHANCE * len(verdicts)
            lines.append(
                f"Of {len(verdicts)} verdicts about {number(expected, 0 if expected >= 1 else 1)} would be decided by "
                "chance alone if the two were equally good."
            )
        return lines

    def __str__(self) -> str:
        """Every finding and the summary, a line each."""
        head = [
            f"A: {self.a}",
            f"B: {self.b}",
            f"B - A, with 95 % intervals of {RESAMPLES:,} paired bootstrap resamples (seed {self.seed}):",
            *(f"Warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join([*head, *(finding.text for finding in self.findings), *self.summary()])


def compare(a: Evaluation | str | Path, b: Evaluation | str | Path, *, seed: int = 0) -> Comparison:
    """Return the paired differences B - A of the students of two evaluations.

    Args:
        a, b: evaluations, or folders with ``eval.json`` and the files beside it.
        seed: random seed of the resampling.

    Raises:
        DrklError: a folder is not evaluated, or the two were evaluated on different tasks, rows or prompts.
    """
    pair = _opened(a), _opened(b)
    first, second = pair
    if first.task != second.task:
        raise DrklError(f"The tasks differ: {first.task} in {first}, {second.task} in {second}. They share no metric.")
    warnings = [*_different_settings(pair), *_different_teachers(pair)]
    if first.task == "classification":
        table = Table(None, None)
        tables = [_compared(pair, TEXTS, [_predicted(run) for run in pair], table, seed)]
    else:
        heldout, samples = [_sets(run, ROWS) for run in pair], [_sets(run, PROMPTS) for run in pair]
        warnings += [*_only_in_one("held-out rows", heldout), *_only_in_one("answers", samples)]
        tables = _compare_generation(pair, heldout, samples, seed)
    few = {f"{count} {name}" for table in tables for name, count in table.units.items() if count < MIN_UNITS}
    warnings += [f"{what} decide nothing; it takes {MIN_UNITS} or more." for what in sorted(few)]
    return Comparison(first, second, seed, tables, warnings)


def _opened(evaluation: Evaluation | str | Path) -> Evaluation:
    return evaluation if isinstance(evaluation, Evaluation) else Evaluation.load(evaluation)


# Pairs ------------------------------------------------------------------------------------------------------------


def _lines(run: Evaluation, unit: Unit) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = getattr(run, unit.file)
    if not lines:
        raise DrklError(f"{str(run)!r} has no {unit.file}.jsonl; `drkl evaluate` writes it beside eval.json.")
    return lines


def _sets(run: Evaluation, unit: Unit) -> Sets:
    """The lines of each model on each set; sets without lines of the student are left out."""
    if unit is PROMPTS and not run.samples and not run.settings.get("prompts"):
        return {}  # nothing was sampled
    sets: Sets = {}
    for line in _lines(run, unit):
        temperature = line.get("sampling_temperature")
        place = line.get("suite"), None if temperature is None else float(temperature)
        sets.setdefault(place, {}).setdefault(line["model"], []).append(line)
    return {place: models for place, models in sets.items() if "student" in models}


def _predicted(run: Evaluation) -> dict[str, list[Line]]:
    """A line of ``predictions.jsonl`` is of the student and, where there is one, of the teacher."""
    lines: list[Line] = [*_lines(run, TEXTS)]
    has_teacher = all("teacher" in line and "teacher_confidence" in line for line in lines)
    return {"student": lines} | ({"teacher": lines} if has_teacher else {})


def _compare_generation(pair: Pair, heldout: Sequence[Sets], samples: Sequence[Sets], seed: int) -> list[Table]:
    main = pair[0].settings.get("sampling_temperature")
    tables = []
    for suite in dict.fromkeys(name for name, _ in [*heldout[0], *samples[0]]):
        tokens = Table(suite, None)
        if all((suite, None) in sets for sets in heldout):
            tokens = _compared(pair, ROWS, [sets[suite, None] for sets in heldout], tokens, seed)
        both = sorted({t for name, t in samples[0] if name == suite and (suite, t) in samples[1] and t is not None})
        if main not in both and tokens.units:
            tables.append(tokens)
        for temperature in sorted(both, key=lambda t: t != main):
            start = tokens if temperature == main else Table(suite, None)
            start = replace(start, sampling_temperature=temperature)
            table = _compared(pair, PROMPTS, [sets[suite, temperature] for sets in samples], start, seed)
            if temperature == main:
                more = _when_as_varied(pair, suite, samples, both, seed)
                table = replace(table, differences=[*table.differences, *more])
            tables.append(table)
    if not tables:
        raise DrklError(f"{pair[0]} and {pair[1]} were evaluated on different sets: they share no row and no prompt.")
    return tables


def _compared(pair: Pair, unit: Unit, lines: Sequence[Mapping[str, list[Line]]], start: Table, seed: int) -> Table:
    """``start``, and what these lines add to it."""
    ids, sides = _paired_sides(pair, unit, lines, seed)
    metrics = {key: metrics_of(pair[0].task)[key] for key in unit.keys if key not in SIZES}
    differences, missing = paired(metrics, *sides)
    known = {difference.metric.key for difference in differences}
    # eval.json's tables are of the main temperature.
    main = start.sampling_temperature in (None, pair[0].settings.get("sampling_temperature"))
    for key in metrics if main else ():
        if key not in known | missing.keys() and any(run.value("student", key) is not None for run in pair):
            missing[key] = unit.lacking
    return Table(
        start.suite,
        start.sampling_temperature,
        start.units | {unit.plural: len(ids)},
        start.differences + [settled(difference, len(ids)) for difference in differences],
        start.not_compared | missing,
    )


def _when_as_varied(
    pair: Pair, suite: str | None, samples: Sequence[Sets], temperatures: Sequence[float], seed: int
) -> Iterator[Difference]:
    """What `AS_VARIED` names where each student is as varied as its teacher; nothing where one cannot be so."""
    curves: list[dict[str, dict[float, Resampled]]] = [{"student": {}, "teacher": {}} for _ in pair]
    units = 0
    for temperature in temperatures:
        ids, sides = _paired_sides(pair, PROMPTS, [sets[suite, temperature] for sets in samples], seed)
        units = len(ids)
        for curve, side in zip(curves, sides, strict=True):
            curve["student"][temperature] = side.student
            if side.teacher.points:
                curve["teacher"][temperature] = side.teacher
    for key, metric in AS_VARIED.items():
        matched = [when_as_varied(*(Curve.of(curve[model], key) for model in curve)) for curve in curves]
        scores = [scores[1] for scores in matched if not isinstance(scores, str)]
        if len(scores) < 2:
            continue
        a, b = scores
        known = ~(np.isnan(a) | np.isnan(b))
        change = mostly(b - a)
        verdict: Verdict = "undecided" if change.interval is None else decide(-a[1:][known[1:]], -b[1:][known[1:]])
        yield settled(Difference(metric, float(a[0]), float(b[0]), change.interval, verdict), units)


def _paired_sides(
    pair: Pair, unit: Unit, lines: Sequence[Mapping[str, list[Line]]], seed: int
) -> tuple[list[Any], list[Side]]:
    """The units that both were evaluated on, and both students with their teachers, resampled over those."""
    ids = same_units(pair, unit, [models["student"] for models in lines])
    sides = []
    for models, run in zip(lines, pair, strict=True):
        both = [
            _resampled(run, unit, models[model], model, ids, seed) if model in models else Resampled({}, {})
            for model in ("student", "teacher")
        ]
        sides.append(Side(*both))
    return ids, sides


def _resampled(
    run: Evaluation, unit: Unit, lines: Sequence[Line], model: str, ids: Sequence[Any], seed: int
) -> Resampled:
    """Return a model's metrics over the units in this order, cached in its evaluation."""
    place = lines[0].get("suite"), lines[0].get("sampling_temperature")
    key = (unit.plural, place, model, seed, tuple(ids))
    if key not in run.cache:
        metrics = unit.metrics(in_order(lines, unit, ids, run), run, model)
        run.cache[key] = Resampled.of(metrics, len(ids), seed)
    resampled: Resampled = run.cache[key]
    return resampled


def same_units(pair: Pair, unit: Unit, lines: Sequence[Sequence[Line]]) -> list[Any]:
    """The ids of what both runs were evaluated on, in the order of the first.

    Raises:
        DrklError: they differ.
    """
    first, second = ({line[unit.id]: line for line in rows} for rows in lines)
    if not first and not second:
        raise DrklError(f"{pair[0]} and {pair[1]} have no {unit.plural}.")
    for (run, here), (_, there) in (((pair[0], first), (pair[1], second)), ((pair[1], second), (pair[0], first))):
        if alone := [name for name in here if name not in there]:
            raise DrklError(
                f"The {unit.plural} differ: {len(alone)} of {len(here)} are in {run} only, such as {alone[0]!r}. "
                "Only runs evaluated on the same data can be compared."
            )
    for name, line in first.items():
        for key in unit.same:
            if line[key] != second[name][key]:
                values = " and ".join(_short(value) for value in (line[key], second[name][key]))
                raise DrklError(
                    f"The {unit.plural} differ: {name!r} has as {key} {values}. "
                    "Only runs evaluated on the same data can be compared."
                )
    return list(first)


def in_order(lines: Sequence[Line], unit: Unit, ids: Sequence[Any], run: Evaluation) -> list[Line]:
    """The lines in the order of the ids."""
    by_id: dict[Any, list[Line]] = {}
    for line in lines:
        by_id.setdefault(line[unit.id], []).append(line)
    if by_id.keys() != set(ids):
        raise DrklError(f"The models in {run} were evaluated on different {unit.plural}; `drkl evaluate` it again.")
    return [line for name in ids for line in by_id[name]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _different_settings(pair: Pair) -> Iterator[str]:
    """A sentence for each setting of the sampling that is not the same in both."""
    for key in SAMPLING:
        a, b = (run.settings.get(key) for run in pair)
        if a != b:
            yield f"{key} is {_short(a)} in A and {_short(b)} in B."


def _different_teachers(pair: Pair) -> Iterator[str]:
    """A sentence where the teachers have other names, or other numbers on the same rows."""
    names = [models.get("teacher") for run in pair if (models := run.settings.get("models")) is not None]
    if len(names) == 2 and names[0] != names[1]:
        yield f"The teachers differ: {_short(names[0])} in A, {_short(names[1])} in B."
        return
    for key in ("nll", "entropy", "confidence"):
        a, b = (run.value("teacher", key) for run in pair)
        same = a is b is None or (a is not None and b is not None and isclose(a, b, rel_tol=1e-3))
        if not same:
            metric = metrics_of(pair[0].task)[key]
            yield f"The teachers differ: {metric.title} {metric.show(a)} in A, {metric.show(b)} in B."
            return


def _only_in_one(what: str, sets: Sequence[Sets]) -> Iterator[str]:
    """A sentence for each set or sampling temperature that one of the two lacks."""
    for name, here, there in (("A", sets[0], sets[1]), ("B", sets[1], sets[0])):
        for suite, temperature in here:
            if (suite, temperature) not in there:
                at = "" if temperature is None else f" at sampling temperature {temperature:g}"
                yield f"Only {name} has {what}{'' if suite is None else f' of {suite}'}{at}: not compared."


def _decided(table: Table) -> Iterator[str]:
    place = table.place
    at = f"{place[:1].upper()}{place[1:]}: " if place else ""
    for verdict in ("A better", "B better"):
        if titles := [d.metric.title for d in table.differences if d.verdict == verdict]:
            yield f"{at}{verdict} in {len(titles)}: {'; '.join(titles)}."
    judged = [d for d in table.differences if d.verdict is not None]
    if open_ := [d.metric.title for d in judged if d.verdict == "undecided"]:
        if len(open_) == len(judged):
            yield f"{at}The data decide nothing: none of {len(judged)} metrics tells the two apart."
        else:
            yield f"{at}The data do not decide {len(open_)} of {len(judged)}: {'; '.join(open_)}."
    if sides := [d.metric.title for d in judged if d.verdict == "undecided" and _differs(d)]:
        yield f"{at}The two differ, but not in which is nearer to ideal, by: {'; '.join(sides)}."
    if no_ideal := [d.metric.title for d in table.differences if d.verdict is None and d.metric.better == "teacher"]:
        yield f"{at}No verdict without a teacher's value: {'; '.join(no_ideal)}."
    reasons: dict[str, list[str]] = {}
    for key, reason in table.not_compared.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        yield f"{at}Not compared ({reason}): {', '.join(keys)}."


def _differs(difference: Difference) -> bool:
    ends = difference.interval
    return ends is not None and not ends[0] <= 0 <= ends[1]


# Several runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """The comparison of several students by one metric; a run is named by its place in the given list."""

    metric: Metric
    values: dict[int, float]
    """The students that have the metric, from the nearest to ideal to the farthest."""
    better: dict[tuple[int, int], bool]
    """For each (nearer, farther) pair that could be tested, whether the paired test of `compare` decides it."""
    reason: str = ""
    """Why a pair could not be tested."""

    @property
    def winner(self) -> int | None:
        """The student that is decided to be better than every other; None where there is none."""
        runs = list(self.values)
        return runs[0] if len(runs) > 1 and all(self.better.get((runs[0], other)) for other in runs[1:]) else None

    @property
    def leaders(self) -> list[int]:
        """The students that no other is decided to be better than."""
        return [run for run in self.values if not any(self.better.get((other, run)) for other in self.values)]

    def text(self, names: Sequence[str]) -> str:
        """A sentence: who is best, or between whom the data do not decide; ``names`` are those of all runs."""
        metric, unit = self.metric, " %" if self.metric.unit == "%" else ""
        numbers = ", ".join(f"{names[run]} {metric.show(value)}{unit}" for run, value in self.values.items())
        text = f"{metric.title}: {numbers}"
        if len(self.values) < 2:
            return f"{text}."
        if self.winner is not None:
            return f"{text}; {names[self.winner]} is {'best' if len(self.values) > 2 else 'better'}."
        if self.reason:
            return f"{text}; not every pair could be tested: {self.reason}."
        best = [names[run] for run in self.leaders]
        return f"{text}; the data do not decide between {', '.join(best[:-1])} and {best[-1]}."


def side_by_side(
    evaluations: Sequence[Evaluation], keys: Sequence[str] | None = None, *, seed: int = 0
) -> list[Standing]:
    """Compare several students, each with each, by the paired test of `compare` at the main sampling temperature.

    Args:
        evaluations: of any task; only those of the same task, rows and prompts, with their lines, can be tested.
        keys: of the metrics, in the order of the result; ``rouge_l_when_as_varied`` and
            ``rouge_l_best_when_as_varied`` are where each student is as varied as its teacher. Default: every metric
            with an ideal.
        seed: random seed of the resampling.
    """
    tested: dict[tuple[int, int], dict[str, Difference]] = {}
    reasons: dict[tuple[int, int], str] = {}
    for a, b in itertools.combinations(range(len(evaluations)), 2):
        try:
            tables = compare(evaluations[a], evaluations[b], seed=seed).tables
        except DrklError as error:
            reasons[a, b] = str(error).rstrip(".")
            continue
        if len({table.suite for table in tables}) > 1:
            reasons[a, b] = "each suite is compared by itself"
            continue
        tested[a, b] = {difference.metric.key: difference for difference in tables[0].differences}
    known = {key: metric for run in evaluations for key, metric in metrics_of(run.task).items()}
    known |= MATCHED
    wanted = keys if keys is not None else [key for key, metric in known.items() if metric.better != "none"]
    standings = [_standing(evaluations, known[key], tested, reasons) for key in wanted]
    return [standing for standing in standings if standing.values]


def _standing(
    evaluations: Sequence[Evaluation],
    metric: Metric,
    tested: Mapping[tuple[int, int], Mapping[str, Difference]],
    reasons: Mapping[tuple[int, int], str],
) -> Standing:
    key = metric.key
    values: dict[int, float] = {}
    for run, evaluation in enumerate(evaluations):
        value = evaluation.value("student", key)
        for (a, b), differences in tested.items() if value is None else ():
            if key in differences and run in (a, b):
                value = differences[key].a if run == a else differences[key].b
        if value is not None:
            values[run] = value
    distance = {run: metric.distance(value, evaluations[run].value("teacher", key)) for run, value in values.items()}
    order = sorted((run for run in values if distance[run] is not None), key=lambda run: distance[run])
    better, reason = {}, ""
    for near, far in itertools.combinations(order, 2):
        pair = (near, far) if near < far else (far, near)
        difference = tested.get(pair, {}).get(key)
        if difference is None or difference.verdict is None:
            reason = reasons.get(pair, "it has no paired difference")
            continue
        better[near, far] = difference.verdict == ("A better" if pair[0] == near else "B better")
    return Standing(metric, {run: values[run] for run in order}, better, reason)
