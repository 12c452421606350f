"""Objectives over the whole vocabulary. q is the student, p the teacher; all values in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drkl.objectives.logspace import kl, mixture


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

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor:
        assert labels is not None
        observed = labels.unsqueeze(-1)
        at_label = student_logits.gather(-1, observed)
        log_norm = softmax_(student_logits)
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

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher_logits is not None
        difference = teacher_logits - student_logits
        shift = softmax_(student_logits) - softmax_(teacher_logits)
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

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher_logits is not None
        difference = student_logits - teacher_logits
        shift = softmax_(teacher_logits) - softmax_(student_logits)
        value = torch.linalg.vecdot(student_logits, difference).unsqueeze(-1) + shift
        student_logits.mul_(difference.add_(shift - value))
        return value.squeeze(-1)


@dataclass(frozen=True)
class JensenShannon:
    """1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2. A part for the tail of a decoupled objective."""

    name: ClassVar[str] = "gjs"
    formula: ClassVar[str] = "1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q)/2"
    source: ClassVar[str] = "GKD, Agarwal et al. 2024, arXiv 2306.13649"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    has_closed_form: ClassVar[bool] = False

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        assert teacher_logp is not None
        teacher_logp = teacher_logp.detach()
        middle = mixture(student_logp, teacher_logp, 0.5)
        return 0.5 * (kl(teacher_logp, middle) + kl(student_logp, middle))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None) -> Tensor:
        raise NotImplementedError("has_closed_form is False")


def softmax_(logits: Tensor) -> Tensor:
    """Overwrite finite ``logits`` `[n, k]` with their softmax; return the log-sum-exp `[n, 1]`."""
    highest = logits.amax(-1, keepdim=True)
    logits.sub_(highest).exp_()
    total = logits.sum(-1, keepdim=True)
    logits.div_(total)
    return highest + total.log()
