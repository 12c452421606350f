"""Objectives over the whole vocabulary. q is the student, p the teacher; all values in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drkl.objectives.base import Objective, check_number, help_text
from drkl.objectives.closed_form import (
    log_and_mean,
    log_odds_,
    log_ratio_,
    log_ratio_of_,
    softmax_,
    through_softmax_,
    two_kls_,
)
from drkl.objectives.logspace import kl, mixture, split, weighted
from drkl.objectives.terms import Terms, kl_terms_of, label_or_top, mean_terms, splits, summands


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log q(y): plain fine-tuning on the observed token y; needs no teacher."""

    name = "ce"
    formula = "-log q(y)"
    source = "maximum likelihood on the observed token"
    needs_teacher = False
    needs_labels = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return -student_logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        value = self(student_logp, None, label_or_top(teacher_logp, labels))
        return Terms(value, torch.zeros_like(value.detach()))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor:
        assert labels is not None
        observed = labels.unsqueeze(-1)
        at_label = student_logits.gather(-1, observed)
        log_norm = softmax_(student_logits)
        student_logits.scatter_add_(-1, observed, torch.full_like(at_label, -1.0))
        return (log_norm - at_label).squeeze(-1)


@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(p || q), the true KL: the teacher's entropy is included, so it is 0 at p = q."""

    name = "fkl"
    formula = "KL(p || q)"
    source = "Hinton et al. 2015, arXiv 1503.02531"
    on_classes = "bound"

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return kl(teacher_logp.detach(), student_logp)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        student, teacher = splits(student_logp, teacher_logp, label_or_top(teacher_logp, labels))
        return kl_terms_of(teacher, student)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        log_ratio = log_ratio_(student_logits, teacher_logits)
        student_logits.sub_(teacher_logits)
        return torch.linalg.vecdot(teacher_logits, log_ratio).neg_()


@dataclass(frozen=True)
class ReverseKL(Objective):
    """KL(q || p), the usual loss of LLM distillation; its factor 1 - q_t makes students overconfident."""

    name = "rkl"
    formula = "KL(q || p)"
    source = "MiniLLM, Gu et al. 2024, arXiv 2306.08543"
    on_classes = "bound"

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return kl(student_logp, teacher_logp.detach())

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        student, teacher = splits(student_logp, teacher_logp, label_or_top(teacher_logp, labels))
        return kl_terms_of(student, teacher)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        log_ratio = log_ratio_of_(student_logits, teacher_logits)
        value = torch.linalg.vecdot(student_logits, log_ratio)
        student_logits.mul_(log_ratio.sub_(value.unsqueeze(-1)))
        return value


@dataclass(frozen=True)
class SymmetricKL(Objective):
    """w KL(p || q) + (1 - w) KL(q || p); Jeffreys' divergence at w = 1/2, up to a factor 2.

    Published code calls unequal weights such as 0.1 and 0.9 "symmetric" too; only w = 1/2 is.
    """

    name = "symmetric_kl"
    formula = "w KL(p || q) + (1 - w) KL(q || p)"
    source = "Jeffreys 1946"
    on_classes = "bound"

    forward_weight: float = field(default=0.5, metadata=help_text("w, the weight of KL(p || q), in [0, 1]"))

    def __post_init__(self) -> None:
        check_number(self.name, "forward_weight", self.forward_weight, "in [0, 1]", lambda w: 0 <= w <= 1)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp, w = teacher_logp.detach(), self.forward_weight
        return weighted(w, kl(teacher_logp, student_logp)) + weighted(1.0 - w, kl(student_logp, teacher_logp))

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        student, teacher = splits(student_logp, teacher_logp, label_or_top(teacher_logp, labels))
        return mean_terms(self.forward_weight, kl_terms_of(teacher, student), kl_terms_of(student, teacher))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        log_ratio = log_ratio_(student_logits, teacher_logits)
        return two_kls_(student_logits, teacher_logits, log_ratio, self.forward_weight)


