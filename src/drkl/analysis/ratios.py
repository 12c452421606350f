"""Means over positions, with intervals over the rows that the positions belong to."""

from __future__ import annotations

from typing import Any

import numpy as np

from drkl.evaluation import bootstrap
from drkl.evaluation.bookkeeping import finite
from drkl.evaluation.calibration import weighted_sums
from drkl.evaluation.paired import MIN_UNITS

MISSED = 0.1
"""Up to this share of the resamples may contain none of a mean's positions; they are left out of its interval."""


class Ratios:
    """Sums over positions divided by sums over positions, each with a 95 % bootstrap interval over rows.

    Args:
        row: `[n]`, the row of each position, from 0.
        num_rows: number of rows.
    """

    def __init__(self, row: np.ndarray, num_rows: int) -> None:
        self._row, self._num_rows = row, num_rows
        self._over: dict[str, np.ndarray] = {}
        self._under: dict[str, np.ndarray] = {}

    def mean(self, name: str, values: np.ndarray, where: np.ndarray | None = None) -> None:
        """The mean of ``values`` `[n]` over the positions ``where``."""
        chosen = np.ones(len(self._row)) if where is None else where.astype(np.float64)
        self.ratio(name, np.where(chosen > 0, values, 0.0), chosen)

    def ratio(self, name: str, over: np.ndarray, under: np.ndarray) -> None:
        """The sum of ``over`` `[n]` divided by the sum of ``under`` `[n]`."""
        assert name not in self._over, f"{name} is defined already"
        for sums, values in ((self._over, over), (self._under, under)):
            sums[name] = np.bincount(self._row, values, self._num_rows).astype(np.float64)

    def compute(self, seed: int) -> dict[str, dict[str, Any]]:
        """``value`` and ``interval`` by name; None where it is infinite, over no position, or over too few rows."""
        ones = np.ones((1, self._num_rows))
        values = {name: finite_or_none(value[0]) for name, value in self._metrics(ones).items()}
        ends: dict[str, bootstrap.Interval | None] = {}
        if self._num_rows >= MIN_UNITS:
            resampled = bootstrap.bootstrap(self._metrics, self._num_rows, seed)
            ends = {name: _interval(values) for name, values in resampled.items()}
        return {name: {"value": value, "interval": ends.get(name)} for name, value in values.items()}

    def _metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        names = list(self._over)
        over, under = (
            weighted_sums(weights, np.stack([sums[name] for name in names], -1)) for sums in (self._over, self._under)
        )
        # A share of what is infinite is not 0.
        under = np.where(np.isinf(under), np.nan, under)
        with np.errstate(invalid="ignore", divide="ignore"):
            return dict(zip(names, (over / under).T, strict=True))


def _interval(resampled: np.ndarray) -> bootstrap.Interval | None:
    known = resampled[~np.isnan(resampled)]
    return bootstrap.interval(known) if len(known) >= (1 - MISSED) * len(resampled) else None


def finite_or_none(value: float) -> float | None:
    """The value, or None for NaN and infinities, which json cannot hold."""
    return finite(float(value))
