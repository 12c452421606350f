"""Bootstrap intervals of metrics that are functions of how often each unit (prompt, row, text) counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A number and its 95 % interval; None where there is none."""

    value: float | None
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """``{"value": ..., "interval": [low, high]}``."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Estimate:
        """The estimate that ``to_json`` gave."""
        ends = entry["interval"]
        return cls(entry["value"], None if ends is None else (ends[0], ends[1]))


RESAMPLES = 1000
LEVEL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""

Metrics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""From weights `[m, units]` to every metric's values `[m]` by name."""


def resample_weights(
    size: int, seed: int, resamples: int = RESAMPLES, *, at_once: int | None = None
) -> Iterator[np.ndarray]:
    """Yield weights `[m, size]`, ``resamples`` rows in all: how often each unit was drawn, with replacement.

    They depend on ``size``, ``seed`` and ``resamples`` alone, so that two models measured on the same units meet the
    same resamples: their differences are paired.
    """
    generator = np.random.default_rng(seed)
    step = max(1, min(resamples, at_once or 2_000_000 // max(size, 1)))  # a few megabytes at a time
    for start in range(0, resamples, step):
        many = min(step, resamples - start)
        yield generator.multinomial(size, np.full(size, 1 / size), size=many).astype(np.float64)


def bootstrap(metrics: Metrics, size: int, seed: int, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """Every metric on every resample, `[resamples]` by name; nothing for no units."""
    if size == 0:
        return {}
    columns: dict[str, list[np.ndarray]] = {}
    for weights in resample_weights(size, seed, resamples):
        for name, values in metrics(weights).items():
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def interval(values: np.ndarray) -> Interval | None:
    """The 95 % percentile interval of resampled values; None where one of them is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, LEVEL)
    return float(low), float(high)


@dataclass(frozen=True)
class Resampled:
    """A model's metrics on all units, and on every resample of them.

    Two models on the same units with the same seed meet the same resamples, so their differences are paired.
    """

    points: dict[str, float]
    values: dict[str, np.ndarray]
    """`[resamples]` by metric; nothing for no units."""

    @classmethod
    def of(cls, metrics: Metrics | None, size: int, seed: int) -> Resampled:
        """Resample a function of the weights of ``size`` units; None has no metric."""
        if metrics is None or size == 0:
            return cls({}, {})
        points = {key: float(value[0]) for key, value in metrics(np.ones((1, size))).items()}
        return cls(points, bootstrap(metrics, size, seed))

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals by metric, of those that have one."""
        intervals = {key: interval(values) for key, values in self.values.items()}
        return {key: ends for key, ends in intervals.items() if ends is not None}

    def minus(self, other: Resampled) -> dict[str, Estimate]:
        """The paired differences, this minus the other, of the metrics that are finite in both."""
        differences = {}
        for key in self.points.keys() & other.points.keys():
            difference = self.points[key] - other.points[key]
            if math.isfinite(difference):
                differences[key] = Estimate(difference, interval(self.values[key] - other.values[key]))
        return differences
