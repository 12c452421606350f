"""A chunk of positions on a device with the Triton kernel: products in, values and the gradient on the products out."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from drkl.losses.common import LogitChunk, LossSettings, Observer, observed_chunk
from drkl.losses.head import LMHead
from drkl.losses.kernel_topk import top_k_step_
from drkl.losses.merged import MergedIds, ids_on, log_sum_exp, shares, swap_
from drkl.losses.topk import TopK
from drkl.objectives import ReverseKL

OVERLAPPED = False
"""Whether a chunk's sweeps run on a second stream of the GPU beside the next chunk's products, in the memory of two
chunks. Not measured on a GPU."""
Chunk = tuple[slice, Tensor, Tensor]
"""Which positions, their values `[n]`, and the gradient of the values' sum on ``hidden @ weight.T`` `[n, vocab]`."""
_Given = tuple[Tensor, Tensor | TopK | None, Tensor | None]
"""A chunk's products or what is known of the teacher, and its labels."""


class Products(Protocol):
    """One model's products with its head."""

    head: LMHead
    weight: Tensor
    dtype: torch.dtype

    def product(self, rows: slice, turn: int) -> Tensor:
        """``hidden @ weight.T`` `[n, vocab]` of some positions, over the last one that was made in the same turn."""


class KernelSteps:
    """A loss by the row kernel, chunk by chunk.

    Args:
        student: the student's products.
        teacher: the teacher's, or what is known of its logits; None where there is none.
        settings: what `why_not` has no reason against.
        needs_grad: whether a gradient is made.
        observe: the loss's observer.
    """

    def __init__(
        self,
        student: Products,
        teacher: Products | TopK | None,
        settings: LossSettings,
        needs_grad: bool,
        observe: Observer | None,
    ) -> None:
        self._student, self._teacher, self._settings = student, teacher, settings
        self._needs_grad, self._observe = needs_grad, observe

    def __call__(self, chunks: Sequence[slice], labels: Tensor | None) -> Iterator[Chunk]:
        """Each chunk of positions in turn.

        Args:
            chunks: which positions they have.
            labels: `[n]`, of all positions; classes where ids are merged.
        """
        device = self._student.weight.device
        if OVERLAPPED and device.type == "cuda":
            ours, theirs = torch.cuda.current_stream(device), _second_stream(device)
            yield from self.overlapped(chunks, labels, ours, theirs, torch.cuda.stream)
            return
        for rows in chunks:
            yield rows, *self._step(self._products(rows, labels))

    def overlapped(
        self, chunks: Sequence[slice], labels: Tensor | None, ours: Any, second: Any, on_stream: Callable[[Any], Any]
    ) -> Iterator[Chunk]:
        """The same, each chunk's sweeps on a second stream while the first one has the next chunk's products.

        Two turns of buffers: the first stream writes one anew when it has waited for the sweeps over it.
        """
        ahead = self._products(chunks[0], labels) if chunks else None
        for number, rows in enumerate(chunks):
            assert ahead is not None
            now = ahead
            second.wait_stream(ours)
            with on_stream(second):
                values, grad = self._step(now)
            done = second.record_event()
            ahead = self._products(chunks[number + 1], labels, (number + 1) % 2) if number + 1 < len(chunks) else None
            ours.wait_event(done)
            values.record_stream(ours)
            yield rows, values, grad

    def _products(self, rows: slice, labels: Tensor | None, turn: int = 0) -> _Given:
        """Both models' products of a chunk; the observer has seen them."""
        product = self._student.product(rows, turn)
        teacher: Tensor | TopK | None = None
        if isinstance(self._teacher, TopK):
            teacher = self._teacher[rows]
        elif self._teacher is not None:
            teacher = self._teacher.product(rows, turn)
        own = None if labels is None else labels[rows]
        if self._observe is not None:
            head, theirs = self._student.head, self._teacher_head
            _show(self._observe, product, head, teacher, theirs, own, rows.start, self._settings.merged)
        return product, teacher if self._settings.uses_teacher else None, own

    @property
    def _teacher_head(self) -> LMHead | None:
        return None if self._teacher is None or isinstance(self._teacher, TopK) else self._teacher.head

    def _step(self, given: _Given) -> tuple[Tensor, Tensor]:
        """The values of a chunk, and the gradient in place of the student's products."""
        product, teacher, labels = given
        settings, head = self._settings, self._student.head
        if isinstance(teacher, TopK):
            return top_k_step_(product, teacher, labels, settings, head, self._needs_grad), product
        step = _whole_step_ if settings.merged is None else _merged_step_
        theirs = None if teacher is None else self._teacher_head
        return step(product, teacher, labels, settings, head, theirs, self._needs_grad), product


@functools.lru_cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def why_not(student: Products, teacher: Products | TopK | None, settings: LossSettings) -> str | None:
    """The reason why the kernel does not compute a loss, as a sentence; None where it does."""
    sides = [side for side in (student, teacher) if side is not None and not isinstance(side, TopK)]
    if torch.float64 in [side.dtype for side in sides]:
        return "The row kernel computes in fp32, and these products are in float64."
    if importlib.util.find_spec("triton") is None:
        return "The row kernel needs Triton, which is not installed."
    if isinstance(teacher, TopK) and settings.uses_teacher:
        return None  # whatever the kernel does not know is computed on the few classes
    from drkl.losses import row_kernel

    return row_kernel.why_not(settings)


