"""The alpha-beta divergence: one family that holds both KLs, the Hellinger and the Euclidean distance.

With s = alpha + beta, P = p^s, Q = q^s, M = p^alpha q^beta, each class adds

    [(P - M) / beta - (M - Q) / alpha] / s

which is the published form with its terms regrouped, so that neither 1/alpha nor 1/beta stands alone: as alpha goes to
0, (M - Q) / alpha goes to Q log(p/q), as beta goes to 0, (P - M) / beta to P log(p/q), and these are the published
limits. Only s = 0 needs a case of its own. The slope is d / d log q = -(M - Q) / alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives.base import Objective, OnClasses, check_number, help_text
from drkl.objectives.closed_form import through_softmax_
from drkl.objectives.terms import Terms, summands

SMALL_SUM = 0.2
"""Below this s the two differences nearly cancel in the sum: small s |log p/q| take a series instead."""
SMALL_EXPONENT = 0.1
"""From this on the difference of two neighbours in P, M, Q loses less than log p and log q have lost already."""
SERIES_REACH, TERMS = 0.5, range(14)


@dataclass(frozen=True)
class AlphaBeta(Objective):
    """-1/(ab) sum p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b), and its limits; a = alpha, b = beta.

    (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) is 2 sum (sqrt p - sqrt q)^2, (1, 1) is 1/2 sum (p - q)^2 and
    (0, 0) is 1/2 sum (log p - log q)^2. With beta = -alpha, (p/q)^alpha leaves the range of the number format where
    the two differ by hundreds of nats; so does nothing else.
    """

    name = "ab"
    formula = "-1/(ab) sum p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b), with its limits"
    source = "ABKD, Wang et al. 2025, arXiv 2505.04560; Cichocki et al. 2011"
    why_not_on_classes = "where alpha + beta is 0, every token counts alike, however little mass it has."

    alpha: float = field(default=0.2, metadata=help_text("a, at least 0 (or -beta): larger, more forward"))
    beta: float = field(default=0.7, metadata=help_text("b, at least 0 (or -alpha): larger, more reverse"))

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            check_number(self.name, name, getattr(self, name), "at least 0, or the negative of the other")
        if min(self.alpha, self.beta) < 0 and self.alpha != -self.beta:
            raise DrklError(
                f"ab.alpha is {self.alpha} and ab.beta is {self.beta}; expected both at least 0, or alpha = -beta."
            )

    @property
    def on_classes(self) -> OnClasses | None:
        return "approximation" if self.alpha + self.beta > 0 else None

    @property
    def has_closed_form(self) -> bool:
        # At s = 0 a class counts even where it has no mass, which the tail of a decoupled objective cannot express.
        return self.alpha + self.beta > 0

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        teacher_logp = teacher_logp.detach()
        no_student, no_teacher = student_logp == -math.inf, teacher_logp == -math.inf
        outside = no_student | no_teacher
        log_q, log_p = student_logp.masked_fill(outside, 0.0), teacher_logp.masked_fill(outside, 0.0)
        terms = class_terms(log_q, log_p, self.alpha, self.beta)
        if bool(outside.any()):
            student_alone = self._alone(student_logp.masked_fill(no_student, 0.0), self.alpha)
            teacher_alone = self._alone(teacher_logp.masked_fill(no_teacher, 0.0), self.beta)
            terms = torch.where(no_teacher, student_alone, torch.where(no_student, teacher_alone, terms))
            terms = terms.masked_fill(no_student & no_teacher, 0.0)
        return terms.sum(-1)

    def _alone(self, logp: Tensor, exponent: float) -> Tensor:
        """The term of a class that the other model excludes; ``exponent`` is the other model's."""
        s = self.alpha + self.beta
        if s <= 0 or exponent <= 0:
            return torch.full_like(logp, math.inf)
        return (s * logp).exp() / (exponent * s)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        return summands(self, student_logp, teacher_logp, labels)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        assert self.has_closed_form
        log_q, log_p = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
        torch.exp(log_q, out=student_logits)
        if self.alpha + self.beta < SMALL_SUM:
            values = class_terms(log_q, log_p, self.alpha, self.beta).sum(-1)
            slope = rise(log_p, log_q, self.alpha, self.beta).neg_()
        else:
            values, slope = values_and_slope_(log_q, log_p, self.alpha, self.beta)
        through_softmax_(student_logits, slope)
        return values


