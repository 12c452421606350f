"""Curves of cells, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.result import Evaluation, SweepPoint
from drkl.studies.kinds import Kind, has_one_teacher
from drkl.studies.statistics import paired_t

FIDELITY, VARIETY = "rouge_l", "distinct_2"


@dataclass(frozen=True)
class Mean:
    """The mean over seeds; ``interval`` is its 95 % t interval, None with one seed, or where all seeds are one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class SweepMean:
    """The answers of one kind of cell at one sampling temperature."""

    temperature: float
    fidelity: Mean
    variety: Mean

    @property
    def by_metric(self) -> list[tuple[str, Mean]]:
        """Both means with the keys of their metrics."""
        return [(FIDELITY, self.fidelity), (VARIETY, self.variety)]


@dataclass(frozen=True)
class BinMean:
    """One bin of confidence: means over the seeds that have tokens in it, and the range of their accuracies."""

    share: float
    confidence: float
    accuracy: float
    range: Interval


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean over seeds with its t interval; None without a value."""
    if not values:
        return None
    test = paired_t(np.array(values, dtype=np.float64))
    low, high = float(test.low), float(test.high)
    return Mean(float(test.mean), (low, high) if np.isfinite([low, high]).all() else None)


def sweep_means(evaluations: Sequence[Evaluation], model: str = "student") -> list[SweepMean]:
    """ROUGE-L and Distinct-2 at every sampling temperature that all evaluations have, the lowest first."""
    sweeps = [by_temperature(one, model) for one in evaluations]
    shared = sorted(set.intersection(*(set(sweep) for sweep in sweeps))) if sweeps else []
    means = []
    for temperature in shared:
        fidelity, variety = (mean_of([sweep[temperature][place] for sweep in sweeps]) for place in (0, 1))
        assert fidelity is not None and variety is not None
        means.append(SweepMean(temperature, fidelity, variety))
    return means


def by_temperature(evaluation: Evaluation, model: str) -> dict[float, tuple[float, float]]:
    """ROUGE-L and Distinct-2 by sampling temperature; without a sweep, at the evaluation's own."""
    points = evaluation.sweep.get(model)
    if points is None:
        values = {key: evaluation.value(model, key) for key in (FIDELITY, VARIETY)}
        own = evaluation.settings.get("sampling_temperature")
        points = [SweepPoint(float(own), values, {})] if isinstance(own, int | float) else []
    found = {point.sampling_temperature: (point.values.get(FIDELITY), point.values.get(VARIETY)) for point in points}
    return {at: (x, y) for at, (x, y) in found.items() if x is not None and y is not None}


def reliability_means(evaluations: Sequence[Evaluation], model: str = "student") -> list[BinMean]:
    """The bins of equal width that some seed has tokens in; none where the evaluations have different bins."""
    reliabilities = [one.reliability for one in evaluations if one.reliability is not None]
    bins = [one.width[model] for one in reliabilities if model in one.width]
    if not bins or any(one.edges != reliabilities[0].edges for one in reliabilities):
        return []
    total = sum(sum(one.counts) for one in bins) or 1
    means = []
    for place in range(len(bins[0].counts)):
        known = [
            (one.counts[place], one.confidence[place], one.accuracy[place]) for one in bins if one.counts[place] > 0
        ]
        rows = [(count, x, y) for count, x, y in known if x is not None and y is not None]
        if rows:
            accuracies = [y for _, _, y in rows]
            x, y = (math.fsum(row[column] for row in rows) / len(rows) for column in (1, 2))
            means.append(BinMean(sum(row[0] for row in rows) / total, x, y, (min(accuracies), max(accuracies))))
    return means


def teacher_of(kinds: Sequence[Kind], means: Callable[[Sequence[Evaluation], str], list[Any]]) -> list[Any]:
    """The teacher's curve over all cells; none where they have different teachers."""
    if not has_one_teacher(cell for kind in kinds for cell in kind.cells):
        return []
    return means([one for kind in kinds for one in kind.evaluations if "teacher" in one.models], "teacher")
