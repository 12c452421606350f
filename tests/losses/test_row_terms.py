"""The row kernel's elementary functions, to the last bits of fp32 and without a device library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this system")
import triton
import triton.language as tl

from drkl.losses import row_terms
from tests.losses.interpreter import patched_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with patched_once():
        yield


@triton.jit
def apply(pointer, result_pointer, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, BLOCK)
    tl.store(result_pointer + lanes, FUNCTION(tl.load(pointer + lanes)))


SMALL = [0.0, 1e-30, 1e-8, 1e-4, 0.01, 0.2, 0.249, 0.2501, 0.5, 0.7, 1.0]
LARGE = [*SMALL, 2.0, 8.0, 15.0, 30.0, 80.0]
SIGNED = [*(-x for x in LARGE), *LARGE]
FUNCTIONS: list[tuple[Any, list[float], Callable[[Any], Any]]] = [
    (row_terms.log1p, SMALL, np.log1p),
    (row_terms.log_sigmoid, SIGNED, lambda x: -np.logaddexp(0.0, -x)),
    (row_terms.sigmoid, SIGNED, lambda x: 1.0 / (1.0 + np.exp(-x))),
    (row_terms.decay, LARGE, lambda t: np.where(t == 0, 1.0, -np.expm1(-t) / np.where(t == 0, 1.0, t))),
    (row_terms.tanh, [*SIGNED, np.inf, -np.inf], np.tanh),
]


@pytest.mark.parametrize(("function", "places", "exact"), FUNCTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_relative_error(function: Any, places: list[float], exact: Callable[[Any], Any]) -> None:
    padded = torch.zeros(64)
    padded[: len(places)] = torch.tensor(places)
    result = torch.zeros(64, device=DEVICE)
    apply[(1,)](padded.to(DEVICE), result, FUNCTION=function, BLOCK=64)
    expected = exact(padded.double().numpy())
    # Some ten operations, and an exponential of a number that was rounded itself.
    size = np.maximum(1.0, np.minimum(np.abs(padded.double().numpy()), 100.0))
    assert (np.abs(result.cpu().double().numpy() - expected) <= 8 * EPS * size * np.abs(expected)).all()


def test_a_series_of_the_exponential() -> None:
    places = np.linspace(-0.5, 0.5, 64)
    result = torch.zeros(64, device=DEVICE)
    apply[(1,)](torch.from_numpy(places).float().to(DEVICE), result, FUNCTION=row_terms.second_rise, BLOCK=64)
    exact = [float(sum(x**k / float(np.prod(range(1, k + 3))) for k in range(25))) for x in places]
    np.testing.assert_allclose(result.cpu(), exact, rtol=4 * EPS)
