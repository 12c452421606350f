"""Bootstrap intervals of metrics that are functions of how often each unit (prompt, row, text) counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


RESAMPLES = 1000
LEVEL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""

Metrics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Of weights `[m, units]` every metric's `m` values by name."""


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
    found: dict[str, list[np.ndarray]] = {}
    for weights in resample_weights(size, seed, resamples):
        for name, values in metrics(weights).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of resampled values; None where one of them is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, LEVEL)
    return [float(low), float(high)]


def intervals(metrics: Metrics, size: int, seed: int, resamples: int = RESAMPLES) -> dict[str, list[float]]:
    """95 % intervals by name, of those that have one."""
    found = {name: interval(values) for name, values in bootstrap(metrics, size, seed, resamples).items()}
    return {name: ends for name, ends in found.items() if ends is not None}
