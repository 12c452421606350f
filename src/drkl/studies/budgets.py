"""What the cells of a study were given, what they took, and on what they ran."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from drkl.display import ABSENT, as_number
from drkl.reporting.tables import PlainTable
from drkl.reporting.text import count, duration, joined, percent, short
from drkl.studies.cells import CellResult, Verdict
from drkl.studies.definition import SEED
from drkl.studies.kinds import Kind, Names, in_order
from drkl.studies.result import Study

PARTS = ("start", "cache", "train", "evaluate")
"""The parts of a cell's time, in the order in which it takes them."""
NEARLY = 0.01
"""Counts that differ by less are called nearly equal."""
_NEEDED = ("steps", "tokens", "training rows", "evaluated rows")
"""Parts of the budget that every run has, though it may not be known, of a stream of rows for instance."""
_TITLES = {"start": "Shared start", "cache": "Teacher's cache", "train": "Training", "evaluate": "Evaluation"}


def table(kinds: Sequence[Kind]) -> PlainTable | None:
    """A row for each part of the budget: what every cell had, or what each kind had; None where nothing is known."""
    done = [[cell for cell in kind.cells if cell.state == "done" and cell.budget] for kind in kinds]
    keys = in_order(key for cells in done for cell in cells for key, value in cell.budget.items() if value is not None)
    labels = [kind.label for kind in kinds]
    rows: list[list[str | tuple[str, str]]] = [
        [short(key, 60).replace("_", " ").capitalize(), *_line(key, labels, done)] for key in keys
    ]
    return PlainTable(["Budget", "In all cells", "Value"], rows, names=3) if rows else None


def _line(key: str, labels: Sequence[str], cells: Sequence[Sequence[CellResult]]) -> tuple[str, str]:
    """Whether the cells agree, and their values."""
    values = [[cell.budget.get(key) for cell in own] for own in cells]
    every = [value for own in values for value in own]
    texts = in_order(_show(value) for value in every)
    if len(texts) == 1:
        return "equal", texts[0]
    by_seed: dict[Any, set[str]] = {}
    for own in cells:
        for cell in own:
            by_seed.setdefault(cell.axes.get(SEED), set()).add(_show(cell.budget.get(key)))
    span = _span(every)
    if all(len(seen) == 1 for seen in by_seed.values()):
        return "equal within each seed", span or "; ".join(texts)
    numbers = [value for value in map(as_number, every) if value is not None]
    if span and (apart := (max(numbers) - min(numbers)) / (abs(max(numbers)) or 1.0)) <= NEARLY:
        return f"equal to within {percent(apart)}", span
    texts_of = [_span(own) or "; ".join(in_order(map(_show, own))) for own in values]
    own_texts = list(zip(labels, texts_of, strict=True))
    return "differs", "; ".join(f"{label}: {text}" for label, text in own_texts if text)


def _span(values: Sequence[Any]) -> str:
    """Numbers as their range; empty where one is none."""
    numbers = [as_number(value) for value in values]
    known = [value for value in numbers if value is not None]
    if not known or len(known) < len(numbers):
        return ""
    low, high = _show(min(known)), _show(max(known))
    return low if low == high else f"{low} to {high}"


def _show(value: Any) -> str:
    size = as_number(value)
    if size is not None:
        return f"{size:,.0f}" if size == int(size) else f"{size:,g}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{str(key).replace('_', ' ')} {_show(own)}" for key, own in value.items() if own is not None)
    text = value if isinstance(value, str) else ABSENT if value is None else json.dumps(value, default=str)
    return short(text, 300)


def unequal(rows: Sequence[Verdict], names: Names) -> list[str]:
    """The pairs of kinds whose budgets differ, and in what."""
    by_pair: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        known = by_pair.setdefault(names.against(row.axes, row.baseline), [])
        known += [what for what in row.budget_differs if what not in known]
    return [f"{cell} against {other}: {joined(what)}" for (cell, other), what in by_pair.items() if what]


def timed(kinds: Sequence[Kind]) -> tuple[list[tuple[str, dict[str, float]]], list[str]]:
    """By kind the mean seconds of each part, over the finished cells that have a time; and the parts."""
    parts = [part for part in PARTS if any(part in cell.seconds for kind in kinds for cell in kind.cells)]
    return [(kind.label, _mean_seconds(kind)) for kind in kinds], parts


