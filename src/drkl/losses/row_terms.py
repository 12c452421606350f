"""What the row kernel computes class by class: one small function per objective, on the device.

A function takes log q and log p of a class (-inf where it is excluded, which ``gone_q`` and ``gone_p`` say too), their
difference d (0 where either is excluded) and four parameters; it returns the class's term of the value, and the slope
h = d term / d log q as if log q were free. The gradient on the logits is h_j - q_j sum(h), so that a slope may have any
multiple of q added. Terms and slopes of excluded classes are those of the definitions in `drkl.objectives`.

Written without a device library, which Triton's interpreter does not have, and to the last bits of fp32 near 0.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INFINITE = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-float("inf"))


@triton.jit
def log1p(x):
    """For x in [0, 1], by 2 artanh(x / (2 + x))."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 11.0 + square * (1.0 / 13.0)
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * series)
    series = 1.0 / 3.0 + square * (1.0 / 5.0 + square * series)
    return 2.0 * ratio * (1.0 + square * series)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def log_add_exp(a, b):
    """log(e^a + e^b) of two scalars; -inf where both are."""
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    gap = tl.where(high == LOWEST, 0.0, low) - tl.where(high == LOWEST, 0.0, high)
    return high + log1p(tl.exp(gap))


@triton.jit
def decay(t):
    """(1 - e^-t) / t for t >= 0, and 1 at 0."""
    near = t < 0.25
    series = 1.0 - t * (1.0 / 5.0) * (1.0 - t * (1.0 / 6.0))
    series = 1.0 - t * (1.0 / 2.0) * (1.0 - t * (1.0 / 3.0) * (1.0 - t * (1.0 / 4.0) * series))
    return tl.where(near, series, (1.0 - tl.exp(-t)) / tl.where(near, 1.0, t))


@triton.jit
def tanh(x):
    double = 2.0 * tl.abs(x)
    near, small = tl.minimum(double, 0.25), tl.exp(-double)
    size = tl.where(double <= 0.25, near * decay(near), 1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def second_rise(x):
    """(e^x - 1 - x) / x^2 for abs(x) <= 1/2, by its series; 1 + x times it is (e^x - 1) / x."""
    series = 1.0 / 5040.0 + x * (1.0 / 40320.0 + x * (1.0 / 362880.0))
    series = 1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0 + x * series))
    return 1.0 / 2.0 + x * (1.0 / 6.0 + x * series)


@triton.jit
def fkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    p = tl.exp(log_p)
    return tl.where(gone_p, 0.0, tl.where(gone_q, INFINITE, -p * d)), tl.where(gone_q, 0.0, -p)


@triton.jit
def rkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    q = tl.exp(log_q)
    return tl.where(gone_q, 0.0, tl.where(gone_p, INFINITE, q * d)), q * tl.where(gone_p, -1.0, d)


