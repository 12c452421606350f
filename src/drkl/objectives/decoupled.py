"""The decoupling operator, and the two objectives made with it: DRKL and DKD."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from drkl.errors import DrklError
from drkl.objectives.base import (
    Objective,
    OnClasses,
    check_choice,
    check_number,
    check_values,
    help_text,
    on_classes,
    why_not_on_classes,
)
from drkl.objectives.closed_form import EXCLUDED, log_share, softmax_
from drkl.objectives.divergences import ForwardKL, GeneralizedJensenShannon, ReverseKL
from drkl.objectives.logspace import Split, argmax, kl, mixture, split, two_classes, weighted
from drkl.objectives.terms import Terms

TAILS = {"rkl": ReverseKL(), "fkl": ForwardKL(), "gjs": GeneralizedJensenShannon()}
"""The tails of DRKL by name."""
TARGETS = ("teacher", "label")
SOME_CLASSES = 64
"""The number of classes among which one is looked for that counts, before it is looked for in all."""
GAMMA = 0.5
"""The tail's weight where none is given."""
WEIGHTS = ("constant", "student", "teacher", "floor")
_TARGET_HELP = help_text("teacher (its top token) or label (the observed token)")
_WEIGHT_HELP = help_text("constant (gamma), student (1-q_t, detached), teacher (1-p_t) or floor (max(gamma, 1-q_t))")


def target_class(
    target: str, teacher_logits: Float[Tensor, "n vocab"], labels: Int[Tensor, "n"] | None
) -> Int[Tensor, "n"]:
    """The target class at each position `[n]`: the teacher's top token (lowest index on ties), or the label."""
    if target == "teacher":
        return argmax(teacher_logits)
    assert labels is not None
    return labels


def tail_weight(weight: str, gamma: float, student_log_odds: Tensor, teacher_log_odds: Tensor) -> Tensor:
    """The tail's weight `[n]`, detached: gamma, 1 - q_t, 1 - p_t, or max(gamma, 1 - q_t)."""
    if weight == "constant":
        return torch.full_like(student_log_odds.detach(), gamma)
    if weight == "teacher":
        return torch.sigmoid(-teacher_log_odds.detach())
    outside = torch.sigmoid(-student_log_odds.detach())
    return outside if weight == "student" else outside.clamp(min=gamma)


def _mask_empty_student_tail(value: Tensor, student: Split) -> Tensor:
    # No student mass beside the target: there is no tail distribution to compare.
    return value.masked_fill(student.log_odds == math.inf, 0.0)


