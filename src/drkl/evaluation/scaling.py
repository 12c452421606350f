"""A temperature on a student's logits, given or fitted on held-out rows, and how it is measured on other rows.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599) chooses T so that softmax(z / T) has the least mean negative
log-likelihood of what was observed. With b = 1 / T and an anchor a = z_y it is a convex function of b, whose
derivatives need no more than the logits once::

    L(b)   = mean[log sum exp(b z) - b a]
    L'(b)  = mean[E_b[z] - a],   L''(b) = mean[Var_b[z]],   E_b and Var_b over softmax(b z)

With a = sum p z in place of z_y it is the forward KL to a teacher p, up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drkl.data.examples import hash_of_id
from drkl.evaluation.config import FITS
from drkl.evaluation.result import Fold, Scaling
from drkl.models.readout import CHUNK, Readout, read_logits
from drkl.processes import ALONE, Share

LOWEST, HIGHEST = 0.05, 20.0
"""A fitted temperature lies in here. A model that is always right has no best one: the lower, the better."""
FOLDS = 2
STEPS = 20
"""Passes over the logits at most; three or four are enough."""
SETTLED = 1e-5
"""The last step of a fit is shorter than this share of T, and its error then of the order of the square."""
AT_ONCE = 16
"""Positions that are worked on together: as many as fit into a processor's cache."""

Slopes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From b `[folds, k]` to the sums over each fold's positions of E_b[z] - a and of Var_b[z], `[folds, k]` each."""


class Fitted(NamedTuple):
    """A temperature, and whether it is the lowest or the highest that was tried."""

    temperature: float
    at_bound: bool = False


