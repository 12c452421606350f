"""The loss from two logit tensors: the slow definition that everything faster is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.losses.common import (
    LossSettings,
    Observer,
    Reduction,
    check_topk,
    denominator,
    log_softmax,
    make_settings,
    observed_chunk,
    select,
    select_labels,
    select_weights,
    shared_vocabulary,
    spread,
    valid_positions,
)
from drkl.losses.merged import make_merged
from drkl.losses.topk import TopK, class_values
from drkl.objectives import ObjectiveLike
from drkl.objectives.base import check_values
from drkl.objectives.logspace import weighted


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    *,
    objective: ObjectiveLike = "drkl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    t2_scaling: bool = False,
    token_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    merged_ids: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """The distillation loss of a batch of positions, from logits.

    ``kd_weight * objective(log_softmax(student / T), log_softmax(teacher / T)) * (T**2 if t2_scaling else 1)
    + (1 - kd_weight) * cross_entropy(student, labels)``, summed over the positions that count and divided by
    ``num_tokens``. A position counts iff its label is not -100 and its mask is true.

    Args:
        student_logits: `[..., vocab]`, any float dtype; the maths runs in fp32 or wider.
        teacher_logits: `[..., vocab]`, for the same positions; gets no gradient. None where the objective needs none. A
            `TopK` in its place compares both models on its k + 1 classes.
        labels: `[...]`, already aligned: ``labels[..., t]`` is what ``logits[..., t]`` predict; -100 = ignore.
        objective: a name in `drkl.OBJECTIVES`, an objective, or a function
            ``(student_logp, teacher_logp, labels) -> [n]`` of log-probabilities `[n, vocab]`.
        temperature: T > 0, divides both models' logits.
        kd_weight: in [0, 1].
        t2_scaling: multiply the objective by T squared.
        token_mask: `[...]`, true where a position counts.
        token_weights: `[...]`, factors on the positions' values; they do not change ``num_tokens``. No gradient.
        num_tokens: the divisor of ``mean``: the valid tokens of the whole optimiser step (all micro-batches, all
            ranks). Default: those of this call.
        reduction: ``mean``, ``sum``, or ``none`` (`[...]`, 0 at the positions that do not count).
        vocab_size: compare on the token ids below this only; both logits are cut before the softmax. For models whose
            vocabularies are one up to padding (Qwen2.5's 151,936 and 152,064).
        merged_ids: token ids that count as one class E, in both models, such as the tokens that end an answer:
            ``q(E) = sum_{i in E} q_i`` with ``q = softmax(student / T)``, and likewise p. The objective sees the
            vocabulary with E in place of its ids (E at the smallest of them, and the last columns in the places of the
            others); a label in E is E, whose cross-entropy is ``-log q(E)`` at T = 1.
        observe: called with the logits (`drkl.losses.LogitChunk`) of the positions that count, for numbers beside the
            loss. It gets the teacher's too where they are given, even if the objective needs none.

    Returns:
        A scalar in nats per token. With no valid position it is 0 and has a graph.

    Raises:
        DrklError: shapes or vocabularies that differ, labels missing or out of range, ids to merge that are not there
            or fewer than two, a value outside its domain, an objective that does not return one value per position, or
            one that cannot be had from a `TopK`.

    >>> student, teacher = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> float(distillation_loss(student, teacher))
    0.0
    """
    settings = make_settings(objective, temperature, kd_weight, t2_scaling, reduction)
    shape = student_logits.shape[:-1]
    if settings.uses_teacher and teacher_logits is None:
        raise DrklError(f"Objective {settings.objective.name!r} compares with a teacher, but teacher_logits is None.")
    compared = teacher_logits if settings.uses_teacher or observe is not None else None
    known = compared if isinstance(compared, TopK) else None
    logits = None if isinstance(compared, TopK) else compared
    size = shared_vocabulary(student_logits.shape[-1], None if logits is None else logits.shape[-1], vocab_size)
    if known is not None:
        check_topk(known, settings, shape, size)
    if logits is not None and logits.shape[:-1] != shape:
        raise DrklError(
            f"teacher_logits has shape {list(logits.shape)} and student_logits {list(student_logits.shape)}; "
            "expected the same positions."
        )
    settings = replace(settings, merged=make_merged(merged_ids, size))
    keep = valid_positions(shape, labels, token_mask, token_weights, settings, size)
    student = select(student_logits[..., :size], keep)
    teacher: Tensor | TopK | None = None if logits is None else select(logits.detach()[..., :size], keep)
    if known is not None:
        teacher = known.at(keep)
    kept_labels = select_labels(labels, keep)
    if settings.merged is not None:
        kept_labels = settings.merged.labels(kept_labels)
    if observe is not None and len(student):
        with torch.no_grad():
            observe(observed_chunk(student.detach(), teacher, kept_labels, 0, settings.merged))
    values = position_values(student, teacher, kept_labels, settings)
    weights = select_weights(token_weights, keep, values.dtype)
    result = values if weights is None else weighted(weights, values)
    if reduction == "none":
        return spread(result, keep, shape)
    return result.sum() if reduction == "sum" else result.sum() / denominator(num_tokens, values.numel())


def position_values(
    student_logits: Tensor, teacher_logits: Tensor | TopK | None, labels: Tensor | None, settings: LossSettings
) -> Tensor:
    """The loss at each of `[n]` valid positions, differentiable; ``student_logits`` is `[n, vocab]`.

    Where ids are merged, ``labels`` are classes of the merged vocabulary.
    """
    parts = []
    if settings.uses_objective:
        student_logp = log_softmax(student_logits, settings.temperature, settings.merged)
        if isinstance(teacher_logits, TopK) and settings.uses_teacher:
            known = teacher_logits.merged(settings.merged, settings.temperature)
            value = class_values(settings.objective, student_logp, known, labels, settings.temperature)
        else:
            teacher_logp = None
            if settings.uses_teacher and isinstance(teacher_logits, Tensor):
                teacher_logp = log_softmax(teacher_logits, settings.temperature, settings.merged)
            value = settings.objective(student_logp, teacher_logp, labels)
        check_values(settings.objective, value, student_logp.shape[0])
        parts.append(value if settings.kd_factor == 1.0 else settings.kd_factor * value)
    if settings.uses_cross_entropy:
        assert labels is not None
        observed = log_softmax(student_logits, 1.0, settings.merged).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        parts.append(-(1.0 - settings.kd_weight) * observed)
    return parts[0] if len(parts) == 1 else torch.add(*parts)
