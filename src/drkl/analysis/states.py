"""Two models compared at the positions of held-out text, and the gradient of every objective there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drkl.analysis.gradients import decompose
from drkl.evaluation.bookkeeping import finite
from drkl.losses.common import check_vocabularies, log_softmax
from drkl.models.readout import Readout, chunks, read_logits
from drkl.objectives import Objective
from drkl.objectives.logspace import argmax, split
from drkl.positions import at, target_statistics, token_statistics
from drkl.processes import ALONE, Share

CHUNK = 128
"""Positions whose logits exist at once."""
MATCHED = 0.25
"""The target is matched where |D| is at most this, in nats of log-odds: in probability .06 at most."""

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class Pushes:
    """One objective at the positions ``at`` `[m]`: each field is `[m]`; a negative push raises the target's logit.

    The pushes are the entries of the two gradients on the logit of the teacher's top token, whatever the objective's
    own target is. The forces are the Euclidean norms of the two gradients over the vocabulary.
    """

    value: np.ndarray
    target_push: np.ndarray
    tail_push: np.ndarray
    target_force: np.ndarray
    tail_force: np.ndarray
    closed_form_gap: float | None
    """The largest difference between autograd's gradient and the objective's closed form over the first positions; None
    where there is no closed form, or where it is not finite."""


@dataclass(frozen=True)
class Observed:
    """The numbers of an analysis; q = student, p = teacher, t = the teacher's top token, y* = argmax q.

    ``columns`` has `[n]` by name. At the loss's temperature: ``q_t``, ``p_t``, ``rest`` (1 - q_t, from log-sum-exps),
    ``B``, ``K``, ``D`` in nats, ``tail_slope`` (the norm of dK/dz over the tail, which the tail's weight multiplies).
    At temperature 1: ``confidence`` (max q), ``correct`` (1 where y* is the label), ``teacher_confidence``,
    ``teacher_correct``, ``overconfidence`` (q - p at y*), ``target_gap`` (q - p at t).
    """

    columns: Mapping[str, np.ndarray]
    row: np.ndarray
    """`[n]`, the row of each position, from 0."""
    num_rows: int
    labels: np.ndarray
    temperature: float
    at: np.ndarray
    """`[m]`, the positions at which every objective was differentiated, in order."""
    sampled: np.ndarray
    """`[m]`, whether a position is one of the evenly spaced; the others were added because their target is matched."""
    pushes: Mapping[str, Pushes]

    @property
    def matched(self) -> np.ndarray:
        """`[n]`, whether the target's log-odds differ by no more than `MATCHED`."""
        close: np.ndarray = np.abs(self.columns["D"]) <= MATCHED
        return close


def observe(
    student: Readout,
    teacher: Readout,
    objectives: Mapping[str, Objective],
    *,
    positions: int = 512,
    temperature: float = 1.0,
    share: Share = ALONE,
    on_reading: Progress = None,
    on_objective: Progress = None,
) -> Observed:
    """Compare two models position by position, and differentiate every objective at some of them.

    Args:
        student: the student's readout, of at least one position; of several processes each has its own positions.
        teacher: the teacher's readout of the same positions.
        objectives: the objectives by the names that the result uses.
        positions: number of evenly spaced positions at which each objective is differentiated. Half as many are added
            from the positions where the target is matched, which are few.
        temperature: T > 0, divides both models' logits in everything except confidence and accuracy.
        share: of several processes, which divide positions and objectives and have the result each.
        on_reading: called after each chunk with its number of positions.
        on_objective: called with 1 after each objective.

    Raises:
        DrklError: the vocabularies differ, or `decompose` refuses an objective.
    """
    check_vocabularies(student.num_outputs, teacher.num_outputs)
    columns, rows, labels = _compared(student, teacher, temperature, share, on_reading)
    chosen, sampled = _choose(np.abs(columns["D"]) <= MATCHED, positions)
    both = [model.at(torch.from_numpy(chosen), share) for model in (student, teacher)]

    def differentiate(name: str) -> Pushes:
        return _pushes(both[0], both[1], objectives[name], temperature)

    pushes = {}
    for name, pushed in zip(objectives, share.map(differentiate, list(objectives)), strict=True):
        pushes[name] = pushed
        if on_objective is not None:
            on_objective(1)
    return Observed(columns, rows, int(rows.max()) + 1, labels, temperature, chosen, sampled, pushes)


def _compared(
    student: Readout, teacher: Readout, temperature: float, share: Share, on_reading: Progress
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The columns, the rows and the labels of all positions, in every process."""
    places = torch.arange(len(student.labels)) if student.positions is None else student.positions
    parts = []
    for part, student_logits, teacher_logits, labels in read_logits(student, teacher, CHUNK):
        assert teacher_logits is not None
        facts = {"place": places[part], "row": student.row_index[part], "label": student.labels[part]}
        known = {name: value.numpy() for name, value in facts.items()}
        parts.append(known | _columns(student_logits, teacher_logits, labels, temperature))
        if on_reading is not None:
            on_reading(len(labels))
    found = share.together(lambda: parts)
    columns = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    order = columns.pop("place").argsort()
    columns = {name: values[order] for name, values in columns.items()}
    rows, labels_of_all = columns.pop("row"), columns.pop("label")
    return columns, rows, labels_of_all


@torch.no_grad()
def _columns(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> dict[str, np.ndarray]:
    tokens = token_statistics(student_logits, teacher_logits, labels)
    target = argmax(teacher_logits)
    student, teacher = (split(log_softmax(logits, temperature), target) for logits in (student_logits, teacher_logits))
    statistics = target_statistics(student, teacher, target)
    columns = {name: getattr(statistics, name) for name in ("q_t", "p_t", "rest", "B", "K", "D")} | {
        "tail_slope": _tail_slope(student.log_tail, teacher.log_tail, statistics.K) / temperature,
        "confidence": tokens.confidence,
        "correct": tokens.accuracy,
        "teacher_confidence": tokens.teacher_confidence,
        "teacher_correct": target == labels,
        "overconfidence": tokens.overconfidence,
        "target_gap": tokens.target_gap,
    }
    return {name: value.double().cpu().numpy() for name, value in columns.items()}


def _tail_slope(log_q: Tensor, log_p: Tensor, K: Tensor) -> Tensor:
    """|| q^_j (log q^_j/p^_j - K) || over the tail; infinite where K is."""
    infinite = torch.isinf(K)
    empty = log_q == -math.inf
    ratio = log_q.masked_fill(empty, 0.0) - log_p.masked_fill(empty, 0.0) - K.masked_fill(infinite, 0.0).unsqueeze(-1)
    return (log_q.exp() * ratio).norm(dim=-1).masked_fill(infinite, math.inf)


def _choose(matched: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    even = evenly(np.arange(len(matched)), positions)
    spare = np.setdiff1d(np.flatnonzero(matched), even)
    chosen = np.union1d(even, evenly(spare, max(1, positions // 2)))
    return chosen, np.isin(chosen, even)


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``values``, in equal steps."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]


def _pushes(student: Readout, teacher: Readout, objective: Objective, temperature: float) -> Pushes:
    """The pushes at every position of the two readouts."""
    parts: list[Sequence[Tensor]] = []
    gap: float | None = None
    for number, some in enumerate(chunks(len(student.labels), CHUNK)):
        student_logits = student.logits(some)
        teacher_logits = teacher.logits(some).to(student_logits.device)
        # With labels, the target of an objective that has none of its own would be the label.
        labels = student.targets(some).to(student_logits.device) if objective.needs_labels else None
        result = decompose(student_logits, teacher_logits, labels, objective, temperature)
        with torch.no_grad():
            logp = [log_softmax(logits, temperature) for logits in (student_logits, teacher_logits)]
            value = objective(logp[0], logp[1], labels)
        top = argmax(teacher_logits)
        grads = (result.target_grad, result.tail_grad)
        if number == 0 and objective.has_closed_form:
            closed = _closed_form(objective, student_logits, teacher_logits, labels, temperature)
            gap = finite(float((result.target_grad + result.tail_grad - closed).abs().max()))
        parts.append((value, *(at(grad, top) for grad in grads), *(grad.norm(dim=-1) for grad in grads)))
    columns = [torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)]
    return Pushes(columns[0], columns[1], columns[2], columns[3], columns[4], gap)


@torch.no_grad()
def _closed_form(
    objective: Objective, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float
) -> Tensor:
    """The objective's gradient `[n, vocab]` on the student's logits, from its closed form."""
    grad, teacher = (logits / temperature for logits in (student_logits, teacher_logits))  # overwritten
    objective.value_and_grad_(grad, teacher, labels)
    return grad / temperature
