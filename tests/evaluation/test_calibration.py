"""Bins of confidence, against torchmetrics, numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional.classification import binary_calibration_error

from drkl.evaluation.calibration import EDGES, Bins, bin_of, mass_bins, weighted_sums, width_bins


def binned(confidence: list[float], right: list[int], units: list[int] | None = None) -> tuple[Bins, Bins]:
    values, correct = np.array(confidence, dtype=float), np.array(right, dtype=float)
    unit = np.arange(len(values)) if units is None else np.array(units)
    size = int(unit.max()) + 1
    width, mass = (Bins.of(bins(values), values, correct, unit, size) for bins in (width_bins, mass_bins))
    return width, mass


def test_worked_by_hand() -> None:
    # Three bins of width 1/15: two at .9 and .92 (one right), one at .5 (right), one at .1 (wrong).
    width, mass = binned([0.9, 0.92, 0.5, 0.1], [1, 0, 1, 0])
    once = np.ones((1, 4))
    assert width.ece(once) == pytest.approx([(abs(1.82 - 1) + 0.5 + 0.1) / 4])
    assert width.mce(once) == pytest.approx([0.5])
    assert mass.ece(once) == pytest.approx([(0.1 + 0.92 + 0.5 + 0.1) / 4])
    counts, confidence, accuracy = width.reliability()
    assert (counts[13], confidence[13], accuracy[13]) == (2, pytest.approx(0.91), 0.5)
    assert accuracy[:3] == [None, 0.0, None]


def test_edges_belong_to_the_bin_above_and_one_to_the_last() -> None:
    assert width_bins(np.array([0.0, *EDGES[1:-1], 1.0])).tolist() == [*range(15), 14]
    below = np.nextafter(np.array(EDGES[1:]), 0)
    assert width_bins(below).tolist() == list(range(15))
    assert bin_of(np.array([-0.1, 1.1]), EDGES).tolist() == [0, 14]


@pytest.mark.parametrize("seed", range(4))
def test_both_errors_are_torchmetrics(seed: int) -> None:
    generator = np.random.default_rng(seed)
    confidence, right = generator.uniform(0.3, 1, 300), generator.integers(0, 2, 300)
    width, _ = binned(confidence.tolist(), right.tolist())
    for norm, found in (("l1", width.ece), ("max", width.mce)):
        expected = binary_calibration_error(torch.tensor(confidence), torch.tensor(right), n_bins=15, norm=norm)  # type: ignore[arg-type]
        assert found(np.ones((1, 300))) == pytest.approx(float(expected), rel=1e-5)


@given(st.lists(st.sampled_from([0.2, 0.5, 0.5000001, 0.9]), min_size=1, max_size=60))
def test_bins_of_equal_mass(confidence: list[float]) -> None:
    values = np.array(confidence)
    bins = mass_bins(values)
    counts = np.bincount(bins, minlength=15)
    assert counts.max() - counts.min() <= 1 and (np.diff(bins[np.lexsort((bins, values))]) >= 0).all()
    for value in set(confidence):  # of equal values the earlier go to the lower bin
        assert (np.diff(bins[values == value]) >= 0).all()


@given(st.integers(0, 1000), st.integers(1, 4))
def test_a_weight_is_a_repeated_unit(seed: int, times: int) -> None:
    generator = np.random.default_rng(seed)
    units = generator.integers(0, 5, 20)
    confidence, right = generator.uniform(0, 1, 20), generator.integers(0, 2, 20)
    weights = np.ones(int(units.max()) + 1)
    weights[units[0]] = times
    again = np.concatenate([np.arange(20), *[np.flatnonzero(units == units[0])] * (times - 1)])
    width, _ = binned(confidence.tolist(), right.tolist(), units.tolist())
    expected, _ = binned(confidence[again].tolist(), right[again].tolist())
    once = np.ones((1, len(again)))
    assert width.ece(weights[None]) == pytest.approx(expected.ece(once))
    assert width.mce(weights[None]) == pytest.approx(expected.mce(once))


def test_nothing_drawn_is_no_number() -> None:
    width, mass = binned([0.5, 0.7], [1, 0])
    assert all(np.isnan(found(np.zeros((1, 2)))).all() for found in (width.ece, width.mce, mass.ece))


VALUES = st.sampled_from([0.0, 1.5, -2.0, np.inf, -np.inf, np.nan])


@given(arrays(float, (4, 3), elements=VALUES), arrays(float, (5, 4), elements=st.sampled_from([0.0, 1.0, 2.0])))
def test_what_is_not_drawn_has_no_say(sums: np.ndarray, weights: np.ndarray) -> None:
    found = weighted_sums(weights, sums)
    for m in range(5):
        for k in range(3):
            drawn = [w * x for w, x in zip(weights[m].tolist(), sums[:, k].tolist(), strict=True) if w]
            assert found[m, k] == pytest.approx(sum(drawn), nan_ok=True)
