"""The loss from hidden states and heads, without a [tokens, vocab] tensor.

The positions go through both heads in chunks; each chunk's gradient is made in the forward pass, in the chunk's own
logits, and carried on to the hidden states and the head at once, so that memory does not grow with the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drkl.errors import DrklError
from drkl.losses.common import (
    LossSettings,
    Reduction,
    check_vocabularies,
    denominator,
    make_settings,
    select,
    select_labels,
    spread,
    valid_positions,
)
from drkl.losses.dense import position_values
from drkl.losses.head import LMHead, as_head
from drkl.objectives import CrossEntropy, Objective

CHUNK_BYTES = 64 * 2**20
"""Logits of one model held at a time."""
BLOCK_BYTES = 2**20
"""Rows whose gradient is made at a time: small enough to stay in the processor's cache between passes."""


def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | LMHead,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | LMHead | None,
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
    """`distillation_loss` of ``head.logits(hidden)``, in memory that does not grow with [tokens, vocab].

    The same values and gradients as the two naive lines it equals::

        student_logits, teacher_logits = student_head.logits(student_hidden), teacher_head.logits(teacher_hidden)
        distillation_loss(student_logits, teacher_logits, labels, ...)

    Args:
        student_hidden: `[..., student_hidden]`, the last hidden states (after the final norm).
        student_head: `[vocab, student_hidden]`, or an `LMHead` with bias, scale or soft-cap.
        teacher_hidden: `[..., teacher_hidden]`; gets no gradient. None where the objective needs none.
        teacher_head: `[vocab, teacher_hidden]` or an `LMHead`; gets no gradient.
        labels, objective, temperature, kd_weight, t2_scaling, token_mask, num_tokens: as in `distillation_loss`.
        reduction: ``mean``, ``sum``, or ``none`` (`[...]`, detached: values without a graph).

    Returns:
        A scalar in nats per token. With no valid position it is 0 and has a graph.

    Raises:
        DrklError: as `distillation_loss`.
    """
    settings = make_settings(objective, temperature, kd_weight, t2_scaling, reduction)
    head = as_head(student_head)
    _check_hidden("student", student_hidden, head)
    shape = student_hidden.shape[:-1]
    teacher = _detached_teacher(teacher_hidden, teacher_head, settings, head.vocab_size, shape)
    keep = valid_positions(shape, labels, token_mask, settings, head.vocab_size)
    hidden = select(student_hidden, keep)
    dtype = _compute_dtype(hidden, head.weight)
    inputs = _Inputs(
        labels=select_labels(labels, keep),
        teacher_hidden=None if teacher is None else select(teacher[0], keep),
        teacher_head=None if teacher is None else teacher[1],
        settings=settings,
        head=LMHead(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap),
        compute_dtype=dtype,
        teacher_dtype=dtype if teacher is None else _teacher_dtype(teacher[0], teacher[1].weight, dtype),
    )
    # The autograd function cannot see that grad mode is off: it would make gradients that nobody takes.
    total: Tensor
    if reduction == "none" or not torch.is_grad_enabled():
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            values, *_ = _run(hidden.detach(), inputs, needs=(False, False, False))
        if reduction == "none":
            return spread(values, keep, shape)
        total = values.sum()
    else:
        total = _FusedSum.apply(hidden, head.weight, head.bias, inputs)
    return total if reduction == "sum" else total / denominator(num_tokens, hidden.shape[0])


class _Inputs(NamedTuple):
    """What the autograd function takes besides the tensors that get gradients."""

    labels: Tensor | None
    teacher_hidden: Tensor | None
    teacher_head: LMHead | None
    settings: LossSettings
    head: LMHead
    compute_dtype: torch.dtype
    teacher_dtype: torch.dtype


def _check_hidden(whose: str, hidden: Tensor, head: LMHead) -> None:
    if hidden.shape[-1] != head.weight.shape[1]:
        raise DrklError(
            f"The {whose}'s hidden states have {hidden.shape[-1]} columns and its head {head.weight.shape[1]}."
        )


def _detached_teacher(
    hidden: Tensor | None, head: Tensor | LMHead | None, settings: LossSettings, vocab_size: int, shape: torch.Size
) -> tuple[Tensor, LMHead] | None:
    if not settings.uses_teacher:
        return None
    if hidden is None or head is None:
        name = settings.objective.name
        raise DrklError(f"Objective {name!r} compares with a teacher, but teacher_hidden or teacher_head is None.")
    head = as_head(head)
    _check_hidden("teacher", hidden, head)
    check_vocabularies(vocab_size, head.vocab_size)
    if hidden.shape[:-1] != shape:
        raise DrklError(
            f"The teacher's hidden states cover positions {list(hidden.shape[:-1])} and the student's {list(shape)}."
        )
    bias = None if head.bias is None else head.bias.detach()
    return hidden.detach(), LMHead(head.weight.detach(), bias, head.scale, head.softcap)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else the wider of the two inputs'."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _teacher_dtype(hidden: Tensor, weight: Tensor, student: torch.dtype) -> torch.dtype:
    """The same for the teacher; a student in low precision does not take the teacher's own precision from it."""
    return torch.promote_types(_compute_dtype(hidden, weight), student)


