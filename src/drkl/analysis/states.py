"""What two models say at the positions of held-out text, and what every objective would do about it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drkl.analysis.gradients import closed_form, decompose, has_closed_form, log_odds_gap
from drkl.losses.common import check_vocabularies, log_softmax
from drkl.objectives import Objective
from drkl.objectives.logspace import argmax, kl, split
from drkl.positions import token_statistics

CHUNK = 128
"""Positions whose logits are held at once."""
MATCHED = 0.25
"""The target is matched where its log-odds differ by at most this, |D| in nats: in probability by .06 at most."""

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class Reading:
    """One model at `n` positions.

    ``labels`` `[n]` are the observed tokens (or classes), ``row_index`` `[n]` says which row each position is of, from
    0, and ``logits`` gives `[m, vocab]` for the positions `[m]` it is asked for.
    """

    labels: Tensor
    row_index: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pushes:
    """What one objective's gradient is at the positions ``at`` `[m]`; `[m]` each, negative = upwards.

    The pushes are the entries on the logit of the teacher's top token, whatever the objective's own target is; the
    forces are the Euclidean norms of the two gradients over the vocabulary.
    """

    value: np.ndarray
    target_push: np.ndarray
    tail_push: np.ndarray
    target_force: np.ndarray
    tail_force: np.ndarray
    closed_form_gap: float | None
    """The largest difference of the two gradients from their equations, at the first positions; None without any."""


@dataclass(frozen=True)
class Observed:
    """Everything that a diagnosis is made of; q = student, p = teacher, t = the teacher's top token, y* = argmax q.

    ``columns`` has `[n]` by name. At the loss's temperature: ``q_t``, ``p_t``, ``rest`` (1 - q_t, from log-sum-exps),
    ``B``, ``K``, ``D`` in nats, ``tail_slope`` (the norm of dK/dz over the tail, what a weight of the tail multiplies).
    At temperature 1: ``confidence`` (max q), ``correct`` (1 where y* is the label), ``teacher_confidence``,
    ``teacher_correct``, ``own_gap`` (q - p at y*), ``target_gap`` (q - p at t).
    """

    columns: Mapping[str, np.ndarray]
    row: np.ndarray
    """`[n]`, from 0."""
    num_rows: int
    labels: np.ndarray
    temperature: float
    at: np.ndarray
    """`[m]`, the positions at which every objective was differentiated, in order."""
    sampled: np.ndarray
    """`[m]`, whether a position was taken evenly from all; the others were added because their target is matched."""
    pushes: Mapping[str, Pushes]

    @property
    def matched(self) -> np.ndarray:
        """`[n]`: the target's log-odds differ by no more than `MATCHED`."""
        close: np.ndarray = np.abs(self.columns["D"]) <= MATCHED
        return close


def observe(
    student: Reading,
    teacher: Reading,
    objectives: Mapping[str, Objective],
    *,
    positions: int = 512,
    temperature: float = 1.0,
    on_reading: Progress = None,
    on_objective: Progress = None,
) -> Observed:
    """Compare two models position by position, and differentiate every objective at some of them.

    Args:
        student: of at least one position.
        teacher: of the same positions.
        objectives: by the name they get in the result.
        positions: at how many positions, evenly over all, each objective is differentiated; half as many again are
            added of those where the target is matched, which are few.
        temperature: T > 0, divides both models' logits in everything but confidence and accuracy.
        on_reading: called with the number of positions after each part.
        on_objective: called with 1 after each objective.

    Raises:
        DrklError: vocabularies that differ, or what `decompose` refuses.
    """
    assert torch.equal(student.labels, teacher.labels), "both models read the same positions"
    size = len(student.labels)
    parts = []
    for start in range(0, size, CHUNK):
        some = torch.arange(start, min(start + CHUNK, size))
        parts.append(_columns(student.logits(some), teacher.logits(some), student.labels[some], temperature))
        if on_reading is not None:
            on_reading(len(some))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    at, sampled = _choose(np.abs(columns["D"]) <= MATCHED, positions)
    pushes = {}
    for name, objective in objectives.items():
        pushes[name] = _pushes(student, teacher, objective, torch.from_numpy(at), temperature)
        if on_objective is not None:
            on_objective(1)
    row = student.row_index.numpy()
    return Observed(columns, row, int(row.max()) + 1, student.labels.numpy(), temperature, at, sampled, pushes)


