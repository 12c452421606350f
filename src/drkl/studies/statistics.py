"""Verdicts over training seeds: the paired t-test, and Holm's correction of the comparisons named before the runs.

A comparison has for each seed a cell x and a baseline y that began from the same weights. With d = x - y of n seeds::

    t = mean(d) / (s / sqrt(n)),   s^2 = sum (d - mean(d))^2 / (n - 1),   n - 1 degrees of freedom

s is the comparison's own: one cell whose runs vary more moves no other comparison. Which of two is better is decided by
the distance from the ideal (`drkl.evaluation.declared.Metric.distance`), which is the value itself, or its negative,
where lower or higher is better.

Every function takes arrays of many studies at once; of one study they have no dimension but that of the seeds. The
error rates of just these functions are simulated: docs/results/study-errors.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHA = 0.05
"""The share of true null hypotheses that may be decided: of each comparison, or of a family that has one."""
MIN_PAIRS = 2
MOST_SEEDS = 10_000
"""More seeds than these are not said to be needed."""
_ROUNDING = 16 * np.finfo(np.float64).eps
"""Differences that vary less than this share of the values are all one."""


@dataclass(frozen=True)
class PairedT:
    """The paired t-test of numbers over seeds; every array has a number for each study, NaN where there is none."""

    mean: np.ndarray
    sd: np.ndarray
    low: np.ndarray
    """The lower end of the 95 % interval of the mean."""
    high: np.ndarray
    t: np.ndarray
    p: np.ndarray
    """Two-sided."""


@dataclass(frozen=True)
class Compared:
    """A comparison over seeds, before it is decided; every array has a number for each study."""

    seeds: int
    difference: PairedT
    """The metric's own values, cell minus baseline."""
    distance: PairedT | None
    """The distances from the ideal, cell minus baseline; below 0 the cell is better. None without an ideal."""
    is_still: np.ndarray
    """Whether the seed moves neither side, so that it replicates nothing."""

    @property
    def deciding(self) -> PairedT:
        """The test that decides: of the distance, or of the values where there is no ideal."""
        return self.difference if self.distance is None else self.distance


def compared(
    cell: np.ndarray, baseline: np.ndarray, far_cell: np.ndarray | None = None, far_baseline: np.ndarray | None = None
) -> Compared:
    """Return the paired tests of a cell and its baseline.

    Args:
        cell: values by seed, `[..., seeds]`.
        baseline: likewise, the same seeds in the same order.
        far_cell: distances of the cell from the ideal, likewise; None where there is no ideal.
        far_baseline: those of the baseline.
    """
    known = [values for values in (cell, baseline, far_cell, far_baseline) if values is not None]
    scale = np.max([np.abs(values).max(-1, initial=0) for values in known], axis=0)
    far = None
    if far_cell is not None and far_baseline is not None:
        far = paired_t(far_cell - far_baseline, scale)
    still = np.full(cell.shape[:-1], cell.shape[-1] >= MIN_PAIRS)
    for values in (cell, baseline) if cell.shape[-1] else ():
        still &= np.ptp(values, axis=-1) <= _ROUNDING * scale
    return Compared(cell.shape[-1], paired_t(cell - baseline, scale), far, still)


def paired_t(differences: np.ndarray, scale: np.ndarray | float = 0.0) -> PairedT:
    """Return the t-test of differences `[..., seeds]` against 0.

    Differences that are 0 in every seed have the interval [0, 0] and p = 1. Those that are all one other number have
    neither interval nor p: from no spread nothing follows for further seeds.

    Args:
        differences: by seed.
        scale: the largest magnitude of the values that were subtracted; what varies by less than its rounding does not.
    """
    n = differences.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = differences.mean(-1) if n else np.full(differences.shape[:-1], np.nan)
        if n < MIN_PAIRS:
            none = np.full(differences.shape[:-1], np.nan)
            return PairedT(mean, none, none, none, none, none)
        sd = differences.std(-1, ddof=1)
        t = mean / (sd / np.sqrt(n))
        half = critical_t(n) * sd / np.sqrt(n)
    flat = sd <= _ROUNDING * np.asarray(scale)
    zero = flat & (np.abs(mean) <= _ROUNDING * np.asarray(scale))
    t = np.where(zero, 0.0, np.where(flat, np.nan, t))
    half = np.where(zero, 0.0, np.where(flat, np.nan, half))
    return PairedT(mean, np.where(flat, 0.0, sd), mean - half, mean + half, t, 2 * _survival(np.abs(t), n - 1))


