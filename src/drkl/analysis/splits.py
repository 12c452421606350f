"""An objective as a target term and a tail term.

q = student, p = teacher, t = the target class, b = the pair (t, all the rest), q^ and p^ = the rest renormalised,
B = KL(b_q || b_p), K = KL(q^ || p^), D = logit q_t - logit p_t. The two terms add up to the objective:

| objective | target term | tail term |
|---|---|---|
| `rkl` | B | (1-q_t) K |
| `fkl` | KL(b_p ‖ b_q) | (1-p_t) KL(p^ ‖ q^) |
| `symmetric_kl` | w times the term of `fkl` plus 1-w times the term of `rkl` | likewise |
| `akl` | as `symmetric_kl`, with its own weight w, which gets no gradient | likewise |
| `srkl` | KL(b_q ‖ b_m) | (1-q_t) KL(q^ ‖ m^) |
| `sfkl` | KL(b_p ‖ b_m) | (1-p_t) KL(p^ ‖ m^) |
| `gjs` | beta KL(b_p ‖ b_m) + (1-beta) KL(b_q ‖ b_m) | the two tail terms, weighted likewise |
| `drkl`, `dkd`, `decoupled` | a F(b_q, b_p), as defined | w G(q^, p^), as defined; p = m where skewed |
| `tvd`, `ab`, `todi` | the target's summand | the sum over all other classes |
| `ce` | all of it, t = the label | 0 |

m is the objective's mixture of q and p; b_m and m^ are the split of m. No term is ever negative. In the KLs and `gjs`
(not `akl`) the target term is the same divergence of the two pairs, and the tail term is what is lost when the rest is
merged into one class. `tvd`, `ab` and `todi` have no such chain rule (`tvd` is an f-divergence, but its loss by
merging, 1/2 (sum_rest |p-q| - |p_t-q_t|), contains the target again). They are sums over classes and are split as such,
so their target term is no divergence of the pairs: `ab` at (0, 1) and (1, 0) has the values and gradients of `rkl` and
`fkl`, but not their two terms, since its summands are q log q/p - q + p and p log p/q - p + q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives import (
    AdaptiveKL,
    AlphaBeta,
    CrossEntropy,
    ForwardKL,
    GeneralizedJensenShannon,
    Objective,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TokenWiseKL,
    TotalVariation,
)
from drkl.objectives.decoupled import Terms, target_class
from drkl.objectives.logspace import Split, argmax, kl, mixture, split, weighted


def target_of(objective: Objective, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
    """The target class `[n]`: the objective's own, else the label, else (without labels) the teacher's top token."""
    own = getattr(objective, "target", None)
    if own is not None:
        return target_class(own, teacher_logp, labels)
    return argmax(teacher_logp) if labels is None else labels


def terms(
    objective: Objective,
    student_logp: Float[Tensor, "n vocab"],
    teacher_logp: Float[Tensor, "n vocab"],
    labels: Int[Tensor, "n"] | None = None,
) -> Terms:
    """The objective's target term and tail term `[n]`, in nats; they add up to ``objective(...)``, differentiably.

    Args:
        objective: an objective of this library, or one with a method ``terms``.
        student_logp: `[n, vocab]`, log-probabilities in fp32 or wider.
        teacher_logp: `[n, vocab]`, log-probabilities in fp32 or wider; they get no gradient.
        labels: `[n]`, the observed next token's id; see `decompose`.

    Raises:
        DrklError: the objective has no two terms.
    """
    own = getattr(objective, "terms", None)
    if own is not None:
        return Terms(*own(student_logp, teacher_logp, labels))
    if type(objective) not in SPLITS:
        known = ", ".join(cls.name for cls in SPLITS)
        raise DrklError(
            f"Objective {objective.name!r} does not say what its target term and its tail term are. Known: {known}, "
            "and every decoupled objective. Give an objective of your own a method terms(student_logp, teacher_logp, "
            "labels) that returns the two terms, each [n], which add up to its value."
        )
    target = target_of(objective, teacher_logp, labels)
    return SPLITS[type(objective)](objective, student_logp, teacher_logp.detach(), target)


def _chained(a: Split, b: Split) -> Terms:
    """KL(a || b) by the chain rule: KL of the pairs, and (1 - a_t) KL of the tails."""
    on_tail, log_rest = kl(a.log_tail, b.log_tail), a.log_two[:, 1]
    # As in `kl`, a mass that underflows is not 0: where b excludes a class, the term stays +inf.
    empty, infinite = log_rest == -math.inf, on_tail == math.inf
    inside = log_rest.exp() * on_tail.masked_fill(empty | infinite, 0.0)
    return Terms(kl(a.log_two, b.log_two), inside.masked_fill(infinite & ~empty, math.inf))


def _sum(first_weight: Tensor | float, first: Terms, second: Terms) -> Terms:
    """w first + (1 - w) second, term by term."""
    pairs = zip(first, second, strict=True)
    return Terms(*(weighted(first_weight, a) + weighted(1.0 - first_weight, b) for a, b in pairs))


def _forward_kl(objective: Any, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    return _chained(split(logp, target), split(logq, target))


def _reverse_kl(objective: Any, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    return _chained(split(logq, target), split(logp, target))


def _symmetric_kl(objective: SymmetricKL, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    student, teacher = split(logq, target), split(logp, target)
    return _sum(objective.forward_weight, _chained(teacher, student), _chained(student, teacher))


def _adaptive_kl(objective: AdaptiveKL, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    student, teacher = split(logq, target), split(logp, target)
    return _sum(objective.forward_share(logq, logp), _chained(teacher, student), _chained(student, teacher))


def _skew_forward_kl(objective: SkewForwardKL, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    return _chained(split(logp, target), split(mixture(logp, logq, objective.skew), target))


def _skew_reverse_kl(objective: SkewReverseKL, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    return _chained(split(logq, target), split(mixture(logq, logp, objective.skew), target))


def _jensen_shannon(objective: GeneralizedJensenShannon, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    middle = split(mixture(logp, logq, objective.beta), target)
    return _sum(objective.beta, _chained(split(logp, target), middle), _chained(split(logq, target), middle))


def _summands(objective: Objective, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    """For an objective that is a sum over classes: its value on the target alone, and without the target."""
    at_target = target.unsqueeze(-1)
    alone = objective(logq.gather(-1, at_target), logp.gather(-1, at_target))
    # A class that both exclude adds nothing to the value or to the gradient.
    others = objective(logq.scatter(-1, at_target, -math.inf), logp.scatter(-1, at_target, -math.inf))
    return Terms(alone, others)


def _cross_entropy(objective: CrossEntropy, logq: Tensor, logp: Tensor, target: Tensor) -> Terms:
    value = objective(logq, None, target)
    return Terms(value, torch.zeros_like(value.detach()))


SPLITS: dict[type[Objective], Callable[[Any, Tensor, Tensor, Tensor], Terms]] = {
    CrossEntropy: _cross_entropy,
    ForwardKL: _forward_kl,
    ReverseKL: _reverse_kl,
    SymmetricKL: _symmetric_kl,
    GeneralizedJensenShannon: _jensen_shannon,
    SkewForwardKL: _skew_forward_kl,
    SkewReverseKL: _skew_reverse_kl,
    TotalVariation: _summands,
    AdaptiveKL: _adaptive_kl,
    AlphaBeta: _summands,
    TokenWiseKL: _summands,
}
"""By class, the two terms of the objectives that are not defined as two terms, from (objective, log q, log p, t)."""