@dataclass(frozen=True)
class Decoupled(Objective):
    """a F(b_q, b_p) + w G(q^, p^): one divergence on target-against-rest, another on the renormalised rest.

    b = (probability of the target, probability of the rest); q^, p^ = the tails, renormalised. With F = G = RKL, a = 1
    and a constant w = gamma it is DRKL; with w = 1 - q_t *not* detached it would be RKL again.
    """

    name = "decoupled"
    formula = "a F(b_q, b_p) + w G(q^, p^)"
    source = "the operator behind DKD (arXiv 2203.08679) and DRKL (arXiv 2604.00223)"

    on_target: Objective = field(
        default=TAILS["rkl"], metadata=help_text("divergence F on (target, rest), by its name")
    )
    on_tail: Objective = field(default=TAILS["rkl"], metadata=help_text("divergence G on the tails, by its name"))
    gamma: float = field(default=GAMMA, metadata=help_text("weight of the tail, > 0"))
    target_weight: float = field(default=1.0, metadata=help_text("a, at least 0"))
    target: str = field(default="teacher", metadata=_TARGET_HELP)
    weight: str = field(default="constant", metadata=_WEIGHT_HELP)

    def __post_init__(self) -> None:
        for name in ("gamma", "target_weight"):
            check_number(self.name, name, getattr(self, name), "at least 0", lambda value: value >= 0)
        check_choice(self.name, "target", self.target, TARGETS)
        check_choice(self.name, "weight", self.weight, WEIGHTS)

    @property
    def on_classes(self) -> OnClasses | None:
        # Target and rest are the same two classes, whose part is exact.
        return on_classes(self.on_tail)

    @property
    def why_not_on_classes(self) -> str:
        return f"its tail is {self.on_tail.name!r}, and {why_not_on_classes(self.on_tail)}"

    @property
    def has_closed_form(self) -> bool:
        return self.on_tail.has_closed_form

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.add(*self.terms(student_logp, teacher_logp, labels))

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        """The two summands, weights included."""
        target = target_class(self.target, teacher_logp, labels)
        student, teacher = split(student_logp, target), split(teacher_logp.detach(), target)
        on_target = self.on_target(student.log_two, teacher.log_two)
        tails = [side.log_tail for side in (student, teacher)]
        if not self.on_tail.has_closed_form:
            # -inf at the target is for objectives that say what they do there; in a plain function it makes NaN.
            tails = [tail.scatter(-1, target.unsqueeze(-1), EXCLUDED) for tail in tails]
        on_tail = self.on_tail(*tails)
        for part, values in ((self.on_target, on_target), (self.on_tail, on_tail)):
            check_values(part, values, target.shape[0])
        on_tail = _mask_empty_student_tail(on_tail, student)
        weight = tail_weight(self.weight, self.gamma, student.log_odds, teacher.log_odds)
        return Terms(weighted(self.target_weight, on_target), weighted(weight, on_tail))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        # With s the target's log-odds, d s / dz_t = 1 and d s / dz_j = -q^_j: the two classes' gradient is one number.
        assert self.has_closed_form
        at_target = target_class(self.target, teacher_logits, labels).unsqueeze(-1)
        z_t, y_t = student_logits.gather(-1, at_target), teacher_logits.gather(-1, at_target)
        tail_q = student_logits.scatter_(-1, at_target, EXCLUDED).clone()
        teacher_logits.scatter_(-1, at_target, EXCLUDED)
        s, u = z_t - softmax_(tail_q), y_t - teacher_logits.logsumexp(-1, keepdim=True)
        on_tail = self.on_tail.value_and_grad_(student_logits, teacher_logits, None)
        with torch.enable_grad():
            log_odds = s.squeeze(-1).detach().requires_grad_()
            on_target = self.on_target(two_classes(log_odds), two_classes(u.squeeze(-1)))
            (push,) = torch.autograd.grad(on_target.sum(), log_odds)
        push = self.target_weight * push.unsqueeze(-1)
        weight = tail_weight(self.weight, self.gamma, s, u)
        student_logits.mul_(weight).sub_(tail_q.mul_(push)).scatter_(-1, at_target, push)
        return self.target_weight * on_target.detach() + weight.squeeze(-1) * on_tail


