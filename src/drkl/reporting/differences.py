"""A comparison of two runs as people and programs read it: text, Markdown, csv, json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drkl.display import MINUS, number
from drkl.evaluation.bootstrap import RESAMPLES
from drkl.evaluation.declared import groups_of
from drkl.evaluation.paired import AS_VARIED
from drkl.reporting.metrics import DIRECTIONS

if TYPE_CHECKING:
    from drkl.evaluation.comparison import Comparison, Difference, Table

HEADER = ("metric", "A", "B", f"B {MINUS} A", "95 % interval", "verdict")


def as_text(comparison: Comparison, width: int = 120) -> str:
    """Tables, and what they decide in words."""
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
        console.print(line)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def as_markdown(comparison: Comparison) -> str:
    """The same with Markdown's tables."""
    parts = ["\n".join(f"- {line}" for line in _head(comparison))]
    for table in comparison.tables:
        parts.append(f"**{_title(table)}**")
        lines = [f"| {' | '.join(HEADER)} |", "|---|---:|---:|---:|---:|---|"]
        for title, differences in _grouped(comparison, table):
            lines.append(f"| *{title}* | | | | | |")
            lines += [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in _cells(d))} |" for d in differences]
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {line}" for line in comparison.summary()))
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """A line per metric, set and temperature; the numbers as ``eval.json`` stores them."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow("suite sampling_temperature key metric unit better a b teacher difference low high verdict".split())
    for table in comparison.tables:
        for d in table.differences:
            low, high = d.interval or (None, None)
            m = d.metric
            writer.writerow(
                [table.suite, table.sampling_temperature, m.key, m.title, m.unit, m.better, d.a, d.b, d.teacher,
                 d.difference, low, high, d.verdict]
            )  # fmt: skip
    return file.getvalue()


def as_json(comparison: Comparison) -> str:
    """Everything, for programs; the numbers as ``eval.json`` stores them."""
    found = {
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
        "summary": comparison.summary(),
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
}


def _head(comparison: Comparison) -> list[str]:
    return [
        f"A: {comparison.a}",
        f"B: {comparison.b}",
        f"Differences are B {MINUS} A, with 95 % intervals of {RESAMPLES:,} paired bootstrap resamples (seed "
        f"{comparison.seed}). Verdicts go by the distance from ideal: lower (↓), higher (↑), 0 or the teacher's (T).",
        *(f"Warning: {warning}" for warning in comparison.warnings),
    ]


def _title(table: Table) -> str:
    place = [table.place] if table.place else []
    return ", ".join([*place, *(f"{count:,} {name}" for name, count in table.units.items())])


def _grouped(comparison: Comparison, table: Table) -> Iterator[tuple[str, list[Difference]]]:
    by_key = {difference.metric.key: difference for difference in table.differences}
    for group in groups_of(comparison.task):
        if found := [by_key[metric.key] for metric in group.metrics if metric.key in by_key]:
            yield group.title, found
    if AS_VARIED.key in by_key:
        yield "At matched variety", [by_key[AS_VARIED.key]]


def _cells(difference: Difference) -> tuple[str, ...]:
    metric = difference.metric
    # A difference of two shown values may be smaller than their last digit.
    finer = replace(metric, digits=metric.digits + 1)
    ideal = "" if difference.teacher is None else f" {metric.show(difference.teacher)}"
    interval = difference.interval
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
