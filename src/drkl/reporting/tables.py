"""The report's tables as data; page, Markdown and terminal draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.display import ABSENT
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import Better, Metric, groups_of, metrics_of
from drkl.evaluation.findings import Finding
from drkl.evaluation.result import Numbers
from drkl.reporting.inputs import TITLES, Run, run_labels
from drkl.reporting.plotting import Line
from drkl.reporting.text import short

DIRECTIONS: dict[Better, tuple[str, str]] = {
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "zero": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}0", "nearer to 0 is better"),
    "teacher": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}T", "nearer to the teacher's is better"),
    "none": ("", ""),
}

COMPARED = {"yes": "better", "no": "worse", "undecided": "undecided", "not_applicable": ABSENT}
"""Words in a cell that say whether a run is better than the first."""


@dataclass(frozen=True)
class Cell:
    """One number as text, with what stands below it; ``value`` is what a column is sorted by.

    ``finding`` is what the paired test says of the number, for the run named ``run``.
    """

    text: str
    value: float | None = None
    interval: str = ""
    beside: str = ""
    best: bool = False
    style: str = ""
    finding: Finding | None = None
    run: str = ""


@dataclass(frozen=True)
class Row:
    """One metric with its cells."""

    metric: Metric
    arrow: str
    direction: str
    cells: list[Cell]


@dataclass(frozen=True)
class RowGroup:
    """Rows under one heading, or under none."""

    title: str
    note: str
    rows: list[Row]


@dataclass(frozen=True)
class Column:
    """The head of a column; ``color`` is a CSS variable, ``sign`` a piece of the run's curve."""

    title: str
    subtitle: str = ""
    color: str = ""
    sign: str = ""


@dataclass(frozen=True)
class MetricTable:
    """A row for each metric; ``defined``: each with its definition."""

    title: str
    columns: list[Column]
    groups: list[RowGroup]
    defined: bool = False


@dataclass(frozen=True)
class PlainTable:
    """Text and numbers; a cell is a text, or a number with its interval. The first ``names`` columns hold names."""

    head: list[str]
    rows: list[list[str | tuple[str, str]]]
    names: int = 1


def show_interval(metric: Metric, ends: Interval | None) -> str:
    """An interval as "85.1 to 87.6"; empty where there is none, or one of no width."""
    return f"{metric.show(ends[0])} to {metric.show(ends[1])}" if ends and ends[0] < ends[1] else ""


def number_cell(numbers: Numbers, model: str, metric: Metric, **more: Any) -> Cell:
    """One number with its interval."""
    value = numbers.value(model, metric.key)
    return Cell(metric.show(value), value, show_interval(metric, numbers.interval(model, metric.key)), **more)


def _row(metric: Metric, cells: list[Cell], *, has_teacher: bool = True) -> Row:
    # Without a teacher's value there is no better and worse for what should be like the teacher's.
    aimless = metric.better == "teacher" and not has_teacher
    return Row(metric, *DIRECTIONS["none" if aimless else metric.better], cells)


def _filled(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(cell.text != ABSENT for cell in row.cells)]


def changed_from(run: Run) -> str | None:
    """The model with which the table of all numbers compares the student: the one after warm-up, or before training."""
    if run.task == "classification":
        return None  # there the question is how near the student is to its teacher
    return next((model for model in ("warmup", "before") if {model, "student"} <= {*run.models}), None)


def every_number(run: Run) -> MetricTable | None:
    """Every metric that at least one model has, in groups; None without an evaluation."""
    if run.evaluation is None:
        return None
    numbers, base = run.evaluation.numbers, changed_from(run)
    groups = []
    for group in groups_of(run.task):
        rows = []
        for metric in group.metrics:
            has_teacher = numbers.value("teacher", metric.key) is not None
            cells = [number_cell(numbers, model, metric, style=f"of-{model}") for model in run.models]
            if any(cell.text != ABSENT for cell in cells):
                cells += [_change(numbers, base, metric)] if base else []
                rows.append(_row(metric, cells, has_teacher=has_teacher))
        if rows:
            groups.append(RowGroup(group.title, group.note, rows))
    columns = [
        Column(TITLES[model], run.subtitles[model] if model in ("warmup", "student", "scaled") else "", model)
        for model in run.models
    ]
    columns += [Column("Change", f"from {TITLES[base].lower()}")] if base else []
    return MetricTable("Every number", columns, groups, defined=True) if groups else None


