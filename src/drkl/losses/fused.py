"""The loss from hidden states and heads, without a [tokens, vocab] tensor.

For each chunk of positions: both models' logits, the values, the gradient in place of the student's logits, and from it
the gradients on the hidden states and the head. All of it happens in the forward pass, so memory does not grow with the
tokens; the backward pass only scales.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drkl.errors import DrklError
from drkl.losses import buffers
from drkl.losses.common import (
    LossSettings,
    Observer,
    Reduction,
    check_topk,
    denominator,
    make_settings,
    observed_chunk,
    select,
    select_labels,
    select_weights,
    shared_vocabulary,
    spread,
    valid_positions,
)
from drkl.losses.compiled import ClosedForm, compiled
from drkl.losses.dense import position_values
from drkl.losses.head import LMHead, as_head
from drkl.losses.kernel_steps import Chunk, KernelSteps, kernel_runs, why_not
from drkl.losses.merged import MergedIds, make_merged
from drkl.losses.products import add_product_
from drkl.losses.topk import TopK, class_values_and_grads_
from drkl.objectives import CrossEntropy, Objective, ObjectiveLike
from drkl.objectives.base import check_values
from drkl.objectives.logspace import weighted

CHUNK_BYTES = 48 * 2**20
"""Bytes of logits that one model has at a time."""
BLOCK_BYTES = 2**19
"""Bytes of logits that a thread makes the gradient of at a time: few enough to stay in its cache between passes."""
CUDA_CHUNK_BYTES, CUDA_BLOCK_BYTES = 512 * 2**20, 128 * 2**20
"""The same on a GPU, which wants more rows in a matrix product, and more work in a call, than a processor."""
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
"""The devices on which the Triton kernel runs."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""On hidden states, weight and bias; None where not needed."""
P = ParamSpec("P")
R = TypeVar("R")


def _not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile break its graph here once, instead of making a graph for every loop in ``function``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # Not torch.compiler.disable as the decorator: it loads torch._dynamo, which takes a second.
        run = torch.compiler.disable(function) if torch.compiler.is_dynamo_compiling() else function
        return run(*args, **kwargs)

    return call


@_not_compiled
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | LMHead,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: Tensor | LMHead | None,
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
    """`distillation_loss` of ``head.logits(hidden)``, in memory that does not grow with [tokens, vocab].

    The same values and gradients as the two naive lines it equals::

        student_logits, teacher_logits = student_head.logits(student_hidden), teacher_head.logits(teacher_hidden)
        distillation_loss(student_logits, teacher_logits, labels, ...)

    Args:
        student_hidden: `[..., student_hidden]`, the last hidden states (after the final norm).
        student_head: `[vocab, student_hidden]`, or an `LMHead` with bias, scale or soft-cap. A head that needs no
            gradient costs none; one sharded over processes (DTensor) is gathered once.
        teacher_hidden: `[..., teacher_hidden]`; gets no gradient. None where the objective needs none. A `TopK` in
            its place says what is known of the teacher's distributions; then there is no ``teacher_head``.
        teacher_head: `[vocab, teacher_hidden]` or an `LMHead`; gets no gradient.
        labels, objective, temperature, kd_weight, t2_scaling, token_mask, token_weights, num_tokens, vocab_size,
            merged_ids: as in `distillation_loss`.
        reduction: ``mean``, ``sum``, or ``none`` (`[...]`, detached: values without a graph).
        observe: as in `distillation_loss`; called once per chunk with the logits that the loss is made from, so that
            numbers beside the loss cost no further product with the heads.

    Returns:
        A scalar in nats per token. With no valid position it is 0 and has a graph.

    Raises:
        DrklError: as `distillation_loss`.
    """
    settings = make_settings(objective, temperature, kd_weight, t2_scaling, reduction)
    shape = student_hidden.shape[:-1]
    head = as_head(student_head).gathered()
    _check_hidden("student", student_hidden, head)
    known = teacher_hidden if isinstance(teacher_hidden, TopK) else None
    teacher = None
    if isinstance(teacher_hidden, TopK):
        if teacher_head is not None:
            raise DrklError("teacher_hidden is a TopK, which has logits already; leave teacher_head out.")
    elif settings.uses_teacher or (observe is not None and teacher_hidden is not None and teacher_head is not None):
        teacher = _checked_teacher(teacher_hidden, teacher_head, settings, shape)
    size = shared_vocabulary(head.vocab_size, None if teacher is None else teacher[1].vocab_size, vocab_size)
    if known is not None:
        check_topk(known, settings, shape, size)
    head = head.trimmed(size)
    settings = replace(settings, merged=make_merged(merged_ids, size))
    keep = valid_positions(shape, labels, token_mask, token_weights, settings, size)
    hidden = select(student_hidden, keep)
    dtype = _compute_dtype(hidden, head.weight)
    wide = torch.promote_types(torch.float32, dtype)
    scratch: dict[torch.dtype, Tensor] = {}
    teacher_side: _Side | TopK | None = None if known is None else known.at(keep)
    if teacher is not None:
        # A student in low precision does not take the teacher's own precision from it.
        teacher_dtype = torch.promote_types(_compute_dtype(teacher[0], teacher[1].weight), dtype)
        teacher_side = _Side(select(teacher[0], keep), teacher[1].trimmed(size), teacher_dtype, wide, scratch)
    kept_labels = select_labels(labels, keep)
    run = functools.partial(
        _run,
        _Side(hidden.detach(), head.detached(), dtype, wide, scratch),
        teacher_side,
        kept_labels if settings.merged is None else settings.merged.labels(kept_labels),
        select_weights(token_weights, keep, wide),
        settings,
        observe,
    )
    # The autograd function cannot see that grad mode is off: it would make gradients that nobody takes.
    divisor = denominator(num_tokens, hidden.shape[0]) if reduction == "mean" else 1.0
    if reduction == "none" or not torch.is_grad_enabled():
        with torch.no_grad(), torch.autocast(_autocast_device(hidden), enabled=False):
            values, _ = run((False, False, False), 1.0)
        return spread(values, keep, shape) if reduction == "none" else values.sum() / divisor
    # A number on a device is not known without waiting for it.
    told = not isinstance(divisor, Tensor) or divisor.device.type == "cpu"
    result: Tensor = _FusedSum.apply(hidden, head.weight, head.bias, run, float(divisor) if told else 1.0)
    return result if told else result / divisor


