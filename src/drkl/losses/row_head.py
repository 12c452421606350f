"""akl's head set inside the row kernel: the teacher's most probable classes up to a mass, exact at ties.

The head ends at a threshold: the highest logit from which on the classes have the mass. It is searched for over integer
keys that order as the logits do. A sweep over the teacher's row keeps every lane's best and second best, and the masses
above four thresholds. Where all of the head are bests of their lanes, the threshold is among those, which are in
registers; otherwise the masses narrow the bracket down for the next sweep. Of the classes that tie at the threshold the
lowest indices are in the head.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from drkl.losses.row_sweeps import log_prob, logits, pair
from drkl.losses.row_terms import LOWEST

TINY = tl.constexpr(2.0**-126)
WHOLE = tl.constexpr(-(2**31))
"""The key below all others."""


@triton.jit
def order_key(y):
    """An int32 that orders as a float does; -0 and 0 are one."""
    bits = tl.where(y == 0, 0.0, y).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(low, high, mass_low, mass_high, at, mass, mu):
    """A bracket after the mass from ``at`` on is known; it holds the threshold in [low, high)."""
    inside = (at > low) & (at < high)
    up, down = inside & (mass >= mu), inside & (mass < mu)
    # A mass that is no number narrows it too: the search has to end.
    down = down | (inside & (mass != mass))
    return (
        tl.where(up, at, low),
        tl.where(down, at, high),
        tl.where(up, mass, mass_low),
        tl.where(down, mass, mass_high),
    )


@triton.jit
def among_bests(keys, probs, floor, high, mass_high, mu):
    """The threshold among the lanes' bests that lie above ``floor``, and the mass above it."""
    low = floor + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        mass = mass_high_of(keys, probs, middle, high, mass_high)
        enough = mass >= mu
        low = tl.where(enough, middle, low)
        mass_high = tl.where(enough, mass_high, mass)
        high = tl.where(enough, high, middle)
    return low, mass_high


@triton.jit
def mass_high_of(keys, probs, at, high, mass_high):
    """The mass from ``at`` on, from that from ``high`` on."""
    inside = (keys >= at.to(tl.int32)) & (keys < high.to(tl.int32))
    return mass_high + tl.sum(tl.where(inside, probs, 0.0), 0)


