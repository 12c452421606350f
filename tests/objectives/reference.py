"""The objectives straight from their equations, with 40 digits and any exponent. Imports nothing of the library.

q is the student, p the teacher, t the target class. A distribution is a list of mpmath numbers; a tail without mass is
all zeros. Nothing here is clever: no log-space, no special form for confident positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpmath import mp, mpf  # type: ignore[import-untyped]

mp.dps = 40
mp.pretty = True

Distribution = list[Any]
Divergence = Callable[[Distribution, Distribution], Any]
INF = mpf("inf")


def softmax(logits: Sequence[float], temperature: float = 1.0) -> Distribution:
    masses = [mp.exp(mpf(float(z)) / mpf(float(temperature))) for z in logits]
    total = mp.fsum(masses)
    return [mass / total for mass in masses]


def kl(a: Distribution, b: Distribution) -> Any:
    """KL(a || b) = sum a log(a / b), with 0 log 0 = 0."""
    if any(x > 0 and y == 0 for x, y in zip(a, b, strict=True)):
        return INF
    return mp.fsum(x * mp.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def fkl(q: Distribution, p: Distribution) -> Any:
    return kl(p, q)


def rkl(q: Distribution, p: Distribution) -> Any:
    return kl(q, p)


def gjs(q: Distribution, p: Distribution) -> Any:
    m = mix(p, q, 0.5)
    return (kl(p, m) + kl(q, m)) / 2


PARTS: dict[str, Divergence] = {"fkl": fkl, "rkl": rkl, "gjs": gjs}


def mix(p: Distribution, q: Distribution, skew: float) -> Distribution:
    """(1 - skew) p + skew q."""
    return [(1 - mpf(skew)) * x + mpf(skew) * y for x, y in zip(p, q, strict=True)]


def split(p: Distribution, t: int) -> tuple[Distribution, Distribution]:
    """The two-class distribution (p_t, 1 - p_t), and the tail renormalised."""
    rest = [x for i, x in enumerate(p) if i != t]
    outside = mp.fsum(rest)
    return [p[t], outside], ([x / outside for x in rest] if outside > 0 else rest)


def tail_divergence(part: Divergence, q_tail: Distribution, p_tail: Distribution) -> Any:
    """0 without a student's tail to compare; reverse KL is +inf where only the teacher's is empty."""
    return part(q_tail, p_tail) if any(q_tail) else mpf(0)


def tail_weight(weight: str, gamma: float, q: Distribution, p: Distribution, t: int) -> Any:
    outside_q, outside_p = split(q, t)[0][1], split(p, t)[0][1]
    return {
        "constant": mpf(gamma),
        "student": outside_q,
        "teacher": outside_p,
        "floor": max(mpf(gamma), outside_q),
    }[weight]


def decoupled(
    q: Distribution,
    p: Distribution,
    t: int,
    *,
    on_target: str = "rkl",
    on_tail: str = "rkl",
    gamma: float = 0.5,
    target_weight: float = 1.0,
    weight: str = "constant",
    skew: float = 0.0,
) -> Any:
    """a F(b_q, b_p) + w G(q^, p^); with a skew, p is the mixture everywhere but in the weight."""
    w = tail_weight(weight, gamma, q, p, t)
    compared = mix(p, q, skew) if skew else p
    (b_q, q_tail), (b_p, p_tail) = split(q, t), split(compared, t)
    first = mpf(target_weight) * PARTS[on_target](b_q, b_p) if target_weight else mpf(0)
    return first + (w * tail_divergence(PARTS[on_tail], q_tail, p_tail) if w else mpf(0))


def cross_entropy(q: Distribution, label: int) -> Any:
    return -mp.log(q[label]) if q[label] > 0 else INF


def top(logits: Sequence[float]) -> int:
    """The most probable class, the lowest index on ties."""
    values = [float(z) for z in logits]
    return values.index(max(values))


def logit(x: Any, rest: Any) -> Any:
    return mp.log(x) - mp.log(rest)


def parts(q: Distribution, p: Distribution, t: int) -> tuple[Any, Any, Any]:
    """B, K and D of section 1."""
    (b_q, q_tail), (b_p, p_tail) = split(q, t), split(p, t)
    return kl(b_q, b_p), kl(q_tail, p_tail), logit(*b_q) - logit(*b_p)


def rkl_gradient(q: Distribution, p: Distribution) -> list[Any]:
    """q_j [log(q_j / p_j) - RKL]."""
    value = kl(q, p)
    return [a * (mp.log(a / b) - value) for a, b in zip(q, p, strict=True)]


def rkl_target_gradient(q: Distribution, p: Distribution, t: int) -> Any:
    """The same at the target, written as q_t (1 - q_t) (D - K)."""
    _, k, d = parts(q, p, t)
    (q_t, outside), _ = split(q, t)
    return q_t * outside * (d - k)


def drkl_gradient(q: Distribution, p: Distribution, t: int, weight: Any) -> list[Any]:
    """q_t (1 - q_t) D at the target; -q_t q_j D + w q^_j [log(q^_j / p^_j) - K] elsewhere. w gets no gradient."""
    _, k, d = parts(q, p, t)
    (q_t, outside), _ = split(q, t)
    (_, outside_p), _ = split(p, t)
    gradient = []
    for j, (a, b) in enumerate(zip(q, p, strict=True)):
        log_ratio = mp.log((a / outside) / (b / outside_p))
        tail = -q_t * a * d + weight * (a / outside) * (log_ratio - k)
        gradient.append(q_t * outside * d if j == t else tail)
    return gradient
