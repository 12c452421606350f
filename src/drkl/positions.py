"""What one position says about two models, besides the loss."""

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
from drkl.objectives.logspace import argmax, kl, split


class TokenStatistics(NamedTuple):
    """Detached per-position values `[n]`, in nats or probabilities; teacher columns are None without a teacher.

    q = student, p = teacher, y* = argmax q, t = argmax p.
    """

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
    """What an evaluation asks of each position besides `TokenStatistics`; detached, None without a teacher but brier.

    t = argmax p; q^, p^ = the tails, both without t and renormalised, as `logspace.split` makes them. B, K and D of a
    loss's own ``return_stats`` (`losses.position`) are of the same split and the same `logspace.kl`, there at the
    loss's temperature and with the objective's target, here at temperature 1 with the teacher's top token.
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


class _Model(NamedTuple):
    """One model's distributions, once."""

    logp: Tensor
    probs: Tensor
    top: Tensor
    """`[n, 1]`, the first of equals."""


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
    teacher = None if teacher_logits is None else _model(teacher_logits)
    return _token_statistics(_model(student_logits), teacher, labels)


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
    """Compare two models at `[n]` positions in every way that an evaluation asks for, at temperature 1.

    Args:
        student_logits: `[n, vocab]`.
        teacher_logits: `[n, vocab]`, or None.
        labels: `[n]`, the observed next token's id.
        head_mass: the mass, in (0, 1), of the teacher's head; the token that reaches it is inside.
        overlap: how many of the most probable tokens are compared as sets; at most the vocabulary.
        ranks: the teacher's ranks, first and last, that the rank correlation is over; up to the vocabulary.
        profile_ranks: the teacher's ranks whose tokens' q is kept.
    """
    student = _model(student_logits)
    teacher = None if teacher_logits is None else _model(teacher_logits)
    tokens = _token_statistics(student, teacher, labels)
    brier = brier_score(student.probs, labels)
    if teacher is None:
        return ComparisonStatistics(tokens, brier)
    target = teacher.top.squeeze(-1)
    tail_rkl, tail_fkl, gap, rest = _tails(student.logp, teacher.logp, target)
    vocab_size = student.logp.shape[-1]
    reach = min(vocab_size, max(overlap, ranks[1], *profile_ranks))
    ranked = most_probable(teacher.logp, reach, spare=reach)
    among = ranked.ids[:, ranks[0] - 1 : ranks[1]]
    return ComparisonStatistics(
        tokens=tokens,
        brier=brier,
        js=_js(student, teacher),
        tail_rkl=tail_rkl,
        tail_fkl=tail_fkl,
        target_log_odds_gap=gap,
        q_t=student.probs.gather(-1, teacher.top).squeeze(-1),
        p_t=teacher.probs.gather(-1, teacher.top).squeeze(-1),
        rest=rest,
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


class Ranked(NamedTuple):
    """The most probable tokens, best first."""

    ids: Int[Tensor, "n k"]
    taken: Int[Tensor, "n m"]
    """As far as they were looked at; past k, equal ones may be missing."""


def most_probable(logp: Float[Tensor, "n vocab"], count: int, *, spare: int) -> Ranked:
    """The ``count`` most probable tokens, best first, of equal ones the lower id first.

    topk leaves open which of equals it takes. So ``spare`` more are taken, and a row whose equals go on past those is
    sorted whole.
    """
    vocab_size = logp.shape[-1]
    ids = logp.topk(min(vocab_size, count + spare), -1, sorted=False).indices.sort(-1).values
    values, order = logp.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if ids.shape[-1] < vocab_size:
        open_ended = values[:, count - 1] == values[:, -1]
        if bool(open_ended.any()):
            whole = logp[open_ended].sort(dim=-1, descending=True, stable=True).indices
            ids[open_ended] = whole[:, : ids.shape[-1]]
    return Ranked(ids[:, :count], ids)


def _model(logits: Tensor) -> _Model:
    logp = log_softmax(logits, 1.0)
    return _Model(logp, logp.exp(), argmax(logp).unsqueeze(-1))


def _token_statistics(student: _Model, teacher: _Model | None, labels: Tensor) -> TokenStatistics:
    logq, q, best = student
    nll = -logq.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    accuracy = (best.squeeze(-1) == labels).to(logq.dtype)
    confidence = logq.gather(-1, best).exp().squeeze(-1)
    room = torch.empty_like(q)
    entropy = _entropy(q, logq, room)
    if teacher is None:
        return TokenStatistics(nll, accuracy, entropy, confidence)
    logp, p, target = teacher
    q_target, p_target = q.gather(-1, target).squeeze(-1), p.gather(-1, target).squeeze(-1)
    rkl, fkl = _two_kls(student, teacher, room)
    if not _finite(rkl, fkl):  # a class is excluded
        rkl, fkl = kl(logq, logp), kl(logp, logq)
    return TokenStatistics(
        nll=nll,
        accuracy=accuracy,
        entropy=entropy,
        confidence=confidence,
        fkl=fkl,
        rkl=rkl,
        tvd=0.5 * torch.sub(p, q, out=room).abs_().sum(-1),
        agreement=(best == target).squeeze(-1).to(logq.dtype),
        overconfidence=confidence - p.gather(-1, best).squeeze(-1),
        target_gap=q_target - p_target,
        teacher_entropy=_entropy(p, logp, room),
        teacher_confidence=p_target,
    )


def _two_kls(a: _Model, b: _Model, room: Tensor) -> tuple[Tensor, Tensor]:
    """KL(a || b) and KL(b || a) without the masks of `kl`, half of its time; ``room`` is overwritten."""
    difference = a.logp - b.logp
    forth = torch.mul(a.probs, difference, out=room).sum(-1)
    back = torch.mul(b.probs, difference, out=room).sum(-1)
    return forth, back.neg_()


def _finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def _entropy(probs: Tensor, logp: Tensor, room: Tensor) -> Tensor:
    value = torch.mul(probs, logp, out=room).sum(-1)
    if not _finite(value):
        value = (probs * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return -value


def _js(student: _Model, teacher: _Model) -> Tensor:
    """log p/m = log 2 - softplus(log q/p): no difference of logs of m, and exactly 0 where q = p."""
    difference = student.logp - teacher.logp
    log_two = F.softplus(difference.new_zeros(1))
    of_teacher = (log_two - F.softplus(difference)).mul_(teacher.probs).sum(-1)
    of_student = (log_two - F.softplus(difference.neg_())).mul_(student.probs).sum(-1)
    value = 0.5 * (of_teacher + of_student)
    if not _finite(value):
        value = GeneralizedJensenShannon()(student.logp, teacher.logp)
    return value


def _tails(logq: Tensor, logp: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL of the tails, reverse and forward; D; and 1 - q_t."""
    student, teacher = split(logq, target), split(logp, target)
    at_target = target.unsqueeze(-1)
    q, p = student.log_tail.exp(), teacher.log_tail.exp()
    # No mass is there any more, and -inf - -inf would be NaN.
    tails = [
        _Model(log.scatter_(-1, at_target, 0.0), probs, at_target)
        for log, probs in ((student.log_tail, q), (teacher.log_tail, p))
    ]
    reverse, forward = _two_kls(tails[0], tails[1], torch.empty_like(q))
    if not _finite(reverse, forward):
        log_q, log_p = (tail.logp.scatter_(-1, at_target, -math.inf) for tail in tails)
        reverse, forward = kl(log_q, log_p), kl(log_p, log_q)
    # Without any mass beside the target there is no tail distribution to compare.
    reverse = reverse.masked_fill(student.log_odds == math.inf, 0.0)
    forward = forward.masked_fill(teacher.log_odds == math.inf, 0.0)
    gap = (student.log_odds - teacher.log_odds).masked_fill(student.log_odds == teacher.log_odds, 0.0)
    return reverse, forward, gap, student.log_two[:, 1].exp()


def _mass_outside(probs: Tensor, teacher: _Model, ranked: Ranked, mass: float) -> Tensor:
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
