"""Two distributions at one position: target probabilities, B, K, D, entropies, divergences, agreement.

These are the only formulas of that kind outside the objectives. q = student, p = teacher, t = the target class, y* =
argmax q; b = (target, rest) and q^, p^ = the rest renormalised (`logspace.split`). Values are in nats or probabilities,
in fp32 or wider.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from drkl.losses.common import log_softmax
from drkl.objectives.adaptive import head_mask, reached
from drkl.objectives.divergences import GeneralizedJensenShannon
from drkl.objectives.logspace import Ranked, Split, argmax, kl, most_probable, split


class Distribution(NamedTuple):
    """One model's distributions at `[n]` positions."""

    logp: Float[Tensor, "n vocab"]
    probs: Float[Tensor, "n vocab"]
    top: Int[Tensor, "n"]
    """The most probable token, the lowest id on ties."""


def distribution(logits: Float[Tensor, "n vocab"], temperature: float = 1.0) -> Distribution:
    """Return the distributions of ``logits / temperature``."""
    logp = log_softmax(logits, temperature)
    return Distribution(logp, logp.exp(), argmax(logp))


def entropy(model: Distribution, buffer: Tensor | None = None) -> Float[Tensor, "n"]:
    """-sum q log q. ``buffer`` `[n, vocab]`, here and below, is overwritten; it saves an allocation."""
    value = torch.mul(model.probs, model.logp, out=buffer).sum(-1)
    if not _finite(value):  # a class is excluded
        value = (model.probs * model.logp.masked_fill(model.logp == -math.inf, 0.0)).sum(-1)
    return -value


