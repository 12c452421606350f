"""Paired differences of two runs: what ``drkl compare`` prints.

A metric f is a function of weights w, how often each held-out row, prompt or text counts. Both runs meet the same
weights, so that what makes a prompt hard for both falls out of the difference::

    f_B(w) - f_A(w),   w ~ multinomial(n, 1/n),   its 2.5th and 97.5th percentile

The verdict is about the distance from ideal, d: f or -f where lower or higher is better, |f| where 0 is ideal,
|f(w) - f_teacher(w)| where the teacher is. The runs differ where the interval of d_B(w) - d_A(w) leaves out 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Literal

import numpy as np

from drkl.display import as_number
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Metrics, bootstrap, interval
from drkl.evaluation.declared import ANSWER_KEYS, CLASS_KEYS, TOKEN_KEYS, Metric, metrics_of
from drkl.evaluation.evaluated import (
    PROMPTS,
    ROWS,
    TEXTS,
    Evaluated,
    Line,
    Models,
    Pair,
    Sets,
    Unit,
    different_settings,
    different_teachers,
    in_order,
    only_in_one,
    same_units,
)

Verdict = Literal["A better", "B better", "undecided"]

SIZES = ("num_tokens", "num_answers", "num_rows")


@dataclass(frozen=True)
class Difference:
    """One metric of A and B; ``interval`` is that of ``b - a``. None where it cannot be said."""

    metric: Metric
    a: float
    b: float
    interval: list[float] | None
    verdict: Verdict | None
    teacher: float | None = None
    """The teacher's value, where that is the ideal."""

    @property
    def difference(self) -> float:
        """B − A."""
        return self.b - self.a


@dataclass(frozen=True)
class Table:
    """What was compared on one set, at one sampling temperature (None: nothing sampled)."""

    suite: str | None
    sampling_temperature: float | None
    units: dict[str, int]
    """How many held-out rows, prompts or texts were resampled."""
    differences: list[Difference]
    not_compared: dict[str, str]
    """Metrics that cannot be paired, and why."""


@dataclass(frozen=True)
class Comparison:
    """Run B against run A; the table of the main sampling temperature stands first."""

    a: Path
    b: Path
    task: str
    seed: int
    tables: list[Table]
    warnings: list[str]


def compare(a: str | Path, b: str | Path, *, seed: int = 0) -> Comparison:
    """Return the paired differences B − A of the students of two evaluated runs.

    Args:
        a, b: folders with ``eval.json`` and the files beside it, as ``drkl evaluate`` writes them.
        seed: of the resampling.

    Raises:
        DrklError: a folder is not evaluated, or the two were evaluated on different tasks, rows or prompts.
    """
    pair = Evaluated.open(a), Evaluated.open(b)
    first, second = pair
    if first.task != second.task:
        raise DrklError(f"The tasks differ: {first.task} in {a}, {second.task} in {b}. They share no metric.")
    warnings = [*different_settings(pair), *different_teachers(pair)]
    if first.task == "classification":
        tables = [_compare_texts(pair, seed)]
    else:
        heldout, samples = [run.heldout() for run in pair], [run.samples() for run in pair]
        warnings += [*only_in_one("held-out rows", heldout), *only_in_one("answers", samples)]
        tables = _compare_generation(pair, heldout, samples, seed)
    return Comparison(Path(a), Path(b), first.task, seed, tables, warnings)


def paired(
    metrics: Mapping[str, Metric],
    a: tuple[Metrics, Metrics | None],
    b: tuple[Metrics, Metrics | None],
    size: int,
    seed: int,
) -> tuple[list[Difference], dict[str, str]]:
    """The differences, by resampling, of two students that are functions of the weights.

    Args:
        metrics: what to compare, by key.
        a, b: of each run the student and, where there is one, its teacher.
        size: number of units that the weights are over: the same units in the same order everywhere.
        seed: of the resampling.

    Returns:
        The differences, and why other keys have none.
    """
    (old, old_ideal), (new, new_ideal) = ([_Resampled.of(f, size, seed) for f in run] for run in (a, b))
    differences, missing = [], {}
    for key, metric in metrics.items():
        have = [name for name, run in (("A", old), ("B", new)) if key in run.points]
        if not (isfinite(old.points.get(key, nan)) and isfinite(new.points.get(key, nan))):
            if len(have) == 1:
                missing[key] = f"only {have[0]} has it"
            elif have:
                missing[key] = "undefined or infinite"
            continue
        before = _from_ideal(metric, old.values[key], old_ideal.values.get(key))
        after = _from_ideal(metric, new.values[key], new_ideal.values.get(key))
        differences.append(
            Difference(
                metric,
                old.points[key],
                new.points[key],
                interval(new.values[key] - old.values[key]),
                None if before is None or after is None else decide(before, after),
                as_number(old_ideal.points.get(key)) if metric.better == "teacher" else None,
            )
        )
    return differences, missing


def decide(a: np.ndarray, b: np.ndarray) -> Verdict:
    """The verdict by resampled distances from ideal; undecided too where there is no interval."""
    ends = interval(b - a)
    if ends is None or ends[0] <= 0 <= ends[1]:
        return "undecided"
    return "A better" if ends[0] > 0 else "B better"


def _from_ideal(metric: Metric, values: np.ndarray, teacher: np.ndarray | None) -> np.ndarray | None:
    """``Metric.distance`` of every resample."""
    if metric.better == "none":
        return None
    if metric.better == "teacher":
        return None if teacher is None else np.abs(values - teacher)
    return {"lower": values, "higher": -values, "zero": np.abs(values)}[metric.better]


