"""What a loss can say about each position besides its value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drkl.losses.common import LossSettings, log_softmax, spread
from drkl.objectives.closed_form import Moments
from drkl.objectives.decoupled import target_class
from drkl.objectives.logspace import kl, split


class PositionStatistics(NamedTuple):
    """Detached per-position values, in nats or probabilities; 0 at the positions that do not count.

    q = student, p = teacher, both after the temperature, t = the objective's target class (the teacher's top token for
    an objective without one). Teacher columns are None without a teacher, B and K for an objective without a target.
    """

    value: Tensor
    """The position's loss, before ``token_weights``."""
    student_entropy: Tensor
    """-sum q log q."""
    max_q: Tensor
    """max q."""
    teacher_entropy: Tensor | None
    """-sum p log p."""
    max_p: Tensor | None
    """max p."""
    q_t: Tensor | None
    """q at the target."""
    p_t: Tensor | None
    """p at the target."""
    B: Tensor | None
    """KL(b_q || b_p), b = (target, rest)."""
    K: Tensor | None
    """KL(q^ || p^) on the renormalised rest."""


def empty_statistics(values: Tensor, with_teacher: bool, settings: LossSettings) -> PositionStatistics:
    """Room for the statistics of ``values`` `[n]`, which are the first column."""

    def column(wanted: bool) -> Tensor | None:
        return torch.empty_like(values) if wanted else None

    has_target = with_teacher and hasattr(settings.objective, "target")
    return PositionStatistics(
        values,
        torch.empty_like(values),
        torch.empty_like(values),
        *(column(with_teacher) for _ in range(4)),
        *(column(has_target) for _ in range(2)),
    )


@torch.no_grad()
def position_statistics(
    into: PositionStatistics,
    rows: slice,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    settings: LossSettings,
) -> None:
    """Fill ``into[rows]`` from logits `[rows, vocab]`, before the temperature; the logits are left as they are."""
    student_logp = log_softmax(student_logits, settings.temperature)
    into.student_entropy[rows] = _entropy(student_logp)
    into.max_q[rows] = student_logp.amax(-1).exp()
    if into.teacher_entropy is None or teacher_logits is None:
        return
    teacher_logp = log_softmax(teacher_logits, settings.temperature)
    assert into.max_p is not None and into.q_t is not None and into.p_t is not None
    into.teacher_entropy[rows] = _entropy(teacher_logp)
    into.max_p[rows] = teacher_logp.amax(-1).exp()
    target = target_class(getattr(settings.objective, "target", "teacher"), teacher_logits, labels)
    at_target = target.unsqueeze(-1)
    into.q_t[rows] = student_logp.gather(-1, at_target).squeeze(-1).exp()
    into.p_t[rows] = teacher_logp.gather(-1, at_target).squeeze(-1).exp()
    if into.B is not None and into.K is not None:
        student, teacher = split(student_logp, target), split(teacher_logp, target)
        into.B[rows] = kl(student.log_two, teacher.log_two)
        empty = student.log_odds == torch.inf
        into.K[rows] = kl(student.log_tail, teacher.log_tail).masked_fill(empty, 0.0)


def keep_moments(into: PositionStatistics, rows: slice, moments: Moments) -> None:
    """Fill ``into[rows]`` with what a closed form has noticed."""
    for name, column in into._asdict().items():
        if name != "value" and column is not None:
            column[rows] = getattr(moments, name).squeeze(-1)


def spread_statistics(statistics: PositionStatistics, keep: Tensor | None, shape: torch.Size) -> PositionStatistics:
    """Put every column back where its positions came from."""
    columns: list[Any] = [None if column is None else spread(column, keep, shape) for column in statistics]
    return PositionStatistics(*columns)


def _entropy(logp: Tensor) -> Tensor:
    return -torch.linalg.vecdot(logp.exp(), logp.masked_fill(logp == -torch.inf, 0.0))
