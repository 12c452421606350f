"""The gradients of an objective's target term and of its tail term (`drkl.analysis.splits`) on the student's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drkl.analysis.splits import target_of, terms
from drkl.errors import DrklError
from drkl.losses.common import check_vocabularies, log_softmax, make_settings, valid_positions
from drkl.objectives import (
    AdaptiveKL,
    CrossEntropy,
    Decoupled,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
    ForwardKL,
    Objective,
    ReverseKL,
    SymmetricKL,
)
from drkl.objectives.decoupled import tail_weight
from drkl.objectives.logspace import Split, kl, split


class Decomposition(NamedTuple):
    """Detached, fp32 or wider; gradients are d / d student_logits, before the temperature.

    A negative push means that gradient descent raises the target's logit. q, p, B, K, D are after the temperature.
    """

    target_grad: Tensor
    """`[n, vocab]`, of the target term."""
    tail_grad: Tensor
    """`[n, vocab]`, of the tail term; the two add up to the gradient of the objective."""
    target_push: Tensor
    """`[n]`, ``target_grad`` at the target."""
    tail_push: Tensor
    """`[n]`, ``tail_grad`` at the target."""
    q_t: Tensor
    """`[n]`, the student's probability of the target."""
    p_t: Tensor
    """`[n]`, the teacher's."""
    B: Tensor
    """`[n]`, KL(b_q || b_p) in nats, b = (target, rest); whatever the objective."""
    K: Tensor
    """`[n]`, KL(q^ || p^) in nats on the renormalised rest; whatever the objective. 0 where the student has no rest."""
    D: Tensor
    """`[n]`, logit q_t - logit p_t in nats; 0 where both are infinite."""


def decompose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    objective: str | Objective = "rkl",
    temperature: float = 1.0,
) -> Decomposition:
    """Split an objective's gradient on the student's logits into that of its target term and that of its tail term.

    By autograd, on the terms that the table of `drkl.analysis.splits` names. At T = 1 and q_t = p_t the tail pushes the
    target with -q_t (1-q_t) K under `rkl`, and with 0 under `drkl` without skew.

    Args:
        student_logits: `[n, vocab]`, any float dtype; the maths runs in fp32 or wider. Nothing flows back into it.
        teacher_logits: `[n, vocab]`, for the same positions.
        labels: `[n]`, ids in [0, vocab). An objective whose target is the label, and `ce`, need them. For one without a
            target of its own (`rkl`, `fkl`, ...) they choose it: t is the label; without them the teacher's top token.
            One with ``target="teacher"`` ignores them.
        objective: a name in `drkl.OBJECTIVES`, or an objective; one of your own needs a method ``terms`` with the
            arguments of ``__call__`` and a pair `[n]`, `[n]` as result.
        temperature: T > 0, divides both models' logits: a factor 1/T on every gradient.

    Raises:
        DrklError: shapes or vocabularies that differ, labels missing or out of range, an unknown objective or one that
            has no two terms, a temperature that is not above 0.

    >>> student = torch.tensor([[1.0, 0.5, -1.5]])
    >>> teacher = torch.tensor([[1.0, -1.5, 0.5]])  # the same probability of class 0, the others exchanged
    >>> found = decompose(student, teacher, objective="rkl")
    >>> bool(torch.isclose(found.tail_push, -found.q_t * (1 - found.q_t) * found.K))
    True
    >>> round(abs(float(decompose(student, teacher, objective="drkl").tail_push)), 6)
    0.0

    Source: the decomposition of DRKL, arXiv 2604.00223; DKD's, arXiv 2203.08679.
    """
    made, labels = _checked(student_logits, teacher_logits, labels, objective, temperature)
    # Autograd refuses tensors of an outer inference mode, copies made outside of it are plain ones.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _wide(student_logits).requires_grad_()
        student_logp = log_softmax(leaf, temperature)
        teacher_logp = log_softmax(_wide(teacher_logits), temperature)
        labels = None if labels is None else labels.long().clone()
        both = terms(made, student_logp, teacher_logp, labels)
        target_grad, tail_grad = (_gradient(term, leaf) for term in both)
        target = target_of(made, teacher_logp, labels)
        at_target = target.unsqueeze(-1)
        student, teacher = split(student_logp.detach(), target), split(teacher_logp, target)
        return Decomposition(
            target_grad,
            tail_grad,
            target_grad.gather(-1, at_target).squeeze(-1),
            tail_grad.gather(-1, at_target).squeeze(-1),
            student.log_two[:, 0].exp(),
            teacher.log_two[:, 0].exp(),
            kl(student.log_two, teacher.log_two),
            kl(student.log_tail, teacher.log_tail),
            log_odds_gap(student, teacher),
        )


