"""How far a toy student is from its teacher, context by context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.objectives.adaptive import head_mask
from drkl.objectives.closed_form import log_share
from drkl.objectives.logspace import argmax

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
    "tvd": "1/2 sum |p - q|; the next two add up to it",
    "head_error": "its part over the teacher's most probable tokens, up to a mass of 1/2",
    "tail_error": "its part over all others",
    "agreement": "share of contexts where the two top tokens are the same",
    "rival_q": "the student's highest probability of a token that is not the teacher's top one",
    "rival_p": "the teacher's probability of that token",
    "rival_rank": "its rank with the teacher: one more than the tokens that are more probable",
}
"""Each metric's name and meaning; in a row it is the mean over contexts."""


@dataclass(frozen=True)
class ToyTeacher:
    """A teacher and what every measurement needs of it, `[n, vocab]` each."""

    logits: Tensor
    logp: Tensor
    probs: Tensor
    head: Tensor
    """1 at the most probable tokens up to a mass of 1/2, the one that reaches it included, else 0."""

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor) -> ToyTeacher:
        logp = torch.log_softmax(logits, -1)
        return cls(logits, logp, logp.exp(), head_mask(logp, HEAD_MASS).to(logp.dtype))

    def rows(self, some: slice) -> ToyTeacher:
        return ToyTeacher(self.logits[some], self.logp[some], self.probs[some], self.head[some])


@torch.no_grad()
def measure(student_logits: Tensor, teacher: ToyTeacher) -> dict[str, Tensor]:
    """Every metric of `METRICS` at each context `[n]`, from finite logits `[n, vocab]`."""
    log_q, p = torch.log_softmax(student_logits, -1), teacher.probs
    q = log_q.exp()
    target = argmax(teacher.logp).unsqueeze(-1)
    q_t, p_t = q.gather(-1, target).squeeze(-1), p.gather(-1, target).squeeze(-1)
    log_q_p = log_q - teacher.logp
    log_q_m = log_share(log_q_p, 0.5, 0.5)
    forward, reverse = -torch.linalg.vecdot(p, log_q_p), torch.linalg.vecdot(q, log_q_p)
    gap = (p - q).abs_().mul_(0.5)
    tvd, in_head = gap.sum(-1), torch.linalg.vecdot(gap, teacher.head)
    top = argmax(log_q)
    rival = argmax(log_q.scatter(-1, target, -math.inf)).unsqueeze(-1)
    rival_p = p.gather(-1, rival)
    return {
        "q_t": q_t,
        "p_t": p_t,
        "target_error": (q_t - p_t).abs(),
        "entropy": -torch.linalg.vecdot(q, log_q),
        "max_q": q.amax(-1),
        "fkl": forward,
        "rkl": reverse,
        # log p/m = log q/m - log q/p
        "js": 0.5 * (torch.linalg.vecdot(q, log_q_m) + torch.linalg.vecdot(p, log_q_m) + forward),
        "tvd": tvd,
        "head_error": in_head,
        "tail_error": tvd - in_head,
        "agreement": (top == target.squeeze(-1)).to(p.dtype),
        "rival_q": q.gather(-1, rival).squeeze(-1),
        "rival_p": rival_p.squeeze(-1),
        "rival_rank": 1 + (p > rival_p).sum(-1).to(p.dtype),
    }
