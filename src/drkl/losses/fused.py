"""The loss from hidden states and heads, without a [tokens, vocab] tensor.

The positions go through both heads in chunks; each chunk's gradient is made in the forward pass, in the chunk's own
logits, and carried on to the hidden states and the head at once, so that memory does not grow with the tokens.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drkl.errors import DrklError
from drkl.losses.common import (
    LossArguments,
    LossSettings,
    Reduction,
    denominator,
    make_settings,
    select,
    select_labels,
    select_weights,
    shared_vocabulary,
    spread,
    valid_positions,
)
from drkl.losses.dense import position_values
from drkl.losses.head import LMHead, as_head
from drkl.losses.position import (
    PositionStatistics,
    empty_statistics,
    keep_moments,
    position_statistics,
    spread_statistics,
)
from drkl.objectives import CrossEntropy, Objective
from drkl.objectives.closed_form import Moments
from drkl.objectives.logspace import weighted

CHUNK_BYTES = 48 * 2**20
"""Logits of one model held at a time."""
BLOCK_BYTES = 2**20
"""Rows whose gradient is made at a time: small enough to stay in the processor's cache between passes."""
CUDA_CHUNK_BYTES, CUDA_BLOCK_BYTES = 512 * 2**20, 128 * 2**20
"""The same on a GPU, which wants more rows in a matrix product, and more work in a call, than a processor."""
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
"""Where the Triton kernel is used."""


@overload
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | LMHead,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | LMHead | None,
    labels: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **settings: Unpack[LossArguments],
) -> Tensor: ...
@overload
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | LMHead,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | LMHead | None,
    labels: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **settings: Unpack[LossArguments],
) -> tuple[Tensor, PositionStatistics]: ...
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
    token_weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    reduction: Reduction = "mean",
    vocab_size: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PositionStatistics]:
    """`distillation_loss` of ``head.logits(hidden)``, in memory that does not grow with [tokens, vocab].

    The same values and gradients as the two naive lines it equals::

        student_logits, teacher_logits = student_head.logits(student_hidden), teacher_head.logits(teacher_hidden)
        distillation_loss(student_logits, teacher_logits, labels, ...)

    Args:
        student_hidden: `[..., student_hidden]`, the last hidden states (after the final norm).
        student_head: `[vocab, student_hidden]`, or an `LMHead` with bias, scale or soft-cap. A head that needs no
            gradient costs none; one sharded over processes (DTensor) is gathered once.
        teacher_hidden: `[..., teacher_hidden]`; gets no gradient. None where the objective needs none.
        teacher_head: `[vocab, teacher_hidden]` or an `LMHead`; gets no gradient.
        labels, objective, temperature, kd_weight, t2_scaling, token_mask, token_weights, num_tokens, vocab_size: as in
            `distillation_loss`.
        reduction: ``mean``, ``sum``, or ``none`` (`[...]`, detached: values without a graph).
        return_stats: also return a `PositionStatistics` of detached values `[...]`, made from the same logits while
            they are there: no further matrix product.

    Returns:
        A scalar in nats per token. With no valid position it is 0 and has a graph. With ``return_stats``, a pair.

    Raises:
        DrklError: as `distillation_loss`.
    """
    settings = make_settings(objective, temperature, kd_weight, t2_scaling, reduction)
    positions = _Positions(labels, token_mask, token_weights, num_tokens)
    run = _fused_loss
    if "torch._dynamo" in sys.modules:  # one break in a compiled graph, instead of a graph for every loop below
        run = torch.compiler.disable(_fused_loss)
    return run(
        (student_hidden, student_head), (teacher_hidden, teacher_head), positions, settings, vocab_size, return_stats
    )


class _Positions(NamedTuple):
    """What a caller says about the positions."""

    labels: Tensor | None
    token_mask: Tensor | None
    token_weights: Tensor | None
    num_tokens: int | float | Tensor | None


