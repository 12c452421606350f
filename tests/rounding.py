"""How far apart two computations of one number may be: a bound from the arithmetic, the same on every processor."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(terms: int, scale: float | Tensor = 1.0, dtype: torch.dtype = torch.float64) -> float:
    """The most that two sums of ``terms`` numbers, in any order and with any kernel, can differ.

    Each is off by at most (terms - 1) u sum |x| for the unit roundoff u = eps / 2 (Higham, Accuracy and Stability,
    section 4.2), each term by a few u of its own (an exponential, a logarithm, a product). So both sums are within
    (terms + 4) eps of each other, times ``scale``, the sum of the |x| (or their number times the largest).
    """
    return (terms + 4) * torch.finfo(dtype).eps * float(scale)


def assert_near(found: Tensor | None, expected: Tensor | None, terms: int, scale: float | None = None) -> None:
    """Equal up to `rounding`; ``scale`` is that of the largest of both where it is not given."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    dtype = torch.promote_types(found.dtype, expected.dtype)
    finite = [x.detach().abs()[x.detach().isfinite()] for x in (found, expected)]
    largest = max((float(x.max()) for x in finite if x.numel()), default=0.0)
    bound = rounding(terms, max(largest, 1.0) if scale is None else scale, dtype)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=bound)