@dataclass(frozen=True)
class _Resampled:
    points: dict[str, float]
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, metrics: Metrics | None, size: int, seed: int) -> _Resampled:
        if metrics is None:
            return cls({}, {})
        points = {key: float(value[0]) for key, value in metrics(np.ones((1, size))).items()}
        return cls(points, bootstrap(metrics, size, seed))


Make = Callable[[list[Line], Evaluated], Metrics]


def _compare_generation(pair: Pair, heldout: Sequence[Sets], samples: Sequence[Sets], seed: int) -> list[Table]:
    from drkl.evaluation.answers import AnswerTable
    from drkl.evaluation.positions import PositionTable

    def positions(lines: list[Line], run: Evaluated) -> Metrics:
        return PositionTable.from_rows(lines).metrics

    def answers(lines: list[Line], run: Evaluated) -> Metrics:
        return AnswerTable.from_samples(lines, int(as_number(run.settings.get("max_new_tokens")) or 0)).metrics

    main = as_number(pair[0].settings.get("sampling_temperature"))
    tables = []
    for suite in dict.fromkeys(name for name, _ in [*heldout[0], *samples[0]]):
        tokens = Table(suite, None, {}, [], {})
        if all((suite, None) in sets for sets in heldout):
            found = [sets[suite, None] for sets in heldout]
            tokens = _compare_lines(pair, ROWS, found, positions, TOKEN_KEYS, tokens, seed)
        both = sorted({t for name, t in samples[0] if name == suite and (suite, t) in samples[1] and t is not None})
        if main not in both and tokens.units:
            tables.append(tokens)
        for temperature in sorted(both, key=lambda t: t != main):
            found = [sets[suite, temperature] for sets in samples]
            start = tokens if temperature == main else Table(suite, None, {}, [], {})
            start = dataclasses.replace(start, sampling_temperature=temperature)
            tables.append(_compare_lines(pair, PROMPTS, found, answers, ANSWER_KEYS, start, seed))
    if not tables:
        raise DrklError(f"{pair[0]} and {pair[1]} were evaluated on different sets: they share no row and no prompt.")
    return tables


def _compare_texts(pair: Pair, seed: int) -> Table:
    keys = ("id", "text", "label", "student", "student_confidence", "nll")
    found = []
    for run in pair:
        lines = run.lines("predictions.jsonl", keys)
        found.append({run.student: lines})
        if all("teacher" in line and "teacher_confidence" in line for line in lines):
            found[-1]["teacher"] = [
                {**{key: line[key] for key in ("id", "text", "label", "teacher", "teacher_confidence")}, "nll": None,
                 "student": line["teacher"], "student_confidence": line["teacher_confidence"]}
                for line in lines
            ]  # fmt: skip
    start = Table(None, None, {}, [], {})
    return _compare_lines(pair, TEXTS, found, lambda lines, run: _predicted(lines), CLASS_KEYS, start, seed)


def _predicted(lines: Sequence[Line]) -> Metrics:
    """A classifier's metrics, of what ``predictions.jsonl`` keeps (rounded to four digits)."""
    from drkl.evaluation.classification import Scores

    columns = {
        "accuracy": [line["student"] == line["label"] for line in lines],
        "confidence": [line["student_confidence"] for line in lines],
    }
    if all(as_number(line["nll"]) is not None for line in lines):
        columns["nll"] = [line["nll"] for line in lines]
    if all("teacher" in line and "teacher_confidence" in line for line in lines):
        columns["agreement"] = [line["student"] == line["teacher"] for line in lines]
        columns["teacher_confidence"] = [line["teacher_confidence"] for line in lines]
    numbers = {name: i for i, name in enumerate(sorted({str(line[k]) for line in lines for k in ("label", "student")}))}
    predicted, labels = (np.array([numbers[str(line[key])] for line in lines]) for key in ("student", "label"))
    floats = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    return Scores(floats, predicted, labels, len(numbers)).metrics


def _compare_lines(
    pair: Pair, unit: Unit, found: Sequence[Models], make: Make, keys: Sequence[str], start: Table, seed: int
) -> Table:
    """``start``, and what these lines add to it."""
    ids = same_units(pair, unit, [models[run.student] for models, run in zip(found, pair, strict=True)])
    sides = []
    for models, run in zip(found, pair, strict=True):
        student = make(in_order(models[run.student], unit, ids, run), run)
        teacher = make(in_order(models["teacher"], unit, ids, run), run) if "teacher" in models else None
        sides.append((student, teacher))
    declared = metrics_of(pair[0].task)
    metrics = {key: declared[key] for key in keys if key not in SIZES}
    differences, missing = paired(metrics, sides[0], sides[1], len(ids), seed)
    found_keys = {difference.metric.key for difference in differences}
    # eval.json's tables are of the main temperature.
    main = start.sampling_temperature in (None, as_number(pair[0].settings.get("sampling_temperature")))
    for key in metrics if main else ():
        if key not in found_keys | missing.keys() and any(run.value(run.student, key) is not None for run in pair):
            missing[key] = unit.lacking
    return dataclasses.replace(
        start,
        units=start.units | {unit.plural: len(ids)},
        differences=start.differences + differences,
        not_compared=start.not_compared | missing,
    )