def _checked(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    objective: str | Objective,
    temperature: float,
) -> tuple[Objective, Tensor | None]:
    """The objective, and the labels; raises DrklError."""
    settings = make_settings(objective, temperature, kd_weight=1.0, t2_scaling=False, reduction="none")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise DrklError(f"{name} is {kind}; expected a tensor of floats [n, vocab].")
        if logits.dim() != 2:
            raise DrklError(
                f"{name} has shape {list(logits.shape)}; expected [n, vocab], one row per position that counts "
                "(logits[token_mask] makes them)."
            )
    check_vocabularies(student_logits.shape[1], teacher_logits.shape[1])
    if student_logits.shape != teacher_logits.shape:
        raise DrklError(
            f"teacher_logits has shape {list(teacher_logits.shape)} and student_logits {list(student_logits.shape)}; "
            "expected the same positions."
        )
    shape, vocab_size = student_logits.shape[:1], student_logits.shape[1]
    keep = valid_positions(shape, labels, None, None, settings, vocab_size)
    if keep is not None and not bool(keep.all()):
        raise DrklError(
            f"labels has {int((~keep).sum())} positions that do not count (-100), which have no gradient to split; "
            "pass the rows that count only."
        )
    return settings.objective, labels


def _wide(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(torch.float32, logits.dtype), copy=True)


def _gradient(term: Tensor, leaf: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True)
    return grad


def log_odds_gap(student: Split, teacher: Split) -> Tensor:
    """D = logit q_t - logit p_t `[n]`, in nats; 0 where both are infinite."""
    same = student.log_odds == teacher.log_odds
    return (student.log_odds.masked_fill(same, 0.0) - teacher.log_odds.masked_fill(same, 0.0)).masked_fill(same, 0.0)


@dataclass(frozen=True)
class _Pieces:
    """What the closed forms are made of; `[n, 1]`, or `[n, vocab]` with 0 at the target."""

    student: Split
    teacher: Split
    at_target: Tensor
    tail_q: Tensor
    tail_p: Tensor
    log_ratio: Tensor
    """log q^/p^."""
    q_t: Tensor
    rest_q: Tensor
    """1 - q_t."""
    rest_p: Tensor
    K: Tensor
    D: Tensor

    @classmethod
    def of(cls, logq: Tensor, logp: Tensor, target: Tensor) -> _Pieces:
        student, teacher = split(logq, target), split(logp, target)
        nobody = (student.log_tail == -math.inf) & (teacher.log_tail == -math.inf)
        log_ratio = student.log_tail.masked_fill(nobody, 0.0) - teacher.log_tail.masked_fill(nobody, 0.0)
        pair_q, pair_p = student.log_two.exp(), teacher.log_two.exp()
        return cls(
            student,
            teacher,
            target.unsqueeze(-1),
            student.log_tail.exp(),
            teacher.log_tail.exp(),
            log_ratio,
            pair_q[:, :1],
            pair_q[:, 1:],
            pair_p[:, 1:],
            kl(student.log_tail, teacher.log_tail).unsqueeze(-1),
            log_odds_gap(student, teacher).unsqueeze(-1),
        )

    def through_pair(self, push: Tensor) -> Tensor:
        """The gradient of a function of q_t alone, from its entry at the target: d logit(q_t) / dz_j = -q^_j."""
        return (-push * self.tail_q).scatter(-1, self.at_target, push)

    def reverse_target(self) -> Tensor:
        return self.through_pair(self.q_t * self.rest_q * self.D)

    def forward_target(self) -> Tensor:
        # q_t - p_t, from whichever side is small.
        p_t = self.teacher.log_two[:, :1].exp()
        return self.through_pair(torch.where(self.q_t > 0.5, self.rest_p - self.rest_q, self.q_t - p_t))

    def reverse_tail(self) -> Tensor:
        """Of K."""
        return self.tail_q * (self.log_ratio - self.K)

    def forward_tail(self) -> Tensor:
        """Of KL(p^ || q^)."""
        return self.tail_q - self.tail_p

    def weighted_reverse_tail(self) -> Tensor:
        """Of (1 - q_t) K, the weight's gradient included."""
        elsewhere = self.rest_q * self.tail_q * (self.log_ratio - self.rest_q * self.K)
        return elsewhere.scatter(-1, self.at_target, -self.q_t * self.rest_q * self.K)


