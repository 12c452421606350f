"""Write the rows of docs/families.md: what `make test-families` found, from the folder that the tests wrote to.

    python -m scripts.write_families FOLDER

It writes docs/results/families.csv; `make docs` makes the page of it.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import transformers

from scripts.families_page import NOT_BUILT as NO_MODEL
from scripts.families_page import ROWS, whole
from tests.families.builder import ARCHITECTURES, NOT_BUILT
from tests.families.checks import COLUMNS, FAILS

HEAD = ("transformers", "row", "registry", "model_type", "class", "column", "status", "message")


def gathered(folder: Path) -> list[dict[str, str]]:
    """Return a cell for each column of each architecture, in the registries' order."""
    cells = []
    for row, names in ARCHITECTURES.items():
        head = dict(zip(HEAD, (transformers.__version__, row, *names), strict=False))
        if row in NOT_BUILT:
            cells.append(head | {"column": "", "status": NO_MODEL, "message": NOT_BUILT[row]})
            continue
        path = folder / f"{row}.json"
        # A test whose process ended before it wrote its cells.
        found = json.loads(path.read_text()) if path.is_file() else {}
        for column in COLUMNS:
            cells.append(head | {"column": column} | found.get(column, {"status": FAILS, "message": "no result"}))
    return cells


def write_rows(cells: list[dict[str, str]]) -> None:
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEAD, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)


def main() -> None:
    """Write the rows that the tests found."""
    cells = gathered(Path(sys.argv[1]))
    write_rows(cells)
    print(f"{ROWS.name}: {whole(cells)}")


if __name__ == "__main__":
    main()
