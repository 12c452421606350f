import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

from drkl.evaluation.result import Evaluation, Numbers, Reliability, ReliabilityBins, SweepPoint
from drkl.studies.curves import mean_of, reliability_means, sweep_means


def evaluation(**more: Any) -> Evaluation:
    return Evaluation(Numbers({"student": {"rouge_l": 10.0, "distinct_2": 0.5}}), {"sampling_temperature": 1.0}, **more)


def test_the_mean_over_seeds_has_scipys_t_interval() -> None:
    values = [0.2, 0.25, 0.21, 0.4]
    mean = mean_of(values)
    assert mean is not None and mean.interval is not None
    ends = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean.value == pytest.approx(np.mean(values)) and mean.interval == pytest.approx(ends)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    one = mean_of([0.3])
    assert one is not None and one.value == pytest.approx(0.3) and one.interval is None
    assert mean_of([]) is None
    same = mean_of([0.3, 0.3])
    assert same is not None and same.interval is None


def sweep(*points: tuple[float, float | None, float]) -> dict[str, list[SweepPoint]]:
    return {"student": [SweepPoint(at, {"rouge_l": x, "distinct_2": y}, {}) for at, x, y in points]}


def test_a_sweep_is_averaged_where_every_seed_has_it() -> None:
    ones = [
        evaluation(sweep=sweep((0.5, 12.0, 0.4), (1.0, 10.0, 0.8), (1.5, 5.0, 0.9))),
        evaluation(sweep=sweep((0.5, 14.0, 0.5), (1.0, 11.0, 0.7), (1.5, None, 0.9))),
    ]
    means = sweep_means(ones)
    assert [(p.temperature, p.fidelity.value, p.variety.value) for p in means] == [
        (0.5, 13.0, pytest.approx(0.45)),
        (1.0, 10.5, pytest.approx(0.75)),
    ]
    half = stats.t.ppf(0.975, 1) * math.sqrt(2) / math.sqrt(2)
    assert means[0].fidelity.interval == pytest.approx((13 - half, 13 + half))


def test_without_a_sweep_there_is_the_evaluations_own_temperature() -> None:
    (point,) = sweep_means([evaluation()])
    assert (point.temperature, point.fidelity.value, point.fidelity.interval) == (1.0, 10.0, None)
    assert sweep_means([]) == [] == sweep_means([evaluation()], "teacher")


def reliability(counts: list[int], accuracy: list[float | None], middle: float = 0.5) -> Reliability:
    edges = (0.0, middle, 1.0)
    middles = [(a + b) / 2 if count else None for count, (a, b) in zip(counts, pairwise(edges), strict=True)]
    return Reliability(list(edges), {"student": ReliabilityBins(counts, middles, accuracy)})


def test_bins_are_averaged_over_the_seeds_that_have_tokens_in_them() -> None:
    ones = [
        evaluation(reliability=reliability([10, 30], [0.2, 0.6])),
        evaluation(reliability=reliability([0, 40], [None, 0.8])),
    ]
    low, high = reliability_means(ones)
    assert (low.share, low.confidence, low.accuracy, low.range) == (10 / 80, 0.25, 0.2, (0.2, 0.2))
    assert (high.share, high.accuracy, high.range) == (70 / 80, pytest.approx(0.7), (0.6, 0.8))


def test_bins_with_other_edges_are_not_averaged() -> None:
    ones = [
        evaluation(reliability=reliability([10, 30], [0.2, 0.6])),
        evaluation(reliability=reliability([10, 30], [0.2, 0.6], middle=0.4)),
    ]
    assert reliability_means(ones) == [] == reliability_means([evaluation()])
