"""Objectives over the whole vocabulary. q is the student, p the teacher; all values in nats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from drkl.objectives.base import check_number, help_text
from drkl.objectives.closed_form import (
    Moments,
    log_ratio_,
    log_share,
    observed_softmax_,
    softmax_,
    softmaxes_,
    through_softmax_,
    two_kls_,
)
from drkl.objectives.logspace import kl, mixture, weighted


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(y): plain fine-tuning on the observed token y; needs no teacher."""

    name: ClassVar[str] = "ce"
    formula: ClassVar[str] = "-log q(y)"
    source: ClassVar[str] = "maximum likelihood on the observed token"
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    has_closed_form: ClassVar[bool] = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return -student_logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        assert labels is not None
        observed = labels.unsqueeze(-1)
        at_label = student_logits.gather(-1, observed)
        if seen is None:
            log_norm = softmax_(student_logits)
        else:
            log_norm, seen.max_q, seen.student_entropy = observed_softmax_(student_logits)
        student_logits.scatter_add_(-1, observed, torch.full_like(at_label, -1.0))
        return (log_norm - at_label).squeeze(-1)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p || q), the true KL: the teacher's entropy is included, so it is 0 at p = q."""

    name: ClassVar[str] = "fkl"
    formula: ClassVar[str] = "KL(p || q)"
    source: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        return kl(teacher_logp.detach(), student_logp)

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        assert teacher_logits is not None
        difference = teacher_logits - student_logits
        log_norm_q, log_norm_p = softmaxes_(student_logits, teacher_logits, seen)
        shift = log_norm_q - log_norm_p
        value = torch.linalg.vecdot(teacher_logits, difference).unsqueeze(-1) + shift
        student_logits.sub_(teacher_logits)
        return value.squeeze(-1)


@dataclass(frozen=True)
class ReverseKL:
    """KL(q || p), the usual loss of LLM distillation; its factor 1 - q_t makes students overconfident."""

    name: ClassVar[str] = "rkl"
    formula: ClassVar[str] = "KL(q || p)"
    source: ClassVar[str] = "MiniLLM, Gu et al. 2024, arXiv 2306.08543"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        return kl(student_logp, teacher_logp.detach())

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        assert teacher_logits is not None
        difference = student_logits - teacher_logits
        log_norm_q, log_norm_p = softmaxes_(student_logits, teacher_logits, seen)
        shift = log_norm_p - log_norm_q
        value = torch.linalg.vecdot(student_logits, difference).unsqueeze(-1) + shift
        student_logits.mul_(difference.add_(shift - value))
        return value.squeeze(-1)


@dataclass(frozen=True)
class SymmetricKL:
    """w KL(p || q) + (1 - w) KL(q || p); Jeffreys' divergence at w = 1/2, up to a factor 2.

    Published code calls unequal weights such as 0.1 and 0.9 "symmetric" too; only w = 1/2 is.
    """

    name: ClassVar[str] = "symmetric_kl"
    formula: ClassVar[str] = "w KL(p || q) + (1 - w) KL(q || p)"
    source: ClassVar[str] = "Jeffreys 1946"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    forward_weight: float = field(default=0.5, metadata=help_text("w, the weight of KL(p || q), in [0, 1]"))

    def __post_init__(self) -> None:
        check_number(self.name, "forward_weight", self.forward_weight, "in [0, 1]", lambda w: 0 <= w <= 1)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        teacher_logp, w = teacher_logp.detach(), self.forward_weight
        return weighted(w, kl(teacher_logp, student_logp)) + weighted(1.0 - w, kl(student_logp, teacher_logp))

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        assert teacher_logits is not None
        log_ratio = log_ratio_(student_logits, teacher_logits, seen)
        return two_kls_(student_logits, teacher_logits, log_ratio, self.forward_weight)