def values_and_slope_(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The sums over classes `[n]`, and d / d log q of each term (as if free) `[n, k]`; overwrites both logs."""
    s = alpha + beta
    difference = log_p - log_q
    q_s = log_q.mul_(s)
    middle = torch.add(q_s, difference, alpha=alpha).exp_()
    q_s, p_s = q_s.exp_(), log_p.mul_(s).exp_()
    # As a goes to 0, (x - y) / a goes to the mean of both times log(x / y) / a.
    per_alpha, per_beta = 1.0 / alpha if alpha > 0 else -0.5, 1.0 / beta if beta > 0 else 0.5
    slope = _gap_(q_s, middle, difference, -alpha).mul_(per_alpha)
    terms = torch.add(slope, _gap_(p_s, middle, difference, beta), alpha=per_beta, out=difference)
    return terms.sum(-1).div_(s), slope


def _gap_(x: Tensor, y: Tensor, difference: Tensor, exponent: float) -> Tensor:
    """Overwrite x with x - y, for log(x / y) = a d; at a = 0 with (x + y) d.

    Below `SMALL_EXPONENT`, where most digits would be lost, it is (x + y) tanh(a d / 2).
    """
    if abs(exponent) >= SMALL_EXPONENT:
        return x.sub_(y)
    if exponent == 0.0:
        return x.add_(y).mul_(difference)
    return x.add_(y).mul_(torch.mul(difference, 0.5 * exponent).tanh_())


def power(log_p: Tensor, alpha: float, log_q: Tensor, beta: float) -> Tensor:
    """p^alpha q^beta from logs."""
    return torch.add(alpha * log_p, log_q, alpha=beta).exp()


def rise(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """(p^alpha - q^alpha) q^beta / alpha, and q^beta log(p/q) at alpha = 0; for alpha + beta > 0. Nothing overflows."""
    difference = log_p - log_q
    if alpha == 0.0:
        return (beta * log_q).exp() * difference
    # Of p^alpha q^beta and q^(alpha + beta) the larger, times 1 - (smaller / larger).
    up = power(log_p, alpha, log_q, beta) * torch.expm1(-alpha * difference.clamp(min=0.0)) / -alpha
    down = ((alpha + beta) * log_q).exp() * torch.expm1(alpha * difference.clamp(max=0.0)) / alpha
    return torch.where(difference >= 0, up, down)


def class_terms(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """The term of each class, from finite logs."""
    difference, s = log_p - log_q, alpha + beta
    if s == 0.0:
        if alpha == 0.0:
            return 0.5 * difference**2
        x = alpha * difference
        near = x.abs() < SERIES_REACH
        small = difference**2 * _polynomial(x.masked_fill(~near, 0.0), [1 / math.factorial(k + 2) for k in TERMS])
        return torch.where(near, small, (torch.expm1(x) / alpha - difference) / alpha)
    # (P - M) / beta is the same rise with the two exchanged, seen from above.
    terms = (-rise(log_q, log_p, beta, alpha) - rise(log_p, log_q, alpha, beta)) / s
    if s >= SMALL_SUM:
        return terms
    # The term over q^s log(p/q)^2 as a series in w = s log(p/q).
    w = s * difference
    near = w.abs() < SERIES_REACH
    shares = [sum((alpha / s) ** j for j in range(k + 1)) / (math.factorial(k + 1) * (k + 2)) for k in TERMS]
    small = (s * log_q).exp() * difference**2 * _polynomial(w.masked_fill(~near, 0.0), shares)
    return torch.where(near, small, terms)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
