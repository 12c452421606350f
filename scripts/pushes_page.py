"""What docs/results/pushes.csv says of the push on matched targets, for docs/evidence.md and docs/why.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.rows import Row
from drkl.display import number
from drkl.evaluation.findings import PUSHED
from drkl.reporting.text import count
from drkl.studies.statistics import critical_t
from scripts.families_page import markdown

ROWS = Path(__file__).resolve().parents[1] / "docs" / "results" / "pushes.csv"
COLUMNS = {
    "matched": ("matched targets, %", 100, 1),
    "matched_p_t": ("the teacher's probability there", 1, 2),
    "matched_K": ("K there, nats", 1, 3),
    "matched_outweighs": ("there the tail pushes harder than the target, %", 100, 1),
    "matched_overshoot": ("there reverse KL rests above the teacher by, points", 100, 2),
    "stronger": ("1 − q_t < 0.5 at, %", 100, 1),
    "tail_force_ratio": ("DRKL's force on the tail, by reverse KL's", 1, 2),
}
"""Head, factor and digits of what is shown, by the name of its column in the file."""

Rows = Sequence[Row]


def by_student(rows: Rows) -> dict[tuple[str, str], list[Row]]:
    """The runs of each part and objective, a run for each seed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["part"], row["objective"]), []).append(row)
    return found


def with_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % t interval over seeds; of one seed there is none."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), critical_t(len(values)) * stdev(values) / len(values) ** 0.5


def show(values: Sequence[float], factor: float, digits: int) -> str:
    """The mean of the values with half of its interval."""
    mean, half = with_spread([factor * value for value in values])
    return number(mean, digits) + ("" if half is None else f" ± {number(half, digits)}")


def values_of(rows: Rows, column: str) -> list[float]:
    """The column's value in each row."""
    return [float(row[column]) for row in rows]


def table(rows: Rows) -> str:
    """A row for each part and objective."""
    lines = [
        [part, objective, str(len(own)), *(show(values_of(own, key), factor, digits)
                                           for key, (_, factor, digits) in COLUMNS.items())]
        for (part, objective), own in by_student(rows).items()
    ]  # fmt: skip
    return markdown(["part", "student of", "seeds", *(head for head, *_ in COLUMNS.values())], lines)


def outcome(rows: Rows) -> tuple[list[str], list[str]]:
    """Whether reverse KL pushes matched targets of its own students, and the numbers of it, by part."""
    said, texts = [], []
    for (part, objective), own in by_student(rows).items():
        if objective != "rkl":
            continue
        mean, half = with_spread(values_of(own, "matched_overshoot"))
        low, high = (mean, mean) if half is None else (mean - half, mean + half)
        said.append("held" if low > PUSHED else "not held" if high < PUSHED else "undecided")
        texts.append(
            f"{part}, students of reverse KL: matched targets ({show(values_of(own, 'matched'), 100, 1)} %) come to "
            f"rest {show(values_of(own, 'matched_overshoot'), 100, 2)} points above the teacher, "
            f"{count(len(own), 'seed')}"
        )
    return said, texts
