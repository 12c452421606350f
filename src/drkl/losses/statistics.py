"""What one position says about two models, besides the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from drkl.losses.common import log_softmax
from drkl.objectives.logspace import kl


class TokenStatistics(NamedTuple):
    """Detached per-position values `[n]`, in nats or probabilities; teacher columns are None without a teacher.

    q = student, p = teacher, y* = argmax q, t = argmax p.
    """

    nll: Tensor
    """-log q(label)."""
    accuracy: Tensor
    """1 where y* is the label."""
    entropy: Tensor
    """-sum q log q."""
    confidence: Tensor
    """max q."""
    fkl: Tensor | None = None
    """KL(p || q)."""
    rkl: Tensor | None = None
    """KL(q || p)."""
    tvd: Tensor | None = None
    """1/2 sum |p - q|."""
    agreement: Tensor | None = None
    """1 where y* = t."""
    overconfidence: Tensor | None = None
    """q(y*) - p(y*)."""
    target_gap: Tensor | None = None
    """q(t) - p(t)."""
    teacher_entropy: Tensor | None = None
    """-sum p log p."""
    teacher_confidence: Tensor | None = None
    """max p."""


@torch.no_grad()
def token_statistics(
    student_logits: Float[Tensor, "n vocab"], teacher_logits: Float[Tensor, "n vocab"] | None, labels: Int[Tensor, "n"]
) -> TokenStatistics:
    """Compare two models at `[n]` positions, at temperature 1.

    Args:
        student_logits: `[n, vocab]`.
        teacher_logits: `[n, vocab]`, or None.
        labels: `[n]`, the observed next token's id.
    """
    logq = log_softmax(student_logits, 1.0)
    best = logq.argmax(-1, keepdim=True)
    nll = -logq.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    accuracy = (best.squeeze(-1) == labels).to(logq.dtype)
    confidence = logq.gather(-1, best).exp().squeeze(-1)
    q = logq.exp()
    entropy = _entropy(q, logq)
    if teacher_logits is None:
        return TokenStatistics(nll, accuracy, entropy, confidence)
    logp = log_softmax(teacher_logits, 1.0)
    target = logp.argmax(-1, keepdim=True)
    p = logp.exp()
    q_target, p_target = q.gather(-1, target).squeeze(-1), p.gather(-1, target).squeeze(-1)
    return TokenStatistics(
        nll=nll,
        accuracy=accuracy,
        entropy=entropy,
        confidence=confidence,
        fkl=_kl(p, logp, logq),
        rkl=_kl(q, logq, logp),
        tvd=0.5 * (p - q).abs_().sum(-1),
        agreement=(best == target).squeeze(-1).to(logq.dtype),
        overconfidence=confidence - p.gather(-1, best).squeeze(-1),
        target_gap=q_target - p_target,
        teacher_entropy=_entropy(p, logp),
        teacher_confidence=p_target,
    )


def _kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """`kl`, without its masks (half of the time) where no class is excluded."""
    value = torch.linalg.vecdot(a, log_a - log_b)
    return value if bool(torch.isfinite(value).all()) else kl(log_a, log_b)


def _entropy(probs: Tensor, logp: Tensor) -> Tensor:
    value = torch.linalg.vecdot(probs, logp)
    if not bool(torch.isfinite(value).all()):
        value = (probs * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return -value