@triton.jit
def symmetric_kl(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """a: the weight of forward KL."""
    forward, forward_slope = fkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
    reverse, reverse_slope = rkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
    return mean_of_two(a, forward, reverse), a * forward_slope + (1.0 - a) * reverse_slope


@triton.jit
def weighted(weight, value):
    """What has no weight adds nothing, even where it is infinite."""
    return tl.where(weight == 0, 0.0, weight * tl.where(weight == 0, 0.0, value))


@triton.jit
def mean_of_two(weight, first, second):
    return weighted(weight, first) + weighted(1.0 - weight, second)


@triton.jit
def log_shares(d, gone_q, gone_p, c, e):
    """log q/m and log p/m for m = w_p p + w_q q, from c = log w_p and e = log w_q."""
    odds = c - e - d
    log_small = log1p(tl.exp(-tl.abs(odds)))
    log_q_m = tl.where(gone_p, 0.0, -tl.maximum(odds, 0.0) - log_small) - e
    return log_q_m, tl.where(gone_q, 0.0, tl.minimum(odds, 0.0) - log_small) - c


@triton.jit
def gjs(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """a, b: the weights of p and q in the mixture; c, e: their logs."""
    log_q_m, log_p_m = log_shares(d, gone_q, gone_p, c, e)
    slope = b * tl.exp(log_q) * log_q_m
    return a * tl.exp(log_p) * log_p_m + slope, slope


@triton.jit
def sfkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """As `gjs`."""
    log_q_m, log_p_m = log_shares(d, gone_q, gone_p, c, e)
    p = tl.exp(log_p)
    return p * log_p_m, tl.where(gone_q, 0.0, -p * tl.exp(log_q_m + e))


@triton.jit
def srkl(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """As `gjs`."""
    log_q_m, _ = log_shares(d, gone_q, gone_p, c, e)
    q = tl.exp(log_q)
    return q * log_q_m, q * (log_q_m - tl.exp(log_q_m + e))


@triton.jit
def tvd(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    q = tl.exp(log_q)
    difference = q - tl.exp(log_p)
    sign = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, 0.0))
    return sign * difference, sign * q


@triton.jit
def todi(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    q, p = tl.exp(log_q), tl.exp(log_p)
    alone, either = gone_q != gone_p, gone_q | gone_p
    slope = sigmoid(d) * q * (d + 1.0) - sigmoid(-d) * p
    return tl.where(alone, INFINITE, (q - p) * d), tl.where(either, 0.0, slope)


@triton.jit
def ab(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """a, b: alpha and beta; c: their sum s > 0. With Q = q^s, M = p^a q^b, P = p^s the slope is (Q - M) / a."""
    size = tl.abs(d)
    # The larger of two neighbours among P, M and Q, times 1 - smaller / larger.
    of_q = tl.exp(c * tl.where(gone_q, 0.0, log_q) + a * tl.maximum(-d, 0.0))
    of_p = tl.exp(c * tl.where(gone_p, 0.0, log_p) + b * tl.maximum(d, 0.0))
    on_q, on_p = of_q * decay(a * size), of_p * decay(b * size)
    term, slope = d * (on_q - on_p) / c, d * on_q
    # A class that one excludes: the other's power alone, and no limit where its exponent is 0.
    student, teacher = of_q / tl.where(a > 0, a, 1.0), of_p / tl.where(b > 0, b, 1.0)
    term = tl.where(gone_p, tl.where(a > 0, student / c, INFINITE), term)
    term = tl.where(gone_q, tl.where(gone_p, 0.0, tl.where(b > 0, teacher / c, INFINITE)), term)
    slope = tl.where(gone_p, tl.where(a > 0, student, 0.0), slope)
    return term, tl.where(gone_q, 0.0, slope)


@triton.jit
def ab_small(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """`ab` where s is small, so that its two differences nearly cancel: near p = q their difference as one series.

    With f(x) = (e^x - 1) / x and g(x) = (e^x - 1 - x) / x^2, x = a log p/q and y = b log p/q, the term is
    Q log(p/q)^2 [b g(y) - a g(x) + a f(x) f(y)] / s.
    """
    term, slope = ab(log_q, log_p, d, gone_q, gone_p, a, b, c, e)
    near = (tl.abs(c * d) < 0.5) & (gone_q == 0) & (gone_p == 0)
    x, y = -a * tl.where(near, d, 0.0), -b * tl.where(near, d, 0.0)
    g_x, g_y = second_rise(x), second_rise(y)
    inner = b * g_y - a * g_x + a * (1.0 + x * g_x) * (1.0 + y * g_y)
    series = tl.exp(c * tl.where(gone_q, 0.0, log_q)) * d * d * inner / c
    return tl.where(near, series, term), slope


@triton.jit
def ab_zero(log_q, log_p, d, gone_q, gone_p, a, b, c, e):
    """`ab` at s = 0: a class counts however little mass it has. a: alpha."""
    x = -a * d
    near = tl.abs(x) < 0.5
    g = second_rise(tl.where(near, x, 0.0))
    far, rise = tl.where(near, 1.0, x), tl.exp(tl.where(near, 0.0, x)) - 1.0
    term = d * d * tl.where(near, g, (rise - far) / (far * far))
    slope = d * tl.where(near, 1.0 + x * g, rise / far)
    either = gone_q | gone_p
    return tl.where(gone_q != gone_p, INFINITE, tl.where(either, 0.0, term)), tl.where(either, 0.0, slope)
