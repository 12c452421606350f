"""The parts of docs/faults.md that `make docs` makes of the tests' marks and of docs/results/faults.csv."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.families_page import markdown

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "faults"
ROWS = ROOT / "docs" / "results" / "faults.csv"
HEAD = ("test", "injections", "lost", "injections_before", "lost_before")
GROUPS = (
    "Ends from outside", "Disk", "Damaged files", "The best checkpoint", "Changed between start and resume",
    "Other people's files", "Two runs in one folder", "Numbers", "Memory", "Hostile input", "Settings", "Places",
    "Surroundings",
)  # fmt: skip
"""Of the table, in its order."""


@dataclass(frozen=True)
class Fault:
    """A row of the table: a test with the mark ``fault``."""

    test: str
    """As pytest names it, without parameters."""
    group: str
    fault: str
    does: str
    is_slow: bool


def faults(folder: Path = TESTS) -> list[Fault]:
    """Return the rows that the tests' marks hold, in the order of the groups and of the files.

    Raises:
        ValueError: a mark lacks one of its three texts, or names another group.
    """
    found = [fault for path in sorted(folder.glob("test_*.py")) for fault in _marked(path)]
    return sorted(found, key=lambda fault: GROUPS.index(fault.group))


def _marked(path: Path) -> Iterator[Fault]:
    known: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = node.value
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = {ast.unparse(mark).removeprefix("pytest.mark.").partition("(")[0]: mark for mark in node.decorator_list}
        mark = marks.get("fault")
        if isinstance(mark, ast.Call):
            name = f"{path.relative_to(path.parents[2]).as_posix()}::{node.name}"
            yield Fault(name, *_texts(name, mark, known), is_slow="slow" in marks)


def _texts(name: str, mark: ast.Call, known: Mapping[str, ast.expr]) -> tuple[str, str, str]:
    """The three texts of a mark; one may be the name of a text that stands above it."""
    given = {}
    for word in mark.keywords:
        value = known.get(word.value.id) if isinstance(word.value, ast.Name) else word.value
        given[word.arg] = str(value.value) if isinstance(value, ast.Constant) else ""
    group, fault, does = (given.get(key, "") for key in ("group", "fault", "does"))
    if not (fault and does and group in GROUPS):
        raise ValueError(f"{name}: a mark has a group of {', '.join(GROUPS)}, a fault, and what drkl does, as texts.")
    return group, fault, does


def read_rows() -> dict[str, dict[str, str]]:
    """Return what was counted, by the test's name."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        return {row["test"]: row for row in csv.DictReader(file)}


def parts() -> dict[str, str]:
    """Return the parts of the page by their names."""
    table, counted = faults(), read_rows()
    return {"faults": _table(table, counted), "counts": _counts(table, counted)}


def _table(table: list[Fault], counted: Mapping[str, Mapping[str, str]]) -> str:
    sections = []
    for group in GROUPS:
        rows = [
            [fault.fault, fault.does, *_cells(counted.get(fault.test)), _link(fault)]
            for fault in table
            if fault.group == group
        ]
        if rows:
            head = ["fault", "what drkl does", "injected", "lost", "lost before", "test"]
            sections.append(f"## {group}\n\n{markdown(head, rows)}")
    return "\n\n".join(sections)


def _cells(row: Mapping[str, str] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    before = f"{row['lost_before']} of {row['injections_before']}" if row["injections_before"] else ""
    return [row["injections"], row["lost"], before]


def _link(fault: Fault) -> str:
    path, _, name = fault.test.partition("::")
    name = name.removeprefix("test_").replace("_", " ")
    return f"[{name}](../{path})" + (" (slow)" if fault.is_slow else "")


def _counts(table: list[Fault], counted: Mapping[str, Mapping[str, str]]) -> str:
    rows = [["all", *_sums(table, counted)]]
    for group in GROUPS:
        if own := [fault for fault in table if fault.group == group]:
            rows.insert(-1, [group, *_sums(own, counted)])
    return markdown(["", "faults", "injected", "survived", "lost", "injected before", "lost before"], rows)


def _sums(table: list[Fault], counted: Mapping[str, Mapping[str, str]]) -> list[str]:
    own = [counted[fault.test] for fault in table if fault.test in counted]
    injected, lost, injected_before, lost_before = (sum(int(row[name] or 0) for row in own) for name in HEAD[1:])
    return [f"{number:,}" for number in (len(table), injected, injected - lost, lost, injected_before, lost_before)]
