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

from jaxtyping import Float, Int
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives import OBJECTIVES, Objective
from drkl.objectives.decoupled import target_class
from drkl.objectives.terms import Terms, label_or_top


def target_of(objective: Objective, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
    """The target class `[n]`: the objective's own, else the label, else (without labels) the teacher's top token."""
    own = getattr(objective, "target", None)
    if own is not None:
        return target_class(own, teacher_logp, labels)
    return label_or_top(teacher_logp, labels)


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
    if own is None:
        known = ", ".join(name for name, cls in OBJECTIVES.items() if hasattr(cls, "terms"))
        raise DrklError(
            f"Objective {objective.name!r} does not say what its target term and its tail term are. Known: {known}, "
            "and every decoupled objective. Give an objective of your own a method terms(student_logp, teacher_logp, "
            "labels) that returns the two terms, each [n], which add up to its value."
        )
    return Terms(*own(student_logp, teacher_logp.detach(), labels))
