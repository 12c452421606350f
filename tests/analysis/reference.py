"""The two terms of every objective straight from their equations, their gradients by differences with 40 digits.

q is the student, p the teacher, t the target class; ``held`` is the student at which weights without a gradient are
taken. Imports nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpmath import mp, mpf  # type: ignore[import-untyped]
from scipy.special import logsumexp

from tests.objectives import reference
from tests.objectives.reference import Distribution, kl, mix, split

Pair = tuple[Any, Any]
Terms = Callable[[Distribution, Distribution, int, Distribution], Pair]
"""(q, p, t, held) -> (target term, tail term)."""


def chained(a: Distribution, b: Distribution, t: int) -> Pair:
    """KL of the pairs, and (1 - a_t) KL of the tails."""
    (pair_a, tail_a), (pair_b, tail_b) = split(a, t), split(b, t)
    return kl(pair_a, pair_b), pair_a[1] * kl(tail_a, tail_b) if pair_a[1] else mpf(0)


def average(weight: Any, first: Pair, second: Pair) -> Pair:
    w = mpf(weight)
    return w * first[0] + (1 - w) * second[0], w * first[1] + (1 - w) * second[1]


def both_kls(weight: Any, q: Distribution, p: Distribution, t: int) -> Pair:
    return average(weight, chained(p, q, t), chained(q, p, t))


def gjs(q: Distribution, p: Distribution, t: int, beta: float) -> Pair:
    m = mix(q, p, beta)
    return average(beta, chained(p, m, t), chained(q, m, t))


def akl_weight(q: Distribution, p: Distribution, mu: float) -> Any:
    """That of the forward KL: the head's share of sum |p - q|."""
    gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
    mass, head = mpf(0), mpf(0)
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mu < 1 and mass >= mpf(mu):
            break
        mass += p[i]
        head += gaps[i]
    return head / mp.fsum(gaps) if any(gaps) else mpf("0.5")


def summands(one: Callable[[Any, Any, Any], Any], q: Distribution, p: Distribution, t: int, held: Distribution) -> Pair:
    parts = [one(x, y, z) for x, y, z in zip(q, p, held, strict=True)]
    return parts[t], mp.fsum(part for i, part in enumerate(parts) if i != t)


def todi_term(q: Any, p: Any, held: Any) -> Any:
    return p / (p + held) * p * mp.log(p / q) + held / (p + held) * q * mp.log(q / p)


def ab_term(alpha: float, beta: float) -> Callable[[Any, Any, Any], Any]:
    return lambda q, p, held: reference._ab_term(p, q, mpf(alpha), mpf(beta))


def whole(name: str, **params: Any) -> Callable[[Distribution, Distribution, Distribution], Any]:
    """The value of a divergence as a function of (q, p, held)."""
    if name in ("akl", "todi"):
        return lambda q, p, held: mp.fsum(terms(name, **params)(q, p, 0, held))
    return lambda q, p, held: reference.PARTS[name](q, p, **params)


NAMES = frozenset("ce rkl fkl symmetric_kl akl gjs sfkl srkl tvd ab todi dkd drkl decoupled".split())
"""The objectives whose two terms have equations here."""


def terms(name: str, **params: Any) -> Terms:
    """Of the objective of this name with these parameters, all of them given."""
    plain: dict[str, Terms] = {
        "ce": lambda q, p, t, held: (-mp.log(q[t]), mpf(0)),
        "rkl": lambda q, p, t, held: chained(q, p, t),
        "fkl": lambda q, p, t, held: chained(p, q, t),
        "symmetric_kl": lambda q, p, t, held: both_kls(params["forward_weight"], q, p, t),
        "akl": lambda q, p, t, held: both_kls(akl_weight(held, p, params["mu"]), q, p, t),
        "gjs": lambda q, p, t, held: gjs(q, p, t, params["beta"]),
        "sfkl": lambda q, p, t, held: chained(p, mix(q, p, params["skew"]), t),
        "srkl": lambda q, p, t, held: chained(q, mix(p, q, params["skew"]), t),
        "tvd": lambda q, p, t, held: summands(lambda x, y, _: abs(x - y) / 2, q, p, t, held),
        "ab": lambda q, p, t, held: summands(ab_term(params["alpha"], params["beta"]), q, p, t, held),
        "todi": lambda q, p, t, held: summands(todi_term, q, p, t, held),
    }
    return plain[name]


def decoupled_terms(
    on_target: Callable[..., Any],
    on_tail: Callable[..., Any],
    gamma: float,
    target_weight: float = 1.0,
    weight: str = "constant",
    skew: float = 0.0,
) -> Terms:
    def both(q: Distribution, p: Distribution, t: int, held: Distribution) -> Pair:
        compared = mix(p, q, skew) if skew else p
        (pair_q, tail_q), (pair_p, tail_p), (pair_h, tail_h) = split(q, t), split(compared, t), split(held, t)
        w = reference.tail_weight(weight, gamma, held, p, t)
        return mpf(target_weight) * on_target(pair_q, pair_p, pair_h), w * on_tail(tail_q, tail_p, tail_h)

    return both


