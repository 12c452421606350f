"""The report's tables: every metric of one run, and the trained students of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.display import ABSENT
from drkl.reporting.answer import run_labels
from drkl.reporting.metrics import (
    DIRECTIONS,
    Metric,
    best_student,
    groups_of,
    metrics_of,
    span_of,
    value_of,
)
from drkl.reporting.record import RunRecord
from drkl.reporting.text import short


@dataclass(frozen=True)
class Cell:
    """One number; ``best`` marks the student nearest to ideal, ``interval`` says how exact the number is.

    ``value`` is what a column is sorted by, ``beside`` another model's number for the eye.
    """

    model: str
    title: str
    text: str
    best: bool = False
    interval: str = ""
    value: float | None = None
    beside: str = ""


@dataclass(frozen=True)
class Row:
    """One metric over the models; ``change`` compares the last student with the one before it."""

    metric: Metric
    arrow: str
    direction: str
    cells: list[Cell]
    change: str = ""
    verdict: str = ""
    change_value: float | None = None


@dataclass(frozen=True)
class RowGroup:
    """Rows under one heading."""

    title: str
    note: str
    rows: list[Row]


@dataclass(frozen=True)
class SuiteTable:
    """A model's numbers on several sets of prompts; cells in the order of ``names``."""

    title: str
    names: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class RunTable:
    """Several runs side by side; ``differences`` are the configuration keys on which they differ."""

    labels: list[str]
    rows: list[Row]
    differences: list[tuple[str, list[str]]]
    warning: str


def metric_groups(record: RunRecord) -> list[RowGroup]:
    """Every metric that at least one model has, in groups."""
    groups = []
    for group in groups_of(record.task):
        rows = [_row(record, metric) for metric in group.metrics]
        rows = [row for row in rows if any(cell.text != ABSENT for cell in row.cells)]
        if rows:
            groups.append(RowGroup(group.title, group.note, rows))
    return groups


def change_from(record: RunRecord) -> str | None:
    """The student with which ``after`` is compared: the warm-up's, or the one before training."""
    if record.task == "classification":
        return None  # what is asked there is how near the student is to its teacher
    return next((model for model in ("warmup", "before") if model in record.models and "after" in record.models), None)


def _row(record: RunRecord, metric: Metric) -> Row:
    evaluation = record.evaluation or {}
    best = best_student(metric, evaluation)
    cells = [
        Cell(
            model,
            record.titles[model],
            metric.show(value_of(evaluation, model, metric.key)),
            model == best,
            interval_of(record, model, metric),
            value_of(evaluation, model, metric.key),
        )
        for model in record.models
    ]
    # Without a teacher's value there is no better and worse for what should be like the teacher's.
    aimless = metric.better == "teacher" and value_of(evaluation, "teacher", metric.key) is None
    arrow, direction = DIRECTIONS["none" if aimless else metric.better]
    change, verdict, base, moved = "", "", change_from(record), None
    if base and metric.better != "none":
        old, new = (value_of(evaluation, model, metric.key) for model in (base, "after"))
        if old is not None and new is not None:
            moved = new - old
            change = metric.show(moved, signed=True)
            verdict = metric.verdict(old, new, value_of(evaluation, "teacher", metric.key)) or ""
    return Row(metric, arrow, direction, cells, change, verdict, moved)


def interval_of(record: RunRecord, model: str, metric: Metric) -> str:
    """The interval of one number as "85.1 to 87.6"; empty where there is none (or of no width)."""
    return _span_text(metric, span_of(record.evaluation, "intervals", model, metric.key))


def _span_text(metric: Metric, span: tuple[float, float] | None) -> str:
    return f"{metric.show(span[0])} to {metric.show(span[1])}" if span else ""


def suite_tables(records: Sequence[RunRecord]) -> list[SuiteTable]:
    """Per run, its trained student on each suite, the teacher's number beside; only where ``eval.json`` has suites."""
    tables = []
    for record, label in zip(records, run_labels(records), strict=True):
        found = (record.evaluation or {}).get("suites")
        suites = {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}
        rows = []
        for metric in metrics_of(record.task).values():
            cells = [_suite_cell(short(str(name)), one, metric) for name, one in suites.items()]
            if any(cell.text != ABSENT for cell in cells):
                arrow, direction = DIRECTIONS[metric.better]
                rows.append(Row(metric, arrow, direction, cells))
        if rows:
            tables.append(SuiteTable(label, [short(str(name)) for name in suites], rows))
    return tables


