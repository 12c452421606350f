"""Paired differences of two students that were measured on the same units.

A metric f is a function of weights w, how often each held-out row, prompt or text counts. Both students meet the same
weights, so that what makes a unit hard for both falls out of the difference::

    f_B(w) - f_A(w),   w ~ multinomial(n, 1/n),   its 2.5th and 97.5th percentile

The verdict is about the distance from ideal, d = `Metric.distance`: f or -f where lower or higher is better, |f| where
0 is ideal, |f(w) - f_teacher(w)| where the teacher is. The students differ where the interval of d_B(w) - d_A(w) leaves
out 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Literal, NamedTuple

import numpy as np

from drkl.display import as_number, number
from drkl.evaluation.bootstrap import Estimate, Interval, Resampled, interval
from drkl.evaluation.declared import METRICS, Metric

Verdict = Literal["A better", "B better", "undecided"]
MIN_UNITS = 5
"""Fewer rows, prompts or texts decide nothing: a resample of so few says little about others."""


@dataclass(frozen=True)
class Difference:
    """One metric of A and B; ``interval`` is that of ``b - a``. None where there is no interval or no verdict."""

    metric: Metric
    a: float
    b: float
    interval: Interval | None
    verdict: Verdict | None
    teacher: float | None = None
    """The teacher's value, where that is the ideal."""

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a


class Side(NamedTuple):
    """A student of a comparison, and its teacher (without any metric where there is none)."""

    student: Resampled
    teacher: Resampled = Resampled({}, {})

    def distance(self, metric: Metric) -> np.ndarray | None:
        """Return the distance of every resample from its ideal, or None without an ideal."""
        ideal = self.teacher.values.get(metric.key)
        result: np.ndarray | None = metric.distance(self.student.values[metric.key], ideal)
        return result


def paired(metrics: Mapping[str, Metric], a: Side, b: Side) -> tuple[list[Difference], dict[str, str]]:
    """The differences of ``metrics`` between two students, and why other metrics have none.

    Both sides have to be resampled over the same units, in the same order, with the same seed.
    """
    differences, missing = [], {}
    for key, metric in metrics.items():
        points = [side.student.points.get(key) for side in (a, b)]
        have = [name for name, point in zip("AB", points, strict=True) if point is not None]
        first, second = points
        if first is None or second is None or not (isfinite(first) and isfinite(second)):
            if len(have) == 1:
                missing[key] = f"only {have[0]} has it"
            elif have:
                missing[key] = "undefined or infinite"
            continue
        far = [side.distance(metric) for side in (a, b)]
        differences.append(
            Difference(
                metric,
                first,
                second,
                interval(b.student.values[key] - a.student.values[key]),
                None if far[0] is None or far[1] is None else decide(far[0], far[1]),
                as_number(a.teacher.points.get(key)) if metric.better == "teacher" else None,
            )
        )
    return differences, missing


def settled(difference: Difference, units: int) -> Difference:
    """Return the difference with its verdict, which fewer than `MIN_UNITS` units leave undecided."""
    if difference.verdict is None or units >= MIN_UNITS:
        return difference
    return replace(difference, verdict="undecided")


def decide(a: np.ndarray, b: np.ndarray) -> Verdict:
    """The verdict by resampled distances from ideal; undecided too where there is no interval."""
    ends = interval(b - a)
    if ends is None or ends[0] <= 0 <= ends[1]:
        return "undecided"
    return "A better" if ends[0] > 0 else "B better"


