"""A comparison of two evaluations as people and programs read it: text, Markdown, csv, json."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from drkl.display import MINUS, clean, markdown_text, number
from drkl.evaluation.bootstrap import RESAMPLES
from drkl.evaluation.comparison import Comparison, Table
from drkl.evaluation.declared import groups_of
from drkl.evaluation.paired import Difference
from drkl.reporting.tables import DIRECTIONS
from drkl.reporting.text import csv_text, markdown_table

HEADER = ("metric", "A", "B", f"B {MINUS} A", "95 % interval", "verdict")
COLUMNS = "suite sampling_temperature key metric unit better a b teacher difference low high verdict".split()


def as_text(comparison: Comparison, width: int = 120) -> str:
    """Tables, and the summary of what they decide."""
    from rich.console import Console
    from rich.table import Table as Grid

    file = io.StringIO()
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False, color_system=None)
    for line in _head(comparison):
        console.print(line)
    for table in comparison.tables:
        grid = Grid(title=_title(table), title_justify="left")
        for name in HEADER:
            grid.add_column(name, justify="right" if name in HEADER[1:5] else "left")
        for title, differences in _grouped(comparison, table):
            grid.add_section()
            grid.add_row(title.upper())
            for difference in differences:
                grid.add_row(*_cells(difference))
        console.print(grid)
    for line in comparison.summary():
        console.print(clean(line))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def as_markdown(comparison: Comparison) -> str:
    """The same with Markdown's tables."""
    parts = ["\n".join(f"- {markdown_text(line)}" for line in _head(comparison))]
    for table in comparison.tables:
        rows = []
        for title, differences in _grouped(comparison, table):
            rows.append([f"*{title}*", *[""] * (len(HEADER) - 1)])
            rows += [[markdown_text(cell) for cell in _cells(difference)] for difference in differences]
        parts += [f"**{markdown_text(_title(table))}**", markdown_table(HEADER, rows)]
    parts.append("\n".join(f"- {markdown_text(line)}" for line in comparison.summary()))
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """A line per metric, set and temperature; the numbers as ``eval.json`` stores them."""
    return csv_text(COLUMNS, _lines(comparison))


def _lines(comparison: Comparison) -> Iterator[list[Any]]:
    for table in comparison.tables:
        for d in table.differences:
            place, m = [table.suite, table.sampling_temperature], d.metric
            interval = d.interval or (None, None)
            yield [*place, m.key, m.title, m.unit, m.better, d.a, d.b, d.teacher, d.difference, *interval, d.verdict]


def as_json(comparison: Comparison) -> str:
    """Everything, for programs; the numbers as ``eval.json`` stores them."""
    content = {
        "a": str(comparison.a),
        "b": str(comparison.b),
        "task": comparison.task,
        "difference": "B - A",
        "intervals": f"95 %, percentiles of {RESAMPLES} paired bootstrap resamples; not over training seeds",
        "resamples": RESAMPLES,
        "seed": comparison.seed,
        "warnings": comparison.warnings,
        "tables": [
            {
                "suite": table.suite,
                "sampling_temperature": table.sampling_temperature,
                "units": table.units,
                "metrics": [_entry(difference) for difference in table.differences],
                "not_compared": table.not_compared,
            }
            for table in comparison.tables
        ],
        "findings": [finding.to_json() for finding in comparison.findings],
        "summary": comparison.summary(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
}


def _head(comparison: Comparison) -> list[str]:
    lines = [
        f"A: {comparison.a}",
        f"B: {comparison.b}",
        f"Differences are B {MINUS} A, with 95 % intervals of {RESAMPLES:,} paired bootstrap resamples (seed "
        f"{comparison.seed}). Verdicts go by the distance from ideal: lower (↓), higher (↑), 0 or the teacher's (T).",
        *(f"Warning: {warning}" for warning in comparison.warnings),
    ]
    return [clean(line) for line in lines]


def _title(table: Table) -> str:
    place = [clean(table.place)] if table.place else []
    return ", ".join([*place, *(f"{count:,} {name}" for name, count in table.units.items())])


def _grouped(comparison: Comparison, table: Table) -> Iterator[tuple[str, list[Difference]]]:
    left = {difference.metric.key: difference for difference in table.differences}
    for group in groups_of(comparison.task):
        if own := [left.pop(metric.key) for metric in group.metrics if metric.key in left]:
            yield group.title, own
    if left:
        yield "Where both are as varied as the teacher", [*left.values()]


def _cells(difference: Difference) -> tuple[str, ...]:
    metric = difference.metric
    # A difference of two shown values may be smaller than their last digit.
    interval = difference.interval
    finer = metric.finer.fine_enough(difference.difference, *(interval or ()))
    ideal = "" if difference.teacher is None else f" {metric.show(difference.teacher)}"
    return (
        f"{metric.title}, {metric.unit} {DIRECTIONS[metric.better][0]}{ideal}".rstrip(),
        metric.show(difference.a),
        metric.show(difference.b),
        finer.show(difference.difference, signed=True),
        number(None) if interval is None else " to ".join(finer.show(end, signed=True) for end in interval),
        difference.verdict or number(None),
    )


def _entry(difference: Difference) -> dict[str, Any]:
    return {
        "key": difference.metric.key,
        "better": difference.metric.better,
        "a": difference.a,
        "b": difference.b,
        "teacher": difference.teacher,
        "difference": difference.difference,
        "interval": difference.interval,
        "verdict": difference.verdict,
    }
