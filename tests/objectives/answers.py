"""Whole objectives and losses of `vectors`, with their gradients on the logits and how far rounding may carry both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.objectives.vectors import (
    INF,
    PARTS,
    TINY,
    WIDE,
    Array,
    Classes,
    log_softmax,
    log_sum,
    minus,
    mix,
    times,
    wide,
)


@dataclass
class Answer:
    """What an objective is at each of some positions `[n]`, its gradient `[n, vocab]`, and their sizes.

    A rounding error of e in each log-probability carries the value off by about ``size`` e, the gradient by
    ``grad_size`` e. ``slack`` and ``grad_slack`` are for what jumps: a sign where p = q but for rounding, a token that
    ties with the last of a head but for rounding.
    """

    value: Array
    grad: Array
    size: Array
    grad_size: Array
    slack: Array
    grad_slack: Array

    def times(self, factor: Any) -> Answer:
        factor = np.broadcast_to(np.asarray(factor, dtype=WIDE), self.value.shape)
        return Answer(
            times(factor, self.value),
            factor[:, None] * self.grad,
            *(abs(factor) * x for x in (self.size, self.grad_size, self.slack, self.grad_slack)),
        )

    def open_where(self, rows: NDArray[np.bool_]) -> Answer:
        """Where rounding decides whether the value is infinite at all."""
        return replace(self, slack=np.where(rows, INF, self.slack), grad_slack=np.where(rows, INF, self.grad_slack))

    def __add__(self, other: Answer) -> Answer:
        names = ("value", "grad", "size", "grad_size", "slack", "grad_slack")
        return Answer(*(getattr(self, n) + getattr(other, n) for n in names))


def through_softmax(lq: Array, slope: Array) -> Array:
    """h_j - q_j sum_i h_i, as sum_i (q_i h_j - q_j h_i): nothing cancels where one class has nearly all the mass."""
    q = np.exp(lq)
    if lq.shape[-1] > 100:  # too many pairs; what cancels is small beside the largest of so many
        return slope - q * slope.sum(-1, keepdims=True)
    pairs = q[:, None, :] * slope[:, :, None]
    return (pairs - pairs.transpose(0, 2, 1)).sum(-1)


def of_classes(classes: Classes, lq: Array) -> Answer:
    size, q = classes.size, np.exp(lq)
    total = size.sum(-1)
    none = np.zeros_like(total)
    return Answer(
        classes.term.sum(-1), through_softmax(lq, classes.slope), total, (size + q * total[:, None]).max(-1), none, none
    )


def _akl(lq: Array, lp: Array, near: Array, mu: float = 0.5) -> Answer:
    forward, reverse = of_classes(PARTS["fkl"](lq, lp), lq), of_classes(PARTS["rkl"](lq, lp), lq)
    gap = np.abs(np.exp(lp) - np.exp(lq))
    total = gap.sum(-1)
    share = _shares(gap, lp, mu, np.zeros_like(near))
    weight = np.where(total > 0, np.minimum(share, 1), 0.5)
    unclear = _unclear(gap, lp, mu, near)
    found = forward.times(weight) + reverse.times(1 - weight)
    finite = np.isfinite(forward.value) & np.isfinite(reverse.value)
    apart = np.abs(np.where(finite, forward.value, 0) - np.where(finite, reverse.value, 0))
    apart_grad = np.abs(forward.grad - reverse.grad).max(-1)
    found.slack, found.grad_slack = unclear * apart, unclear * apart_grad
    # A weight that may round to 0 takes what is infinite with it.
    rest = np.where(np.isinf(forward.value), weight, np.where(np.isinf(reverse.value), 1 - weight, INF))
    return found.open_where(rest - unclear < near[:, 0])


def _shares(gap: Array, lp: Array, mu: float, shift: Array) -> Array:
    """g_h / (g_h + g_t), for a head of the mass mu + ``shift``; the lower index first on ties."""
    order = np.argsort(-lp, axis=-1, kind="stable")
    p, gaps = (np.take_along_axis(x, order, -1) for x in (np.exp(lp), gap))
    enough = WIDE(mu) * (1 - WIDE(2) ** -50) + shift
    head = np.isfinite(np.take_along_axis(lp, order, -1))
    if mu < 1:
        head &= np.cumsum(p, -1) - p < enough
    total = gap.sum(-1)
    return (gaps * head).sum(-1) / np.where(total > 0, total, 1)


def _unclear(gap: Array, lp: Array, mu: float, near: Array) -> Array:
    """How much of the weight rests on rounding: masses near mu, near ties, masses nearly equal."""
    least = 4 * near[:, 0]
    total = np.maximum(gap.sum(-1), np.maximum(least, TINY))
    rounded = least / total
    if mu >= 1:
        return rounded
    jump = np.abs(_shares(gap, lp, mu, near) - _shares(gap, lp, mu, -near))
    order = np.argsort(-lp, axis=-1, kind="stable")
    log_p = np.take_along_axis(lp, order, -1)
    last = np.argmax(np.cumsum(np.exp(log_p), -1) >= WIDE(mu) * (1 - WIDE(2) ** -50), -1)[:, None]
    distance = np.where(np.isneginf(lp), INF, np.abs(lp - np.take_along_axis(log_p, last, -1)))
    close = distance < near
    nearly = (gap * close).sum(-1) * (close & (distance > 0)).any(-1) / total  # a tie to the last bit is none of these
    return np.minimum(1, rounded + jump + nearly)


def of_part(name: str, lq: Array, lp: Array, near: Array, **params: Any) -> Answer:
    """A divergence; ``near`` `[n, 1]` is how close two log-probabilities are where rounding decides which is larger."""
    if name == "akl":
        return _akl(lq, lp, near, **params)
    found = of_classes(PARTS[name](lq, lp, **params), lq)
    if name == "tvd":
        unclear = np.abs(minus(lq, lp)) < near
        mass = (np.exp(lq) * unclear).sum(-1)
        found.grad_slack = np.minimum(mass, 1)
    return found


@dataclass
class Split:
    """One distribution from a target: two classes, the renormalised rest, and the log-odds."""

    two: Array
    tail: Array
    odds: Array
    empty: NDArray[np.bool_]


def split(logits: Array, target: NDArray[np.int64]) -> Split:
    rest = logits.copy()
    np.put_along_axis(rest, target[:, None], -INF, -1)
    log_rest = log_sum(rest)
    empty = np.isneginf(log_rest)[:, 0]
    at_target = np.take_along_axis(logits, target[:, None], -1)
    odds = np.where(empty[:, None], INF, at_target - np.where(empty[:, None], 0, log_rest))
    two = np.concatenate([-_softplus(-odds), -_softplus(odds)], -1)
    tail = np.where(empty[:, None], -INF, rest - np.where(empty[:, None], 0, log_rest))
    return Split(two, tail, odds[:, 0], empty)


def _softplus(x: Array) -> Array:
    return np.where(np.isposinf(x), INF, np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def tail_weight(weight: str, gamma: float, student: Split, teacher: Split) -> Array:
    outside_q, outside_p = np.exp(student.two[:, 1]), np.exp(teacher.two[:, 1])
    known = {"student": outside_q, "teacher": outside_p, "floor": np.maximum(WIDE(gamma), outside_q)}
    return known.get(weight, np.full_like(outside_q, WIDE(gamma)))


def _two_classes(name: str, student: Split, teacher: Split, near: Array) -> Answer:
    """F(b_q, b_p), and its slope by the student's log-odds as both columns of a gradient, (push, -push)."""
    found = of_part(name, student.two, teacher.two, near)
    if name not in ("fkl", "rkl"):
        return found
    # These two are made of the log-odds themselves, exact at any confidence; so is the bound on their rounding.
    spread = sum(np.exp(side.two.sum(-1)) for side in (student, teacher))
    terms = PARTS[name](student.two, teacher.two).term
    apart = np.where(np.isfinite(student.odds) & np.isfinite(teacher.odds), student.odds - teacher.odds, 0)
    found.size = np.where(np.isfinite(terms), np.abs(terms), 0).sum(-1) + spread * (1 + np.abs(apart))
    found.grad_size = np.abs(found.grad).max(-1) + spread * (1 + np.abs(apart))
    return found


