"""Target term and tail term of objectives that have no target of their own.

The target class t of such an objective is the label where there are labels, else the teacher's top token.
`drkl.analysis.splits` has the table of all objectives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from drkl.objectives.base import Objective
from drkl.objectives.logspace import Split, argmax, kl, split, weighted


class Terms(NamedTuple):
    """An objective at each position `[n]` as a sum of two, in nats."""

    target: Tensor
    tail: Tensor


def label_or_top(teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
    """The labels `[n]`, or without any the teacher's top token."""
    return argmax(teacher_logp) if labels is None else labels


def splits(first_logp: Tensor, second_logp: Tensor, target: Tensor) -> tuple[Split, Split]:
    """Both distributions, split at the target."""
    return split(first_logp, target), split(second_logp, target)


def kl_terms_of(a: Split, b: Split) -> Terms:
    """KL(a || b) by the chain rule: KL of the pairs (target, rest), and (1 - a_t) KL of the tails."""
    on_tail, log_rest = kl(a.log_tail, b.log_tail), a.log_two[:, 1]
    # As in `kl`, a mass that underflows is not 0: what the other one excludes stays +inf.
    empty, infinite = log_rest == -math.inf, on_tail == math.inf
    inside = log_rest.exp() * on_tail.masked_fill(empty | infinite, 0.0)
    return Terms(kl(a.log_two, b.log_two), inside.masked_fill(infinite & ~empty, math.inf))


def mean_terms(weight: Tensor | float, first: Terms, second: Terms) -> Terms:
    """w first + (1 - w) second, term by term."""
    pairs = zip(first, second, strict=True)
    return Terms(*(weighted(weight, a) + weighted(1.0 - weight, b) for a, b in pairs))


def summands(objective: Objective, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Terms:
    """The terms of a sum over classes: the objective on the target alone, and on all classes but the target."""
    at_target = label_or_top(teacher_logp, labels).unsqueeze(-1)
    alone = objective(student_logp.gather(-1, at_target), teacher_logp.gather(-1, at_target))
    # A class that both exclude adds nothing, to the gradient either.
    without = (logp.scatter(-1, at_target, -math.inf) for logp in (student_logp, teacher_logp))
    return Terms(alone, objective(*without))
