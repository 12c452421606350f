"""Values and gradients of every objective for many positions at once, from the equations, in numpy. No import of drkl.

`reference` has 40 digits and lists; here are arrays `[n, vocab]` of numpy's widest floats, in logs, so that no mass
underflows. A gradient is written class by class: with h_i = d value / d log q_i as if the classes were free, that on
the logits is h_j - q_j sum h. Beside each number stands how far rounding may carry it: the sum of the sizes of all that
is added up, and of what one unit in a log-probability changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.objectives import reference

Array = NDArray[np.longdouble]
WIDE = np.longdouble
INF = WIDE(np.inf)
TINY = WIDE(np.finfo(np.float32).tiny)


def wide(logits: Any) -> Array:
    return np.asarray(logits, dtype=np.float64).astype(WIDE)


def log_sum(logits: Array) -> Array:
    """log sum exp `[n, 1]`; -inf where nothing is left."""
    top = logits.max(-1, keepdims=True)
    base = np.where(np.isinf(top), 0, top)
    with np.errstate(divide="ignore"):
        return base + np.log(np.exp(logits - base).sum(-1, keepdims=True))


def log_softmax(logits: Array) -> Array:
    """Exact near 0 too: of a class with nearly all the mass, what the others have is not rounded away."""
    top = logits.argmax(-1)[:, None]
    highest = np.take_along_axis(logits, top, -1)
    others = np.exp(logits - highest)
    np.put_along_axis(others, top, 0, -1)
    return logits - highest - np.log1p(others.sum(-1, keepdims=True))


def minus(a: Array, b: Array) -> Array:
    """a - b of logs, 0 where both exclude a class."""
    both = np.isneginf(a) & np.isneginf(b)
    return np.where(both, 0, a) - np.where(both, 0, b)


def times(mass: Array, factor: Array) -> Array:
    """mass * factor, 0 where there is no mass."""
    return mass * np.where(mass == 0, 0, factor)


def mix(log_a: Array, log_b: Array, weight_a: float) -> Array:
    with np.errstate(divide="ignore"):
        return np.logaddexp(log_a + np.log(WIDE(weight_a)), log_b + np.log1p(-WIDE(weight_a)))


@dataclass
class Classes:
    """A divergence class by class: the terms, their slopes by log q and by log p, and what the slopes may change by."""

    term: Array
    slope: Array
    teacher_slope: Array
    second: Array

    @property
    def size(self) -> Array:
        """How much rounding there is in each class, in units of a log-probability's error."""
        parts = (self.term, self.slope, self.teacher_slope, self.second)
        return np.asarray(sum(np.where(np.isfinite(part), np.abs(part), 0) for part in parts))


def _kl_classes(log_a: Array, log_b: Array) -> tuple[Array, Array, Array]:
    """The terms of KL(a || b), and their slopes by log a and by log b."""
    a, ratio = np.exp(log_a), minus(log_a, log_b)
    # A class that b excludes is infinite however little a has; one that a excludes has no term.
    term = np.where(np.isneginf(log_a), 0, np.where(np.isneginf(log_b), INF, times(a, ratio)))
    return term, times(a, np.where(np.isinf(ratio), 0, ratio) + 1), -a


def _fkl(lq: Array, lp: Array) -> Classes:
    term, by_teacher, by_student = _kl_classes(lp, lq)
    return Classes(term, by_student, by_teacher, np.exp(lq) + np.exp(lp))


def _rkl(lq: Array, lp: Array) -> Classes:
    term, by_student, by_teacher = _kl_classes(lq, lp)
    return Classes(term, by_student, by_teacher, np.exp(lq) + np.exp(lp))


def _add(*parts: tuple[Any, Classes]) -> Classes:
    fields = ("term", "slope", "teacher_slope", "second")
    return Classes(*(sum(w * getattr(c, f) for w, c in parts if np.any(w != 0)) for f in fields))  # type: ignore[arg-type]


def _symmetric_kl(lq: Array, lp: Array, forward_weight: float = 0.5) -> Classes:
    w = WIDE(forward_weight)
    return _add((w, _fkl(lq, lp)), (1 - w, _rkl(lq, lp)))


def _from_mixture(log_a: Array, log_b: Array, weight_a: float) -> tuple[Array, Array, Array]:
    """KL(a || m), m = w a + (1 - w) b: the terms and the slopes by log a and log b."""
    w = WIDE(weight_a)
    if weight_a == 0:
        return _kl_classes(log_a, log_b)
    a, b, log_m = np.exp(log_a), np.exp(log_b), mix(log_a, log_b, weight_a)
    ratio = np.where(np.isneginf(log_a), 0, minus(log_a, log_m))
    inside = np.where(np.isneginf(log_m), 0, np.exp(minus(log_a, log_m)))  # a / m
    return times(a, ratio), times(a, ratio + 1 - w * inside), -(1 - w) * b * inside


def _sfkl(lq: Array, lp: Array, skew: float = 0.1) -> Classes:
    term, by_teacher, by_student = _from_mixture(lp, lq, skew)
    return Classes(term, by_student, by_teacher, np.exp(lq) + np.exp(lp))