@dataclass(frozen=True)
class GeneralizedJensenShannon(Objective):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; the Jensen-Shannon divergence at 1/2.

    It tends to 0, not to a KL, as beta goes to 0 or 1.
    """

    name = "gjs"
    formula = "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q"
    source = "GKD, Agarwal et al. 2024, arXiv 2306.13649"
    on_classes = "bound"

    beta: float = field(default=0.5, metadata=help_text("share of the teacher in the mixture, in (0, 1)"))

    def __post_init__(self) -> None:
        domain = "in (0, 1): at 0 and 1 it is 0 everywhere; what is meant there are 'fkl' and 'rkl'"
        check_number(self.name, "beta", self.beta, domain, lambda beta: 0 < beta < 1)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp = teacher_logp.detach()
        middle = mixture(teacher_logp, student_logp, self.beta)
        return self.beta * kl(teacher_logp, middle) + (1.0 - self.beta) * kl(student_logp, middle)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        target = label_or_top(teacher_logp, labels)
        student, teacher = splits(student_logp, teacher_logp, target)
        middle = split(mixture(teacher_logp, student_logp, self.beta), target)
        return mean_terms(self.beta, kl_terms_of(teacher, middle), kl_terms_of(student, middle))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        # d/dz = (1 - beta) q (log q/m - sum q log q/m)
        share = 1.0 - self.beta
        log_odds = log_odds_(log_ratio_(student_logits, teacher_logits), share, self.beta)
        # log q/m and log p/m, less the logs of the two weights, which add up over q and over p.
        log_q_m, on_student = log_and_mean(torch.sigmoid(log_odds), log_odds, student_logits)
        on_teacher = torch.linalg.vecdot(teacher_logits, torch.sub(log_q_m, log_odds, out=log_odds))
        student_logits.mul_(torch.add(-share * on_student.unsqueeze(-1), log_q_m, alpha=share, out=log_q_m))
        entropy = -self.beta * math.log(self.beta) - share * math.log(share)
        return self.beta * on_teacher + share * on_student + entropy


def _check_skew(owner: str, skew: object) -> None:
    check_number(owner, "skew", skew, "in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class SkewForwardKL(Objective):
    """KL(p || m), m = s p + (1 - s) q: forward KL that stays finite where the student excludes a token."""

    name = "sfkl"
    formula = "KL(p || s p + (1 - s) q)"
    source = "DistiLLM, Ko et al. 2024, arXiv 2402.03898"
    on_classes = "bound"

    skew: float = field(default=0.1, metadata=help_text("s, share of the teacher in the mixture, in [0, 1)"))

    def __post_init__(self) -> None:
        _check_skew(self.name, self.skew)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp = teacher_logp.detach()
        return kl(teacher_logp, mixture(teacher_logp, student_logp, self.skew))

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        middle = mixture(teacher_logp, student_logp, self.skew)
        return kl_terms_of(*splits(teacher_logp, middle, label_or_top(teacher_logp, labels)))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        # h = d value / d log q = -p (1 - s) q/m
        if self.skew == 0.0:
            return ForwardKL().value_and_grad_(student_logits, teacher_logits, labels)
        log_odds = log_odds_(log_ratio_(student_logits, teacher_logits), 1.0 - self.skew, self.skew)
        share = torch.sigmoid(log_odds)
        _, value = log_and_mean(share, log_odds, teacher_logits, less_t=True)
        through_softmax_(student_logits, share.mul_(teacher_logits).neg_())
        return value - math.log(self.skew)


@dataclass(frozen=True)
class SkewReverseKL(Objective):
    """KL(q || m), m = (1 - s) p + s q: reverse KL that stays finite where the teacher excludes a token.

    The gradient goes through the mixture too.
    """

    name = "srkl"
    formula = "KL(q || (1 - s) p + s q)"
    source = "DistiLLM, Ko et al. 2024, arXiv 2402.03898"
    on_classes = "bound"

    skew: float = field(default=0.1, metadata=help_text("s, share of the student in the mixture, in [0, 1)"))

    def __post_init__(self) -> None:
        _check_skew(self.name, self.skew)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return kl(student_logp, mixture(student_logp, teacher_logp.detach(), self.skew))

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        middle = mixture(student_logp, teacher_logp, self.skew)
        return kl_terms_of(*splits(student_logp, middle, label_or_top(teacher_logp, labels)))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        # d/dz = q (g - sum q g), g = log q/m - s q/m
        if self.skew == 0.0:
            return ReverseKL().value_and_grad_(student_logits, teacher_logits, labels)
        log_odds = log_odds_(log_ratio_of_(student_logits, teacher_logits), self.skew, 1.0 - self.skew)
        share = torch.sigmoid(log_odds)
        slope, mean = log_and_mean(share, log_odds, student_logits)
        slope.sub_(share)
        student_logits.mul_(slope.sub_(torch.linalg.vecdot(student_logits, slope).unsqueeze(-1)))
        return mean - math.log(self.skew)


@dataclass(frozen=True)
class TotalVariation(Objective):
    """1/2 sum |p - q|, the total variation distance; its subgradient is 0 where p = q."""

    name = "tvd"
    formula = "1/2 sum |p - q|"
    source = "f-distill, Wen et al. 2023, arXiv 2307.15190"
    on_classes = "bound"

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.5 * (teacher_logp.detach().exp() - student_logp.exp()).abs().sum(-1)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        return summands(self, student_logp, teacher_logp, labels)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        q, p = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
        difference = torch.sub(q, p, out=student_logits)
        value = 0.5 * torch.abs(difference, out=p).sum(-1)
        sign = difference.sign_()
        mean = torch.linalg.vecdot(q, sign).unsqueeze(-1)
        torch.mul(q, torch.add(-0.5 * mean, sign, alpha=0.5, out=p), out=student_logits)
        return value