class _FusedSum(torch.autograd.Function):
    """The sum of the values; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: _Inputs) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            values, grad_hidden, grad_weight, grad_bias = _run(hidden.detach(), inputs, needs)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return values.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError("The fused loss was differentiated twice; its gradients are made once and given away.")
        ctx.grads = None
        # In place: the sums are nobody else's, and the head's is as large as the head.
        scaled = [
            None if g is None else g.mul_(upstream.to(g.dtype)).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _run(
    hidden: Tensor, inputs: _Inputs, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Values `[n]` and the gradients of their sum on hidden states, weight and bias (None where not needed)."""
    count, dtype = hidden.shape[0], inputs.compute_dtype
    wide = torch.promote_types(torch.float32, dtype)
    values = torch.empty(count, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if needs[0] else None
    head = inputs.head
    grad_weight = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] and head.bias is not None else None
    weight = head.weight.to(dtype)
    teacher = inputs.teacher_head
    teacher_weight = None if teacher is None else teacher.weight.to(inputs.teacher_dtype)
    size = max(1, CHUNK_BYTES // (head.vocab_size * wide.itemsize))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        chunk = hidden[rows].to(dtype)
        student_logits = _logits(chunk, weight, head, wide)
        teacher_logits = None
        if teacher is not None and teacher_weight is not None and inputs.teacher_hidden is not None:
            states = inputs.teacher_hidden[rows].to(inputs.teacher_dtype)
            teacher_logits = _logits(states, teacher_weight, teacher, wide)
        labels = None if inputs.labels is None else inputs.labels[rows]
        capped = student_logits.clone() if head.softcap is not None and any(needs) else None
        values[rows] = _values_and_grads_(student_logits, teacher_logits, labels, inputs.settings)
        if any(needs):
            grad = _through_head_(student_logits, capped, head)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            _accumulate(grad.to(dtype), chunk, weight, rows, grad_hidden, grad_weight)
    return values, grad_hidden, grad_weight, grad_bias


def _logits(hidden: Tensor, weight: Tensor, head: LMHead, wide: torch.dtype) -> Tensor:
    out = (hidden @ weight.T).to(wide)
    if head.bias is not None:
        out += head.bias
    if head.scale != 1.0:
        out *= head.scale
    return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)


def _through_head_(grad: Tensor, capped: Tensor | None, head: LMHead) -> Tensor:
    """From the gradient on the logits to that on ``hidden @ weight.T + bias``, in place."""
    if capped is not None and head.softcap is not None:
        grad *= 1.0 - (capped / head.softcap) ** 2
    return grad.mul_(head.scale) if head.scale != 1.0 else grad


def _accumulate(
    grad: Tensor, chunk: Tensor, weight: Tensor, rows: slice, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    if grad_hidden is not None:
        grad_hidden[rows] = grad @ weight
    if grad_weight is not None:
        if grad.dtype == grad_weight.dtype:
            grad_weight.addmm_(grad.T, chunk)
        else:
            grad_weight += grad.T @ chunk


def _values_and_grads_(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, settings: LossSettings
) -> Tensor:
    """Values `[n]`; ``student_logits`` `[n, vocab]` is overwritten with their gradient, block of rows by block."""
    count, vocab_size = student_logits.shape
    size = max(1, BLOCK_BYTES // (vocab_size * student_logits.element_size()))
    values = torch.empty(count, dtype=student_logits.dtype, device=student_logits.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        student = student_logits[rows]
        teacher = None if teacher_logits is None else teacher_logits[rows]
        block_labels = None if labels is None else labels[rows]
        closed = settings.objective.has_closed_form or not settings.uses_objective
        if closed and _all_finite(student) and (teacher is None or _all_finite(teacher)):
            values[rows] = _closed_form_(student, teacher, block_labels, settings)
        else:
            values[rows] = _autograd_(student, teacher, block_labels, settings)
    return values


def _all_finite(block: Tensor) -> bool:
    low, high = torch.aminmax(block)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _closed_form_(student: Tensor, teacher: Tensor | None, labels: Tensor | None, settings: LossSettings) -> Tensor:
    """The objective's own gradient, in place of the logits; cross-entropy beside it where it is asked for."""
    plain = student.clone() if settings.uses_cross_entropy and settings.uses_objective else student
    values: Tensor | None = None
    if settings.uses_objective:
        temperature = settings.temperature
        if temperature != 1.0:
            student /= temperature
            if teacher is not None:
                teacher /= temperature
        values = settings.objective.value_and_grad_(student, teacher, labels)
        if settings.kd_factor != 1.0:
            values = values * settings.kd_factor
        if settings.kd_factor != temperature:
            student *= settings.kd_factor / temperature
    if settings.uses_cross_entropy:
        share = 1.0 - settings.kd_weight
        observed = CrossEntropy().value_and_grad_(plain, None, labels) * share
        plain *= share
        if values is None:
            return observed
        student += plain
        values = values + observed
    assert values is not None
    return values


def _autograd_(student: Tensor, teacher: Tensor | None, labels: Tensor | None, settings: LossSettings) -> Tensor:
    """The definition itself, differentiated: for objectives without a closed form and for infinite logits."""
    with torch.enable_grad():
        leaf = student.detach().clone().requires_grad_()
        values = position_values(leaf, teacher, labels, settings)
        (grad,) = torch.autograd.grad(values.sum(), leaf)
    student.copy_(grad)
    return values.detach()