def _suite_cell(name: str, suite: Mapping[str, Any], metric: Metric) -> Cell:
    value, teacher = (value_of(suite, model, metric.key) for model in ("after", "teacher"))
    interval = _span_text(metric, span_of(suite, "intervals", "after", metric.key))
    # At zero distance from itself the teacher says nothing.
    of_teacher = teacher is not None and metric.better in ("teacher", "higher", "lower") and teacher not in (0.0, 1.0)
    beside = f"teacher {metric.show(teacher)}" if of_teacher else ""
    return Cell("after", name, metric.show(value), False, interval, value, beside)


def run_table(records: Sequence[RunRecord]) -> RunTable:
    """The ``after`` of several runs side by side."""
    labels, rows = run_labels(records), []
    for metric in metrics_of(records[0].task).values():
        values = [value_of(record.evaluation, "after", metric.key) for record in records]
        away = [
            None if value is None else metric.distance(value, value_of(record.evaluation, "teacher", metric.key))
            for value, record in zip(values, records, strict=True)
        ]
        rounded = [None if one is None else round(one * metric.scale, metric.digits) for one in away]
        known = [one for one in rounded if one is not None]
        alone = len(known) > 1 and known.count(min(known)) == 1
        teacher = value_of(records[0].evaluation, "teacher", metric.key)
        of_teacher = interval_of(records[0], "teacher", metric)
        cells = [Cell("teacher", "Teacher", metric.show(teacher), False, of_teacher, teacher)]
        cells += [
            Cell(
                "after",
                label,
                metric.show(value),
                alone and one == min(known),
                interval_of(record, "after", metric),
                value,
            )
            for label, value, one, record in zip(labels, values, rounded, records, strict=True)
        ]
        if any(value is not None for value in values):
            arrow, direction = DIRECTIONS[metric.better]
            rows.append(Row(metric, arrow, direction, cells))
    return RunTable(labels, rows, _differences(records), _warning(records))


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    flat = _compared(records)
    keys = dict.fromkeys(key for one in flat for key in one if key not in ("run.name", "run.dir"))
    rows = [(key, [one.get(key, ABSENT) for one in flat]) for key in keys]
    return [(key, [short(value, 60) for value in values]) for key, values in rows if len(set(values)) > 1]


def _compared(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The configurations; where a pair has none, the settings of all evaluations."""
    if not any(record.is_pair for record in records):
        return [_flatten(record.config) for record in records]
    told = ("definitions", "versions", "command", "decoding", "intervals")
    return [_flatten({k: v for k, v in record.settings.items() if k not in told}) for record in records]


def _warning(records: Sequence[RunRecord]) -> str:
    """What makes numbers of different runs incomparable."""
    flat = [_flatten(record.config) for record in records]
    used = [_flatten(record.settings) for record in records]
    pairs = any(record.is_pair for record in records)
    # What was used is in eval.json; a configuration may have been written before a setting was there.
    known = pairs or all("seeds" in record.settings for record in records)
    different = [] if pairs else _differing(flat, ("teacher", "data"))
    different += _differing(used, _MEASURED) if known else _differing(flat, ("evaluation",))
    if any(record.evaluation is None for record in records):
        return "Not every run has been evaluated; `drkl evaluate RUN` does that."
    if different:
        named = " and ".join(dict.fromkeys(different))
        return f"These runs differ in {named}: their numbers are not measured on the same thing."
    return ""


_MEASURED = (
    "data", "prompts", "samples_per_prompt", "sampling_temperature", "max_new_tokens", "seeds", "protocol", "suites",
)  # fmt: skip


def _differing(flat: Sequence[Mapping[str, str]], sections: Sequence[str]) -> list[str]:
    return [
        section.replace("_", " ")
        for section in sections
        if len({repr({k: v for k, v in one.items() if k.split(".")[0] == section}) for one in flat}) > 1
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, one in value.items():
            flat |= _flatten(one, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: "null" if value is None else str(value)}
