"""Calibration: bins of confidence, and how far the accuracy of each is from it; for tokens and texts alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drkl.evaluation.declared import NUM_CALIBRATION_BINS as NUM_BINS

EDGES = [i / NUM_BINS for i in range(NUM_BINS + 1)]


def bin_of(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The bin of each value, [a, b), the last with b; values outside the edges go to the nearest bin."""
    bins: np.ndarray = np.searchsorted(np.asarray(edges[1:-1]), values, side="right")
    return bins


def width_bins(confidence: np.ndarray) -> np.ndarray:
    """Bins of equal width."""
    return bin_of(confidence, EDGES)


def mass_bins(confidence: np.ndarray) -> np.ndarray:
    """Bins with equally many values, up to one; of equal values the earlier go to the lower bin."""
    bins = np.empty(len(confidence), dtype=np.int64)
    for number, members in enumerate(np.array_split(np.argsort(confidence, kind="stable"), NUM_BINS)):
        bins[members] = number
    return bins


@dataclass(frozen=True)
class Bins:
    """Sums by unit (row, text) and bin of confidence: three `[units, NUM_BINS]` arrays.

    A bin's numbers are sums, and which bin a position is in does not change when units are counted more or less often.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, bins: np.ndarray, confidence: np.ndarray, correct: np.ndarray, unit: np.ndarray, size: int) -> Bins:
        """Sum positions by unit and bin: their number, their confidence, and whether they are ``correct`` (0 or 1)."""
        place = unit * NUM_BINS + bins

        def table(values: np.ndarray | None) -> np.ndarray:
            return np.bincount(place, values, size * NUM_BINS).astype(np.float64).reshape(size, NUM_BINS)

        return cls(table(None), table(confidence), table(correct))

    def ece(self, weights: np.ndarray) -> np.ndarray:
        """Sum over bins of |sum of confidence - sum of accuracy|, per position, for each of the ``weights``."""
        with np.errstate(invalid="ignore"):
            gaps = np.abs(weights @ (self.confidence - self.accuracy)).sum(-1)
            share: np.ndarray = gaps / (weights @ self.counts).sum(-1)
        return share

    def mce(self, weights: np.ndarray) -> np.ndarray:
        """The largest |mean confidence - accuracy| of a bin that is not empty; NaN where all are."""
        counts, gaps = weights @ self.counts, np.abs(weights @ (self.confidence - self.accuracy))
        of_bins = np.divide(gaps, counts, out=np.zeros_like(gaps), where=counts > 0)
        largest: np.ndarray = np.where(counts.any(-1), of_bins.max(-1), np.nan)
        return largest

    def reliability(self) -> tuple[list[int], list[float | None], list[float | None]]:
        """Three lists by bin: number of positions, mean confidence, accuracy (None in an empty bin)."""
        counts = self.counts.sum(0)
        confidence, accuracy = (
            [float(total / count) if count else None for total, count in zip(sums.sum(0), counts, strict=True)]
            for sums in (self.confidence, self.accuracy)
        )
        return counts.astype(int).tolist(), confidence, accuracy


def weighted_sums(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """``weights`` `[m, units]` times ``sums`` `[units, k]`, where 0 times an infinite sum is 0.

    A distance is infinite where one model excludes what the other does not; a unit of weight 0 has no effect.
    """
    good = np.isfinite(sums)
    if good.all():
        product: np.ndarray = weights @ sums
        return product
    out = weights @ np.where(good, sums, 0.0)
    counted = (weights > 0).astype(np.float64)
    up, down, unknown = (
        counted @ mask.astype(np.float64) > 0 for mask in (sums == np.inf, sums == -np.inf, sums != sums)
    )
    out[up] = np.inf
    out[down] = -np.inf
    out[(up & down) | unknown] = np.nan
    return out
