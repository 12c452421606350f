"""An objective as a target term and a tail term.

q = student, p = teacher, t = the target class, b = the pair (t, all the rest), q^ and p^ = the rest renormalised,
B = KL(b_q || b_p), K = KL(q^ || p^), D = logit q_t - logit p_t. The two terms add up to the objective:

| objective | target term | tail term |
|---|---|---|
| `rkl` | B | (1-q_t) K |
| `fkl` | KL(b_p ‖ b_q) | (1-p_t) KL(p^ ‖ q^) |
| `symmetric_kl` | w and 1-w times those of `fkl` and `rkl` | likewise |
| `akl` | as `symmetric_kl`, w its own weight, which gets no gradient | likewise |
| `srkl` | KL(b_q ‖ b_m) | (1-q_t) KL(q^ ‖ m^) |
| `sfkl` | KL(b_p ‖ b_m) | (1-p_t) KL(p^ ‖ m^) |
| `gjs` | beta KL(b_p ‖ b_m) + (1-beta) KL(b_q ‖ b_m) | the two tail terms, weighted likewise |
| `drkl`, `dkd`, `decoupled` | a F(b_q, b_p), as defined | w G(q^, p^), as defined; p = m where skewed |
| `tvd`, `ab`, `todi` | the target's summand | the sum over all other classes |
| `ce` | all of it, t = the label | 0 |

m is the objective's mixture of q and p, whole; b_m and m^ are its split. No term is ever negative. In the KLs and `gjs`
(not `akl`) the target term is the same divergence of the two pairs, and the tail term what merging the rest into one
class loses. `tvd`, `ab` and `todi` have no such chain rule (`tvd` is an f-divergence, but what merging loses there,
1/2 (sum_rest |p-q| - |p_t-q_t|), has the target in it again): they are split where they are sums, and the target's
summand is no divergence of the pairs. So `ab` at (0, 1) and (1, 0) has the values and gradients of `rkl` and `fkl`, but
not their two terms: its summands are q log q/p - q + p and p log p/q - p + q.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives import OBJECTIVES, Objective
from drkl.objectives.decoupled import target_class
from drkl.objectives.terms import Terms, label_or_top


def target_of(objective: Objective, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
    """The target class `[n]`: the objective's own; without one the label, without labels the teacher's top token."""
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
        teacher_logp: `[n, vocab]`, likewise; gets no gradient.
        labels: `[n]`, the observed next token's id; see `decompose`.

    Raises:
        DrklError: an objective that has no two terms.
    """
    own = getattr(objective, "terms", None)
    if own is None:
        known = ", ".join(name for name, cls in OBJECTIVES.items() if hasattr(cls, "terms"))
        raise DrklError(
            f"Objective {objective.name!r} does not say what its target term and its tail term are. Known: {known}, "
            "and whatever is decoupled; give one of your own a method terms(student_logp, teacher_logp, labels) that "
            "returns the two, each [n], which add up to its value."
        )
    return Terms(*own(student_logp, teacher_logp.detach(), labels))
