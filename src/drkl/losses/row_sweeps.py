"""Sweeps over a row of the row kernel: both models' logits block by block, their log-sum-exps, an objective's sums.

Sums are fp32 and kept lane by lane until the end of a sweep: a reduction over a block makes its threads wait. A class
is excluded where its logit or its product with the head is -inf; so are columns beyond the row, and the target where
the other classes are summed.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from drkl.losses.row_terms import INFINITE, LOWEST, tanh


@triton.jit
def logits(side, columns, vocab_size, HEAD: tl.constexpr):
    """The logits of some columns, softcap(scale (product + bias)); -inf beyond the row and where the product is -inf.

    ``side`` is (pointer to the row, pointer to the bias, scale, soft-cap, a column and the logit that stands there
    instead), and HEAD says which of them there are: (the bias, any, the soft-cap, the column).
    """
    pointer, bias_pointer, scale, cap, event, at_event = side
    inside = columns < vocab_size
    product = tl.load(pointer + columns, mask=inside, other=LOWEST).to(tl.float32)
    value = product
    if HEAD[0]:
        value += tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    if HEAD[1]:
        value *= scale
        if HEAD[2]:
            value = tanh(value / cap) * cap
        value = tl.where(product == LOWEST, LOWEST, value)
    if HEAD[3]:
        value = tl.where(columns == event, at_event, value)
    return value


@triton.jit
def through_head(grad, values, columns, side, HEAD: tl.constexpr):
    """From the gradient on logits, which are ``values``, to that on the products."""
    _, _, scale, cap, event, _ = side
    through = grad
    if HEAD[1]:
        through *= scale
        if HEAD[2]:
            share = tl.where(values == LOWEST, 0.0, values) / cap
            through *= 1.0 - share * share
        if HEAD[3]:
            through = tl.where(columns == event, grad, through)
    return through


@triton.jit
def _add(
    state, z, y, temperature, TEACHER: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr, UNIT: tl.constexpr
):
    """Some classes' logits, added to the sums of e^z, e^z (z - y), e^y, e^y (z - y) and e^(z T), lane by lane."""
    max_z, sum_z, gap_z, max_y, sum_y, gap_y, unit = state
    new_z = tl.maximum(max_z, tl.max(z, 0))
    # A block may have no class at all; and what is lost to a much larger maximum keeps an infinite sum infinite.
    base_z = tl.where(new_z == LOWEST, 0.0, new_z)
    scale_z = tl.maximum(tl.exp(max_z - base_z), 1e-37)
    e_z = tl.exp(z - base_z)
    sum_z = sum_z * scale_z + e_z
    if UNIT:
        unit = unit * tl.maximum(tl.exp((max_z - base_z) * temperature), 1e-37) + tl.exp((z - base_z) * temperature)
    if TEACHER:
        gone_z, gone_y = z == LOWEST, y == LOWEST
        new_y = tl.maximum(max_y, tl.max(y, 0))
        base_y = tl.where(new_y == LOWEST, 0.0, new_y)
        scale_y = tl.maximum(tl.exp(max_y - base_y), 1e-37)
        e_y = tl.exp(y - base_y)
        sum_y = sum_y * scale_y + e_y
        gap = tl.where(gone_z, 0.0, z) - tl.where(gone_y, 0.0, y)
        if REVERSE:
            gap_z = gap_z * scale_z + tl.where(gone_z, 0.0, tl.where(gone_y, INFINITE, e_z * gap))
        if FORWARD:
            gap_y = gap_y * scale_y + tl.where(gone_y, 0.0, tl.where(gone_z, LOWEST, e_y * gap))
        max_y = new_y
    return new_z, sum_z, gap_z, max_y, sum_y, gap_y, unit


