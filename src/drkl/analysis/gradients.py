"""The gradients of an objective's target term and of its tail term (`drkl.analysis.splits`) on the student's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drkl.analysis.splits import target_of, terms
from drkl.errors import DrklError
from drkl.losses.common import check_vocabularies, log_softmax, make_settings, valid_positions
from drkl.objectives import Objective
from drkl.objectives.logspace import split
from drkl.positions import at, target_statistics


class Decomposition(NamedTuple):
    """The two gradients of an objective, and the two distributions seen from its target; detached, fp32 or wider.

    Gradients are with respect to ``student_logits``, before the temperature divides them. A negative push means that
    gradient descent raises the target's logit. q_t, p_t, B, K, D are at the temperature and do not depend on the
    objective beyond its target.
    """

    target_grad: Tensor
    """`[n, vocab]`, the gradient of the target term."""
    tail_grad: Tensor
    """`[n, vocab]`, the gradient of the tail term; the two add up to the gradient of the objective."""
    target_push: Tensor
    """`[n]`, ``target_grad`` at the target."""
    tail_push: Tensor
    """`[n]`, ``tail_grad`` at the target."""
    q_t: Tensor
    """`[n]`, the student's probability of the target."""
    p_t: Tensor
    """`[n]`, the teacher's probability of the target."""
    B: Tensor
    """`[n]`, KL(b_q || b_p) in nats, b = (target, rest)."""
    K: Tensor
    """`[n]`, KL(q^ || p^) in nats on the renormalised rest; 0 where the student has no rest."""
    D: Tensor
    """`[n]`, logit q_t - logit p_t in nats; 0 where both are infinite."""


def decompose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    objective: str | Objective = "rkl",
    temperature: float = 1.0,
) -> Decomposition:
    """Split an objective's gradient on the student's logits into the gradients of its target term and its tail term.

    Autograd differentiates the two terms in the table of `drkl.analysis.splits`. At T = 1 and q_t = p_t the tail pushes
    the target with -q_t (1-q_t) K under `rkl`, and with 0 under `drkl` without skew.

    Args:
        student_logits: `[n, vocab]`, any float dtype; computed in fp32 or wider. No gradient flows back into them.
        teacher_logits: `[n, vocab]`, for the same positions.
        labels: `[n]`, ids in [0, vocab). Required by `ce` and by an objective whose target is the label. For an
            objective without a target of its own (`rkl`, `fkl`, ...) the target is the label, or without labels the
            teacher's top token. An objective with ``target="teacher"`` ignores them.
        objective: a name in `drkl.OBJECTIVES`, or an objective. An objective of your own needs a method ``terms`` that
            takes the arguments of ``__call__`` and returns the two terms, each `[n]`.
        temperature: T > 0, divides both models' logits: a factor 1/T on every gradient.

    Raises:
        DrklError: shapes or vocabularies differ, labels are missing or out of range, the objective is unknown or has no
            two terms, or the temperature is not above 0.

    >>> student = torch.tensor([[1.0, 0.5, -1.5]])
    >>> teacher = torch.tensor([[1.0, -1.5, 0.5]])  # the same probability of class 0, the others exchanged
    >>> result = decompose(student, teacher, objective="rkl")
    >>> bool(torch.isclose(result.tail_push, -result.q_t * (1 - result.q_t) * result.K))
    True
    >>> round(abs(float(decompose(student, teacher, objective="drkl").tail_push)), 6)
    0.0

    Source: the decomposition of DRKL, arXiv 2604.00223; DKD's, arXiv 2203.08679.
    """
    resolved = _check(student_logits, teacher_logits, labels, objective, temperature)
    # Autograd refuses the tensors of an outer inference mode, but not copies that are made outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _wide(student_logits).requires_grad_()
        student_logp = log_softmax(leaf, temperature)
        teacher_logp = log_softmax(_wide(teacher_logits), temperature)
        labels = None if labels is None else labels.long().clone()
        both = terms(resolved, student_logp, teacher_logp, labels)
        target_grad, tail_grad = (_gradient(term, leaf) for term in both)
        target = target_of(resolved, teacher_logp, labels)
        at_target = target_statistics(split(student_logp.detach(), target), split(teacher_logp, target), target)
        return Decomposition(
            target_grad,
            tail_grad,
            target_push=at(target_grad, target),
            tail_push=at(tail_grad, target),
            q_t=at_target.q_t,
            p_t=at_target.p_t,
            B=at_target.B,
            K=at_target.K,
            D=at_target.D,
        )


def _check(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, objective: str | Objective,
    temperature: float,
) -> Objective:  # fmt: skip
    """Return the objective, or raise DrklError."""
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
    if keep is not None:
        raise DrklError(
            f"labels has {shape[0] - len(keep)} positions that do not count (-100), which have no gradient to split; "
            "pass the rows that count only."
        )
    return settings.objective


def _wide(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.promote_types(torch.float32, logits.dtype), copy=True)


def _gradient(term: Tensor, leaf: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True)
    return grad
