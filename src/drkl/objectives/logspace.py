"""The safe building blocks, all in log space.

A class that both distributions exclude (-inf on both sides) contributes 0 to every value and every gradient. Masks are
applied *before* a product, since 0 * inf is NaN in the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def kl_terms(log_a: Float[Tensor, "n k"], log_b: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """a_i (log a_i - log b_i) class by class, in nats; +inf where b excludes a class that a does not."""
    outside = log_a == -math.inf
    log_a = log_a.masked_fill(outside, 0.0)
    log_b = log_b.masked_fill(outside, 0.0)
    infinite = log_b == -math.inf
    terms = log_a.exp() * (log_a - log_b.masked_fill(infinite, 0.0))
    # A class with log a > -inf has positive mass even where exp(log a) underflows: the definition is +inf there.
    return terms.masked_fill(infinite, math.inf)


def kl(log_a: Float[Tensor, "n k"], log_b: Float[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """KL(a || b) = sum_i a_i (log a_i - log b_i), in nats; +inf where b excludes a class that a does not."""
    return kl_terms(log_a, log_b).sum(-1)


def mixture(log_a: Float[Tensor, "n k"], log_b: Float[Tensor, "n k"], weight_a: float) -> Float[Tensor, "n k"]:
    """log(w a + (1 - w) b), with w = ``weight_a`` in [0, 1]."""
    if weight_a == 0.0:
        return log_b
    if weight_a == 1.0:
        return log_a
    neither = (log_a == -math.inf) & (log_b == -math.inf)
    log_a = log_a.masked_fill(neither, 0.0) + math.log(weight_a)
    log_b = log_b.masked_fill(neither, 0.0) + math.log1p(-weight_a)
    return torch.logaddexp(log_a, log_b).masked_fill(neither, -math.inf)


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:
    """``weight * value``, and 0 where the weight is 0 even if the value is infinite."""
    return weight * value.masked_fill(torch.as_tensor(weight == 0, device=value.device), 0.0)


def argmax(logits: Float[Tensor, "n vocab"]) -> Int[Tensor, "n"]:
    """The place of each row's highest value, the first of equals.

    torch.argmax goes value by value on a processor, and numpy's in vectors: a tenth of its time.
    """
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.float64) or not logits.numel():
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))


class Ranked(NamedTuple):
    """The most probable tokens, best first."""

    ids: Int[Tensor, "n k"]
    taken: Int[Tensor, "n m"]
    """The candidates, in the same order; past k, tokens as probable as the last may be missing."""


def most_probable(logp: Float[Tensor, "n vocab"], count: int, *, spare: int) -> Ranked:
    """The ``count`` most probable tokens, best first, the lower id first on ties.

    topk does not say which of tied tokens it takes. So ``spare`` more are taken, and a row whose ties go on past those
    is sorted in full.
    """
    vocab_size = logp.shape[-1]
    ids = logp.topk(min(vocab_size, count + spare), -1, sorted=False).indices.sort(-1).values
    values, order = logp.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if ids.shape[-1] < vocab_size:
        open_ended = values[:, count - 1] == values[:, -1]
        if bool(open_ended.any()):
            full = logp[open_ended].sort(dim=-1, descending=True, stable=True).indices
            ids[open_ended] = full[:, : ids.shape[-1]]
    return Ranked(ids[:, :count], ids)


class Split(NamedTuple):
    """One distribution seen from a target class: two classes, and the rest renormalised."""

    log_two: Float[Tensor, "n 2"]
    """log of (probability of the target, probability of all the rest)."""
    log_tail: Float[Tensor, "n vocab"]
    """log of the renormalised rest; -inf at the target, and everywhere where nothing is left."""
    log_odds: Float[Tensor, "n"]
    """logit of the target's probability, from log-sum-exps: exact at any confidence."""


def split(logp: Float[Tensor, "n vocab"], target: Int[Tensor, "n"]) -> Split:
    """Split a distribution into the target and the tail (`objectives`, section 1 of the docs)."""
    at_target = target.unsqueeze(-1)
    rest = logp.scatter(-1, at_target, -math.inf)
    empty = (rest == -math.inf).all(-1, keepdim=True)
    log_rest = torch.logsumexp(rest.masked_fill(empty, 0.0), -1, keepdim=True)
    log_odds = (logp.gather(-1, at_target) - log_rest).masked_fill(empty, math.inf).squeeze(-1)
    return Split(two_classes(log_odds), rest - log_rest, log_odds)


def two_classes(log_odds: Float[Tensor, "n"]) -> Float[Tensor, "n 2"]:
    """The logs of (sigmoid(log_odds), 1 - sigmoid(log_odds)), exact at any confidence."""
    certain = torch.isinf(log_odds)
    finite = log_odds.masked_fill(certain, 0.0)
    log_two = torch.stack((F.logsigmoid(finite), F.logsigmoid(-finite)), -1)
    # At +-inf: (0, -inf) and (-inf, 0), without a gradient.
    edge = torch.stack((log_odds.detach(), -log_odds.detach()), -1).clamp(max=0.0)
    return torch.where(certain.unsqueeze(-1), edge, log_two)
