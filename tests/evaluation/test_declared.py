"""How many digits a number of a metric is shown with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.evaluation.declared import METRICS, MOST_DIGITS


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("rkl", (0.0003, 0.00017, 0.00045), ["+0.00030", "+0.00017", "+0.00045"]),
        ("rkl", (-0.026, -0.052, -0.001), ["−0.026", "−0.052", "−0.001"]),
        ("rkl", (0.0, 0.0, 0.0), ["0.000", "0.000", "0.000"]),
        ("rkl", (None, 1.5), ["–", "+1.500"]),
        ("agreement", (-0.0025, -0.0035, -0.0014), ["−0.25", "−0.35", "−0.14"]),
        ("agreement", (0.00002, -0.00001), ["+0.0020", "−0.0010"]),
        ("rkl", (1e-12, -1e-12), ["0.000000", "0.000000"]),
        ("rkl", (float("inf"), 0.001), ["–", "+0.001"]),
    ],
)  # fmt: skip
def test_by_hand(key: str, values: tuple[float | None, ...], shown: list[str]) -> None:
    metric = METRICS[key].finer.fine_enough(*values)
    assert [metric.show(value, signed=True) for value in values] == shown


@given(st.sampled_from(sorted(METRICS)), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4))
def test_the_largest_has_two_digits_of_its_own(key: str, values: list[float]) -> None:
    metric = METRICS[key].fine_enough(*values)
    assert METRICS[key].digits <= metric.digits <= max(METRICS[key].digits, MOST_DIGITS)
    size = max(map(abs, values)) * metric.scale
    if size >= 10.0 ** (1 - MOST_DIGITS):
        assert abs(round(size, metric.digits) - size) <= 0.05 * size * (1 + 1e-9)