def decoupled(
    z: Array,
    y: Array,
    target: NDArray[np.int64],
    near: Array,
    *,
    on_target: str = "rkl",
    on_tail: str = "rkl",
    gamma: float = 0.5,
    target_weight: float = 1.0,
    weight: str = "constant",
) -> Answer:
    """a F(b_q, b_p) + w G(q^, p^). With s the target's log-odds, d s / dz_t = 1 and d s / dz_j = -q^_j."""
    student, teacher = split(z, target), split(y, target)
    w = tail_weight(weight, gamma, student, teacher)
    first = _two_classes(on_target, student, teacher, near).times(target_weight)
    push = first.grad[:, :1]
    second = of_part(on_tail, student.tail, teacher.tail, near)
    for name in ("value", "size", "slack", "grad_size", "grad_slack"):
        setattr(second, name, np.where(student.empty, 0, getattr(second, name)))
    second.grad = np.where(student.empty[:, None], 0, second.grad)
    first.grad = -np.exp(student.tail) * push
    np.put_along_axis(first.grad, target[:, None], push, -1)
    together = first + second.times(w)
    return together.open_where((w < TINY) & np.isinf(second.value))


def skewed_drkl(
    z: Array, y: Array, target: NDArray[np.int64], *, gamma: float = 0.5, weight: str = "constant", skew: float
) -> Answer:
    """B + w K against m = (1 - s) p + s q.

    With L_j = log q_j / m_j and Q, M the masses of the rest, as if free: dB / dq_t = L_t - s q_t / m_t,
    dB / dq_j = log Q / M - s Q / M, dK / dq_j = (L_j - sum q^ L - s q_j / m_j + s Q / M) / Q, up to one number for all.
    """
    lq, lp = log_softmax(z), log_softmax(y)
    student, teacher, log_m = split(z, target), split(y, target), mix(lq, lp, skew)
    compared = split(log_m, target)
    w, s, at = tail_weight(weight, gamma, student, teacher), WIDE(skew), target[:, None]
    on_two, on_tail = PARTS["rkl"](student.two, compared.two), PARTS["rkl"](student.tail, compared.tail)
    ratio, rest = minus(lq, log_m), minus(student.two, compared.two)[:, 1:]
    inside = np.where(np.isneginf(lq), 0, np.exp(ratio))
    ratio = np.where(np.isneginf(lq), 0, ratio)
    slope_b = np.exp(lq) * (rest - s * np.exp(rest))
    at_target = np.exp(lq) * (ratio - s * inside)
    np.put_along_axis(slope_b, at, np.take_along_axis(at_target, at, -1), -1)
    q_tail = np.exp(student.tail)
    slope_k = q_tail * (ratio - (q_tail * ratio).sum(-1, keepdims=True) - s * inside + s * np.exp(rest))
    slope = slope_b + w[:, None] * slope_k
    tail_size = on_tail.size.sum(-1) + np.exp(compared.tail).sum(-1)
    size = on_two.size.sum(-1) + 1 + w * np.where(student.empty, 0, tail_size)
    k = np.where(student.empty, 0, on_tail.term.sum(-1))
    grad_size = 2 * (size + np.abs(rest[:, 0]) + w * np.abs(ratio).max(-1) * 2)
    none = np.zeros_like(size)
    return Answer(on_two.term.sum(-1) + times(w, k), through_softmax(lq, slope), size, grad_size, none, none)