def gradients(
    both: Terms, student: Sequence[float], teacher: Sequence[float], t: int, temperature: float
) -> np.ndarray:
    """`[2, vocab]`, d term / d student's logits, by central differences."""
    step = mpf(10) ** -12
    p, held = reference.softmax(teacher, temperature), reference.softmax(student, temperature)

    def at(j: int, shift: Any) -> Pair:
        logits = [mpf(float(z)) + (shift if i == j else 0) for i, z in enumerate(student)]
        masses = [mp.exp(z / mpf(temperature)) for z in logits]
        total = mp.fsum(masses)
        return both([mass / total for mass in masses], p, t, held)

    columns = []
    for j in range(len(student)):
        up, down = at(j, step), at(j, -step)
        columns.append([float((a - b) / (2 * step)) for a, b in zip(up, down, strict=True)])
    return np.array(columns).T


def numbers(student: np.ndarray, teacher: np.ndarray, t: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    """q_t, 1 - q_t, p_t, B, K, D `[n]` and the tails `[n, vocab]`, in float64 from logits `[n, vocab]`."""
    rows = np.arange(len(t))
    found: dict[str, np.ndarray] = {}
    odds, tails = [], []
    for name, logits in (("q", student / temperature), ("p", teacher / temperature)):
        rest = logits.copy()
        rest[rows, t] = -np.inf
        log_rest = logsumexp(rest, axis=-1)
        odds.append(logits[rows, t] - log_rest)
        tails.append(rest - log_rest[:, None])
        found[f"{name}_t"], found[f"rest_{name}"] = (
            np.exp(-np.logaddexp(0, -odds[-1])),
            np.exp(-np.logaddexp(0, odds[-1])),
        )
        found[f"tail_{name}"] = np.exp(tails[-1])
    s, u = odds
    inside = np.isfinite(tails[0])
    found["log_ratio"] = np.where(inside, np.where(inside, tails[0], 0) - np.where(inside, tails[1], 0), 0)
    found["D"] = s - u
    found["K"] = (found["tail_q"] * found["log_ratio"]).sum(-1)
    found["B"] = found["q_t"] * (np.logaddexp(0, -u) - np.logaddexp(0, -s))
    found["B"] += found["rest_q"] * (np.logaddexp(0, u) - np.logaddexp(0, s))
    return found


WEIGHTS = {
    "constant": lambda gamma, at: gamma,
    "student": lambda gamma, at: at["rest_q"],
    "teacher": lambda gamma, at: at["rest_p"],
    "floor": lambda gamma, at: np.maximum(gamma, at["rest_q"]),
}


def equations(
    name: str, student: np.ndarray, teacher: np.ndarray, t: np.ndarray, temperature: float, **params: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients `[n, vocab]` of the target term and of the tail term, from logits `[n, vocab]`.

    At T = 1, with d_j = log q^_j/p^_j and j other than t, each is (entry at t; entry at j):

        B                   q_t (1-q_t) D;    -q_t q_j D
        (1-q_t) K           -q_t (1-q_t) K;   q_j (d_j - (1-q_t) K)
        w K                 0;                w q^_j (d_j - K)
        KL(b_p || b_q)      q_t - p_t;        -q^_j (q_t - p_t)
        w KL(p^ || q^)      0;                w (q^_j - p^_j)
        -log q_t            q_t - 1;          q_j

    ``name`` is `rkl`, `fkl`, `symmetric_kl`, `akl`, `ce`, or `decoupled` with ``on_target`` and ``on_tail`` `rkl` or
    `fkl`.
    """
    at = {key: value if value.ndim == 2 else value[:, None] for key, value in
          numbers(student, teacher, t, temperature).items()}  # fmt: skip
    is_target = np.arange(student.shape[1]) == t[:, None]
    tails = {"rkl": at["tail_q"] * (at["log_ratio"] - at["K"]), "fkl": at["tail_q"] - at["tail_p"]}
    # q_t - p_t, from whichever side is small.
    gap = np.where(at["q_t"] > 0.5, at["rest_p"] - at["rest_q"], at["q_t"] - at["p_t"])
    pushes = {"rkl": at["q_t"] * at["rest_q"] * at["D"], "fkl": gap, "ce": -at["rest_q"]}
    targets = {key: np.where(is_target, push, -push * at["tail_q"]) for key, push in pushes.items()}
    chained = {
        "rkl": np.where(is_target, -at["q_t"] * at["rest_q"] * at["K"],
                        at["rest_q"] * at["tail_q"] * (at["log_ratio"] - at["rest_q"] * at["K"])),
        "fkl": at["rest_p"] * tails["fkl"],
        "ce": np.zeros_like(student),
    }  # fmt: skip
    if name == "decoupled":
        weight = WEIGHTS[params["weight"]](params["gamma"], at)
        both = params["target_weight"] * targets[params["on_target"]], weight * tails[params["on_tail"]]
    elif name in ("symmetric_kl", "akl"):
        w: Any = params.get("forward_weight")
        if name == "akl":
            pairs = [[reference.softmax(row.tolist(), temperature) for row in logits] for logits in (student, teacher)]
            w = np.array([[float(akl_weight(q, p, params["mu"]))] for q, p in zip(*pairs, strict=True)])
        both = tuple(w * part["fkl"] + (1 - w) * part["rkl"] for part in (targets, chained))  # type: ignore[assignment]
    else:
        both = targets[name], chained[name]
    return both[0] / temperature, both[1] / temperature
