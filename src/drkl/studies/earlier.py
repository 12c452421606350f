"""What an earlier study.json knows of cells whose lines beside eval.json are gone, as in a copy of the numbers alone.

Samples, held-out rows and predictions are large, and a study is kept without them. What follows from them, the
intervals over prompts for instance, was written once and is still true as long as the numbers in eval.json are the
same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drkl.display import as_number
from drkl.evaluation.bootstrap import Interval
from drkl.parsing import parse_json
from drkl.studies.cells import CellResult, Verdict

BY_LINES = ("evaluated rows", "evaluated prompts")
"""What a budget says by the lines."""


@dataclass(frozen=True)
class Earlier:
    """What a study.json says; nothing where there is none that can be read."""

    cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``began``, ``metrics``, ``scaled`` and ``budget`` of each cell, by its name."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """The interval over prompts by the comparison and its numbers."""

    @classmethod
    def read(cls, folder: Path) -> Earlier:
        """The study.json in a study's folder."""
        try:
            content = parse_json((folder / "study.json").read_text(encoding="utf-8"))
            cells = {
                one["name"]: {"began": one["began"]} | {key: dict(one[key]) for key in ("metrics", "scaled", "budget")}
                for one in content["cells"]
            }
            intervals = {}
            for row in content["verdicts"]:
                if (ends := row["prompts_interval"]) is not None:
                    low, high = ends
                    key = _key(row["metric"], row["axes"], row["baseline"], row["difference"], row["by_seed"])
                    intervals[key] = float(low), float(high)
        except (OSError, ValueError, LookupError, TypeError):
            return cls()
        return cls(cells, intervals)

    def completed(self, one: CellResult, derived: Iterable[str]) -> CellResult:
        """The cell with what followed from its lines, if its other numbers are as they were.

        Args:
            one: the cell as its files have it now.
            derived: keys of metrics that follow from the lines.
        """
        known = self.cells.get(one.name)
        if one.evaluation is None or known is None or not _agree(one, known):
            return one
        kept = {key: as_number(known["metrics"].get(key)) for key in derived if key not in one.metrics}
        metrics = {key: value for key, value in kept.items() if value is not None} | dict(one.metrics)
        budget = {key: known["budget"].get(key) for key in BY_LINES if one.budget.get(key) is None}
        return replace(one, metrics=metrics, budget=dict(one.budget) | budget)

    def completed_row(self, row: Verdict) -> Verdict:
        """The verdict with its interval over prompts, if its differences by seed are as they were."""
        if row.prompts_interval is not None:
            return row
        by_seed = {str(seed): value for seed, value in row.by_seed.items()}
        return replace(
            row, prompts_interval=self.intervals.get(_key(row.metric, row.axes, row.baseline, row.difference, by_seed))
        )


def _key(*what: Any) -> str:
    return json.dumps(what, sort_keys=True)


def _agree(one: CellResult, known: Mapping[str, Any]) -> bool:
    """Whether a cell is the one that was known: begun at the same time, with the same numbers."""
    return known["began"] == one.began and all(
        known[name].get(key) == value
        for name, now in (("metrics", one.metrics), ("scaled", one.scaled))
        for key, value in now.items()
    )