def both_kls(
    a: Distribution, b: Distribution, buffer: Tensor | None = None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """KL(a || b) and KL(b || a); +inf where the second excludes a class that the first does not."""
    forth, back = _two_kls(a.probs, b.probs, a.logp - b.logp, buffer)
    if not _finite(forth, back):
        forth, back = kl(a.logp, b.logp), kl(b.logp, a.logp)
    return forth, back


def total_variation(a: Distribution, b: Distribution, buffer: Tensor | None = None) -> Float[Tensor, "n"]:
    """1/2 sum |a - b|."""
    return 0.5 * torch.sub(b.probs, a.probs, out=buffer).abs_().sum(-1)


def jensen_shannon(student: Distribution, teacher: Distribution) -> Float[Tensor, "n"]:
    """1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2; exactly 0 where q = p."""
    # log p/m = log 2 - softplus(log q/p): no difference of logs of m.
    difference = student.logp - teacher.logp
    log_2 = F.softplus(difference.new_zeros(1))
    of_teacher = (log_2 - F.softplus(difference)).mul_(teacher.probs).sum(-1)
    of_student = (log_2 - F.softplus(difference.neg_())).mul_(student.probs).sum(-1)
    value = 0.5 * (of_teacher + of_student)
    if not _finite(value):
        value = GeneralizedJensenShannon()(student.logp, teacher.logp)
    return value


def agreement(a: Distribution, b: Distribution) -> Float[Tensor, "n"]:
    """1 where both have the same top token."""
    return (a.top == b.top).to(a.logp.dtype)


def at(values: Float[Tensor, "n vocab"], ids: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """``values`` at one token of each position."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


class TargetStatistics(NamedTuple):
    """Two distributions `[n]` seen from a target class t: RKL = B + (1 - q_t) K."""

    q_t: Tensor
    """q(t)."""
    p_t: Tensor
    """p(t)."""
    rest: Tensor
    """1 - q_t, from log-sum-exps."""
    B: Tensor
    """KL(b_q || b_p)."""
    K: Tensor
    """KL(q^ || p^); 0 where the student has no tail."""
    K_forward: Tensor
    """KL(p^ || q^); 0 where the teacher has no tail."""
    D: Tensor
    """logit q_t - logit p_t; 0 where both are infinite."""


@torch.no_grad()
def target_statistics(student: Split, teacher: Split, target: Int[Tensor, "n"]) -> TargetStatistics:
    """Compare two distributions at a target class, exactly at any confidence.

    ``student`` and ``teacher`` are `logspace.split` of log-probabilities `[n, vocab]` at ``target``: at temperature T
    those of ``logits / T``. `objectives.decoupled.target_class` gives an objective's own target.
    """
    difference = (student.log_tail - teacher.log_tail).scatter_(-1, target.unsqueeze(-1), 0.0)  # there: -inf - -inf
    K, K_forward = _two_kls(student.log_tail.exp(), teacher.log_tail.exp(), difference)
    if not _finite(K, K_forward):
        K, K_forward = kl(student.log_tail, teacher.log_tail), kl(teacher.log_tail, student.log_tail)
    return TargetStatistics(
        q_t=student.log_two[:, 0].exp(),
        p_t=teacher.log_two[:, 0].exp(),
        rest=student.log_two[:, 1].exp(),
        B=kl(student.log_two, teacher.log_two),
        # Without any mass beside the target there is no tail distribution to compare.
        K=K.masked_fill(student.log_odds == math.inf, 0.0),
        K_forward=K_forward.masked_fill(teacher.log_odds == math.inf, 0.0),
        D=log_odds_gap(student, teacher),
    )


def log_odds_gap(student: Split, teacher: Split) -> Float[Tensor, "n"]:
    """D = logit q_t - logit p_t, in nats; 0 where both are infinite."""
    return (student.log_odds - teacher.log_odds).masked_fill(student.log_odds == teacher.log_odds, 0.0)


class TokenStatistics(NamedTuple):
    """Per-position values `[n]`; those of a teacher are None without one. t = argmax p."""

    nll: Tensor
    """-log q(label)."""
    accuracy: Tensor
    """1 where y* is the label."""
    entropy: Tensor
    """-sum q log q."""
    confidence: Tensor
    """max q."""
    fkl: Tensor | None = None
    """KL(p || q)."""
    rkl: Tensor | None = None
    """KL(q || p)."""
    tvd: Tensor | None = None
    """1/2 sum |p - q|."""
    agreement: Tensor | None = None
    """1 where y* = t."""
    overconfidence: Tensor | None = None
    """q(y*) - p(y*)."""
    target_gap: Tensor | None = None
    """q(t) - p(t)."""
    teacher_entropy: Tensor | None = None
    """-sum p log p."""
    teacher_confidence: Tensor | None = None
    """max p."""


class ComparisonStatistics(NamedTuple):
    """The statistics of an evaluation at each position besides `TokenStatistics`; only brier needs no teacher.

    t = argmax p; temperature 1.
    """

    tokens: TokenStatistics
    brier: Tensor
    """sum_i (q_i - 1[i = label])^2."""
    js: Tensor | None = None
    """1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2."""
    tail_rkl: Tensor | None = None
    """K = KL(q^ || p^); 0 where the student has no tail."""
    tail_fkl: Tensor | None = None
    """KL(p^ || q^); 0 where the teacher has no tail."""
    target_log_odds_gap: Tensor | None = None
    """D = logit q_t - logit p_t; 0 where both are infinite."""
    q_t: Tensor | None = None
    """q(t)."""
    p_t: Tensor | None = None
    """p(t)."""
    rest: Tensor | None = None
    """1 - q_t, from log-sum-exps."""
    tail_mass: Tensor | None = None
    """q outside the shortest list of the teacher's most probable tokens with a mass of ``head_mass``."""
    overlap: Tensor | None = None
    """The share of the teacher's ``overlap`` most probable tokens that are among the student's."""
    rank_correlation: Tensor | None = None
    """Spearman's over the tokens of the teacher's ``ranks``, equal ones at their mean rank; NaN where one is flat."""
    profile: Tensor | None = None
    """`[n, len(profile_ranks)]`: q of the teacher's 1st, 2nd, ... token; NaN past the end of the vocabulary."""


@torch.no_grad()
def token_statistics(
    student_logits: Float[Tensor, "n vocab"], teacher_logits: Float[Tensor, "n vocab"] | None, labels: Int[Tensor, "n"]
) -> TokenStatistics:
    """Compare two models at `[n]` positions, at temperature 1.

    Args:
        student_logits: `[n, vocab]`.
        teacher_logits: `[n, vocab]`, or None.
        labels: `[n]`, the observed next token's id.
    """
    teacher = None if teacher_logits is None else distribution(teacher_logits)
    return _token_statistics(distribution(student_logits), teacher, labels)


@torch.no_grad()
def comparison_statistics(
    student_logits: Float[Tensor, "n vocab"],
    teacher_logits: Float[Tensor, "n vocab"] | None,
    labels: Int[Tensor, "n"],
    *,
    head_mass: float = 0.9,
    overlap: int = 10,
    ranks: tuple[int, int] = (2, 100),
    profile_ranks: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500),
) -> ComparisonStatistics:
    """Compare two models at `[n]` positions in every way that an evaluation needs, at temperature 1.

    Args:
        student_logits: `[n, vocab]`.
        teacher_logits: `[n, vocab]`, or None.
        labels: `[n]`, the observed next token's id.
        head_mass: the mass, in (0, 1), of the teacher's head; the token that reaches it is inside.
        overlap: how many of the most probable tokens are compared as sets; at most the vocabulary.
        ranks: the teacher's ranks, first and last, that the rank correlation is over; up to the vocabulary.
        profile_ranks: the teacher's ranks whose tokens' q is kept.
    """
    student = distribution(student_logits)
    teacher = None if teacher_logits is None else distribution(teacher_logits)
    tokens = _token_statistics(student, teacher, labels)
    brier = brier_score(student.probs, labels)
    if teacher is None:
        return ComparisonStatistics(tokens, brier)
    target = teacher.top
    split_at = target_statistics(split(student.logp, target), split(teacher.logp, target), target)
    vocab_size = student.logp.shape[-1]
    reach = min(vocab_size, max(overlap, ranks[1], *profile_ranks))
    ranked = most_probable(teacher.logp, reach, spare=reach)
    among = ranked.ids[:, ranks[0] - 1 : ranks[1]]
    return ComparisonStatistics(
        tokens=tokens,
        brier=brier,
        js=jensen_shannon(student, teacher),
        tail_rkl=split_at.K,
        tail_fkl=split_at.K_forward,
        target_log_odds_gap=split_at.D,
        q_t=at(student.probs, target),
        p_t=at(teacher.probs, target),
        rest=split_at.rest,
        tail_mass=_mass_outside(student.probs, teacher, ranked, head_mass),
        overlap=_overlap(student.logp, ranked.ids[:, :overlap]),
        rank_correlation=_spearman(student.logp.gather(-1, among), teacher.logp.gather(-1, among)),
        profile=_profile(student.probs, ranked.ids, profile_ranks),
    )


def brier_score(probs: Float[Tensor, "n vocab"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """sum_i (q_i - 1[i = label])^2, without the cancellation of sum q^2 - 2 q_label + 1."""
    at_label = labels.unsqueeze(-1)
    missed = probs.scatter_add(-1, at_label, probs.new_full(at_label.shape, -1.0))
    return missed.square_().sum(-1)


def _token_statistics(student: Distribution, teacher: Distribution | None, labels: Tensor) -> TokenStatistics:
    nll, confidence = -at(student.logp, labels), at(student.logp, student.top).exp()
    accuracy = (student.top == labels).to(student.logp.dtype)
    buffer = torch.empty_like(student.probs)
    student_entropy = entropy(student, buffer)
    if teacher is None:
        return TokenStatistics(nll, accuracy, student_entropy, confidence)
    q_t, p_t = at(student.probs, teacher.top), at(teacher.probs, teacher.top)
    rkl, fkl = both_kls(student, teacher, buffer)
    return TokenStatistics(
        nll=nll,
        accuracy=accuracy,
        entropy=student_entropy,
        confidence=confidence,
        fkl=fkl,
        rkl=rkl,
        tvd=total_variation(student, teacher, buffer),
        agreement=agreement(student, teacher),
        overconfidence=confidence - at(teacher.probs, student.top),
        target_gap=q_t - p_t,
        teacher_entropy=entropy(teacher, buffer),
        teacher_confidence=p_t,
    )


def _two_kls(a: Tensor, b: Tensor, log_ratio: Tensor, buffer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL(a || b) and KL(b || a) from log(a / b), without the masks of `kl`, in half of its time."""
    forth = torch.mul(a, log_ratio, out=buffer).sum(-1)
    back = torch.mul(b, log_ratio, out=buffer).sum(-1)
    return forth, back.neg_()


def _finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def _mass_outside(probs: Tensor, teacher: Distribution, ranked: Ranked, mass: float) -> Tensor:
    """q outside of the head, as a sum: 1 - q(head) has no digits left where little is outside."""
    best, listed = (values.gather(-1, ranked.taken) for values in (teacher.logp, teacher.probs))
    last = (listed.cumsum(-1) < reached(mass, listed.dtype)).sum(-1, keepdim=True)
    outside = torch.arange(best.shape[-1], device=best.device) > last
    value = probs.scatter(-1, ranked.taken, probs.gather(-1, ranked.taken) * outside).sum(-1)
    if best.shape[-1] < probs.shape[-1]:
        # The head goes on past what is listed, or its last token has equals there, maybe of lower ids.
        far = (best.gather(-1, last.clamp(max=best.shape[-1] - 1)) == best[:, -1:]).squeeze(-1)
        if bool(far.any()):
            value[far] = probs[far].masked_fill(head_mask(teacher.logp[far], mass), 0.0).sum(-1)
    return value


def _overlap(logq: Tensor, teachers: Tensor) -> Tensor:
    count = teachers.shape[-1]
    students = most_probable(logq, count, spare=2 * count).ids
    shared = (students.unsqueeze(-1) == teachers.unsqueeze(-2)).sum((-2, -1))
    return shared.to(logq.dtype) / count


def _spearman(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the mean ranks, float64; NaN where one side is constant. Half-integers: sums are exact.

    Of log-probabilities, since probabilities that underflow would be equal.
    """
    middle = 0.5 * (first.shape[-1] - 1)
    a, b = _mean_ranks(first) - middle, _mean_ranks(second) - middle
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


def _mean_ranks(values: Tensor) -> Tensor:
    """From 0 up; equal values share the mean of their ranks."""
    mine, others = values.unsqueeze(-1), values.unsqueeze(-2)
    return (mine > others).sum(-1).double() + 0.5 * ((mine == others).sum(-1).double() - 1.0)


def _profile(probs: Tensor, ids: Tensor, ranks: tuple[int, ...]) -> Tensor:
    there = [rank - 1 for rank in ranks if rank <= ids.shape[-1]]
    out = probs.new_full((probs.shape[0], len(ranks)), math.nan)
    out[:, : len(there)] = probs.gather(-1, ids[:, there])
    return out