def _check_hidden(whose: str, hidden: Tensor, head: LMHead) -> None:
    if hidden.shape[-1] != head.weight.shape[1]:
        raise DrklError(
            f"The {whose}'s hidden states have {hidden.shape[-1]} columns and its head {head.weight.shape[1]}."
        )


def _checked_teacher(
    hidden: Tensor | None, head: Tensor | LMHead | None, settings: LossSettings, shape: torch.Size
) -> tuple[Tensor, LMHead]:
    """The teacher's hidden states and head, detached."""
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
    device = _autocast_device(hidden)
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _autocast_device(tensor: Tensor) -> str:
    """The device whose autocast a tensor follows; one on the meta device has none of its own."""
    return "cpu" if tensor.is_meta else tensor.device.type


class _FusedSum(torch.autograd.Function):
    """The sum of the values over a number; its gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[..., tuple[Tensor, Gradients]],
        divisor: float,
    ) -> Tensor:
        with torch.autocast(_autocast_device(hidden), enabled=False):
            values, ctx.grads = run(ctx.needs_input_grad[:3], 1.0 / divisor)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return values.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError("The fused loss was differentiated twice; its gradients are made once and given away.")
        ctx.grads = None
        # The sums are nobody else's, and the head's is as large as the head: no pass over it that can be spared.
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            for grad in grads:
                if grad is not None:
                    grad *= upstream.to(grad.dtype)
        scaled = [None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


class _Side:
    """One model's logits, chunk by chunk: ``head.logits(hidden)`` of the positions that count, `[n, hidden]`.

    The matrix product runs in ``dtype``, the rest in ``wide``. A chunk's logits overwrite those of the last one, and
    both sides share ``scratch``: allocating afresh costs a processor a twentieth of the total time.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: LMHead,
        dtype: torch.dtype,
        wide: torch.dtype,
        scratch: dict[torch.dtype, Tensor],
    ) -> None:
        self.hidden, self.head, self.dtype, self.wide = hidden, head, dtype, wide
        self.weight = head.weight.to(dtype)
        self._logits: dict[torch.dtype, Tensor] = {}
        self._products: dict[int, dict[torch.dtype, Tensor]] = {}
        self._scratch = scratch

    def states(self, rows: slice) -> Tensor:
        """The hidden states of a chunk."""
        return self.hidden[rows].to(self.dtype)

    def product(self, rows: slice, turn: int) -> Tensor:
        """``hidden @ weight.T`` of a chunk, in ``dtype``, over the last one of the same turn."""
        states = self.states(rows)
        made = self._products.setdefault(turn, {})
        return torch.mm(states, self.weight.T, out=self._buffer(made, self.dtype, len(states)))

    def logits(self, rows: slice) -> Tensor:
        """A chunk's logits, in ``wide``."""
        states, head = self.states(rows), self.head
        out = self._buffer(self._logits, self.wide, len(states))
        if self.dtype == self.wide:
            torch.mm(states, self.weight.T, out=out)
        else:
            out.copy_(torch.mm(states, self.weight.T, out=self._buffer(self._scratch, self.dtype, len(states))))
        if head.bias is not None:
            out += head.bias
        if head.scale != 1.0:
            out *= head.scale
        return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)

    def through_head_(self, grad: Tensor, capped: Tensor | None) -> Tensor:
        """From the gradient on the logits to that on ``hidden @ weight.T + bias``; ``capped`` is a copy of logits."""
        if capped is not None:
            return grad.mul_(self.head.slope(capped))
        return grad.mul_(self.head.scale) if self.head.scale != 1.0 else grad

    def narrowed(self, grad: Tensor) -> Tensor:
        """A chunk's gradient in ``dtype``, for the matrix products."""
        return grad if grad.dtype == self.dtype else self._buffer(self._scratch, self.dtype, len(grad)).copy_(grad)

    def _buffer(self, made: dict[torch.dtype, Tensor], dtype: torch.dtype, count: int) -> Tensor:
        """`[count, vocab]` with arbitrary contents; the first chunk, for which it is made, is the largest."""
        if dtype not in made:
            rows = count
            if self.weight.device.type == "cpu":
                # As many as a chunk may have, though fewer are written: the next call finds one of its size.
                rows = max(rows, chunk_rows(self.weight, self.wide.itemsize))
            made[dtype] = buffers.empty((rows, self.weight.shape[0]), dtype, self.weight.device)
        return made[dtype][:count]