def _fused_loss(
    student: tuple[Tensor, Tensor | LMHead],
    teacher_inputs: tuple[Tensor | None, Tensor | LMHead | None],
    positions: _Positions,
    settings: LossSettings,
    vocab_size: int | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, PositionStatistics]:
    (student_hidden, student_head), (labels, token_mask, token_weights, num_tokens) = student, positions
    reduction = settings.reduction
    shape = student_hidden.shape[:-1]
    head = as_head(student_head).gathered()
    _check_hidden("student", student_hidden, head)
    teacher = _teacher(*teacher_inputs, settings, shape)
    size = shared_vocabulary(head.vocab_size, None if teacher is None else teacher[1].vocab_size, vocab_size)
    head = head.trimmed(size)
    keep = valid_positions(shape, labels, token_mask, token_weights, settings, size)
    if keep is not None and bool(keep.all()):
        keep = None  # nothing to leave out, so nothing to copy
    hidden = select(student_hidden, keep)
    dtype = _compute_dtype(hidden, head.weight)
    wide = torch.promote_types(torch.float32, dtype)
    inputs = _Inputs(
        labels=select_labels(labels, keep),
        token_weights=select_weights(token_weights, keep, wide),
        teacher_hidden=None if teacher is None else select(teacher[0], keep),
        teacher_head=None if teacher is None else teacher[1].trimmed(size),
        settings=settings,
        head=head.detached(),
        compute_dtype=dtype,
        teacher_dtype=dtype if teacher is None else _teacher_dtype(teacher[0], teacher[1].weight, dtype),
        statistics=_room(hidden, wide, teacher is not None, settings) if return_stats else None,
    )
    # The autograd function cannot see that grad mode is off: it would make gradients that nobody takes.
    result: Tensor
    if reduction == "none" or not torch.is_grad_enabled():
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            values, *_ = _run(hidden.detach(), inputs, needs=(False, False, False))
        result = spread(values, keep, shape) if reduction == "none" else values.sum()
    else:
        result = _FusedSum.apply(hidden, head.weight, head.bias, inputs)
    if reduction == "mean":
        result = result / denominator(num_tokens, hidden.shape[0])
    if inputs.statistics is None:
        return result
    return result, spread_statistics(inputs.statistics, keep, shape)


def _room(hidden: Tensor, wide: torch.dtype, with_teacher: bool, settings: LossSettings) -> PositionStatistics:
    return empty_statistics(torch.empty(hidden.shape[0], dtype=wide, device=hidden.device), with_teacher, settings)


class _Inputs(NamedTuple):
    """What the autograd function takes besides the tensors that get gradients."""

    labels: Tensor | None
    token_weights: Tensor | None
    teacher_hidden: Tensor | None
    teacher_head: LMHead | None
    settings: LossSettings
    head: LMHead
    compute_dtype: torch.dtype
    teacher_dtype: torch.dtype
    statistics: PositionStatistics | None


def _check_hidden(whose: str, hidden: Tensor, head: LMHead) -> None:
    if hidden.shape[-1] != head.weight.shape[1]:
        raise DrklError(
            f"The {whose}'s hidden states have {hidden.shape[-1]} columns and its head {head.weight.shape[1]}."
        )


def _teacher(
    hidden: Tensor | None, head: Tensor | LMHead | None, settings: LossSettings, shape: torch.Size
) -> tuple[Tensor, LMHead] | None:
    """The teacher's hidden states and head, detached; None where the loss does not use them."""
    if not settings.uses_teacher:
        return None
    if hidden is None or head is None:
        name = settings.objective.name
        raise DrklError(f"Objective {name!r} compares with a teacher, but teacher_hidden or teacher_head is None.")
    head = as_head(head).detached().gathered()
    _check_hidden("teacher", hidden, head)
    if hidden.shape[:-1] != shape:
        raise DrklError(
            f"The teacher's hidden states cover positions {list(hidden.shape[:-1])} and the student's {list(shape)}."
        )
    return hidden.detach(), head


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
    teacher_weight = None if inputs.teacher_head is None else inputs.teacher_head.weight.to(inputs.teacher_dtype)
    kernel = _row_kernel(hidden.device, inputs)
    size = _even(count, chunk_rows(head.weight, (dtype if kernel else wide).itemsize))
    rooms = None if kernel else _make_rooms(size, inputs, wide)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        chunk = hidden[rows].to(dtype)
        capped: Tensor | None = None
        student_logits, done = None, None
        if kernel is not None:
            student_logits, done = _kernel_step(kernel, chunk, weight, teacher_weight, inputs, rows)
        if student_logits is None or done is None:
            student_logits = _logits(chunk, weight, head, wide, rooms)
            capped = student_logits.clone() if head.softcap is not None and any(needs) else None
            teacher_logits = _teacher_logits(teacher_weight, inputs, rows, wide, rooms)
            labels = None if inputs.labels is None else inputs.labels[rows]
            done = _values_and_grads_(student_logits, teacher_logits, labels, inputs, start)
        values[rows] = done
        if any(needs):
            grad = _through_head_(student_logits, capped, head)
            share = None if inputs.token_weights is None else inputs.token_weights[rows]
            if share is not None:
                grad[share == 0] = 0  # 0 * inf: what has no weight may be infinite
            if grad_bias is not None:
                grad_bias += grad.sum(0) if share is None else share @ grad
            if rooms is not None and rooms.low is not None:
                grad = rooms.low[: grad.shape[0]].copy_(grad)
            _accumulate(grad.to(dtype), chunk, weight, rows, grad_hidden, grad_weight, share)
    if inputs.statistics is not None:
        inputs.statistics.value.copy_(values)
    if inputs.token_weights is not None:
        values = weighted(inputs.token_weights, values)
    return values, grad_hidden, grad_weight, grad_bias


