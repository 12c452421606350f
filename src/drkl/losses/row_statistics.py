"""What training logs of each position as one Triton kernel: the same numbers as `drkl.positions`, from two sweeps.

Of a step's positions few are looked at, and yet written with PyTorch's operations it is a tenth of the loss's time on a
GPU. Imported only where Triton is there and used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
NAMES = ("nll", "student_entropy", "rkl", "fkl", "teacher_entropy", "agreement")
"""The rows of what `row_statistics` returns; the first two without a teacher."""


def row_statistics(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """The numbers of `NAMES` `[2 or 6, n]` in fp32, at temperature 1.

    Args:
        student: `[n, vocab]`, logits; each row contiguous.
        teacher: likewise, or None.
        labels: `[n]`.
    """
    count, vocab_size = student.shape
    out = torch.empty(2 if teacher is None else len(NAMES), count, dtype=torch.float32, device=student.device)
    if count:
        other = student if teacher is None else teacher
        assert student.stride(1) == other.stride(1) == 1
        _row_statistics[(count,)](
            student, other, labels, out, student.stride(0), other.stride(0), labels.stride(0), count, vocab_size,
            TEACHER=teacher is not None, BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)), num_warps=WARPS,
        )  # fmt: skip
    return out


@triton.jit
def _load(pointer, columns, vocab_size):  # type: ignore[no-untyped-def]
    return tl.load(pointer + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)


@triton.jit
def _top(pointer, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The highest logit of a row, and the first of its columns."""
    lanes = tl.arange(0, BLOCK)
    best, place = tl.full((BLOCK,), -float("inf"), tl.float32), lanes
    for start in range(0, vocab_size, BLOCK):
        value = _load(pointer, start + lanes, vocab_size)
        place = tl.where(value > best, start + lanes, place)
        best = tl.maximum(best, value)
    highest = tl.max(best, 0)
    return highest, tl.min(tl.where(best == highest, place, vocab_size), 0)


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    student_pointer,
    teacher_pointer,
    label_pointer,
    out_pointer,
    student_stride,
    teacher_stride,
    label_stride,
    count,
    vocab_size,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_pointer += row * student_stride
    teacher_pointer += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    max_z, top_z = _top(student_pointer, vocab_size, BLOCK)
    max_y, top_y = max_z, top_z
    if TEACHER:
        max_y, top_y = _top(teacher_pointer, vocab_size, BLOCK)
    sum_z, mean_z, sum_y, mean_y, reverse, forward = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        # From the highest one, so that no difference of large numbers is left.
        z = _load(student_pointer, columns, vocab_size) - max_z
        no_z = z == -float("inf")
        e_z, known_z = tl.exp(z), tl.where(no_z, 0.0, z)
        sum_z += e_z
        mean_z += e_z * known_z
        if TEACHER:
            y = _load(teacher_pointer, columns, vocab_size) - max_y
            no_y = y == -float("inf")
            e_y, known_y = tl.exp(y), tl.where(no_y, 0.0, y)
            sum_y += e_y
            mean_y += e_y * known_y
            gap = known_z - known_y
            reverse += tl.where(no_z, 0.0, tl.where(no_y, float("inf"), e_z * gap))
            forward -= tl.where(no_y, 0.0, tl.where(no_z, -float("inf"), e_y * gap))
    total_z = tl.sum(sum_z, 0)
    log_z = tl.log(total_z)
    label = tl.load(label_pointer + row * label_stride).to(tl.int64)
    at_label = tl.load(student_pointer + label).to(tl.float32) - max_z
    out_pointer += row
    tl.store(out_pointer, log_z - at_label)
    tl.store(out_pointer + count, log_z - tl.sum(mean_z, 0) / total_z)
    if TEACHER:
        total_y = tl.sum(sum_y, 0)
        shift = tl.log(total_y) - log_z
        tl.store(out_pointer + 2 * count, tl.sum(reverse, 0) / total_z + shift)
        tl.store(out_pointer + 3 * count, tl.sum(forward, 0) / total_y - shift)
        tl.store(out_pointer + 4 * count, tl.log(total_y) - tl.sum(mean_y, 0) / total_y)
        tl.store(out_pointer + 5 * count, tl.where(top_z == top_y, 1.0, 0.0))
