"""Forward and reverse KL with weights that the two distributions set themselves; the weights get no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from drkl.objectives.base import Objective, check_number, help_text
from drkl.objectives.closed_form import log_ratio_, through_softmax_, two_kls_
from drkl.objectives.logspace import kl, kl_terms, weighted
from drkl.objectives.terms import Terms, kl_terms_of, label_or_top, mean_terms, splits, summands

FIRST_TOKENS = 256
"""The number of the teacher's most probable tokens that are searched for the head first; it seldom has more."""


@dataclass(frozen=True)
class AdaptiveKL(Objective):
    """g_h/(g_h + g_t) KL(p || q) + g_t/(g_h + g_t) KL(q || p): the KL of the part of the vocabulary that is worse off.

    The head is the shortest list of the teacher's most probable tokens (the lower index first on ties) with a mass of
    at least mu, the tail the rest; g = sum |p - q| over each. Both weights are 1/2 where the two agree everywhere.
    """

    name = "akl"
    formula = "(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), g = sg[sum |p - q|] over head / tail"
    source = "AKL, Wu et al. 2024, arXiv 2404.02657"
    on_classes = "approximation"

    mu: float = field(default=0.5, metadata=help_text("the teacher's mass in the head, in (0, 1]"))

    def __post_init__(self) -> None:
        check_number(self.name, "mu", self.mu, "in (0, 1]", lambda mu: 0 < mu <= 1)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp = teacher_logp.detach()
        share = self.forward_share(student_logp, teacher_logp)
        forward, reverse = kl(teacher_logp, student_logp), kl(student_logp, teacher_logp)
        return weighted(share, forward) + weighted(1.0 - share, reverse)

    def forward_share(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """The weight `[n]` of KL(p || q), detached."""
        gap = (teacher_logp.detach().exp() - student_logp.detach().exp()).abs()
        return head_share(gap, head_mask(teacher_logp.detach(), self.mu)).squeeze(-1)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        student, teacher = splits(student_logp, teacher_logp, label_or_top(teacher_logp, labels))
        share = self.forward_share(student_logp, teacher_logp)
        return mean_terms(share, kl_terms_of(teacher, student), kl_terms_of(student, teacher))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        best, places = teacher_logits.topk(min(FIRST_TOKENS, teacher_logits.shape[-1]), -1)
        kept = teacher_logits.clone()
        log_ratio = log_ratio_(student_logits, teacher_logits)
        gap = (teacher_logits - student_logits).abs_()
        listed = first_tokens(best, teacher_logits.gather(-1, places), self.mu)
        if listed is None:
            share = head_share(gap, head_mask(torch.log_softmax(kept, -1), self.mu))
        else:
            share = _share(gap.gather(-1, places).mul_(listed).sum(-1, keepdim=True), gap.sum(-1, keepdim=True))
        return two_kls_(student_logits, teacher_logits, log_ratio, share)


@torch.no_grad()
def head_mask(logp: Float[Tensor, "n vocab"], mu: float) -> Bool[Tensor, "n vocab"]:
    """The shortest list of most probable classes with a mass of at least ``mu``, the lower index first on ties."""
    vocab_size = logp.shape[-1]
    if mu >= 1 or logp.shape[0] == 0:
        return logp > -math.inf
    mu = reached(mu, logp.dtype)
    count = min(FIRST_TOKENS, vocab_size)
    while True:
        best = logp.topk(count, -1).values
        mass = best.exp().cumsum(-1)
        if count == vocab_size or bool((mass[:, -1] >= mu).all()):
            break
        count = min(8 * count, vocab_size)
    last = (mass < mu).sum(-1, keepdim=True).clamp(max=count - 1)
    threshold = best.gather(-1, last)
    above, ties = logp > threshold, logp == threshold
    missing = last + 1 - above.sum(-1, keepdim=True)
    if bool((ties.sum(-1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(-1) <= missing
    return (above | ties) & (logp > -math.inf)


def reached(mu: float, dtype: torch.dtype) -> float:
    """The mass from which on ``mu`` counts as reached: of two classes of exactly 1/2 the first reaches a mu of 1/2."""
    return mu - 16 * torch.finfo(dtype).eps


def first_tokens(best: Float[Tensor, "n k"], probs: Float[Tensor, "n k"], mu: float) -> Bool[Tensor, "n k"] | None:
    """Mark which of the teacher's k best tokens, in descending order, are its head; None where k is too small to know.

    They do not where the head may reach beyond them, or where a token outside of it ties with its last.
    """
    mass = probs.cumsum(-1)
    last = (mass < reached(mu, probs.dtype)).sum(-1, keepdim=True)
    k = best.shape[-1]
    if mu >= 1 or k < 2 or bool((last >= k - 1).any()):
        return None
    if bool((best.gather(-1, last) == best.gather(-1, last + 1)).any()):
        return None
    return torch.arange(k, device=best.device) <= last


def head_share(gap: Float[Tensor, "n vocab"], head: Bool[Tensor, "n vocab"]) -> Float[Tensor, "n 1"]:
    """g_h / (g_h + g_t), and 1/2 where both are 0; overwrites ``gap`` = |p - q|."""
    total = gap.sum(-1, keepdim=True)
    return _share(gap.mul_(head).sum(-1, keepdim=True), total)


def _share(in_head: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, in_head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5).clamp(max=1.0)


@dataclass(frozen=True)
class TokenWiseKL(Objective):
    """sum_v sg[sigma(log p/q)] p log p/q + sg[sigma(log q/p)] q log q/p: forward KL where the student is too low.

    sg stops the gradient. The value is KL(p || q) + KL(q || p); only the gradient differs from theirs.
    """

    name = "todi"
    formula = "sum sg[sigma(log p/q)] p log(p/q) + sg[sigma(log q/p)] q log(q/p)"
    source = "ToDi, Jung et al. 2025, arXiv 2505.16297"
    on_classes = "approximation"

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp = teacher_logp.detach()
        forward_weight = token_weights(student_logp, teacher_logp)
        forward = weighted(forward_weight, kl_terms(teacher_logp, student_logp))
        return (forward + weighted(1.0 - forward_weight, kl_terms(student_logp, teacher_logp))).sum(-1)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        return summands(self, student_logp, teacher_logp, labels)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        # h = d value / d log q = -sigma(log p/q) p + sigma(log q/p) q (log q/p + 1)
        log_ratio = log_ratio_(student_logits, teacher_logits)
        value = torch.linalg.vecdot(student_logits - teacher_logits, log_ratio)
        forward_weight = torch.sigmoid(-log_ratio)
        reverse = log_ratio.add_(1.0).mul_(student_logits).mul_(1.0 - forward_weight)
        through_softmax_(student_logits, reverse.sub_(teacher_logits.mul_(forward_weight)))
        return value


def token_weights(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sigma(log p - log q) class by class, detached; 1/2 where both exclude the class."""
    student_logp = student_logp.detach()
    neither = (student_logp == -math.inf) & (teacher_logp == -math.inf)
    return torch.sigmoid((teacher_logp - student_logp).masked_fill(neither, 0.0))
