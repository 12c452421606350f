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
from drkl.reporting.metrics import DIRECTIONS

if TYPE_CHECKING:
    from drkl.evaluation.comparison import Comparison, Difference, Table

HEADER = ("metric", "A", "B", f"B {MINUS} A", "95 % interval", "verdict")
CHANCE = 0.05
"""How often a 95 % interval leaves out the truth."""


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
    for line in summary(comparison):
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
    parts.append("\n".join(f"- {line}" for line in summary(comparison)))
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
        "summary": summary(comparison),
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
}


def summary(comparison: Comparison) -> list[str]:
    """What is decided, what is not, and how far that goes, in words."""
    lines = [sentence for table in comparison.tables for sentence in _decided(table)]
    verdicts = [d.verdict for table in comparison.tables for d in table.differences if d.verdict is not None]
    units = " and ".join(dict.fromkeys(name for table in comparison.tables for name in table.units))
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


def _decided(table: Table) -> Iterator[str]:
    where = ", ".join(_place(table))
    at = f"{where[:1].upper()}{where[1:]}: " if where else ""
    for verdict in ("A better", "B better"):
        if found := [d.metric.title for d in table.differences if d.verdict == verdict]:
            yield f"{at}{verdict} in {len(found)}: {'; '.join(found)}."
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


def _head(comparison: Comparison) -> list[str]:
    return [
        f"A: {comparison.a}",
        f"B: {comparison.b}",
        f"Differences are B {MINUS} A, with 95 % intervals of {RESAMPLES:,} paired bootstrap resamples (seed "
        f"{comparison.seed}). Verdicts go by the distance from ideal: lower (↓), higher (↑), 0 or the teacher's (T).",
        *(f"Warning: {warning}" for warning in comparison.warnings),
    ]


def _place(table: Table) -> list[str]:
    where = [] if table.suite is None else [table.suite]
    if table.sampling_temperature is not None:
        where.append(f"sampling temperature {table.sampling_temperature:g}")
    return where


def _title(table: Table) -> str:
    return ", ".join([*_place(table), *(f"{count:,} {name}" for name, count in table.units.items())])


def _grouped(comparison: Comparison, table: Table) -> Iterator[tuple[str, list[Difference]]]:
    by_key = {difference.metric.key: difference for difference in table.differences}
    for group in groups_of(comparison.task):
        if found := [by_key[metric.key] for metric in group.metrics if metric.key in by_key]:
            yield group.title, found


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