def _run(
    student: _Side,
    teacher: _Side | TopK | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    settings: LossSettings,
    observe: Observer | None,
    needs: tuple[bool, bool, bool],
    scale: float,
) -> tuple[Tensor, Gradients]:
    """Values `[n]`, and the gradients of ``scale`` times their sum."""
    hidden, head, wide = student.hidden, student.head, student.wide
    count = hidden.shape[0]
    values = torch.empty(count, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if needs[0] else None
    grad_weight = None
    if needs[1]:
        make = buffers.empty if count else torch.zeros
        grad_weight = make(tuple(head.weight.shape), dtype=wide, device=hidden.device)
    grad_bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] and head.bias is not None else None
    kernel = _kernel_steps(student, teacher, settings, any(needs), observe)
    size = even(count, chunk_rows(head.weight, (student.dtype if kernel else wide).itemsize))
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    way = kernel or functools.partial(_closed_form_chunks, student, teacher, settings, any(needs), observe)
    for rows, found, grad in way(chunks, labels):
        values[rows] = found
        if any(needs):
            share = None if token_weights is None else token_weights[rows]
            if share is not None:
                grad.masked_fill_((share == 0).unsqueeze(-1), 0)  # 0 * inf: what has no weight may be infinite
            if grad_bias is not None:
                _add_bias_grad_(grad_bias, grad, share)
            _accumulate(student.narrowed(grad), student, rows, grad_hidden, grad_weight, share, scale)
    if token_weights is not None:
        values = weighted(token_weights, values)
    if grad_bias is not None:
        grad_bias *= scale
    return values, (grad_hidden, grad_weight, grad_bias)


def _closed_form_chunks(
    student: _Side,
    teacher: _Side | TopK | None,
    settings: LossSettings,
    needs_grad: bool,
    observe: Observer | None,
    chunks: Sequence[slice],
    labels: Tensor | None,
) -> Iterator[Chunk]:
    """Each chunk in turn by the objective's closed form, or by its definition."""
    closed_form = _best_closed_form(student, teacher, settings)
    for rows in chunks:
        own = None if labels is None else labels[rows]
        grad, teacher_logits = student.logits(rows), _teacher_chunk(teacher, rows)
        _show(observe, grad, teacher_logits, own, rows.start, settings.merged)
        capped = grad.clone() if student.head.softcap is not None and needs_grad else None
        compared = teacher_logits if settings.uses_teacher else None
        values = values_and_grads_(grad, compared, own, settings, closed_form)
        yield rows, values, student.through_head_(grad, capped) if needs_grad else grad