@torch.no_grad()
def closed_form(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    objective: str | Objective = "rkl",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The two gradients of `decompose`, from equations instead of autograd; finite logits.

    At T = 1, with d_j = log q^_j/p^_j and j other than t, each is (entry at t; entry at j):

        B                   q_t (1-q_t) D;    -q_t q_j D
        (1-q_t) K           -q_t (1-q_t) K;   q_j (d_j - (1-q_t) K)
        w K                 0;                w q^_j (d_j - K)
        KL(b_p || b_q)      q_t - p_t;        -q^_j (q_t - p_t)
        w KL(p^ || q^)      0;                w (q^_j - p^_j)
        -log q_t            q_t - 1;          q_j

    Args:
        student_logits, teacher_logits, labels, temperature: as in `decompose`.
        objective: `rkl`, `fkl`, `symmetric_kl`, `akl`, `dkd`, `ce`, `drkl` without skew and with the tail ``rkl`` or
            ``fkl``, or a `drkl.decoupled` of ``rkl`` and ``fkl``.

    Returns:
        ``target_grad`` and ``tail_grad``, `[n, vocab]`, fp32 or wider.

    Raises:
        DrklError: as `decompose`, and for an objective that is not listed.
    """
    made, labels = _checked(student_logits, teacher_logits, labels, objective, temperature)
    logq, logp = (log_softmax(_wide(logits), temperature) for logits in (student_logits, teacher_logits))
    labels = None if labels is None else labels.long()
    pieces = _Pieces.of(logq, logp, target_of(made, logp, labels))
    target_grad, tail_grad = _equations(made, pieces, logq, logp)
    return target_grad / temperature, tail_grad / temperature


def has_closed_form(objective: Objective) -> bool:
    """Whether `closed_form` has equations for it."""
    return isinstance(objective, (CrossEntropy, ReverseKL, ForwardKL, SymmetricKL, AdaptiveKL)) or _both_kl(objective)


def _both_kl(objective: Objective) -> bool:
    """Whether it is decoupled, without skew, into reverse or forward KL on either side."""
    if isinstance(objective, (DecoupledReverseKL, DecoupledKnowledgeDistillation)):
        return getattr(objective, "skew", 0.0) == 0.0 and _both_kl(objective._operator)
    known = (ReverseKL, ForwardKL)
    return isinstance(objective, Decoupled) and type(objective.on_target) in known and type(objective.on_tail) in known


def _equations(objective: Objective, at: _Pieces, logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(objective, CrossEntropy):
        return at.through_pair(-at.rest_q), torch.zeros_like(logq)
    if isinstance(objective, ReverseKL):
        return at.reverse_target(), at.weighted_reverse_tail()
    if isinstance(objective, ForwardKL):
        return at.forward_target(), at.rest_p * at.forward_tail()
    if isinstance(objective, (SymmetricKL, AdaptiveKL)):
        if isinstance(objective, SymmetricKL):
            w: Any = objective.forward_weight
        else:
            w = objective.forward_share(logq, logp).unsqueeze(-1)
        on_target = w * at.forward_target() + (1.0 - w) * at.reverse_target()
        return on_target, w * at.rest_p * at.forward_tail() + (1.0 - w) * at.weighted_reverse_tail()
    operator = objective
    if isinstance(objective, (DecoupledReverseKL, DecoupledKnowledgeDistillation)):
        operator = objective._operator
    if isinstance(operator, Decoupled) and getattr(objective, "skew", 0.0) == 0.0:
        targets = {ReverseKL: at.reverse_target, ForwardKL: at.forward_target}
        tails = {ReverseKL: at.reverse_tail, ForwardKL: at.forward_tail}
        on_target, on_tail = targets.get(type(operator.on_target)), tails.get(type(operator.on_tail))
        if on_target is not None and on_tail is not None:
            weight = tail_weight(operator.weight, operator.gamma, at.student.log_odds, at.teacher.log_odds)
            return operator.target_weight * on_target(), weight.unsqueeze(-1) * on_tail()
    raise DrklError(
        f"There are no equations here for the two gradients of {objective!r}; decompose() differentiates its terms."
    )