def _row_kernel(device: torch.device, inputs: _Inputs) -> Any:
    """The module with the Triton kernel, where there is one for this loss on this device; else None."""
    plain = [inputs.head] if inputs.teacher_head is None else [inputs.head, inputs.teacher_head]
    if device.type not in KERNEL_DEVICES or torch.float64 in (inputs.compute_dtype, inputs.teacher_dtype):
        return None
    if any(h.bias is not None or h.scale != 1.0 or h.softcap is not None or h.vocab_size < 2 for h in plain):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    from drkl.losses import row_kernel

    return row_kernel if row_kernel.supports(inputs.settings) else None


def _kernel_step(
    kernel: Any, chunk: Tensor, weight: Tensor, teacher_weight: Tensor | None, inputs: _Inputs, rows: slice
) -> tuple[Tensor | None, Tensor | None]:
    """A chunk's gradient on the logits and its values, by the kernel; (None, None) where a value is not finite."""
    assert teacher_weight is not None and inputs.teacher_hidden is not None
    student_logits = chunk @ weight.T
    teacher_logits = inputs.teacher_hidden[rows].to(inputs.teacher_dtype) @ teacher_weight.T
    labels = None if inputs.labels is None else inputs.labels[rows]
    seen = None if inputs.statistics is None else Moments()
    try:
        values = kernel.row_step_(student_logits, teacher_logits, labels, inputs.settings, seen)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton builds at the first call; without a C compiler, say, it cannot
        global KERNEL_DEVICES
        KERNEL_DEVICES = ()
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"The Triton kernel does not run here; the loss goes on without it, slower. {reason}", stacklevel=2
        )
        return None, None
    if not bool(values.isfinite().all()):
        return None, None
    if inputs.statistics is not None and seen is not None:
        keep_moments(inputs.statistics, rows, seen)
    return student_logits, values


class _Rooms(NamedTuple):
    """Memory for a chunk's logits, made once: fresh memory costs a processor a twentieth of the whole."""

    student: Tensor | None
    teacher: Tensor | None
    low: Tensor | None
    """For a product in low precision, on its way to or from fp32."""