def cross_entropy(z: Array, labels: NDArray[np.int64]) -> Answer:
    lq = log_softmax(z)
    at = labels[:, None]
    slope = np.zeros_like(lq)
    np.put_along_axis(slope, at, -1, -1)
    one, none = np.ones(len(lq), WIDE), np.zeros(len(lq), WIDE)
    return Answer(-np.take_along_axis(lq, at, -1)[:, 0], through_softmax(lq, slope), one, 2 * one, none, none)


def objective(
    name: str,
    params: dict[str, Any],
    z: Array,
    y: Array,
    labels: NDArray[np.int64],
    top: NDArray[np.int64],
    near: Array,
) -> Answer:
    """Any objective of the list, or ``decoupled``, on logits over the temperature; ``top`` is the teacher's target."""
    if name == "ce":
        return cross_entropy(z, labels)
    params = dict(params)
    target = labels if params.pop("target", "teacher") == "label" else top
    if name == "drkl" and params.get("skew", 0):
        words = {k: v for k, v in params.items() if k in ("gamma", "weight", "skew")}
        return skewed_drkl(z, y, target, **words)
    if name == "drkl":
        words = {k: v for k, v in params.items() if k in ("gamma", "weight")}
        return decoupled(z, y, target, near, on_tail=params.get("tail", "rkl"), **words)
    if name == "dkd":
        kl = {"on_target": "fkl", "on_tail": "fkl"}
        return decoupled(
            z, y, target, near, **kl, target_weight=params.get("alpha", 1.0), gamma=params.get("beta", 0.5)
        )
    if name == "decoupled":
        return decoupled(z, y, target, near, **params)
    return of_part(name, log_softmax(z), log_softmax(y), near, **params)


