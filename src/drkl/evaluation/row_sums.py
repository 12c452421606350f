"""Sums over the positions of each held-out row, from which teacher-forced metrics are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drkl.evaluation.calibration import NUM_BINS, Bins, weighted_sums
from drkl.evaluation.declared import OVERLAP, TOKEN_KEYS

_RENAMED = {"overlap": f"overlap_{OVERLAP}"}


@dataclass(frozen=True)
class RowSums:
    """Sums over each row's positions, and each row's positions in the bins of confidence.

    ``sums`` has `[rows]` by name; ``num_tokens`` is `[rows]`.
    """

    num_tokens: np.ndarray
    sums: Mapping[str, np.ndarray]
    width: Bins
    mass: Bins

    def __len__(self) -> int:
        return len(self.num_tokens)

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric that there is, `[m]` by name, for each of ``weights`` `[m, rows]`: how often a row counts.

        Means are over tokens; NaN over none. Without a teacher's sums there are no metrics against one.
        """
        assert weights.shape[-1] == len(self), "a weight for each row"
        names = list(self.sums)
        totals = weighted_sums(weights, np.stack([self.sums[name] for name in names], -1))
        count = weights @ self.num_tokens
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = dict(zip(names, totals.T, strict=True))
            ranked = sums.pop("ranked", None)
            correlation = sums.pop("rank_correlation", None)
            means = {_RENAMED.get(name, name): total / count for name, total in sums.items()}
            if ranked is not None and correlation is not None:
                means["rank_correlation"] = np.where(ranked > 0, correlation / ranked, np.nan)
            if "teacher_entropy" in means:
                means["entropy_gap"] = means["entropy"] - means.pop("teacher_entropy")
                means["confidence_gap"] = means["confidence"] - means.pop("teacher_confidence")
        means["calibration_gap"] = means["confidence"] - means["accuracy"]
        means |= {"ece": self.width.ece(weights), "mce": self.width.mce(weights), "ece_mass": self.mass.ece(weights)}
        means["num_tokens"] = count
        return {key: means[key] for key in TOKEN_KEYS if key in means}

    def lines(self, row_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Every row as json: its id, its sums, and the bins it fills: [bin, n, confidence, accuracy].

        An infinite sum is written as text.
        """
        assert len(row_ids) == len(self), "an id for each row"
        return [
            {
                "row_id": row_id,
                "num_tokens": int(self.num_tokens[row]),
                "sums": {name: _json(float(values[row])) for name, values in self.sums.items()},
                "bins": {"width": _filled(self.width, row), "mass": _filled(self.mass, row)},
            }
            for row, row_id in enumerate(row_ids)
        ]

    @classmethod
    def of_lines(cls, lines: Sequence[Mapping[str, Any]]) -> RowSums:
        """The sums that ``lines`` wrote; row i is the i-th line."""
        names = list(lines[0]["sums"]) if lines else ["confidence", "accuracy"]
        sums = {name: np.array([float(line["sums"][name]) for line in lines]) for name in names}
        num_tokens = np.array([float(line["num_tokens"]) for line in lines])
        width, mass = (_read_bins([line["bins"][kind] for line in lines]) for kind in ("width", "mass"))
        return cls(num_tokens, sums, width, mass)


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _filled(bins: Bins, row: int) -> list[list[Any]]:
    columns = (bins.counts, bins.confidence, bins.accuracy)
    return [
        [int(number), int(columns[0][row, number]), *(float(column[row, number]) for column in columns[1:])]
        for number in np.flatnonzero(bins.counts[row])
    ]


def _read_bins(rows: Sequence[Sequence[Sequence[float]]]) -> Bins:
    table = np.zeros((3, len(rows), NUM_BINS))
    for row, filled in enumerate(rows):
        for number, *sums in filled:
            table[:, row, int(number)] = sums
    return Bins(*table)