class Temperatures(NamedTuple):
    """The temperature of each row `[rows]`, and the account of them."""

    of_rows: np.ndarray
    scaling: Scaling

    @classmethod
    def of(cls, wanted: float | str, row_ids: Sequence[str], fits: Sequence[Fitted]) -> Temperatures:
        """Of what was asked for, and the temperature that each half of the rows is measured with."""
        if wanted not in FITS:
            given = float(wanted)
            return cls(np.full(len(row_ids), given), Scaling(None, [Fold(given, len(row_ids))]))
        halves = halves_of(row_ids)
        sizes = np.bincount(halves, minlength=FOLDS).tolist()
        folds = [
            Fold(fitted.temperature, size, len(row_ids) - size, fitted.at_bound)
            for size, fitted in zip(sizes, fits, strict=True)
        ]
        of_rows = np.array([fitted.temperature for fitted in fits])[halves]
        return cls(of_rows, Scaling("teacher" if wanted == FITS[1] else "labels", folds))

    def to_tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` reads."""
        folds = self.scaling.folds
        return {
            "temperature": torch.tensor([fold.temperature for fold in folds], dtype=torch.float64),
            "at_bound": torch.tensor([fold.at_bound for fold in folds]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], wanted: float | str, row_ids: Sequence[str]) -> Temperatures:
        """The temperatures that ``to_tensors`` gave, of the same rows."""
        columns = (tensors[name].tolist() for name in ("temperature", "at_bound"))
        return cls.of(wanted, row_ids, [Fitted(*fold) for fold in zip(*columns, strict=True)])


def temperatures_of(
    wanted: float | str, row_ids: Sequence[str], states: Readout, teacher: Readout | None, share: Share = ALONE
) -> Temperatures | str:
    """The temperature that each held-out row is measured with, or a sentence that says why there is none.

    Args:
        wanted: a temperature for all; ``fit``, or ``fit_to_teacher``, which needs a teacher. Then the rows are cut into
            two halves by a hash of their ids, and each half is measured with the temperature fitted on the other.
        row_ids: of all rows.
        states: the student's at the positions of this process. Where several ids are one class, the logits that are
            divided are those of the classes.
        teacher: likewise.
        share: of several processes, which divide the positions.
    """
    if wanted not in FITS:
        return Temperatures.of(wanted, row_ids, [])
    if len(row_ids) < FOLDS:
        return "A temperature is fitted on other rows than those that are measured with it, and there is a single row."
    to_teacher = wanted == FITS[1]
    assert teacher is not None or not to_teacher, "a teacher to fit to"
    slopes = _slopes_of(states, teacher if to_teacher else None, halves_of(row_ids), share)
    return Temperatures.of(wanted, row_ids, fit(slopes, FOLDS)[::-1])  # each half with the other's


def halves_of(row_ids: Sequence[str]) -> np.ndarray:
    """0 or 1 for each row: every other one in the order of a hash of their ids."""
    order = sorted(range(len(row_ids)), key=lambda place: hash_of_id(row_ids[place]))
    halves = np.empty(len(row_ids), dtype=np.int64)
    halves[order] = np.arange(len(row_ids)) % FOLDS
    return halves


def fit(slopes: Slopes, folds: int = 1) -> list[Fitted]:
    """The temperature of each fold with the least L(1 / T), in `LOWEST` to `HIGHEST`; 1 where all are as good.

    One pass brackets the minimum. Each further one is at the root of a cubic through both ends of the bracket, in
    log b, until Newton's step from there is short.
    """
    grid = np.geomspace(1 / HIGHEST, 1 / LOWEST, 9)
    grid[4] = 1.0  # the middle of a symmetric range, but for rounding
    found: list[Fitted | None] = [None] * folds
    values = slopes(np.tile(grid, (folds, 1)))
    brackets = [_bracket(grid, *(part[fold] for part in values)) for fold in range(folds)]
    for fold, bracket in enumerate(brackets):
        if isinstance(bracket, Fitted):
            found[fold] = bracket
    for _ in range(STEPS):
        if all(fitted is not None for fitted in found):
            break
        tried = np.array([[1.0 if isinstance(b, Fitted) else math.exp(b.root())] for b in brackets])
        slope, curvature = slopes(tried)
        for fold, bracket in enumerate(brackets):
            if isinstance(bracket, Fitted) or found[fold] is not None:
                continue
            end = _End.at(tried[fold, 0], slope[fold, 0], curvature[fold, 0])
            brackets[fold] = bracket.with_end(end)
            step = -end.slope / end.rise if end.rise > 0 else math.inf
            if abs(step) < SETTLED or end.slope == 0:
                found[fold] = Fitted(1 / math.exp(end.place + (step if end.slope else 0.0)))
    return [
        fitted if fitted is not None else Fitted(1 / math.exp(bracket.root()))  # type: ignore[union-attr]
        for fitted, bracket in zip(found, brackets, strict=True)
    ]


class _End(NamedTuple):
    """The slope at log b = ``place``, and its derivative there, by log b."""

    place: float
    slope: float
    rise: float

    @classmethod
    def at(cls, b: float, slope: float, curvature: float) -> _End:
        return cls(math.log(b), float(slope), float(b * curvature))


class _Bracket(NamedTuple):
    """Two places between which the slope changes its sign from minus to plus."""

    low: _End
    high: _End

    def with_end(self, end: _End) -> _Bracket:
        """The part of it that has the root."""
        return self._replace(low=end) if end.slope < 0 else self._replace(high=end)

    def root(self) -> float:
        """Of the cubic with both ends' values and derivatives, by halving; at least within the bracket."""
        width = self.high.place - self.low.place
        a, b = self.low.slope, self.high.slope
        c, d = self.low.rise * width, self.high.rise * width
        left, right = 0.0, 1.0
        for _ in range(60):
            t = (left + right) / 2
            value = a + t * (c + t * (3 * (b - a) - 2 * c - d + t * (2 * (a - b) + c + d)))
            left, right = (t, right) if value < 0 else (left, t)
        return self.low.place + width * (left + right) / 2


def _bracket(grid: np.ndarray, slope: np.ndarray, curvature: np.ndarray) -> _Bracket | Fitted:
    """The two neighbours on the grid with the minimum between them; the fit itself at an end, and where all is flat."""
    if slope[len(grid) // 2] == 0:
        return Fitted(1.0)
    if slope[0] >= 0:
        return Fitted(HIGHEST, at_bound=True)
    if slope[-1] <= 0:
        return Fitted(LOWEST, at_bound=True)
    above = int(np.argmax(slope > 0))
    low, high = (_End.at(*(float(part[place]) for part in (grid, slope, curvature))) for place in (above - 1, above))
    return _Bracket(low, high)


def _slopes_of(states: Readout, teacher: Readout | None, halves: np.ndarray, share: Share) -> Slopes:
    """Slopes over all positions of the rows of each half; a teacher's logits are read once for each pass."""

    def slopes(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def own() -> list[tuple[int, np.ndarray]]:
            sums = []
            for part, logits, teacher_logits, labels in read_logits(states, teacher):
                half = torch.from_numpy(halves)[states.row_index[part]].to(logits.device)
                first = part.start if states.positions is None else int(states.positions[part.start])
                sums.append((first // CHUNK, _chunk_sums(logits, teacher_logits, labels, half, b)))
            return sums

        # In the order of the chunks, whoever computed them.
        chunks = [sums for _, sums in sorted(share.together(own), key=lambda one: one[0])]
        total = np.sum(chunks, axis=0) if chunks else np.zeros((2, *b.shape))
        return total[0], total[1]

    return slopes


@torch.no_grad()
def _chunk_sums(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, half: Tensor, b: np.ndarray
) -> np.ndarray:
    """Sums `[2, folds, k]` of slope and curvature over some positions."""
    sums = np.zeros((2, *b.shape))
    for start in range(0, len(labels), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        p = None if teacher_logits is None else teacher_logits[part]
        values = slopes_at(logits[part], p, labels[part], torch.from_numpy(b).to(logits.device)[half[part]])
        of_fold = torch.nn.functional.one_hot(half[part], len(b)).double().T
        sums += np.stack([(of_fold @ value).cpu().numpy() for value in values])
    return sums


def slopes_at(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """E_b[z] - a and Var_b[z] at positions, `[n, k]` float64; 0 where the loss is infinite at any temperature.

    Args:
        logits: `[n, vocab]`.
        teacher_logits: `[n, vocab]`, to fit to a teacher; else None.
        labels: `[n]`.
        b: `[n, k]`, inverse temperatures.
    """
    centred = logits - logits.amax(-1, keepdim=True)
    # An excluded token has probability 0 at any temperature, and 0 times minus infinity is no number.
    z = centred.masked_fill(centred == -math.inf, 0.0)
    if teacher_logits is None:
        anchor = centred.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    else:
        p = teacher_logits.to(logits.dtype).softmax(-1)
        missed = ((centred == -math.inf) & (p > 0)).any(-1)
        anchor = (p * z).sum(-1).masked_fill(missed, -math.inf)
    counted = anchor != -math.inf
    slopes, curvatures = [], []
    for k in range(b.shape[-1]):
        q = torch.softmax(centred * b[:, k : k + 1].to(logits.dtype), -1)
        q_z = q * z
        mean = q_z.sum(-1)
        slopes.append(torch.where(counted, mean - anchor, 0.0).double())
        curvatures.append(torch.where(counted, (q_z * z).sum(-1) - mean * mean, 0.0).double())
    return torch.stack(slopes, -1), torch.stack(curvatures, -1)