def _teacher_chunk(teacher: _Side | TopK | None, rows: slice) -> Tensor | TopK | None:
    if isinstance(teacher, _Side):
        return teacher.logits(rows)
    return None if teacher is None else teacher[rows]


def _show(
    observe: Observer | None,
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    start: int,
    merged: MergedIds | None,
) -> None:
    if observe is not None:
        observe(observed_chunk(student, teacher, labels, start, merged))


def _kernel_steps(
    student: _Side, teacher: _Side | TopK | None, settings: LossSettings, needs_grad: bool, observe: Observer | None
) -> KernelSteps | None:
    """The loss by the Triton kernel, where it runs for this loss on this device; else None."""
    if student.weight.device.type not in KERNEL_DEVICES or student.head.vocab_size < 2:
        return None
    if why_not(student, teacher, settings) is not None or not kernel_runs(student, teacher, settings):
        return None
    return KernelSteps(student, teacher, settings, needs_grad, observe)


def _best_closed_form(student: _Side, teacher: _Side | TopK | None, settings: LossSettings) -> ClosedForm:
    """The closed form compiled, where the kernel does not know the loss that it could run for."""
    device, vocab_size = student.weight.device, student.head.vocab_size
    if device.type not in KERNEL_DEVICES or vocab_size < 2 or not _has_closed_form(settings):
        return _closed_form_
    reason = why_not(student, teacher, settings)
    if reason is None:
        return _closed_form_  # the kernel does not run, which has been said
    _say_once(f"{reason} The loss goes on without it, slower.")
    if isinstance(teacher, TopK) and settings.uses_teacher:
        return _closed_form_
    if settings.merged is None or not settings.uses_objective:
        return compiled(_closed_form_, settings, vocab_size, student.wide, device)
    # torch.compile stumbles over the columns of merged ids, which are few: the objective alone is compiled.
    alone = replace(settings, temperature=1.0, kd_weight=1.0, t2_scaling=False, merged=None)
    step = compiled(_closed_form_, alone, settings.merged.size, student.wide, device)
    return functools.partial(_closed_form_, core=lambda ours, theirs, observed: step(ours, theirs, observed, alone))


@functools.lru_cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _has_closed_form(settings: LossSettings) -> bool:
    return settings.objective.has_closed_form or not settings.uses_objective