def _mean_seconds(kind: Kind) -> dict[str, float]:
    known = [cell.seconds for cell in kind.cells if cell.state == "done" and cell.seconds]
    return {part: sum(own.get(part, 0.0) for own in known) / len(known) for part in PARTS} if known else {}


def unknown(study: Study) -> list[str]:
    """What of the budgets is not known of some finished cells, and of how many."""
    done = [cell for cell in study.cells if cell.state == "done"]
    gone = [(key, sum(cell.budget.get(key) is None for cell in done)) for key in _NEEDED]
    return [f"the {key} of {many} of the {count(len(done), 'finished run')}" for key, many in gone if many]


def cost(study: Study, kinds: Sequence[Kind]) -> tuple[PlainTable, str] | None:
    """The time of a cell of each kind, and of the study's own in words; None where nothing was timed."""
    rows, parts = timed(kinds)
    taken = [cell for cell in study.cells if study.is_taken(cell)]
    of_others = sum(sum(cell.seconds.values()) for cell in taken)
    total = study.hours * 3600
    if not total + of_others:
        return None
    lines: list[list[str | tuple[str, str]]] = []
    for kind, (label, means) in zip(kinds, rows, strict=True):
        done = sum(cell.state == "done" for cell in kind.cells)
        own = sum(sum(cell.seconds.values()) for cell in kind.cells if not study.is_taken(cell))
        of_parts = [(duration(means[part]) if means else ABSENT, "") for part in parts]
        one = duration(sum(means.values())) if means else ABSENT
        every = duration(own) if own else ABSENT
        lines.append([label, (f"{done} of {len(kind.cells)}", ""), *of_parts, (one, ""), (every, "")])
    sums = "Own runs in all" if taken else "All of them"
    head = ["Cells", "Finished", *(_TITLES[part] for part in parts), "One cell", sums]
    text = f"{_hours(total)} in all, with what failed or was stopped; what ran at the same time counts in full."
    if taken:
        text += f" {count(len(taken), 'run')} of other studies took {_hours(of_others)} more."
    return PlainTable(head, lines), text


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else duration(seconds)


def unfinished(study: Study) -> list[tuple[str, str]]:
    """By state the names of the cells that are not finished and have no message."""
    by_state: dict[str, list[str]] = {}
    for cell in study.cells:
        if cell.state != "done" and not cell.why:
            by_state.setdefault(cell.state, []).append(short(cell.name, 80))
    return [(state, joined(names)) for state, names in by_state.items()]


def every_cell(study: Study) -> PlainTable:
    """A row for each cell: its state, its run folder, its start and its time."""
    rows: list[list[str | tuple[str, str]]] = []
    for cell in study.cells:
        seconds = sum(cell.seconds.values())
        start = short(cell.start or ABSENT, 12)
        took = duration(seconds) if seconds else ABSENT
        inside = cell.run.is_relative_to(study.folder)
        run = str(cell.run.relative_to(study.folder) if inside else cell.run)
        rows.append([short(cell.name, 80), cell.state, short(run, 120), start, (took, "")])
    return PlainTable(["Cell", "State", "Run folder", "Start", "Time"], rows, names=4)


def environment(study: Study, kinds: Sequence[Kind]) -> list[tuple[str, str]]:
    """What the study was begun with, and the versions of the cells' evaluations that are not the same in all."""
    begun = {key: value for key, value in study.made.items() if key != "command" and value is not None}
    rows = [(short(str(key), 60).replace("_", " "), _show(value)) for key, value in begun.items()]
    seen: dict[str, list[str]] = {}
    for evaluation in (one for kind in kinds for one in kind.evaluations):
        known = evaluation.settings.get("versions")
        for package, version in (known if isinstance(known, Mapping) else {}).items():
            seen.setdefault(short(str(package), 40), []).append(short(str(version), 40))
    for package, found in seen.items():
        if len(versions := in_order(found)) > 1:
            rows.append((f"{package}, in evaluations", f"differs: {', '.join(versions)}"))
        elif not begun:
            rows.append((package, versions[0]))
    return rows
