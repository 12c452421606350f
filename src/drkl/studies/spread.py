"""The 95 % t interval of a mean over a few seeds, for figures; verdicts have their own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import sqrt

from drkl.evaluation.bootstrap import Interval

_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""The 97.5 % quantile of t at 1 to 10 degrees of freedom."""
_Z = 1.959964


def mean_interval(values: Sequence[float]) -> Interval | None:
    """``mean ± t s / sqrt(n)``; None for fewer than two values.

    >>> mean_interval([1.0, 2.0, 3.0])
    (-0.484..., 4.484...)
    """
    if len(values) < 2:
        return None
    mean, half = statistics.fmean(values), _quantile(len(values) - 1) * statistics.stdev(values) / sqrt(len(values))
    return mean - half, mean + half


def _quantile(degrees: int) -> float:
    if degrees <= len(_T):
        return _T[degrees - 1]
    # Cornish and Fisher's expansion, to the fourth digit from here on.
    return _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)