def holm(p: np.ndarray, size: int | None = None) -> np.ndarray:
    """Return the p-values after Holm's correction, over the last dimension.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than the one before. NaN is a comparison that
    cannot be made yet: it stays NaN, and counts as one with p = 1.

    Args:
        p: `[..., comparisons]`.
        size: of the family, at least the number of comparisons; default that number.
    """
    many = p.shape[-1] if size is None else size
    assert many >= p.shape[-1], "a family has all its comparisons"
    order = np.argsort(np.where(np.isnan(p), np.inf, p), axis=-1, kind="stable")
    ascending = np.take_along_axis(p, order, -1)
    steps = np.fmax.accumulate(ascending * (many - np.arange(p.shape[-1])), axis=-1)
    adjusted = np.empty_like(p, dtype=np.float64)
    np.put_along_axis(adjusted, order, np.minimum(steps, 1.0), -1)
    return np.where(np.isnan(p), np.nan, adjusted)


def decide(of: Compared, p_holm: np.ndarray | None = None, smallest: float | None = None) -> np.ndarray:
    """Return the outcome of a comparison in each study, as text.

    Args:
        of: the comparison.
        p_holm: its corrected p-values; None of a comparison that is not primary, which its own 95 % interval decides.
        smallest: the difference below which both count as equal; None: they never do.
    """
    outcome = np.full(of.difference.mean.shape, "undecided", dtype="<U13")
    test = of.distance
    with np.errstate(invalid="ignore"):
        if test is not None:
            found = (test.low > 0) | (test.high < 0) if p_holm is None else p_holm <= ALPHA
            outcome[found & (test.mean < 0)] = "better"
            outcome[found & (test.mean > 0)] = "worse"
        if smallest is not None:
            outcome[(of.difference.low >= -smallest) & (of.difference.high <= smallest)] = "no difference"
    outcome[of.is_still] = "undecided"
    return outcome


def decide_family(
    family: Sequence[Compared | None], smallest: Sequence[float | None] | None = None, size: int | None = None
) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
    """Return the outcomes and the corrected p-values of the primary comparisons of a study.

    Args:
        family: the comparisons; None is one that cannot be made yet.
        smallest: by comparison, as `decide` takes it.
        size: of the family, as `holm` takes it.
    """
    bounds = [None] * len(family) if smallest is None else smallest
    known = [one for one in family if one is not None]
    if not known:
        return [None] * len(family), [None] * len(family)
    # A comparison whose seeds replicate nothing, or without an ideal, is never decided: it has no p-value to correct.
    shape = known[0].difference.mean.shape
    none = np.full(shape, np.nan)
    p = [none if one is None or one.distance is None else np.where(one.is_still, np.nan, one.distance.p)
         for one in family]  # fmt: skip
    adjusted = holm(np.stack(p, axis=-1), size)
    corrected = [None if one is None else adjusted[..., place] for place, one in enumerate(family)]
    outcomes = [
        None if one is None or own is None else decide(one, own, bound)
        for one, own, bound in zip(family, corrected, bounds, strict=True)
    ]
    return outcomes, corrected


def critical_t(seeds: int, comparisons: int = 1) -> float:
    """Return the |t| over ``seeds`` pairs that decides one of so many comparisons at the first step of Holm's.

    >>> [round(critical_t(*args), 3) for args in ((3, 1), (5, 1), (3, 6), (5, 6))]
    [4.303, 2.776, 10.886, 4.851]
    """
    from scipy.special import stdtrit

    return float(stdtrit(seeds - 1, 1 - ALPHA / (2 * comparisons)))


def seeds_needed(mean: float, sd: float, comparisons: int = 1) -> int | None:
    """Return the least number of seeds at which this mean and standard deviation would be decided.

    That is no promise: with the true mean and standard deviation as observed, about half of all studies of so many
    seeds decide.

    Args:
        mean: of the differences that decide.
        sd: their standard deviation, with n - 1.
        comparisons: of the family.

    Returns:
        None where the mean is 0, or `MOST_SEEDS` would not do.
    """
    if not (mean and np.isfinite(mean) and np.isfinite(sd)):
        return None
    return _least(lambda seeds: abs(mean) * seeds**0.5 >= critical_t(seeds, comparisons) * sd)


def seeds_to_equal(mean: float, sd: float, smallest: float) -> int | None:
    """Return the least number of seeds at which the 95 % interval would lie within ``smallest`` on both sides of 0.

    Arguments and the rest as `seeds_needed`'s.
    """
    if not (np.isfinite(mean) and np.isfinite(sd)):
        return None
    return _least(lambda seeds: (smallest - abs(mean)) * seeds**0.5 >= critical_t(seeds) * sd)


def _least(decides: Callable[[int], bool]) -> int | None:
    """The least number of seeds that decides; every larger one does too, as t falls and the root grows."""
    low, high = MIN_PAIRS - 1, MOST_SEEDS
    if not decides(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def _survival(t: np.ndarray, degrees: int) -> Any:
    from scipy.special import stdtr

    return stdtr(degrees, -t)
