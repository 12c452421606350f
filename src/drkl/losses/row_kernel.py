"""The row step of the fused loss as one Triton kernel: a position's value, and its gradient in place of its logits.

The same equations as the objectives' closed forms, in fp32, for logits of any width: a program takes a row, reads it
twice or three times and writes it once. Finite logits only: a row with an infinite one gets a value that is not finite,
and the caller goes back to the definition. Imported only where Triton is there and used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drkl.losses.common import LossSettings
from drkl.objectives import DecoupledReverseKL, ForwardKL, ReverseKL, SkewReverseKL

BLOCK, WARPS = 8192, 16


def supports(settings: LossSettings) -> bool:
    """Whether the kernel knows this loss: fkl, rkl, srkl, or drkl with the reverse tail and no skew, without ce."""
    objective = settings.objective
    known = type(objective) in (ForwardKL, ReverseKL, SkewReverseKL, DecoupledReverseKL)
    if isinstance(objective, DecoupledReverseKL):
        known = objective.skew == 0 and objective.tail == "rkl"
    return known and settings.uses_objective and not settings.uses_cross_entropy


def row_step_(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, settings: LossSettings) -> Tensor:
    """Return the values `[n]` in fp32 and overwrite ``student_logits`` with their gradient on it.

    Args:
        student_logits: `[n, vocab]`, contiguous, before the temperature.
        teacher_logits: `[n, vocab]`, likewise; left as it is.
        labels: `[n]`, for ``target="label"``.
        settings: what `supports` accepts.
    """
    count, vocab_size = student_logits.shape
    assert student_logits.is_contiguous() and teacher_logits.is_contiguous() and vocab_size > 1
    objective = settings.objective
    kind, gamma, skew, weight, at_label = objective.name, 0.0, 0.5, "constant", False
    if isinstance(objective, DecoupledReverseKL):
        gamma, weight, at_label = objective.gamma, objective.weight, objective.target == "label"
    elif isinstance(objective, SkewReverseKL):
        kind, skew = ("srkl", objective.skew) if objective.skew > 0 else ("rkl", skew)
    values = torch.empty(count, dtype=torch.float32, device=student_logits.device)
    if count:
        _row_step[(count,)](
            student_logits,
            teacher_logits,
            labels if at_label else values,
            values,
            vocab_size,
            1.0 / settings.temperature,
            settings.kd_factor,
            gamma,
            skew,
            KIND=kind,
            AT_LABEL=at_label,
            WEIGHT=weight,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
            num_warps=WARPS,
        )
    return values


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    """For x >= 0; 1 + x forgets a small x."""
    return tl.where(x < 1e-3, x - 0.5 * x * x, tl.log(1.0 + x))


@triton.jit
def _log_sigmoid(x):  # type: ignore[no-untyped-def]
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _load(pointer, offsets, vocab_size, inverse_temperature, other):  # type: ignore[no-untyped-def]
    loaded = tl.load(pointer + offsets, mask=offsets < vocab_size, other=0.0).to(tl.float32) * inverse_temperature
    return tl.where(offsets < vocab_size, loaded, other)


@triton.jit
def _row_step(  # type: ignore[no-untyped-def]
    student_pointer,
    teacher_pointer,
    label_pointer,
    value_pointer,
    vocab_size,
    inverse_temperature,
    factor,
    gamma,
    skew,
    KIND: tl.constexpr,
    AT_LABEL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_pointer += row * vocab_size
    teacher_pointer += row * vocab_size
    lanes = tl.arange(0, BLOCK)
    low = -float("inf")

    # The target class; -1 for an objective without one.
    target = -1
    if KIND == "drkl":
        if AT_LABEL:
            target = tl.load(label_pointer + row).to(tl.int32)
        else:
            best = tl.full((BLOCK,), low, tl.float32)
            place = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, vocab_size, BLOCK):
                y = _load(teacher_pointer, start + lanes, vocab_size, 1.0, low)
                place = tl.where(y > best, start + lanes, place)
                best = tl.maximum(best, y)
            # A lane keeps the first of its equals, so the lowest index of all is among them.
            target = tl.min(tl.where(best == tl.max(best, 0), place, vocab_size), 0)

    # Log-sum-exps of both, and the sums of e^z (z - y) and e^y (z - y); the target left out.
    max_z, sum_z, gap_z, max_y, sum_y, gap_y = low, 0.0, 0.0, low, 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        offsets = start + lanes
        z = _load(student_pointer, offsets, vocab_size, inverse_temperature, 0.0)
        y = _load(teacher_pointer, offsets, vocab_size, inverse_temperature, 0.0)
        counted = (offsets < vocab_size) & (offsets != target)
        difference = tl.where(counted, z - y, 0.0)
        z, y = tl.where(counted, z, low), tl.where(counted, y, low)
        new_z, new_y = tl.maximum(max_z, tl.max(z, 0)), tl.maximum(max_y, tl.max(y, 0))
        # A block that holds the target alone leaves the maximum at -inf.
        base_z, base_y = tl.where(new_z == low, 0.0, new_z), tl.where(new_y == low, 0.0, new_y)
        scale_z, scale_y = tl.exp(max_z - base_z), tl.exp(max_y - base_y)
        e_z, e_y = tl.exp(z - base_z), tl.exp(y - base_y)
        sum_z = sum_z * scale_z + tl.sum(e_z, 0)
        gap_z = gap_z * scale_z + tl.sum(e_z * difference, 0)
        sum_y = sum_y * scale_y + tl.sum(e_y, 0)
        gap_y = gap_y * scale_y + tl.sum(e_y * difference, 0)
        max_z, max_y = new_z, new_y
    log_z, log_y = max_z + tl.log(sum_z), max_y + tl.log(sum_y)
    shift = log_y - log_z

    mean_gap = gap_z / sum_z
    value, push, tail_weight, mean_slope = 0.0, 0.0, 1.0, 0.0
    odds, log_skew = 0.0, 0.0
    if KIND == "fkl":
        value = -gap_y / sum_y - shift
    if KIND == "rkl":
        value = mean_gap + shift
    if KIND == "srkl":
        log_skew = tl.log(skew)
        odds = tl.log(1.0 - skew) - log_skew
        for start in range(0, vocab_size, BLOCK):
            offsets = start + lanes
            z = _load(student_pointer, offsets, vocab_size, inverse_temperature, 0.0)
            y = _load(teacher_pointer, offsets, vocab_size, inverse_temperature, 0.0)
            q = tl.exp(tl.where(offsets < vocab_size, z - log_z, low))
            ratio = z - y + shift
            log_q_m = -(tl.maximum(odds - ratio, 0.0) + _log1p(tl.exp(-tl.abs(odds - ratio)))) - log_skew
            value += tl.sum(q * log_q_m, 0)
            mean_slope += tl.sum(q * (log_q_m - skew * tl.exp(log_q_m)), 0)
    if KIND == "drkl":
        z_t = tl.load(student_pointer + target).to(tl.float32) * inverse_temperature
        y_t = tl.load(teacher_pointer + target).to(tl.float32) * inverse_temperature
        s, u = z_t - log_z, y_t - log_y
        inside, outside = _sigmoid(s), _sigmoid(-s)
        push = inside * outside * (s - u)
        on_tail = mean_gap + shift
        tail_weight = gamma
        if WEIGHT == "student":
            tail_weight = outside
        if WEIGHT == "teacher":
            tail_weight = _sigmoid(-u)
        if WEIGHT == "floor":
            tail_weight = tl.maximum(gamma, outside)
        on_target = inside * (_log_sigmoid(s) - _log_sigmoid(u)) + outside * (_log_sigmoid(-s) - _log_sigmoid(-u))
        value = on_target + tail_weight * on_tail
    tl.store(value_pointer + row, value * factor)

    scale = factor * inverse_temperature
    for start in range(0, vocab_size, BLOCK):
        offsets = start + lanes
        z = _load(student_pointer, offsets, vocab_size, inverse_temperature, 0.0)
        y = _load(teacher_pointer, offsets, vocab_size, inverse_temperature, 0.0)
        counted = (offsets < vocab_size) & (offsets != target)
        q = tl.exp(tl.where(counted, z - log_z, low))
        ratio = z - y + shift
        if KIND == "fkl":
            grad = q - tl.exp(tl.where(counted, y - log_y, low))
        elif KIND == "srkl":
            log_q_m = -(tl.maximum(odds - ratio, 0.0) + _log1p(tl.exp(-tl.abs(odds - ratio)))) - log_skew
            grad = q * (log_q_m - skew * tl.exp(log_q_m) - mean_slope)
        else:
            grad = q * (tail_weight * (z - y - mean_gap) - push)
        if KIND == "drkl":
            grad = tl.where(offsets == target, push, grad)
        tl.store(student_pointer + offsets, grad * scale, mask=offsets < vocab_size)