@dataclass(frozen=True)
class GeneralizedJensenShannon:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; the Jensen-Shannon divergence at 1/2.

    It tends to 0, not to a KL, as beta goes to 0 or 1.
    """

    name: ClassVar[str] = "gjs"
    formula: ClassVar[str] = "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q"
    source: ClassVar[str] = "GKD, Agarwal et al. 2024, arXiv 2306.13649"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    beta: float = field(default=0.5, metadata=help_text("share of the teacher in the mixture, in (0, 1)"))

    def __post_init__(self) -> None:
        domain = "in (0, 1): at 0 and 1 it is 0 everywhere; what is meant there are 'fkl' and 'rkl'"
        check_number(self.name, "beta", self.beta, domain, lambda beta: 0 < beta < 1)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        teacher_logp = teacher_logp.detach()
        middle = mixture(teacher_logp, student_logp, self.beta)
        return self.beta * kl(teacher_logp, middle) + (1.0 - self.beta) * kl(student_logp, middle)

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        # d/dz = (1 - beta) q (log q/m - sum q log q/m)
        assert teacher_logits is not None
        log_ratio = log_ratio_(student_logits, teacher_logits, seen)
        log_q_m = log_share(log_ratio, 1.0 - self.beta, self.beta)
        on_student = torch.linalg.vecdot(student_logits, log_q_m).unsqueeze(-1)
        on_teacher = torch.linalg.vecdot(teacher_logits, log_ratio.neg_().add_(log_q_m)).unsqueeze(-1)
        student_logits.mul_(log_q_m.sub_(on_student)).mul_(1.0 - self.beta)
        return (self.beta * on_teacher + (1.0 - self.beta) * on_student).squeeze(-1)


def _check_skew(owner: str, skew: object) -> None:
    check_number(owner, "skew", skew, "in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class SkewForwardKL:
    """KL(p || m), m = s p + (1 - s) q: forward KL that stays finite where the student excludes a token."""

    name: ClassVar[str] = "sfkl"
    formula: ClassVar[str] = "KL(p || s p + (1 - s) q)"
    source: ClassVar[str] = "DistiLLM, Ko et al. 2024, arXiv 2402.03898"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    skew: float = field(default=0.1, metadata=help_text("s, share of the teacher in the mixture, in [0, 1)"))

    def __post_init__(self) -> None:
        _check_skew(self.name, self.skew)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        teacher_logp = teacher_logp.detach()
        return kl(teacher_logp, mixture(teacher_logp, student_logp, self.skew))

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        # h = d value / d log q = -(1 - s) p q/m
        assert teacher_logits is not None
        log_ratio = log_ratio_(student_logits, teacher_logits, seen)
        log_q_m = log_share(log_ratio, 1.0 - self.skew, self.skew)
        value = torch.linalg.vecdot(teacher_logits, log_ratio.neg_().add_(log_q_m))
        slope = log_q_m.exp_().mul_(teacher_logits).mul_(self.skew - 1.0)
        through_softmax_(student_logits, slope)
        return value


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(q || m), m = (1 - s) p + s q: reverse KL that stays finite where the teacher excludes a token.

    The gradient goes through the mixture too.
    """

    name: ClassVar[str] = "srkl"
    formula: ClassVar[str] = "KL(q || (1 - s) p + s q)"
    source: ClassVar[str] = "DistiLLM, Ko et al. 2024, arXiv 2402.03898"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    skew: float = field(default=0.1, metadata=help_text("s, share of the student in the mixture, in [0, 1)"))

    def __post_init__(self) -> None:
        _check_skew(self.name, self.skew)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        return kl(student_logp, mixture(student_logp, teacher_logp.detach(), self.skew))

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        # d/dz = q (g - sum q g), g = log q/m - s q/m
        assert teacher_logits is not None
        log_q_m = log_share(log_ratio_(student_logits, teacher_logits, seen), self.skew, 1.0 - self.skew)
        value = torch.linalg.vecdot(student_logits, log_q_m)
        slope = log_q_m if self.skew == 0.0 else log_q_m.sub_(log_q_m.exp(), alpha=self.skew)
        student_logits.mul_(slope.sub_(torch.linalg.vecdot(student_logits, slope).unsqueeze(-1)))
        return value


@dataclass(frozen=True)
class TotalVariation:
    """1/2 sum |p - q|, the total variation distance; its subgradient is 0 where p = q."""

    name: ClassVar[str] = "tvd"
    formula: ClassVar[str] = "1/2 sum |p - q|"
    source: ClassVar[str] = "f-distill, Wen et al. 2023, arXiv 2307.15190"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        return 0.5 * (teacher_logp.detach().exp() - student_logp.exp()).abs().sum(-1)

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        assert teacher_logits is not None
        softmaxes_(student_logits, teacher_logits, seen)
        difference = torch.sub(student_logits, teacher_logits, out=teacher_logits)
        value = 0.5 * difference.abs().sum(-1)
        sign = difference.sign_().mul_(0.5)
        student_logits.mul_(sign.sub_(torch.linalg.vecdot(student_logits, sign).unsqueeze(-1)))
        return value
