"""The pieces of the closed-form gradients, for finite logits. A name that ends in _ overwrites its arguments."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXCLUDED = -1e30
"""A logit that is finite, and whose probability is exactly 0."""


def softmax_(logits: Tensor) -> Tensor:
    """Overwrite finite ``logits`` `[n, k]` with their softmax; return the log-sum-exp `[n, 1]`."""
    highest = logits.amax(-1, keepdim=True)
    logits.sub_(highest).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    return highest + total.log()


def log_ratio_(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Overwrite both finite logits `[n, k]` with their softmax q and p; return log(q / p) `[n, k]`."""
    difference = student_logits - teacher_logits
    log_norm_q, log_norm_p = softmax_(student_logits), softmax_(teacher_logits)
    return difference.add_(log_norm_p - log_norm_q)


def log_share(log_ratio: Tensor, weight_q: float, weight_p: float) -> Tensor:
    """log(q / m) `[n, k]` for m = ``weight_q`` q + ``weight_p`` p, from ``log_ratio`` = log(q / p).

    Both weights are given, though they add up to 1: 1 - weight rounds a small weight away.
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