def chunk_rows(weight: Tensor, itemsize: int) -> int:
    """The number of positions that go through the head `[vocab, hidden]` at a time; a logit has ``itemsize`` bytes.

    Every chunk reads both heads and writes the head's gradient once more, so with a large vocabulary it takes more than
    CHUNK_BYTES: as many as make a quarter of the head's own size, and no more than 256 for that.
    """
    vocab_size, hidden_size = weight.shape
    if weight.device.type == "cuda":
        return max(1, CUDA_CHUNK_BYTES // (vocab_size * itemsize))
    return max(1, CHUNK_BYTES // (vocab_size * itemsize), min(256, hidden_size // 4))


def even(count: int, most: int) -> int:
    """The size of equal chunks of at most ``most`` rows: a last one of few rows would read both heads for nothing."""
    return max(1, -(-count // max(1, -(-count // most))))


def _add_bias_grad_(grad_bias: Tensor, grad: Tensor, share: Tensor | None) -> None:
    if share is None:
        grad_bias += grad.sum(0, dtype=grad_bias.dtype)
    elif grad.dtype == share.dtype:
        grad_bias += share @ grad
    else:
        add_product_(grad_bias.unsqueeze(0), share.to(grad.dtype).unsqueeze(0), grad)


def _accumulate(
    grad: Tensor,
    student: _Side,
    rows: slice,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    share: Tensor | None,
    scale: float,
) -> None:
    """Carry a chunk's gradient on; the positions' weights act on [rows, hidden], not on [rows, vocab]."""
    if grad_hidden is not None:
        product = grad @ student.weight
        grad_hidden[rows] = (product if share is None else product * share.unsqueeze(-1)) * scale
    if grad_weight is not None:
        states = student.states(rows)
        if share is not None:
            states = (states * share.unsqueeze(-1)).to(grad.dtype)
        add_product_(grad_weight, grad.T, states, scale=scale, first=rows.start == 0)


def block_rows(logits: Tensor) -> int:
    """The number of rows of ``logits`` `[n, vocab]` that are worked on at a time, where several passes go over each."""
    block_bytes = CUDA_BLOCK_BYTES if logits.is_cuda else BLOCK_BYTES
    rows = max(1, block_bytes // (logits.shape[-1] * logits.element_size()))
    # As many for each thread, or one waits for another in every pass.
    return rows * torch.get_num_threads() if logits.device.type == "cpu" else rows


def values_and_grads_(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None,
    settings: LossSettings,
    closed_form: ClosedForm | None = None,
) -> Tensor:
    """Values `[n]`; ``student_logits`` `[n, vocab]` is overwritten with their gradient, block of rows by block."""
    count = len(student_logits)
    size = block_rows(student_logits)
    values = torch.empty(count, dtype=student_logits.dtype, device=student_logits.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        student = student_logits[rows]
        teacher = None if teacher_logits is None else teacher_logits[rows]
        closed = (
            _has_closed_form(settings) and _all_finite(student) and _teacher_is_finite(teacher, settings.temperature)
        )
        step = (closed_form or _closed_form_) if closed else _autograd_
        values[rows] = step(student, teacher, None if labels is None else labels[rows], settings)
    return values


def _all_finite(block: Tensor) -> bool:
    # A sum is infinite, or not a number, where one of its terms is; where only the sum overflows, the definition is
    # taken for nothing.
    return math.isfinite(block.sum())


def _teacher_is_finite(teacher: Tensor | TopK | None, temperature: float) -> bool:
    if isinstance(teacher, TopK):
        return teacher.is_finite(temperature)
    return teacher is None or _all_finite(teacher)


def _closed_form_(
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    settings: LossSettings,
    core: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The objective's own gradient, in place of the logits; cross-entropy beside it where it is asked for."""
    plain = student.clone() if settings.uses_cross_entropy and settings.uses_objective else student
    values: Tensor | None = None
    if settings.uses_objective:
        temperature = settings.temperature
        if temperature != 1.0:
            student /= temperature
            if isinstance(teacher, Tensor):
                teacher /= temperature
        objective = settings.objective
        values = _merged_value_and_grad_(objective, student, teacher, labels, settings.merged, temperature, core)
        check_values(settings.objective, values, student.shape[0])
        if settings.kd_factor != 1.0:
            values = values * settings.kd_factor
        if settings.kd_factor != temperature:
            student *= settings.kd_factor / temperature
    if settings.uses_cross_entropy:
        share = 1.0 - settings.kd_weight
        observed = _merged_value_and_grad_(CrossEntropy(), plain, None, labels, settings.merged) * share
        plain *= share
        if values is None:
            return observed
        student += plain
        values = values + observed
    assert values is not None
    return values


def _merged_value_and_grad_(
    objective: Objective,
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    merged: MergedIds | None,
    temperature: float = 1.0,
    core: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``objective.value_and_grad_`` on the merged vocabulary; the gradient is on the logits of the whole one.

    ``core`` is what may take its place there.
    """
    if merged is None:
        return _value_and_grad_(objective, student, teacher, labels, temperature)
    classes, members = merged.merge_(student)
    theirs = merged.merge_(teacher)[0] if isinstance(teacher, Tensor) else teacher
    theirs = theirs.merged(merged, temperature) if isinstance(theirs, TopK) else theirs
    if core is None:
        values = _value_and_grad_(objective, classes, theirs, labels, temperature)
    else:
        values = core(classes, theirs, labels if objective.needs_labels else None)
    merged.spread_(student, members)
    return values


def _value_and_grad_(
    objective: Objective, student: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, temperature: float
) -> Tensor:
    if isinstance(teacher, TopK):
        return class_values_and_grads_(objective, student, teacher, labels, temperature)
    return objective.value_and_grad_(student, teacher, labels)


def _autograd_(student: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, settings: LossSettings) -> Tensor:
    """The definition itself, differentiated: for objectives without a closed form and for infinite logits."""
    with torch.enable_grad():
        leaf = student.detach().clone().requires_grad_()
        values = position_values(leaf, teacher, labels, settings)
        if not values.requires_grad:
            raise DrklError(
                f"Objective {settings.objective.name!r} returned values that do not depend on student_logp through "
                "differentiable operations, so there is nothing to minimise."
            )
        (grad,) = torch.autograd.grad(values.sum(), leaf)
    student.copy_(grad)
    return values.detach()