@torch.no_grad()
def _columns(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> dict[str, np.ndarray]:
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    teacher_logits = teacher_logits.to(student_logits.device)
    labels = labels.to(student_logits.device)
    plain = token_statistics(student_logits, teacher_logits, labels)
    target = argmax(teacher_logits)
    student, teacher = (split(log_softmax(logits, temperature), target) for logits in (student_logits, teacher_logits))
    K = kl(student.log_tail, teacher.log_tail)
    found = {
        "q_t": student.log_two[:, 0].exp(),
        "p_t": teacher.log_two[:, 0].exp(),
        "rest": student.log_two[:, 1].exp(),
        "B": kl(student.log_two, teacher.log_two),
        "K": K,
        "D": log_odds_gap(student, teacher),
        "tail_slope": _tail_slope(student.log_tail, teacher.log_tail, K) / temperature,
        "confidence": plain.confidence,
        "correct": plain.accuracy,
        "teacher_confidence": plain.teacher_confidence,
        "teacher_correct": (target == labels),
        "own_gap": plain.overconfidence,
        "target_gap": plain.target_gap,
    }
    return {name: value.double().cpu().numpy() for name, value in found.items() if value is not None}


def _tail_slope(log_q: Tensor, log_p: Tensor, K: Tensor) -> Tensor:
    """|| q^_j (log q^_j/p^_j - K) || over the tail; infinite where K is."""
    infinite = torch.isinf(K)
    empty = log_q == -math.inf
    ratio = log_q.masked_fill(empty, 0.0) - log_p.masked_fill(empty, 0.0) - K.masked_fill(infinite, 0.0).unsqueeze(-1)
    return (log_q.exp() * ratio).norm(dim=-1).masked_fill(infinite, math.inf)


def _choose(matched: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    even = evenly(np.arange(len(matched)), positions)
    spare = np.setdiff1d(np.flatnonzero(matched), even)
    at = np.union1d(even, evenly(spare, max(1, positions // 2)))
    return at, np.isin(at, even)


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``values``, in equal steps."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def _pushes(student: Reading, teacher: Reading, objective: Objective, at: Tensor, temperature: float) -> Pushes:
    parts: list[Sequence[Tensor]] = []
    gap: float | None = None
    for number, some in enumerate(at.split(CHUNK)):
        student_logits = student.logits(some)
        teacher_logits = teacher.logits(some).to(student_logits.device)
        # Given labels, an objective without a target of its own is split at those, not at the teacher's top token.
        labels = student.labels[some].to(student_logits.device) if objective.needs_labels else None
        found = decompose(student_logits, teacher_logits, labels, objective, temperature)
        with torch.no_grad():
            logp = [log_softmax(logits, temperature) for logits in (student_logits, teacher_logits)]
            value = objective(logp[0], logp[1], labels)
        top = argmax(teacher_logits).unsqueeze(-1)
        grads = (found.target_grad, found.tail_grad)
        if number == 0 and has_closed_form(objective):
            equations = closed_form(student_logits, teacher_logits, labels, objective, temperature)
            gap = max(float((ours - theirs).abs().max()) for ours, theirs in zip(grads, equations, strict=True))
        at_top = [grad.gather(-1, top).squeeze(-1) for grad in grads]
        parts.append((value, *at_top, *(grad.norm(dim=-1) for grad in grads)))
    columns = [torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)]
    return Pushes(columns[0], columns[1], columns[2], columns[3], columns[4], gap)
