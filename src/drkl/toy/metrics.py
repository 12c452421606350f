"""The distance of a toy student to its teacher, context by context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.objectives.adaptive import head_mask
from drkl.objectives.logspace import argmax
from drkl.positions import Distribution, agreement, at, both_kls, distribution, entropy, jensen_shannon, total_variation

HEAD_MASS = 0.5
METRICS = {
    "q_t": "the student's probability of the teacher's top token",
    "p_t": "the teacher's own probability of it",
    "target_error": "|q_t - p_t|",
    "entropy": "the student's entropy, nats",
    "max_q": "the student's highest probability",
    "fkl": "KL(p || q), nats",
    "rkl": "KL(q || p), nats",
    "js": "the Jensen-Shannon divergence, nats",
    "tvd": "1/2 sum |p - q|, the sum of the next two",
    "head_error": "the part of tvd over the teacher's most probable tokens, up to a mass of 1/2",
    "tail_error": "the part of tvd over all other tokens",
    "agreement": "share of contexts in which the two top tokens are the same",
    "rival_q": "the student's highest probability of a token other than the teacher's top token",
    "rival_p": "the teacher's probability of that token",
    "rival_rank": "the teacher's rank of that token: 1 + the number of more probable tokens",
}
"""Each metric's name and meaning; a row of results has its mean over contexts."""


@dataclass(frozen=True)
class ToyTeacher:
    """A teacher at `[n]` contexts, with what every measurement needs."""

    logits: Tensor
    """`[n, vocab]`."""
    model: Distribution
    head: Tensor
    """`[n, vocab]`, 1 at the most probable tokens up to a mass of 1/2 (including the one that reaches it), else 0."""

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor) -> ToyTeacher:
        """The teacher with these logits `[n, vocab]`."""
        model = distribution(logits)
        return cls(logits, model, head_mask(model.logp, HEAD_MASS).to(model.logp.dtype))

    def rows(self, rows: slice) -> ToyTeacher:
        """The teacher at some of its contexts."""
        return ToyTeacher(self.logits[rows], Distribution(*(values[rows] for values in self.model)), self.head[rows])


@torch.no_grad()
def measure(student_logits: Tensor, teacher: ToyTeacher) -> dict[str, Tensor]:
    """Every metric of `METRICS` at each context `[n]`, from finite logits `[n, vocab]`."""
    student, target = distribution(student_logits), teacher.model.top
    q, p = student.probs, teacher.model.probs
    q_t, p_t = at(q, target), at(p, target)
    rkl, fkl = both_kls(student, teacher.model)
    tvd = total_variation(student, teacher.model)
    head_error = 0.5 * torch.linalg.vecdot((p - q).abs_(), teacher.head)
    rival = argmax(student.logp.scatter(-1, target.unsqueeze(-1), -math.inf))
    rival_p = at(p, rival)
    return {
        "q_t": q_t,
        "p_t": p_t,
        "target_error": (q_t - p_t).abs(),
        "entropy": entropy(student),
        "max_q": at(q, student.top),
        "fkl": fkl,
        "rkl": rkl,
        "js": jensen_shannon(student, teacher.model),
        "tvd": tvd,
        "head_error": head_error,
        "tail_error": tvd - head_error,
        "agreement": agreement(student, teacher.model),
        "rival_q": at(q, rival),
        "rival_p": rival_p,
        "rival_rank": 1 + (p > rival_p.unsqueeze(-1)).sum(-1).to(p.dtype),
    }
