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


def mix(p: Distribution, q: Distribution, skew: float) -> Distribution:
    """(1 - skew) p + skew q."""
    return [(1 - mpf(skew)) * x + mpf(skew) * y for x, y in zip(p, q, strict=True)]


def _weigh(weight: Any, value: Any) -> Any:
    return weight * value if weight else mpf(0)


def symmetric_kl(q: Distribution, p: Distribution, forward_weight: float = 0.5) -> Any:
    w = mpf(forward_weight)
    return _weigh(w, kl(p, q)) + _weigh(1 - w, kl(q, p))


def gjs(q: Distribution, p: Distribution, beta: float = 0.5) -> Any:
    m = mix(q, p, beta)
    return mpf(beta) * kl(p, m) + (1 - mpf(beta)) * kl(q, m)


def sfkl(q: Distribution, p: Distribution, skew: float = 0.1) -> Any:
    return kl(p, mix(q, p, skew))


def srkl(q: Distribution, p: Distribution, skew: float = 0.1) -> Any:
    return kl(q, mix(p, q, skew))


def tvd(q: Distribution, p: Distribution) -> Any:
    return mp.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def akl(q: Distribution, p: Distribution, mu: float = 0.5) -> Any:
    order = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: -p[i])
    head, mass = [], mpf(0)
    for i in order:
        if mu < 1 and mass >= mpf(mu):  # no digits are enough to see that all but a class of 1e-8000 is less than 1
            break
        head.append(i)
        mass += p[i]
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    g_head, g_all = mp.fsum(gaps[i] for i in head), mp.fsum(gaps)
    w = g_head / g_all if g_all > 0 else mpf("0.5")
    return _weigh(w, kl(p, q)) + _weigh(1 - w, kl(q, p))


def todi(q: Distribution, p: Distribution) -> Any:
    """sigma(log p/q) = p / (p + q)."""
    if kl(p, q) == INF or kl(q, p) == INF:
        return INF
    pairs = [(x, y) for x, y in zip(p, q, strict=True) if x > 0]
    return mp.fsum((x / (x + y)) * x * mp.log(x / y) + (y / (x + y)) * y * mp.log(y / x) for x, y in pairs)


def ab(q: Distribution, p: Distribution, alpha: float = 0.2, beta: float = 0.7) -> Any:
    """As published, limits included; a class without mass on either side adds nothing."""
    a, b = mpf(alpha), mpf(beta)
    return mp.fsum(_ab_term(x, y, a, b) for x, y in zip(p, q, strict=True) if x > 0 or y > 0)


def _ab_term(p: Any, q: Any, a: Any, b: Any) -> Any:
    needs_both = a + b == 0
    if (p == 0 and (a == 0 or needs_both)) or (q == 0 and (b == 0 or needs_both)):
        return INF
    if a == 0 and b == 0:
        return (mp.log(p) - mp.log(q)) ** 2 / 2
    if a + b == 0:
        return (mp.log(q**a / p**a) + (p / q) ** a - 1) / a**2
    if a == 0:
        return ((q**b * mp.log(q**b / p**b) if q > 0 else 0) - q**b + p**b) / b**2
    if b == 0:
        return ((p**a * mp.log(p**a / q**a) if p > 0 else 0) - p**a + q**a) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


PARTS: dict[str, Divergence] = {
    "fkl": fkl,
    "rkl": rkl,
    "symmetric_kl": symmetric_kl,
    "gjs": gjs,
    "sfkl": sfkl,
    "srkl": srkl,
    "tvd": tvd,
    "akl": akl,
    "ab": ab,
    "todi": todi,
}


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
