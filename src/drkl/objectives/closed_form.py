"""The pieces of the closed-form gradients: in-place softmaxes, and what they notice on their way.

Finite logits only. Each is one sweep over rows that lie in the processor's cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drkl.objectives.logspace import argmax

EXCLUDED = -1e30
"""A logit that is finite, and whose probability is exactly 0."""


@dataclass
class Moments:
    """What a closed form notices about each position `[n, 1]` while it makes the gradient, for whoever asks.

    q = student, p = teacher, t = the target class (the teacher's top one for an objective without a target).
    """

    student_entropy: Tensor | None = None
    """-sum q log q."""
    max_q: Tensor | None = None
    """max q."""
    teacher_entropy: Tensor | None = None
    """-sum p log p."""
    max_p: Tensor | None = None
    """max p."""
    q_t: Tensor | None = None
    """q at the target."""
    p_t: Tensor | None = None
    """p at the target."""
    B: Tensor | None = None
    """KL(b_q || b_p), b = (target, rest); None for an objective without a target."""
    K: Tensor | None = None
    """KL(q^ || p^) on the renormalised rest; likewise."""


class Softmax(NamedTuple):
    """One row's softmax in three numbers, each `[n, 1]`."""

    log_norm: Tensor
    """log sum exp of the logits."""
    top: Tensor
    """The highest probability."""
    entropy: Tensor
    """-sum q log q."""


def softmax_(logits: Tensor) -> Tensor:
    """Overwrite finite ``logits`` `[n, k]` with their softmax; return the log-sum-exp `[n, 1]`."""
    highest = logits.amax(-1, keepdim=True)
    logits.sub_(highest).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    return highest + total.log()


def observed_softmax_(logits: Tensor) -> Softmax:
    """`softmax_`, and the entropy from the same exponentials: one dot product more."""
    highest = logits.amax(-1, keepdim=True)
    exps = logits.sub_(highest).exp()
    total = exps.sum(-1, keepdim=True)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(exps, logits).unsqueeze(-1) / total
    torch.div(exps, total, out=logits)
    return Softmax(highest + log_total, total.reciprocal(), entropy)


def softmaxes_(student_logits: Tensor, teacher_logits: Tensor, seen: Moments | None) -> tuple[Tensor, Tensor]:
    """`softmax_` of both; return both log-sum-exps, and fill ``seen`` as for an objective without a target."""
    if seen is None:
        return softmax_(student_logits), softmax_(teacher_logits)
    target = argmax(teacher_logits).unsqueeze(-1)
    q, p = observed_softmax_(student_logits), observed_softmax_(teacher_logits)
    seen.student_entropy, seen.max_q, seen.q_t = q.entropy, q.top, student_logits.gather(-1, target)
    seen.teacher_entropy, seen.max_p, seen.p_t = p.entropy, p.top, p.top
    return q.log_norm, p.log_norm


def see_distributions(seen: Moments, q: Tensor, log_q: Tensor, p: Tensor, log_p: Tensor) -> None:
    """Fill ``seen`` as for an objective without a target, from both distributions and their logs `[n, k]`."""
    seen.max_q = q.amax(-1, keepdim=True)
    seen.max_p = seen.p_t = p.amax(-1, keepdim=True)
    seen.q_t = q.gather(-1, argmax(log_p).unsqueeze(-1))
    seen.student_entropy = -torch.linalg.vecdot(q, log_q).unsqueeze(-1)
    seen.teacher_entropy = -torch.linalg.vecdot(p, log_p).unsqueeze(-1)


def see_split(
    seen: Moments, tails: tuple[Softmax, Softmax], log_odds: tuple[Tensor, Tensor], on_target: Tensor, on_tail: Tensor
) -> None:
    """Fill ``seen`` from both tails (student's first), the target's log-odds in both, and B and K, all `[n, 1]`."""
    (q, p), (s, u) = tails, log_odds
    seen.q_t, seen.p_t = torch.sigmoid(s), torch.sigmoid(u)
    seen.max_q, seen.student_entropy = _whole(q, s)
    seen.max_p, seen.teacher_entropy = _whole(p, u)
    seen.B, seen.K = on_target, on_tail


def _whole(tail: Softmax, log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """The highest probability and the entropy, from the tail's and the target's log-odds."""
    inside, outside = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    entropy = outside * (tail.entropy - F.logsigmoid(-log_odds)) - inside * F.logsigmoid(log_odds)
    return torch.maximum(inside, outside * tail.top), entropy


def log_ratio_(student_logits: Tensor, teacher_logits: Tensor, seen: Moments | None) -> Tensor:
    """Overwrite both finite logits `[n, k]` with their softmax q and p; return log(q / p) `[n, k]`."""
    difference = student_logits - teacher_logits
    log_norm_q, log_norm_p = softmaxes_(student_logits, teacher_logits, seen)
    return difference.add_(log_norm_p - log_norm_q)


def log_share(log_ratio: Tensor, weight_q: float, weight_p: float) -> Tensor:
    """log(q / m) `[n, k]` for m = ``weight_q`` q + ``weight_p`` p, from ``log_ratio`` = log(q / p).

    Both weights, which add up to 1, since 1 - weight forgets a small one.
    """
    if weight_q == 0.0:
        return log_ratio.clone()
    if weight_p == 0.0:
        return torch.zeros_like(log_ratio)
    # m/q = w_q (1 + w_p/w_q p/q). Beyond the threshold softplus(x) is x to the last bit of float64.
    odds = math.log(weight_p) - math.log(weight_q)
    return F.softplus(odds - log_ratio, threshold=40.0).add_(math.log(weight_q)).neg_()


def through_softmax_(student_probs: Tensor, slope: Tensor) -> None:
    """Overwrite q `[n, k]` with the gradient on the logits, from ``slope`` = d value / d log q (as if free)."""
    student_probs.mul_(slope.sum(-1, keepdim=True)).sub_(slope).neg_()


def two_kls_(student_probs: Tensor, teacher_probs: Tensor, log_ratio: Tensor, forward_weight: Tensor | float) -> Tensor:
    """Overwrite q with the gradient of w KL(p || q) + (1 - w) KL(q || p) for a fixed w; return the values `[n]`."""
    reverse = torch.linalg.vecdot(student_probs, log_ratio).unsqueeze(-1)
    forward = -torch.linalg.vecdot(teacher_probs, log_ratio).unsqueeze(-1)
    reverse_weight = 1.0 - forward_weight
    # w (q - p) + (1 - w) q (log q/p - RKL)
    factor = log_ratio.sub_(reverse).mul_(reverse_weight).add_(forward_weight)
    student_probs.mul_(factor).sub_(teacher_probs.mul_(forward_weight))
    return (forward_weight * forward + reverse_weight * reverse).squeeze(-1)
