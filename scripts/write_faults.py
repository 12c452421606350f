"""Write the rows of docs/faults.md: what the tests of faults counted, from the folder that they wrote to.

    python -m scripts.write_faults FOLDER [BEFORE]

It writes docs/results/faults.csv; `make docs` makes the page of it. BEFORE is the folder of the same tests with an
earlier drkl under test; without it the counts of before that are there already stay.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from scripts.faults_page import HEAD, ROWS, faults, read_rows


def counted(folder: Path) -> dict[str, tuple[int, int]]:
    """Return for each test, over its parameters, the number of faults and of those after which something was lost."""
    sums: dict[str, tuple[int, int]] = {}
    for path in folder.glob("*.json"):
        row = json.loads(path.read_text())
        injections, lost = sums.get(row["test"], (0, 0))
        sums[row["test"]] = injections + row["injections"], lost + len(row["losses"])
    return sums


def main(folder: Path, before: Path | None = None) -> None:
    """Write the rows; a test that was not run keeps its own."""
    known = read_rows() if ROWS.is_file() else {}
    now, then = counted(folder), {} if before is None else counted(before)
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEAD, lineterminator="\n", restval="")
        writer.writeheader()
        for fault in faults():
            row = known.get(fault.test, {}) | {"test": fault.test}
            for names, sums in ((HEAD[1:3], now), (HEAD[3:5], then)):
                if fault.test in sums:
                    row |= dict(zip(names, map(str, sums[fault.test]), strict=True))
            if len(row) > 1:
                writer.writerow(row)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
