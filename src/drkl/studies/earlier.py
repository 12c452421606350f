"""What an earlier study.json knows of cells whose lines beside eval.json are gone, as in a copy of the numbers alone.

Samples, held-out rows and predictions are large, and a study is kept without them. What follows from them, the
intervals over prompts for instance, was written once and is still true as long as the numbers in eval.json are the
same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drkl.display import as_number
from drkl.parsing import parse_json
from drkl.studies.result import CellResult, Verdict

BY_LINES = ("evaluated rows", "evaluated prompts")
"""What a budget says by the lines."""


@dataclass(frozen=True)
class Earlier:
    """The cells and verdicts of a study.json; empty where there is none that can be read."""

    cells: Sequence[Mapping[str, Any]] = ()
    verdicts: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @classmethod
    def read(cls, folder: Path) -> Earlier:
        """The study.json in a study's folder."""
        try:
            content = parse_json((folder / "study.json").read_text(encoding="utf-8"))
            found = cls(content["cells"], content["verdicts"])
            for one in found.cells:
                dict(one["metrics"]), dict(one["scaled"]), dict(one["budget"])
            for row in found.verdicts:
                dict(row["by_seed"]), dict(row["axes"]), dict(row["baseline"])
        except (OSError, ValueError, LookupError, TypeError):
            return cls()
        return found

    def completed(self, one: CellResult, derived: Iterable[str] = ()) -> CellResult:
        """The cell with what followed from its lines, if its other numbers are as they were.

        Args:
            one: the cell as its files have it now.
            derived: keys of metrics that follow from the lines.
        """
        known = next((entry for entry in self.cells if entry.get("name") == one.name), None)
        if one.evaluation is None or known is None or not _agree(one, known):
            return one
        kept = {key: as_number(known["metrics"].get(key)) for key in derived if key not in one.metrics}
        metrics = {key: value for key, value in kept.items() if value is not None} | dict(one.metrics)
        budget = {key: known["budget"].get(key) for key in BY_LINES if one.budget.get(key) is None}
        return replace(one, metrics=metrics, budget=dict(one.budget) | budget)

    def completed_row(self, row: Verdict) -> Verdict:
        """The verdict with its interval over prompts, if its differences by seed are as they were."""
        if row.prompts_interval is not None or row.difference is None:
            return row
        wanted = (row.metric, dict(row.axes), dict(row.baseline), {str(seed): own for seed, own in row.by_seed.items()})
        for known in self.verdicts:
            found = (known.get("metric"), known["axes"], known["baseline"], known["by_seed"])
            ends = known.get("prompts_interval")
            if found == wanted and known.get("difference") == row.difference and isinstance(ends, list):
                low, high = (as_number(end) for end in ends[:2]) if len(ends) == 2 else (None, None)
                return row if low is None or high is None else replace(row, prompts_interval=(low, high))
        return row


def _agree(one: CellResult, known: Mapping[str, Any]) -> bool:
    """Whether a cell is the one that was known: begun at the same time, with the same numbers."""
    return known.get("began") == one.began and all(
        before.get(key) == value
        for before, now in ((known["metrics"], one.metrics), (known["scaled"], one.scaled))
        for key, value in now.items()
    )
