"""The loss from two logit tensors: the slow definition that everything faster is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.losses.common import (
    LossSettings,
    Reduction,
    check_vocabularies,
    denominator,
    log_softmax,
    make_settings,
    select,
    select_labels,
    spread,
    valid_positions,
)
from drkl.objectives import Objective


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    objective: str | Objective = "drkl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    t2_scaling: bool = False,
    token_mask: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The distillation loss of a batch of positions, from logits.

    ``kd_weight * objective(log_softmax(student / T), log_softmax(teacher / T)) * (T**2 if t2_scaling else 1)
    + (1 - kd_weight) * cross_entropy(student, labels)``, summed over the positions that count and divided by
    ``num_tokens``. A position counts iff its label is not -100 and its mask is true.

    Args:
        student_logits: `[..., vocab]`, any float dtype; the maths runs in fp32 or wider.
        teacher_logits: `[..., vocab]`, of the same shape; gets no gradient. None where the objective needs none.
        labels: `[...]`, already aligned: ``labels[..., t]`` is what ``logits[..., t]`` predict; -100 = ignore.
        objective: a name in `drkl.OBJECTIVES`, or an objective.
        temperature: T > 0, divides both models' logits.
        kd_weight: in [0, 1].
        t2_scaling: multiply the objective by T squared.
        token_mask: `[...]`, true where a position counts.
        num_tokens: the divisor of ``mean``: the valid tokens of the whole optimiser step (all micro-batches, all
            ranks). Default: those of this call.
        reduction: ``mean``, ``sum``, or ``none`` (`[...]`, 0 at the positions that do not count).

    Returns:
        A scalar in nats per token. With no valid position it is 0 and has a graph.

    Raises:
        DrklError: shapes or vocabularies that differ, labels missing or out of range, a value outside its domain.

    >>> student, teacher = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> float(distillation_loss(student, teacher))
    0.0
    """
    settings = make_settings(objective, temperature, kd_weight, t2_scaling, reduction)
    vocab_size = student_logits.shape[-1]
    if settings.uses_teacher:
        if teacher_logits is None:
            raise DrklError(
                f"Objective {settings.objective.name!r} compares with a teacher, but teacher_logits is None."
            )
        check_vocabularies(vocab_size, teacher_logits.shape[-1])
        if teacher_logits.shape != student_logits.shape:
            raise DrklError(
                f"teacher_logits has shape {list(teacher_logits.shape)} and student_logits "
                f"{list(student_logits.shape)}; expected the same positions."
            )
    shape = student_logits.shape[:-1]
    keep = valid_positions(shape, labels, token_mask, settings, vocab_size)
    student = select(student_logits, keep)
    teacher = select(teacher_logits.detach(), keep) if settings.uses_teacher and teacher_logits is not None else None
    values = position_values(student, teacher, select_labels(labels, keep), settings)
    if reduction == "none":
        return spread(values, keep, shape)
    total = values.sum()
    return total if reduction == "sum" else total / denominator(num_tokens, values.numel())


def position_values(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, settings: LossSettings
) -> Tensor:
    """The loss at each of `[n]` valid positions, differentiable; ``student_logits`` is `[n, vocab]`."""
    parts = []
    if settings.uses_objective:
        student_logp = log_softmax(student_logits, settings.temperature)
        teacher_logp = None if teacher_logits is None else log_softmax(teacher_logits, settings.temperature)
        value = settings.objective(student_logp, teacher_logp, labels)
        parts.append(value if settings.kd_factor == 1.0 else settings.kd_factor * value)
    if settings.uses_cross_entropy:
        assert labels is not None
        observed = log_softmax(student_logits, 1.0).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        parts.append(-(1.0 - settings.kd_weight) * observed)
    return parts[0] if len(parts) == 1 else torch.add(*parts)