@triton.jit
def head_threshold(
    teacher,
    target,
    vocab_size,
    inverse_temperature,
    norm_y,
    mu,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The head's lowest key, and the mass above it."""
    high = order_key(norm_y[0]).to(tl.int64) + 1
    # All classes below this one have less than half of 1 - mu.
    floor = norm_y[0] + norm_y[1] + tl.log((1.0 - tl.minimum(mu, 0.9999999)) / (2.0 * vocab_size))
    low = tl.minimum(order_key(floor).to(tl.int64), high - 1)
    mass_low, mass_high = 1.0, 0.0
    if mu > 1:
        low = tl.full((), WHOLE, tl.int64)
        high = low + 1
    elif tl.exp(-norm_y[1]) >= mu:
        low = high - 1
    while high - low > 1:
        low, high, mass_low, mass_high = _search(
            teacher, target, vocab_size, inverse_temperature, norm_y, mu, low, high, mass_low, mass_high,
            HEADS, TARGET, BLOCK,
        )  # fmt: skip
    return low.to(tl.int32), mass_high


@triton.jit
def _search(
    teacher,
    target,
    vocab_size,
    inverse_temperature,
    norm_y,
    mu,
    low,
    high,
    mass_low,
    mass_high,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sweep: a narrower bracket, of one key where that is the threshold."""
    # The mass is smooth in the logits, not in their keys: the middle key is there for the search to end.
    bottom, top = key_value(low), key_value(high - 1)
    share = tl.maximum((mass_low - mu) / tl.maximum(mass_low - mass_high, TINY), 0.0)
    guess, width = bottom + tl.minimum(share, 1.0) * (top - bottom), (top - bottom) / 32
    at_0, at_1 = high - 1, low + (high - low) // 2
    at_2, at_3 = order_key(guess - width).to(tl.int64), order_key(guess + width).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    best, second = zeros + LOWEST, zeros + LOWEST
    mass_0, mass_1, mass_2, mass_3 = zeros, zeros, zeros, zeros
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        y = logits(teacher, columns, vocab_size, HEADS[1]) * inverse_temperature
        if TARGET != "none":
            y = tl.where(columns == target, LOWEST, y)
        p, key = tl.exp(log_prob(y, norm_y)), order_key(y)
        mass_0 += tl.where(key >= at_0.to(tl.int32), p, 0.0)
        mass_1 += tl.where(key >= at_1.to(tl.int32), p, 0.0)
        mass_2 += tl.where(key >= at_2.to(tl.int32), p, 0.0)
        mass_3 += tl.where(key >= at_3.to(tl.int32), p, 0.0)
        y = tl.where((key >= low.to(tl.int32)) & (key < high.to(tl.int32)), y, LOWEST)
        second = tl.maximum(second, tl.minimum(best, y))
        best = tl.maximum(best, y)
    keys, probs = order_key(best), tl.exp(log_prob(best, norm_y))
    floor = tl.maximum(order_key(tl.max(second, 0)).to(tl.int64), low - 1)
    mass = mass_high_of(keys, probs, floor + 1, high, mass_high)
    if mass >= mu:
        low, mass_high = among_bests(keys, probs, floor, high, mass_high, mu)
        high = low + 1
    else:
        low, high, mass_low, mass_high = narrowed(low, high, mass_low, mass_high, floor + 1, mass, mu)
        low, high, mass_low, mass_high = narrowed(low, high, mass_low, mass_high, at_0, tl.sum(mass_0, 0), mu)
        low, high, mass_low, mass_high = narrowed(low, high, mass_low, mass_high, at_1, tl.sum(mass_1, 0), mu)
        low, high, mass_low, mass_high = narrowed(low, high, mass_low, mass_high, at_2, tl.sum(mass_2, 0), mu)
        low, high, mass_low, mass_high = narrowed(low, high, mass_low, mass_high, at_3, tl.sum(mass_3, 0), mu)
    return low, high, mass_low, mass_high


@triton.jit
def forward_share(
    student,
    teacher,
    target,
    vocab_size,
    inverse_temperature,
    norm_z,
    norm_y,
    mu,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The share of sum |p - q| that lies in the head: akl's weight of forward KL."""
    threshold, above = head_threshold(
        teacher, target, vocab_size, inverse_temperature, norm_y, mu, HEADS, TARGET, BLOCK
    )
    zeros = tl.zeros((BLOCK,), tl.float32)
    total, in_head, in_ties, ties, tied = zeros, zeros, zeros, zeros, zeros
    for start in range(0, vocab_size, BLOCK):
        _, z, y = pair(student, teacher, start, target, vocab_size, inverse_temperature, HEADS, TARGET, BLOCK)
        p, key = tl.exp(log_prob(y, norm_y)), order_key(y)
        gap, ties_here = tl.abs(p - tl.exp(log_prob(z, norm_z))), (key == threshold) & (y != LOWEST)
        total += gap
        in_head += tl.where((key > threshold) & (y != LOWEST), gap, 0.0)
        in_ties += tl.where(ties_here, gap, 0.0)
        ties += tl.where(ties_here, 1.0, 0.0)
        tied = tl.maximum(tied, tl.where(ties_here, p, 0.0))
    gap_total, gap_head, gap_ties = tl.sum(total, 0), tl.sum(in_head, 0), tl.sum(in_ties, 0)
    missing = tl.maximum(tl.ceil((mu - above) / tl.maximum(tl.max(tied, 0), TINY)), 1.0)
    if tl.sum(ties, 0) > missing:
        gap_ties = _first_ties(
            student, teacher, target, vocab_size, inverse_temperature, norm_z, norm_y, threshold, missing,
            HEADS, TARGET, BLOCK,
        )  # fmt: skip
    share = (gap_head + gap_ties) / tl.maximum(gap_total, TINY)
    return tl.where(gap_total > 0, tl.minimum(share, 1.0), 0.5)


@triton.jit
def _first_ties(
    student,
    teacher,
    target,
    vocab_size,
    inverse_temperature,
    norm_z,
    norm_y,
    threshold,
    missing,
    HEADS: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of |p - q| over the first ``missing`` classes at the threshold."""
    found = tl.zeros((BLOCK,), tl.float32)
    before = missing * 0.0
    for start in range(0, vocab_size, BLOCK):
        _, z, y = pair(student, teacher, start, target, vocab_size, inverse_temperature, HEADS, TARGET, BLOCK)
        tie = tl.where((order_key(y) == threshold) & (y != LOWEST), 1.0, 0.0)
        gap = tl.abs(tl.exp(log_prob(y, norm_y)) - tl.exp(log_prob(z, norm_z)))
        found += tl.where((tie > 0) & (before + tl.cumsum(tie, 0) <= missing), gap, 0.0)
        before += tl.sum(tie, 0)
    return tl.sum(found, 0)
