"""The parts of docs/families.md that `make docs` makes of docs/results/families.csv."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

ROWS = Path(__file__).resolve().parents[1] / "docs" / "results" / "families.csv"
NOT_BUILT = "not built"
"""The status of an architecture without a tiny model."""

Cells = Sequence[Mapping[str, str]]
"""A cell for each column of each architecture: its registry, model type, class, column, status and message."""


def read_rows() -> list[dict[str, str]]:
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def columns(cells: Cells) -> list[str]:
    return list(dict.fromkeys(cell["column"] for cell in cells if cell["column"]))


def counts(cells: Cells) -> str:
    """Return a table: of each column how many architectures work, are refused, differ and fail."""
    statuses = ("works", "refused", "differs", "fails")
    counted = {
        column: Counter(cell["status"] for cell in cells if cell["column"] == column) for column in columns(cells)
    }
    rows = [[column, *(str(counted[column][status]) for status in statuses)] for column in columns(cells)]
    return markdown(["", *statuses], rows)


def whole(cells: Cells) -> str:
    """Return how many architectures work in every column, of how many."""
    built = {cell["row"] for cell in cells if cell["column"]}
    not_whole = {cell["row"] for cell in cells if cell["column"] and cell["status"] != "works"}
    version = cells[0]["transformers"]
    return f"{len(built - not_whole)} of {len(built)} architectures of transformers {version} work in every column."


def table(cells: Cells) -> str:
    """Return a row for each architecture."""
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for cell in cells:
        if cell["column"]:
            found.setdefault(cell["row"], {})[cell["column"]] = cell
    rows = []
    for own in found.values():
        cell = next(iter(own.values()))
        statuses = [own[column]["status"] for column in columns(cells)]
        rows.append([f"`{cell['model_type']}`", cell["class"], cell["registry"], *statuses])
    return markdown(["model type", "class", "registry", *columns(cells)], rows)


def messages(cells: Cells) -> str:
    """Return what is said where a column, or a choice within it, does not work; the same words once."""
    places: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["column"] and cell["message"]:
            words = cell["message"].replace(cell["class"], "CLASS")
            places.setdefault((cell["status"], words), []).append(f"`{cell['row']}` {cell['column']}")
    rows = [[", ".join(where), status, words.replace("|", "\\|")] for (status, words), where in places.items()]
    return markdown(["where", "status", "message"], rows)


def not_built(cells: Cells) -> str:
    return markdown(
        ["model type", "class", "reason"],
        [[f"`{c['model_type']}`", c["class"], c["message"]] for c in cells if c["status"] == NOT_BUILT],
    )


def parts() -> dict[str, str]:
    """Return the generated parts of docs/families.md by the names of their places."""
    cells = read_rows()
    return {
        "counts": f"{counts(cells)}\n\n{whole(cells)}",
        "families": table(cells),
        "messages": messages(cells),
        "not-built": not_built(cells),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