def _change(numbers: Numbers, base: str, metric: Metric) -> Cell:
    old, new = (numbers.value(model, metric.key) for model in (base, "student"))
    if old is None or new is None or metric.better == "none":
        return Cell("")
    return Cell(metric.show(new - old, signed=True), new - old)


def suite_tables(runs: Sequence[Run]) -> list[MetricTable]:
    """For each run with suites its student's numbers on each of them, the teacher's below."""
    tables = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        suites = run.evaluation.suites if run.evaluation is not None else {}
        rows = [
            _row(metric, [_suite_cell(numbers, metric) for numbers in suites.values()])
            for metric in metrics_of(run.task).values()
        ]
        if rows := _filled(rows):
            columns = [Column(short(name)) for name in suites]
            tables.append(MetricTable(label, columns, [RowGroup("", "", rows)]))
    return tables


def _suite_cell(numbers: Numbers, metric: Metric) -> Cell:
    teacher = numbers.value("teacher", metric.key)
    # At zero distance from itself the teacher says nothing.
    says = teacher not in (None, 0.0, 1.0) and metric.better in ("teacher", "higher", "lower")
    return number_cell(numbers, "student", metric, beside=f"teacher {metric.show(teacher)}" if says else "")


def run_table(
    runs: Sequence[Run],
    lines: Mapping[str, Line],
    winners: Mapping[str, int | None],
    findings: Mapping[tuple[int, str], Finding],
) -> MetricTable | None:
    """The students of several runs side by side, beside the first run's teacher; None without any number.

    Args:
        runs: the first one is what the others are compared with.
        lines: the runs' curves by key, for the heads of the columns.
        winners: by metric, the place of the run that the paired test calls better than every other.
        findings: by place and metric, whether a run is better than the first.
    """
    evaluated = [run.evaluation.numbers if run.evaluation is not None else Numbers({}) for run in runs]
    rows = []
    for metric in metrics_of(runs[0].task).values():
        best = winners.get(metric.key)
        cells = [number_cell(evaluated[0], "teacher", metric, style="of-teacher")]
        for place, (run, numbers) in enumerate(zip(runs, evaluated, strict=True)):
            finding = findings.get((place, metric.key))
            cells.append(number_cell(numbers, "student", metric, best=place == best, finding=finding, run=run.name))
        if any(cell.text != ABSENT for cell in cells[1:]):
            rows.append(_row(metric, cells))
    names = ["teacher", *(f"run-{place}" for place in range(len(runs)))]
    signs = [lines[name].sign if name in lines else "" for name in names]
    columns = [Column(title, sign=sign) for title, sign in zip(["Teacher", *run_labels(runs)], signs, strict=True)]
    return MetricTable("The runs side by side", columns, [RowGroup("", "", rows)]) if rows else None


def config_differences(runs: Sequence[Run]) -> PlainTable | None:
    """The configuration keys on which the runs differ; where one has no configuration, the evaluation's settings."""
    if any(run.is_pair for run in runs):
        unsaid = ("definitions", "versions", "command", "decoding", "intervals")
        flat = [_flatten({k: v for k, v in run.settings.items() if k not in unsaid}) for run in runs]
    else:
        flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in ("run.name", "run.dir"))
    values = {key: [config.get(key, ABSENT) for config in flat] for key in keys}
    rows: list[list[Any]] = [
        [key, *(short(value, 60) for value in row)] for key, row in values.items() if len(set(row)) > 1
    ]
    return PlainTable(["Key", *run_labels(runs)], rows, names=len(runs) + 1) if rows else None


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, entry in value.items():
            flat |= _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: "null" if value is None else str(value)}
