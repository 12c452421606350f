"""The programs of the row kernel: what `drkl.losses.row_kernel` launches, one program for a row."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from drkl.losses.row_head import forward_share
from drkl.losses.row_sweeps import compared, log_prob, logits, pair, sum_of_terms, sums, through_head
from drkl.losses.row_terms import INFINITE, LOWEST, log_add_exp, log_sigmoid, mean_of_two, sigmoid, weighted


@triton.jit
def _two_class_share(s, u, p_1, p_2, mu):
    """akl's weight of forward KL on two classes, whose gaps are equal: 1 where both are in the head, else 1/2."""
    first = tl.exp(tl.maximum(p_1, p_2))
    both = (first < mu) & (p_1 != LOWEST) & (p_2 != LOWEST)
    return tl.where(both & (s != u), 1.0, 0.5)


@triton.jit
def _two_classes(s, u, a, b, c, e, TERM: tl.constexpr, ADAPTIVE: tl.constexpr):
    """A divergence on (target, rest) from the log-odds, and its derivative by the student's."""
    q_1, q_2, p_1, p_2 = log_sigmoid(s), log_sigmoid(-s), log_sigmoid(u), log_sigmoid(-u)
    if ADAPTIVE:
        a = _two_class_share(s, u, p_1, p_2, a)
    log_q, log_p, d, gone_q, gone_p = compared(q_1, p_1, (0.0, 0.0), (0.0, 0.0), 0.0)
    term_1, slope_1 = TERM(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
    log_q, log_p, d, gone_q, gone_p = compared(q_2, p_2, (0.0, 0.0), (0.0, 0.0), 0.0)
    term_2, slope_2 = TERM(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
    push = slope_1 * sigmoid(-s) - slope_2 * sigmoid(s)
    return term_1 + term_2, tl.where(tl.abs(s) == INFINITE, 0.0, push)


@triton.jit
def _skewed_tail(s, u, c, e):
    """The weights of p^ and q^ in the renormalised mixture, and their logs; c, e: the logs of those of p and q."""
    on_teacher, on_student = c + log_sigmoid(-u), e + log_sigmoid(-s)
    rest = log_add_exp(on_teacher, on_student)
    # Without a student's tail nothing is compared.
    empty = on_student == LOWEST
    log_teacher = tl.where(empty, 0.0, on_teacher) - tl.where(empty, 0.0, rest)
    log_student = tl.where(empty, 0.0, on_student) - tl.where(empty, 0.0, rest)
    return tl.exp(log_teacher), tl.exp(log_student), log_teacher, log_student


@triton.jit
def _is_number(log_sum, logit):
    """Whether the logits that a log-sum-exp and one more are made of are numbers or -inf, and not all -inf."""
    return (log_sum < INFINITE) & (logit < INFINITE) & (tl.maximum(log_sum, logit) > LOWEST)


@triton.jit
def row_step(
    student_pointer,
    teacher_pointer,
    label_pointer,
    value_pointer,
    student_bias,
    teacher_bias,
    student_stride,
    teacher_stride,
    vocab_size,
    event,
    student_event_pointer,
    teacher_event_pointer,
    student_scale,
    student_cap,
    teacher_scale,
    teacher_cap,
    inverse_temperature,
    temperature,
    factor,
    at_temperature,
    at_one,
    gamma,
    target_weight,
    f_a,
    f_b,
    f_c,
    f_e,
    g_a,
    g_b,
    g_c,
    g_e,
    COMPARES: tl.constexpr,
    AT_TEMPERATURE: tl.constexpr,
    AT_ONE: tl.constexpr,
    UNIT: tl.constexpr,
    TARGET: tl.constexpr,
    WEIGHT: tl.constexpr,
    SKEWED: tl.constexpr,
    ON_TARGET: tl.constexpr,
    ADAPTIVE_TARGET: tl.constexpr,
    ON_CLASSES: tl.constexpr,
    ADAPTIVE_CLASSES: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_event, teacher_event = 0.0, 0.0
    if HEADS[0][3]:
        student_event, teacher_event = tl.load(student_event_pointer + row), tl.load(teacher_event_pointer + row)
    student = (student_pointer + row * student_stride, student_bias, student_scale, student_cap, event, student_event)
    teacher = (teacher_pointer + row * teacher_stride, teacher_bias, teacher_scale, teacher_cap, event, teacher_event)
    label, observed = -1, 0.0
    if TARGET == "label" or AT_TEMPERATURE or AT_ONE:
        label = tl.load(label_pointer + row).to(tl.int32)
        # Read here: at the end another thread may have written the gradient there.
        observed = logits(student, label, vocab_size, HEADS[0])

    target, z_t, y_t, norm_z, norm_y, mean_z, mean_y, log_unit = sums(
        student, teacher, label, vocab_size, inverse_temperature, temperature,
        HEADS, TARGET, COMPARES, FORWARD, REVERSE, UNIT, BLOCK,
    )  # fmt: skip
    log_all = norm_z[0] + norm_z[1]
    valid = _is_number(log_all, z_t)
    s, u, log_all_unit = 0.0, 0.0, log_unit
    if TARGET != "none":
        s, u = log_prob(z_t, norm_z), log_prob(y_t, norm_y)
        log_all = log_add_exp(log_all, z_t)
        log_all_unit = log_all
        if UNIT:
            log_all_unit = log_add_exp(log_unit, z_t * temperature)
    # Of a row of excluded classes there is nothing to normalise.
    norm_z = norm_z[0], tl.where(norm_z[1] == LOWEST, 0.0, norm_z[1])

    value, push, on_slope, on_prob, shift = 0.0, 0.0, 0.0, 0.0, 0.0
    if COMPARES:
        valid = valid & _is_number(norm_y[0] + norm_y[1], y_t)
        mass_p = tl.where(norm_y[1] == LOWEST, 0.0, 1.0)
        norm_y = norm_y[0], tl.where(norm_y[1] == LOWEST, 0.0, norm_y[1])
        shift = (norm_y[0] - norm_z[0]) + (norm_y[1] - norm_z[1])
        if SKEWED:
            g_a, g_b, g_c, g_e = _skewed_tail(s, u, g_c, g_e)
        if ADAPTIVE_CLASSES:
            g_a = forward_share(
                student, teacher, target, vocab_size, inverse_temperature, norm_z, norm_y, g_a,
                HEADS, TARGET, BLOCK,
            )  # fmt: skip
        if FORWARD or REVERSE:
            value = mean_of_two(g_a, mass_p * (-mean_y - shift), mean_z + shift)
            slopes = mean_of_two(g_a, -mass_p, mean_z + shift)
            # What is infinite has the slopes of its finite terms, unless there is no tail of the student's to compare.
            if (tl.abs(value) == INFINITE) & (s != INFINITE):
                value, slopes = sum_of_terms(
                    student, teacher, target, vocab_size, inverse_temperature, norm_z, norm_y, shift,
                    g_a, g_b, g_c, g_e, HEADS, TARGET, ON_CLASSES, BLOCK,
                )  # fmt: skip
        else:
            value, slopes = sum_of_terms(
                student, teacher, target, vocab_size, inverse_temperature, norm_z, norm_y, shift,
                g_a, g_b, g_c, g_e, HEADS, TARGET, ON_CLASSES, BLOCK,
            )  # fmt: skip
        on_slope, on_prob = factor, factor * slopes
        if TARGET != "none":
            weight = gamma
            if WEIGHT == "student":
                weight = sigmoid(-s)
            if WEIGHT == "teacher":
                weight = sigmoid(-u)
            if WEIGHT == "floor":
                weight = tl.maximum(gamma, sigmoid(-s))
            # Without a student's tail there is nothing to compare.
            weight = tl.where(s == INFINITE, 0.0, weight)
            on_target, push = _two_classes(s, u, f_a, f_b, f_c, f_e, ON_TARGET, ADAPTIVE_TARGET)
            push *= target_weight
            if SKEWED:
                # The mixture of the tails moves with the target's log-odds.
                push += weighted(weight, sigmoid(s) * (value - slopes - g_b))
            value = weighted(target_weight, on_target) + weighted(weight, value)
            on_slope, on_prob, push = factor * weight, factor * (weight * slopes + push), factor * push
        value *= factor
    if AT_TEMPERATURE:
        value += at_temperature * (log_all - observed * inverse_temperature)
    if AT_ONE:
        value += at_one * (log_all_unit - observed)
    tl.store(value_pointer + row, tl.where(valid, value, float("nan")))

    if GRAD:
        on_slope, on_prob = on_slope * inverse_temperature, on_prob * inverse_temperature
        push, at_temperature = push * inverse_temperature, at_temperature * inverse_temperature
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            grad = tl.zeros((BLOCK,), tl.float32)
            if COMPARES:
                x, z, y = pair(student, teacher, start, target, vocab_size, inverse_temperature, HEADS, TARGET, BLOCK)
                log_q, log_p, d, gone_q, gone_p = compared(z, y, norm_z, norm_y, shift)
                _, slope = ON_CLASSES(log_q, log_p, d, gone_q, gone_p, g_a, g_b, g_c, g_e)
                grad = on_slope * slope - on_prob * tl.exp(log_q)
                if TARGET != "none":
                    grad = tl.where(columns == target, push, grad)
            else:
                x = logits(student, columns, vocab_size, HEADS[0])
            if AT_TEMPERATURE:
                seen = tl.where(columns == label, 1.0, 0.0)
                grad += at_temperature * (tl.exp(x * inverse_temperature - log_all) - seen)
            if AT_ONE:
                seen = tl.where(columns == label, 1.0, 0.0)
                grad += at_one * (tl.exp(x - log_all_unit) - seen)
            grad = through_head(grad, x, columns, student, HEADS[0])
            tl.store(student_pointer + row * student_stride + columns, grad, mask=columns < vocab_size)


@triton.jit
def rest_sums(
    pointer,
    bias_pointer,
    sum_pointer,
    stride,
    vocab_size,
    scale,
    cap,
    inverse_temperature,
    second,
    HEAD: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    side = (pointer + row * stride, bias_pointer, scale, cap, -1, 0.0)
    _, _, _, norm, _, _, _, log_second = sums(
        side, side, -1, vocab_size, inverse_temperature, second,
        (HEAD, HEAD), "none", False, False, False, COUNT == 2, BLOCK,
    )  # fmt: skip
    tl.store(sum_pointer + row * COUNT, norm[0] + norm[1])
    if COUNT == 2:
        tl.store(sum_pointer + row * COUNT + 1, log_second)


@triton.jit
def spread_rest(
    pointer,
    bias_pointer,
    log_sum_pointer,
    factor_pointer,
    second_log_sum_pointer,
    second_factor_pointer,
    label_pointer,
    stride,
    vocab_size,
    scale,
    cap,
    inverse_temperature,
    second_inverse_temperature,
    label_share,
    HEAD: tl.constexpr,
    COUNT: tl.constexpr,
    LABEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    side = (pointer + row * stride, bias_pointer, scale, cap, -1, 0.0)
    log_sum, factor = tl.load(log_sum_pointer + row), tl.load(factor_pointer + row)
    # Where nothing is left there is no class, and nothing to divide by.
    log_sum = tl.where(log_sum == LOWEST, 0.0, log_sum)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = logits(side, columns, vocab_size, HEAD)
        grad = factor * tl.exp(x * inverse_temperature - log_sum)
        if COUNT == 2:
            second = tl.load(second_log_sum_pointer + row)
            grad += tl.load(second_factor_pointer + row) * tl.exp(x * second_inverse_temperature - second)
        if LABEL:
            label = tl.load(label_pointer + row).to(tl.int32)
            grad -= tl.where((columns == label) & (x != LOWEST), label_share, 0.0)
        grad = through_head(grad, x, columns, side, HEAD)
        tl.store(pointer + row * stride + columns, grad, mask=columns < vocab_size)