@dataclass(frozen=True)
class DecoupledReverseKL(Objective):
    """B + gamma K: reverse KL without the push on an already matched target, and with a supervised tail.

    B = KL(b_q || b_p) on (target, rest), K = KL(q^ || p^) on the renormalised rest; RKL is B + (1 - q_t) K. The paper
    has a constant gamma, the teacher's top token as target and the reverse tail; the other weights and tails are ours.
    With ``skew`` = s > 0, p is replaced by the mixture (1 - s) p + s q, gradient included.
    """

    name = "drkl"
    formula = "KL(b_q || b_p) + gamma KL(q^ || p^)"
    source = "DRKL, arXiv 2604.00223, Eq. 9"
    on_classes = "bound"

    gamma: float = field(default=0.5, metadata=help_text("weight of the tail, > 0"))
    target: str = field(default="teacher", metadata=_TARGET_HELP)
    weight: str = field(default="constant", metadata=_WEIGHT_HELP)
    skew: float = field(default=0.0, metadata=help_text("share of the student in the mixture compared with, in [0, 1)"))
    tail: str = field(default="rkl", metadata=help_text("divergence on the tail: rkl (the paper), fkl or gjs (ours)"))

    def __post_init__(self) -> None:
        check_number("drkl", "gamma", self.gamma, "greater than 0", lambda value: value > 0)
        for name, choices in (("target", TARGETS), ("weight", WEIGHTS), ("tail", TAILS)):
            check_choice("drkl", name, getattr(self, name), choices)
        check_number("drkl", "skew", self.skew, "in [0, 1)", lambda value: 0 <= value < 1)
        if self.skew > 0 and self.tail != "rkl":
            raise DrklError(f"drkl.skew is {self.skew} with tail {self.tail!r}; a skewed DRKL needs tail 'rkl'.")

    @property
    def _operator(self) -> Decoupled:
        return Decoupled(TAILS["rkl"], TAILS[self.tail], self.gamma, 1.0, self.target, self.weight)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.add(*self.terms(student_logp, teacher_logp, labels))

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        """The two summands, weights included."""
        if self.skew == 0:
            return self._operator.terms(student_logp, teacher_logp, labels)
        teacher_logp = teacher_logp.detach()
        target = target_class(self.target, teacher_logp, labels)
        student, teacher = split(student_logp, target), split(teacher_logp, target)
        compared = split(mixture(student_logp, teacher_logp, self.skew), target)
        on_target = kl(student.log_two, compared.log_two)
        on_tail = _mask_empty_student_tail(kl(student.log_tail, compared.log_tail), student)
        weight = tail_weight(self.weight, self.gamma, student.log_odds, teacher.log_odds)
        return Terms(on_target, weighted(weight, on_tail))

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        if self.tail == "gjs":
            return self._operator.value_and_grad_(student_logits, teacher_logits, labels)
        # d/dz_t = q_t (1 - q_t) D; reverse tail: d/dz_j = q^_j [w (d_j - K) - q_t (1 - q_t) D], d_j = log q^_j / p^_j.
        at_target = target_class(self.target, teacher_logits, labels).unsqueeze(-1)
        s, u, log_ratio = _apart_(student_logits, teacher_logits, at_target, reads_teacher=self.tail == "fkl")
        if self.skew > 0:
            return self._skewed_(student_logits, log_ratio, at_target, s, u)
        constant = self.weight == "constant"
        weight = self.gamma if constant else tail_weight(self.weight, self.gamma, s, u)
        inside, outside, gap_in, gap_out = _two_classes(s, u)
        on_target = inside[:, :1] * gap_in + outside[:, :1] * gap_out
        push = inside[:, :1] * outside[:, :1] * (s - u)
        if self.tail == "fkl":
            on_tail = _forward_tail_(student_logits, teacher_logits, at_target, log_ratio, weight, push)
        else:
            on_tail = torch.linalg.vecdot(student_logits, log_ratio).unsqueeze(-1)
            factor = _line_(log_ratio, weight, -weight * on_tail - push)
            student_logits.mul_(factor).scatter_(-1, at_target, push)
        return (on_target + weight * on_tail).squeeze(-1)

    def _skewed_(self, tail_q: Tensor, log_ratio: Tensor, at_target: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Values `[n]`, and the gradient in place of the student's tail; ``log_ratio`` is log q^/p^, 0 at the target.

        With g = log q/m class by class, l_t and l_r that of the target and of the whole rest, and a = skew:
        d K / d log q_j = q^_j (g_j - l_r - K - a e^g_j + a e^l_r), as if free; B's is one number, as without skew.
        """
        a = self.skew
        inside, outside, log_target, log_rest = _two_classes(s, u)
        inside, outside = inside[:, :1], outside[:, :1]
        l_t, l_r = (log_share(log_of, a, 1.0 - a) for log_of in (log_target, log_rest))
        slope = log_share(log_ratio.add_(log_rest), a, 1.0 - a)
        on_tail = torch.linalg.vecdot(tail_q, slope).unsqueeze(-1) - l_r
        slope.sub_(slope.exp(), alpha=a).add_(a * l_r.exp() - l_r - on_tail)
        through = torch.linalg.vecdot(tail_q, slope).unsqueeze(-1)
        weight = tail_weight(self.weight, self.gamma, s, u)
        push = inside * outside * (l_t - l_r - a * (l_t.exp() - l_r.exp()))
        tail_q.mul_(slope.sub_(outside * through).mul_(weight).sub_(push))
        tail_q.scatter_(-1, at_target, push - weight * inside * through)
        return (inside * l_t + outside * l_r + weight * on_tail).squeeze(-1)


def _apart_(
    student_logits: Tensor, teacher_logits: Tensor, at_target: Tensor, *, reads_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite finite logits `[n, k]` with their tails, 0 at the target; the teacher's where they are read.

    Returns:
        The target's log-odds under the student and the teacher, both `[n, 1]`, and log q^/p^ `[n, k]`, 0 at the target.
    """
    z_t, y_t = student_logits.gather(-1, at_target), teacher_logits.gather(-1, at_target)
    student_logits.scatter_(-1, at_target, EXCLUDED)
    teacher_logits.scatter_(-1, at_target, EXCLUDED)
    log_q, log_p = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    s, u = z_t - _log_norm(student_logits, log_q), y_t - _log_norm(teacher_logits, log_p)
    torch.exp(log_q, out=student_logits)
    if reads_teacher:
        torch.exp(log_p, out=teacher_logits)
    return s, u, torch.sub(log_q, log_p, out=log_p)


def _log_norm(logits: Tensor, logp: Tensor) -> Tensor:
    """The log-sum-exp `[n, 1]` of logits from their log-softmax: the difference of both at one class that counts."""
    some = slice(0, SOME_CLASSES)
    highest = logits[:, some].amax(-1, keepdim=True)
    if highest.min() <= 0.5 * EXCLUDED:
        some = slice(None)
        highest = logits.amax(-1, keepdim=True)
    return highest - logp[:, some].amax(-1, keepdim=True)


def _line_(x: Tensor, slope: Tensor | float, start: Tensor) -> Tensor:
    """Overwrite x `[n, k]` with start + slope x, for `[n, 1]` of each or one slope."""
    if isinstance(slope, Tensor):
        return x.mul_(slope).add_(start)
    return torch.add(start, x, alpha=slope, out=x)


def _forward_tail_(
    tail_q: Tensor, tail_p: Tensor, at_target: Tensor, log_ratio: Tensor, weight: Tensor | float, push: Tensor
) -> Tensor:
    """KL(p^ || q^) `[n, 1]`; the student's tail becomes the gradient of it times ``weight``, with the target's push."""
    on_tail = torch.linalg.vecdot(tail_p, log_ratio).neg_().unsqueeze(-1)
    tail_q.mul_(weight - push)
    if isinstance(weight, Tensor):
        tail_q.addcmul_(tail_p, weight, value=-1)
    else:
        tail_q.sub_(tail_p, alpha=weight)
    tail_q.scatter_(-1, at_target, push)
    return on_tail


def _two_classes(s: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher on (target, rest), from the target's log-odds `[n, 1]` under both; exact at any confidence.

    Returns:
        The probabilities of the target, and of the rest, both `[n, 2]`, the student's first; and log q/p of each class,
        `[n, 1]`.
    """
    both = torch.cat((s, u), -1)
    log_in, log_out = F.logsigmoid(both), F.logsigmoid(-both)
    return log_in.exp(), log_out.exp(), log_in[:, :1] - log_in[:, 1:], log_out[:, :1] - log_out[:, 1:]


@dataclass(frozen=True)
class DecoupledKnowledgeDistillation(Objective):
    """alpha KL(b_p || b_q) + beta KL(p^ || q^): the forward twin of DRKL.

    Zhao et al. take the label as the target; here, as for `drkl`, the teacher's top token is the default.
    """

    name = "dkd"
    formula = "alpha KL(b_p || b_q) + beta KL(p^ || q^)"
    source = "DKD, Zhao et al. 2022, arXiv 2203.08679"
    on_classes = "bound"

    alpha: float = field(default=1.0, metadata=help_text("weight of the target against the rest, at least 0"))
    beta: float = field(default=0.5, metadata=help_text("weight of the tail, at least 0; not both 0"))
    target: str = field(default="teacher", metadata=_TARGET_HELP)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            check_number(self.name, name, getattr(self, name), "at least 0", lambda value: value >= 0)
        check_choice(self.name, "target", self.target, TARGETS)
        if self.alpha == 0 and self.beta == 0:
            raise DrklError("dkd.alpha and dkd.beta are both 0; expected one of them above 0.")

    @property
    def _operator(self) -> Decoupled:
        return Decoupled(TAILS["fkl"], TAILS["fkl"], self.beta, self.alpha, self.target)

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._operator(student_logp, teacher_logp, labels)

    def terms(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Terms:
        """The two summands, weights included."""
        return self._operator.terms(student_logp, teacher_logp, labels)

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
        at_target = target_class(self.target, teacher_logits, labels).unsqueeze(-1)
        s, u, log_ratio = _apart_(student_logits, teacher_logits, at_target, reads_teacher=True)
        inside, outside, gap_in, gap_out = _two_classes(s, u)
        # q_t - p_t, of the two classes from the one in which less is lost.
        push = torch.where(s > 0, outside[:, 1:] - outside[:, :1], inside[:, :1] - inside[:, 1:]).mul_(self.alpha)
        on_tail = _forward_tail_(student_logits, teacher_logits, at_target, log_ratio, self.beta, push)
        on_target = inside[:, 1:] * gap_in + outside[:, 1:] * gap_out
        return torch.sub(self.beta * on_tail, on_target, alpha=self.alpha).squeeze(-1)