def _srkl(lq: Array, lp: Array, skew: float = 0.1) -> Classes:
    term, by_student, by_teacher = _from_mixture(lq, lp, skew)
    return Classes(term, by_student, by_teacher, np.exp(lq) + np.exp(lp))


def _gjs(lq: Array, lp: Array, beta: float = 0.5) -> Classes:
    return _add((WIDE(beta), _sfkl(lq, lp, beta)), (1 - WIDE(beta), _srkl(lq, lp, 1 - WIDE(beta))))


def _tvd(lq: Array, lp: Array) -> Classes:
    q, p = np.exp(lq), np.exp(lp)
    sign = np.sign(minus(lq, lp))
    return Classes(np.abs(q - p) / 2, sign * q / 2, -sign * p / 2, q + p)


def _todi(lq: Array, lp: Array) -> Classes:
    forward, reverse, ratio = _fkl(lq, lp), _rkl(lq, lp), minus(lp, lq)
    weight = 1 / (1 + np.exp(-np.clip(ratio, -11000, 11000)))  # sigma(log p / q)
    both = Classes(*(np.zeros_like(lq) for _ in range(4)))
    for w, part in ((weight, forward), (1 - weight, reverse)):
        for name in ("term", "slope", "teacher_slope", "second"):
            setattr(both, name, getattr(both, name) + times(w, getattr(part, name)))
    both.term = np.where(np.isinf(forward.term) | np.isinf(reverse.term), INF, both.term)
    return both


def _ab(lq: Array, lp: Array, alpha: float = 0.2, beta: float = 0.7) -> Classes:
    """As published, with 40 digits where the published form cancels."""
    a, b = WIDE(alpha), WIDE(beta)
    both, either = np.isneginf(lq) & np.isneginf(lp), np.isneginf(lq) | np.isneginf(lp)
    z, y = np.where(either, 0, lq), np.where(either, 0, lp)
    if alpha + beta == 0 or 0 < min(alpha, beta) < 1e-2 or alpha + beta < 1e-1:
        term, slope, teacher_slope = _ab_with_many_digits(z, y, alpha, beta)
    else:
        big_p, big_q, middle = np.exp((a + b) * y), np.exp((a + b) * z), np.exp(a * y + b * z)
        slope = big_q * (z - y) if a == 0 else (big_q - middle) / a
        teacher_slope = big_p * (y - z) if b == 0 else (big_p - middle) / b
        if a == 0:
            term = (big_q * b * (z - y) - big_q + big_p) / b**2
        elif b == 0:
            term = (big_p * a * (y - z) - big_p + big_q) / a**2
        else:
            term = (a / (a + b) * big_p + b / (a + b) * big_q - middle) / (a * b)
    alone = [(np.isneginf(lp), lq, a), (np.isneginf(lq), lp, b)]
    for excluded, log, exponent in alone:
        none = INF if a + b <= 0 or exponent <= 0 else None
        value = np.exp((a + b) * np.where(np.isneginf(log), 0, log)) / (1 if none else exponent * (a + b))
        term = np.where(excluded, INF if none else value, term)
    q_alone, nothing = np.isneginf(lp) & ~both, np.zeros_like(lq)
    scaled = np.exp((a + b) * np.where(np.isneginf(lq), 0, lq)) / (a if a > 0 else 1)
    slope = np.where(either, np.where(q_alone, scaled, 0), slope)
    second = np.exp(np.clip((a + b) * np.maximum(z, y), -11000, 11000))
    return Classes(*(np.where(both, nothing, x) for x in (term, slope, np.where(either, 0, teacher_slope), second)))


def _ab_with_many_digits(lq: Array, lp: Array, alpha: float, beta: float) -> tuple[Array, Array, Array]:
    mp, mpf = reference.mp, reference.mpf
    a, b = mpf(alpha), mpf(beta)

    def one(z: Any, y: Any) -> tuple[float, float, float]:
        # To float64 and what that leaves: mpmath does not read numpy's widest floats.
        z, y = (mpf(float(x)) + mpf(float(x - WIDE(float(x)))) for x in (z, y))
        term = reference._ab_term(mp.exp(y), mp.exp(z), a, b)
        middle = mp.exp(a * y + b * z)
        slope = (mp.exp((a + b) * z) - middle) / a if a else mp.exp(b * z) * (z - y)
        other = (mp.exp((a + b) * y) - middle) / b if b else mp.exp(a * y) * (y - z)
        return tuple(float(x) for x in (term, slope, other))  # type: ignore[return-value]

    found = np.frompyfunc(one, 2, 1)(lq, lp)
    most = WIDE(np.finfo(np.float64).max) * 2  # finite, and beyond any format that is tested
    return tuple(np.array([[x[i] for x in row] for row in found], WIDE).clip(-most, most) for i in range(3))  # type: ignore[return-value]


PARTS: dict[str, Callable[..., Classes]] = {
    "fkl": _fkl,
    "rkl": _rkl,
    "symmetric_kl": _symmetric_kl,
    "gjs": _gjs,
    "sfkl": _sfkl,
    "srkl": _srkl,
    "tvd": _tvd,
    "todi": _todi,
    "ab": _ab,
}