def kernel_runs(student: Products, teacher: Products | TopK | None, settings: LossSettings) -> bool:
    """Try the kernel on one row, which also compiles it; warn and return False where it fails."""
    from drkl.losses import row_kernel

    settings = replace(settings, merged=None)
    if row_kernel.why_not(settings) is not None:  # of few classes
        settings = replace(settings, objective=ReverseKL())
    theirs = student if teacher is None or isinstance(teacher, TopK) else teacher
    return _runs(settings, student.head.vocab_size, (student.dtype, theirs.dtype), student.weight.device)


@functools.lru_cache
def _runs(
    settings: LossSettings, vocab_size: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> bool:
    from drkl.losses import row_kernel

    student, teacher = (torch.zeros(1, vocab_size, dtype=dtype, device=device) for dtype in dtypes)
    labels = torch.zeros(1, dtype=torch.long, device=device) if settings.uses_labels else None
    try:
        row_kernel.row_step_(student, teacher if settings.uses_teacher else None, labels, settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # without a C compiler, say, Triton cannot build it
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"The Triton kernel does not run here; the loss goes on without it, slower. {reason}", stacklevel=2
        )
        return False
    return True


def _show(
    observe: Observer,
    product: Tensor,
    head: LMHead,
    teacher: Tensor | TopK | None,
    teacher_head: LMHead | None,
    labels: Tensor | None,
    start: int,
    merged: MergedIds | None,
) -> None:
    """Give an observer the logits, those alone that it looks at: they are made for it."""
    rows: slice | Tensor | None = None
    if (choose := getattr(observe, "chosen", None)) is not None:
        rows = choose(start, len(product), product.device)
        product, labels = product[rows], None if labels is None else labels[rows]
        teacher = None if teacher is None else teacher[rows]
    student = _logits(product, head, merged)
    if isinstance(teacher, Tensor) and teacher_head is not None:
        teacher = _logits(teacher, teacher_head, merged)
    chunk: LogitChunk = observed_chunk(student, teacher, labels, start, merged)
    observe(chunk._replace(rows=rows))


def _logits(product: Tensor, head: LMHead, merged: MergedIds | None) -> Tensor:
    return product if head.is_plain and merged is None else head.of_products(product)


def _whole_step_(
    product: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    settings: LossSettings,
    head: LMHead,
    teacher_head: LMHead | None,
    needs_grad: bool,
    event: tuple[int, Tensor, Tensor | None] | None = None,
) -> Tensor:
    from drkl.losses import row_kernel

    values: Tensor = row_kernel.row_step_(
        product,
        teacher,
        labels if settings.uses_labels else None,
        settings,
        student_head=head,
        teacher_head=teacher_head,
        event=event,
        needs_grad=needs_grad,
    )
    return values


def _merged_step_(
    product: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    settings: LossSettings,
    head: LMHead,
    teacher_head: LMHead | None,
    needs_grad: bool,
) -> Tensor:
    """Some ids as one class, at whose first id the kernel is told the logit of all."""
    assert settings.merged is not None
    rest = labels, settings.merged, head, teacher_head, needs_grad
    temperature = settings.temperature if settings.uses_objective else 1.0
    if not (settings.uses_objective and settings.uses_cross_entropy) or temperature == 1.0:
        return _one_merged_step_(product, teacher, settings, temperature, *rest)
    # The class has another logit at each temperature, so the objective and the cross-entropy have a sweep each.
    share = settings.kd_weight
    observed = product.clone()
    values = _one_merged_step_(product, teacher, replace(settings, kd_weight=1.0), temperature, *rest)
    others = _one_merged_step_(observed, None, replace(settings, kd_weight=0.0), 1.0, *rest)
    if needs_grad:
        product.mul_(share).add_(observed, alpha=1.0 - share)
    return share * values + (1.0 - share) * others  # not lerp, which makes inf - inf of an infinite value


def _one_merged_step_(
    product: Tensor,
    teacher: Tensor | None,
    settings: LossSettings,
    temperature: float,
    labels: Tensor | None,
    merged: MergedIds,
    head: LMHead,
    teacher_head: LMHead | None,
    needs_grad: bool,
) -> Tensor:
    ids = ids_on(merged, product.device)
    members, together = _take_out_members_(product, merged, ids, head, temperature)
    theirs = None
    if teacher is not None and teacher_head is not None:
        _, theirs = _take_out_members_(teacher, merged, ids, teacher_head, temperature)
    event = merged.event, together, theirs
    heads = [_swapped(h, merged) for h in (head, teacher_head)]
    assert heads[0] is not None
    values = _whole_step_(product, teacher, labels, settings, heads[0], heads[1], needs_grad, event)
    if needs_grad:
        swap_(product, merged)
        given = shares(members / temperature) * product[:, merged.event].unsqueeze(-1)
        product.index_copy_(1, ids, (given * head.slope(members)).to(product.dtype))
    return values


def _swapped(head: LMHead | None, merged: MergedIds) -> LMHead | None:
    """The head of products whose columns changed places."""
    if head is None or head.bias is None:
        return head
    bias = head.bias.clone()
    swap_(bias, merged)
    return replace(head, bias=bias)


def _take_out_members_(
    product: Tensor, merged: MergedIds, ids: Tensor, head: LMHead, temperature: float
) -> tuple[Tensor, Tensor]:
    """The logits `[n, m]` of ids that are one class, and that of the class `[n]`; the products keep its column only."""
    members = head.of_products(product.index_select(1, ids), ids)
    product.index_fill_(1, ids[1:], -math.inf)
    swap_(product, merged)  # a tie goes to the first class of the merged vocabulary
    return members, temperature * log_sum_exp(members / temperature).squeeze(-1)
