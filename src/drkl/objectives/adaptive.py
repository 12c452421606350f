"""Forward and reverse KL with weights that the two distributions set themselves; the weights get no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from drkl.objectives.base import Objective, check_number, help_text
from drkl.objectives.closed_form import log_ratio_, through_softmax_, two_kls_
from drkl.objectives.logspace import kl, kl_terms, weighted
from drkl.objectives.terms import Terms, kl_terms_of, label_or_top, mean_terms, splits, summands

FIRST_TOKENS = 192
"""The number of the teacher's most probable tokens that are searched for the head first; it seldom has more."""
GROUPS = 64, 8
"""The numbers of neighbours in a group of tokens, and in a group within it, when the most probable are looked for."""


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
        log_q, log_p = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
        torch.exp(log_q, out=student_logits)
        torch.exp(log_p, out=teacher_logits)
        gap = (teacher_logits - student_logits).abs_()
        share = _share(gap_in_head(gap, log_p, self.mu), gap.sum(-1, keepdim=True))
        return two_kls_(student_logits, teacher_logits, log_q.sub_(log_p), share)


def gap_in_head(gap: Float[Tensor, "n vocab"], logp: Float[Tensor, "n vocab"], mu: float) -> Float[Tensor, "n 1"]:
    """The sum of ``gap`` over the head of ``logp``, without a mask of the vocabulary where the head is short."""
    best, places = first_of(logp, FIRST_TOKENS)
    listed, sure = first_tokens(best, mu)
    inside = gap.gather(-1, places).mul_(listed).sum(-1, keepdim=True)
    if not bool(sure.all()):
        inside[~sure] = gap[~sure].mul_(head_mask(logp[~sure], mu)).sum(-1, keepdim=True)
    return inside


def first_of(logp: Float[Tensor, "n vocab"], count: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The ``count`` most probable classes, best first, and where they are; all classes where there are fewer.

    On a processor topk over whole rows takes as long as an objective. The best are in the groups of neighbours with the
    highest maxima, as many groups as there are best.
    """
    vocab_size = logp.shape[-1]
    aligned = vocab_size // GROUPS[0] * GROUPS[0]
    if aligned < 2 * count * GROUPS[0] or logp.device.type != "cpu":
        return logp.topk(min(count, vocab_size), -1)
    rows = torch.arange(len(logp)).unsqueeze(-1)
    values, first = logp[:, :aligned], torch.zeros(1, 1, dtype=torch.int64)
    within = aligned  # values are runs of as many neighbours, which begin at the places ``first``
    for width in (*GROUPS, 1):
        grouped = values.unflatten(-1, (-1, width))
        best = grouped.amax(-1).topk(count, -1, sorted=width == 1).indices
        values = grouped[rows, best].flatten(1)
        run = best.mul_(width)
        first = first.expand(len(logp), -1).gather(-1, run.div(within, rounding_mode="floor")).add_(run % within)
        within = width
    if aligned == vocab_size:
        return values, first
    beyond = torch.arange(aligned, vocab_size).expand(len(logp), -1)
    values, order = torch.cat([values, logp[:, aligned:]], -1).topk(count, -1)
    return values, torch.cat([first, beyond], -1).gather(-1, order)


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


def first_tokens(best: Float[Tensor, "n k"], mu: float) -> tuple[Bool[Tensor, "n k"], Bool[Tensor, "n"]]:
    """Mark which of the k best classes are the head; and at which positions these are enough to tell.

    They are not where the head may reach beyond them, or where a class outside of it ties with its last.

    Args:
        best: their log-probabilities, in descending order.
        mu: the mass of the head.
    """
    k = best.shape[-1]
    last = (best.exp().cumsum(-1) < reached(mu, best.dtype)).sum(-1, keepdim=True)
    sure = (last < k - 1) & (mu < 1)
    last = last.clamp(max=max(k - 2, 0))
    tied = best.gather(-1, last) == best.gather(-1, (last + 1).clamp(max=k - 1))
    return torch.arange(k, device=best.device) <= last, (sure & ~tied).squeeze(-1)


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
        # h = d value / d log q = w q (log q/p + 1) - (1 - w) p, w = sigma(log q/p)
        log_ratio = log_ratio_(student_logits, teacher_logits)
        value = torch.linalg.vecdot(student_logits - teacher_logits, log_ratio)
        reverse_weight = torch.sigmoid(log_ratio)
        slope = torch.addcmul(teacher_logits, student_logits, log_ratio.add_(1.0), out=log_ratio)
        through_softmax_(student_logits, slope.mul_(reverse_weight).sub_(teacher_logits))
        return value


def token_weights(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sigma(log p - log q) class by class, detached; 1/2 where both exclude the class."""
    student_logp = student_logp.detach()
    neither = (student_logp == -math.inf) & (teacher_logp == -math.inf)
    return torch.sigmoid((teacher_logp - student_logp).masked_fill(neither, 0.0))