def _make_rooms(size: int, inputs: _Inputs, wide: torch.dtype) -> _Rooms:
    weight = inputs.head.weight

    def room(dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return weight.new_empty(size, weight.shape[0], dtype=dtype) if wanted else None

    dtype = inputs.compute_dtype
    return _Rooms(room(wide), room(wide, inputs.teacher_head is not None), room(dtype, dtype != wide))


def chunk_rows(weight: Tensor, itemsize: int) -> int:
    """How many positions go through the head `[vocab, hidden]` at a time; a logit has ``itemsize`` bytes.

    Every chunk reads both heads and writes the head's gradient once more, so with a large vocabulary it takes more than
    CHUNK_BYTES: as many as make a quarter of the head's own size, and no more than 256 for that.
    """
    vocab_size, hidden_size = weight.shape
    if weight.device.type == "cuda":
        return max(1, CUDA_CHUNK_BYTES // (vocab_size * itemsize))
    return max(1, CHUNK_BYTES // (vocab_size * itemsize), min(256, hidden_size // 4))


def _even(count: int, most: int) -> int:
    """The size of equal chunks of at most ``most`` rows: a last one of few rows would read both heads for nothing."""
    return max(1, -(-count // max(1, -(-count // most))))


def _teacher_logits(
    weight: Tensor | None, inputs: _Inputs, rows: slice, wide: torch.dtype, rooms: _Rooms | None
) -> Tensor | None:
    if weight is None or inputs.teacher_hidden is None or inputs.teacher_head is None:
        return None
    states = inputs.teacher_hidden[rows].to(inputs.teacher_dtype)
    return _logits(states, weight, inputs.teacher_head, wide, rooms and rooms._replace(student=rooms.teacher))


def _logits(hidden: Tensor, weight: Tensor, head: LMHead, wide: torch.dtype, rooms: _Rooms | None) -> Tensor:
    """A chunk's logits in ``wide``, in the student's room where there are rooms."""
    if rooms is None or rooms.student is None:
        out = (hidden @ weight.T).to(wide)
    elif hidden.dtype == wide:
        out = torch.mm(hidden, weight.T, out=rooms.student[: hidden.shape[0]])
    else:
        low = None if rooms.low is None else rooms.low[: hidden.shape[0]]
        out = rooms.student[: hidden.shape[0]].copy_(torch.mm(hidden, weight.T, out=low))
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
    grad: Tensor,
    chunk: Tensor,
    weight: Tensor,
    rows: slice,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    share: Tensor | None,
) -> None:
    """Carry a chunk's gradient on; the positions' weights act on [rows, hidden], not on [rows, vocab]."""
    if grad_hidden is not None:
        product = grad @ weight
        grad_hidden[rows] = product if share is None else product * share.unsqueeze(-1)
    if grad_weight is not None:
        states = chunk if share is None else (chunk * share.unsqueeze(-1)).to(grad.dtype)
        if grad.dtype == grad_weight.dtype:
            grad_weight.addmm_(grad.T, states)
        else:
            grad_weight += grad.T @ states


@lru_cache
def _takes_seen(objective: type) -> bool:
    """Whether an objective's closed form also notes the statistics."""
    closed_form: Any = getattr(objective, "value_and_grad_", None)
    return closed_form is not None and "seen" in inspect.signature(closed_form).parameters


def _values_and_grads_(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, inputs: _Inputs, offset: int
) -> Tensor:
    """Values `[n]`; ``student_logits`` `[n, vocab]` is overwritten with their gradient, block of rows by block.

    ``offset`` is where these rows lie among all, for the statistics.
    """
    settings = inputs.settings
    count, vocab_size = student_logits.shape
    block_bytes = CUDA_BLOCK_BYTES if student_logits.is_cuda else BLOCK_BYTES
    size = max(1, block_bytes // (vocab_size * student_logits.element_size()))
    values = torch.empty(count, dtype=student_logits.dtype, device=student_logits.device)
    notices = settings.uses_objective and _takes_seen(type(settings.objective))
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        student = student_logits[rows]
        teacher = None if teacher_logits is None else teacher_logits[rows]
        block_labels = None if labels is None else labels[rows]
        closed = settings.objective.has_closed_form or not settings.uses_objective
        closed = closed and _all_finite(student) and (teacher is None or _all_finite(teacher))
        seen = Moments() if inputs.statistics is not None and closed and notices else None
        place = slice(offset + rows.start, offset + rows.stop)
        if inputs.statistics is not None and seen is None:
            position_statistics(inputs.statistics, place, student, teacher, block_labels, settings)
        if closed:
            values[rows] = _closed_form_(student, teacher, block_labels, settings, seen)
        else:
            values[rows] = _autograd_(student, teacher, block_labels, settings)
        if inputs.statistics is not None and seen is not None:
            keep_moments(inputs.statistics, place, seen)
    return values


def _all_finite(block: Tensor) -> bool:
    low, high = torch.aminmax(block)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _closed_form_(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, settings: LossSettings, seen: Moments | None
) -> Tensor:
    """The objective's own gradient, in place of the logits; cross-entropy beside it where it is asked for."""
    plain = student.clone() if settings.uses_cross_entropy and settings.uses_objective else student
    values: Tensor | None = None
    if settings.uses_objective:
        temperature = settings.temperature
        if temperature != 1.0:
            student /= temperature
            if teacher is not None:
                teacher /= temperature
        if seen is None:
            values = settings.objective.value_and_grad_(student, teacher, labels)
        else:
            values = settings.objective.value_and_grad_(student, teacher, labels, seen)
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