@triton.jit
def sums(
    student,
    teacher,
    label,
    vocab_size,
    inverse_temperature,
    temperature,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    TEACHER: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The target and its two logits; without it, both log-sum-exps and the means of z - y under both models.

    A log-sum-exp is a pair that adds up to it, the highest logit (0 where there is none) and the rest: taken off one
    after the other they leave the digits of a probability, however large the logits are.

    Where the target is the teacher's top token, every lane holds the best of its classes back until a better one comes:
    the target is never in a sum, so that nothing has to be taken out of one.
    """
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((), -float("inf"), tl.float32)
    state = (low, zeros, zeros, low, zeros, zeros, zeros)
    best_z, best_y, place = zeros + LOWEST, zeros + LOWEST, lanes * 0 - 1
    target, z_t, y_t = label, low, low
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        z = logits(student, columns, vocab_size, HEADS[0]) * inverse_temperature
        y = z
        if TEACHER:
            y = logits(teacher, columns, vocab_size, HEADS[1]) * inverse_temperature
        if TARGET == "label":
            z, y = tl.where(columns == target, LOWEST, z), tl.where(columns == target, LOWEST, y)
        if TARGET == "teacher":
            better = y > best_y
            place = tl.where(better, columns, place)
            z, best_z = tl.where(better, best_z, z), tl.where(better, z, best_z)
            y, best_y = tl.where(better, best_y, y), tl.where(better, y, best_y)
        state = _add(state, z, y, temperature, TEACHER, FORWARD, REVERSE, UNIT)
    if TARGET == "label":
        z_t = logits(student, target, vocab_size, HEADS[0]) * inverse_temperature
        y_t = logits(teacher, target, vocab_size, HEADS[1]) * inverse_temperature
    if TARGET == "teacher":
        # A lane has the first of its equals, so the lowest index of all is among them.
        y_t = tl.max(best_y, 0)
        target = tl.min(tl.where(best_y == y_t, place, vocab_size), 0)
        z_t = tl.sum(tl.where(place == target, best_z, 0.0), 0)
        z, y = tl.where(place == target, LOWEST, best_z), tl.where(place == target, LOWEST, best_y)
        state = _add(state, z, y, temperature, TEACHER, FORWARD, REVERSE, UNIT)
    max_z, sum_z, gap_z, max_y, sum_y, gap_y, unit = state
    total_z, total_y = tl.sum(sum_z, 0), tl.sum(sum_y, 0)
    norm_z, norm_y = _log_sum(max_z, total_z), _log_sum(max_y, total_y)
    mean_z = tl.sum(gap_z, 0) / tl.where(total_z == 0, 1.0, total_z)
    mean_y = tl.sum(gap_y, 0) / tl.where(total_y == 0, 1.0, total_y)
    log_unit = norm_z[0] + norm_z[1]
    if UNIT:
        at_one = _log_sum(max_z * temperature, tl.sum(unit, 0))
        log_unit = at_one[0] + at_one[1]
    return target, z_t, y_t, norm_z, norm_y, mean_z, mean_y, log_unit


@triton.jit
def _log_sum(highest, total):
    return tl.where(total == 0, 0.0, highest), tl.where(total == 0, LOWEST, tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def log_prob(z, norm):
    return z - norm[0] - norm[1]


@triton.jit
def compared(z, y, norm_z, norm_y, shift):
    """log q, log p, their difference (0 where one is excluded), and which are excluded."""
    gone_q, gone_p = z == LOWEST, y == LOWEST
    # Of logits that are near each other the difference is exact; that of their logs is not.
    d = tl.where(gone_q | gone_p, 0.0, tl.where(gone_q, 0.0, z) - tl.where(gone_p, 0.0, y) + shift)
    return log_prob(z, norm_z), log_prob(y, norm_y), d, gone_q, gone_p


@triton.jit
def pair(
    student,
    teacher,
    start,
    target,
    vocab_size,
    inverse_temperature,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both models' logits over the temperature of a block, without the target; and the student's own logits."""
    columns = start + tl.arange(0, BLOCK)
    x = logits(student, columns, vocab_size, HEADS[0])
    z = x * inverse_temperature
    y = logits(teacher, columns, vocab_size, HEADS[1]) * inverse_temperature
    if TARGET != "none":
        z, y = tl.where(columns == target, LOWEST, z), tl.where(columns == target, LOWEST, y)
    return x, z, y


@triton.jit
def sum_of_terms(
    student,
    teacher,
    target,
    vocab_size,
    inverse_temperature,
    norm_z,
    norm_y,
    shift,
    a,
    b,
    c,
    e,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    TERM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An objective's value and the sum of its slopes."""
    total, slopes = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        _, z, y = pair(student, teacher, start, target, vocab_size, inverse_temperature, HEADS, TARGET, BLOCK)
        log_q, log_p, d, gone_q, gone_p = compared(z, y, norm_z, norm_y, shift)
        term, slope = TERM(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
        total += term
        slopes += slope
    return tl.sum(total, 0), tl.sum(slopes, 0)