class Curve(NamedTuple):
    """A model over its sampling temperatures: column 0 of every array is its own number, the others are resamples."""

    temperatures: list[float]
    """Ascending."""
    variety: np.ndarray
    """Distinct-2, `[temperatures, 1 + resamples]`."""
    quality: np.ndarray
    """ROUGE-L, or another metric of the answers, likewise."""

    @classmethod
    def of(cls, by_temperature: Mapping[float, Resampled], quality: str = "rouge_l") -> Curve:
        """The curve of what was resampled at each temperature; without those at which either metric is undefined."""
        columns: dict[float, list[np.ndarray]] = {}
        keys = ("distinct_2", quality)
        for temperature in sorted(by_temperature):
            resampled = by_temperature[temperature]
            if all(isfinite(resampled.points.get(key, nan)) for key in keys):
                columns[temperature] = [
                    np.concatenate([[resampled.points[key]], resampled.values[key]]) for key in keys
                ]
        size = (0, 1)
        both = (np.stack([pair[i] for pair in columns.values()]) if columns else np.empty(size) for i in (0, 1))
        return cls(list(columns), *both)

    def own_variety(self) -> np.ndarray | None:
        """The variety of the model's own distribution, temperature 1; by a straight line where 1 was not sampled."""
        for place, temperature in enumerate(self.temperatures):
            if temperature == 1:
                own: np.ndarray = self.variety[place]
                return own
        for low in range(len(self.temperatures) - 1):
            a, b = self.temperatures[low : low + 2]
            if a < 1 < b:
                between: np.ndarray = self.variety[low] + (1 - a) / (b - a) * (
                    self.variety[low + 1] - self.variety[low]
                )
                return between
        return None


def when_as_varied(student: Curve, teacher: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray] | str:
    """The teacher's own variety, and the quality of student and teacher where each is so varied, all `[1 + resamples]`.

    A sentence says why where the student cannot be brought to that variety.
    """
    if len(student.temperatures) < 2:
        return "There is no sweep over sampling temperatures, so the two cannot be compared where they are as varied."
    goal = teacher.own_variety()
    if goal is None:
        return "The teacher's answers were not sampled at temperature 1, nor at temperatures on both sides of it."
    ours, theirs = (at_variety(curve.variety, curve.quality, goal) for curve in (student, teacher))
    if np.isnan(ours[0]):
        ends = number(float(student.variety[:, 0].min()), 3), number(float(student.variety[:, 0].max()), 3)
        return (
            f"At no sampling temperature tried does the student come to the teacher's Distinct-2 of "
            f"{number(float(goal[0]), 3)}: its own is {ends[0]} to {ends[1]}."
        )
    return goal, ours, theirs


def mostly(values: np.ndarray) -> Estimate:
    """A number (in column 0) and the interval of its resamples, of which a tenth may be undefined."""
    resamples = values[1:]
    known = resamples[~np.isnan(resamples)]
    ends = interval(known) if len(known) and len(known) >= (1 - MISSED) * len(resamples) else None
    return Estimate(float(values[0]), ends)


MISSED = 0.1
"""At most this share of the resamples may be undefined."""


def _as_varied(key: str, title: str) -> Metric:
    return replace(
        METRICS[key],
        key=f"{key}_when_as_varied",
        title=f"{title} when as varied as the teacher",
        definition=f"{title} at the sampling temperature at which the model's Distinct-2 is the teacher's at "
        "temperature 1.",
    )


AS_VARIED: dict[str, Metric] = {
    key: _as_varied(key, title) for key, title in (("rouge_l", "ROUGE-L"), ("rouge_l_best", "ROUGE-L, best of k,"))
}
"""What is compared where models are equally varied, by the key of the metric."""
MATCHED: dict[str, Metric] = {metric.key: metric for metric in AS_VARIED.values()}
"""The same by their own keys."""


def at_variety(variety: np.ndarray, quality: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The quality where a model is as varied as ``goal`` `[m]`; NaN where it is at no sampling temperature.

    Between two neighbouring sampling temperatures by a straight line; the best where it is so more than once.

    Args:
        variety, quality: `[temperatures, m]`, from the lowest temperature to the highest.
        goal: `[m]`.
    """
    exact = np.where(variety == goal, quality, np.nan)
    low, high = variety[:-1], variety[1:]
    inside = (np.minimum(low, high) < goal) & (goal < np.maximum(low, high))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (goal - low) / (high - low)
        between = np.where(inside, (1 - share) * quality[:-1] + share * quality[1:], np.nan)
    candidates = np.concatenate([exact, between])
    best: np.ndarray = np.where(np.isnan(candidates).all(0), np.nan, np.fmax.reduce(candidates, axis=0))
    return best