@dataclass(frozen=True)
class Groups:
    """Ids that are compared as one class: the class of each id, row by row, and the target among the classes."""

    of: NDArray[np.int64]
    count: int
    labels: NDArray[np.int64]
    top: NDArray[np.int64] | None = None
    last_is_taken: bool = False
    """Whether the teacher's last class is known to have been in the last but one, whose own mass is what is left."""

    def unclear(self, classes: Array, near: Array) -> NDArray[np.bool_]:
        """Where rounding decides which class is the target, or what of the rest is left."""
        if self.top is None:
            first = classes.max(-1, keepdims=True)
            distance = first - classes
            return ((distance > 0) & (distance < near)).any(-1)
        rest, label = classes[:, -2], classes[:, -1]
        little = np.exp(np.minimum(minus(rest, label), 0)) < near[:, 0]
        return np.asarray(little & (label > -INF) & self.last_is_taken)

    def together(self, logits: Array) -> Array:
        members = (np.where(self.of == c, logits, -INF) for c in range(self.count))
        return np.concatenate([log_sum(x) for x in members], -1)

    def apart(self, grad: Array, logits: Array, classes: Array) -> Array:
        """A class's gradient goes to its ids by their share of it."""
        whole = np.take_along_axis(classes, self.of, -1)
        share = np.where(np.isneginf(logits), 0, np.exp(minus(logits, whole)))
        return share * np.take_along_axis(grad, self.of, -1)


@np.errstate(invalid="ignore")  # inf - inf where a mask takes another number; one that came through would be a fault
def loss(
    name: str,
    params: dict[str, Any],
    student: Any,
    teacher: Any,
    labels: NDArray[np.int64],
    near: Array,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    t2_scaling: bool = False,
    groups: Groups | None = None,
    merged: bool = False,
) -> Answer:
    """kd_weight KD(T) (T^2) + (1 - kd_weight) CE, and its gradient on the logits; CE is of ``merged`` groups too."""
    z, y = wide(student), wide(teacher)
    # What is equal to the last bit goes through the same arithmetic: nothing there rests on rounding.
    near = np.where((z == y).all(-1, keepdims=True), 0, near)
    parts = []
    if kd_weight > 0:
        factor = WIDE(kd_weight) * (WIDE(temperature) ** 2 if t2_scaling else 1)
        found = _grouped(groups, z / WIDE(temperature), y / WIDE(temperature), labels, (name, params, near))
        found = found.times(factor)
        found.grad, found.grad_size, found.grad_slack = (
            x / WIDE(temperature) for x in (found.grad, found.grad_size, found.grad_slack)
        )
        parts.append(found)
    if kd_weight < 1:
        observed = _grouped(groups if merged else None, z, y, labels, ("ce", {}, near))
        parts.append(observed.times(1 - WIDE(kd_weight)))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _grouped(
    groups: Groups | None, z: Array, y: Array, labels: NDArray[np.int64], what: tuple[str, dict[str, Any], Array]
) -> Answer:
    name, params, near = what
    if groups is None:
        return objective(name, params, z, y, labels, y.argmax(-1), near)
    ours, theirs = groups.together(z), groups.together(y)
    top = theirs.argmax(-1) if groups.top is None else groups.top
    found = objective(name, params, ours, theirs, groups.labels, top, near)
    found.grad = groups.apart(found.grad, z, ours)
    return found.open_where(groups.unclear(theirs, near))
