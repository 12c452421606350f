"""The numbers behind the figures of docs/article.md, from `drkl.analysis.decompose` and the objectives themselves.

q is the student, p the teacher, t the target class (index 0, the teacher's top token everywhere), q^ and p^ the rest
renormalised. A push is a gradient on the target's logit, as `decompose` gives it: negative raises the logit. Everything
is in nats and in float64; each function returns one figure's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import drkl
from drkl.analysis import decompose
from drkl.losses import distillation_loss
from drkl.objectives import CrossEntropy, Objective, SkewReverseKL
from drkl.toy.sweep import to_csv

Row = dict[str, Any]

VOCAB = 50
GAMMA = 0.5
SKEW = 0.1
FLOW_K = (0.5, 1.0, 2.0)
FLOW_P = [round(0.05 + 0.0375 * step, 4) for step in range(25)]
FLOW_Q = [round(0.05 + 0.075 * step, 3) for step in range(13)]
PUSH_TARGETS = (0.3, 0.5, 0.9)
PATH_VOCAB = 1000
PATH_SPREAD = 3.0
PATH_STEPS = 41
MIX_TARGET = 0.6
MIX_SKEWS = [round(0.075 * step, 3) for step in range(13)]
MAP_GAMMAS = [round(0.02 * 50 ** (step / 24), 4) for step in range(25)]
TEMPERATURES = (1.0, 2.0, 4.0)
HEAT_TARGET = 0.6
HEAT_SPREAD = 1.5
EDGE = 10.0
"""A place of rest is searched for between -EDGE and EDGE, in log-odds."""


def tail_at(K: float, size: int = VOCAB - 1) -> Tensor:
    """A student's tail q^ `[size]` with KL(q^ || uniform) = K: log q^_j falls linearly in j, with the slope for K."""
    if K == 0:
        return uniform(size)
    place = torch.arange(size, dtype=torch.float64)

    def too_far(slope: float) -> bool:
        log_tail = (-slope * place).log_softmax(-1)
        return float(math.log(size) + (log_tail.exp() * log_tail).sum()) > K

    return (-_bisect(too_far, 0.0, 50.0) * place).softmax(-1)


def uniform(size: int = VOCAB - 1) -> Tensor:
    """The teacher's tail p^ `[size]`."""
    return torch.full((size,), 1.0 / size, dtype=torch.float64)


def log_probs(target: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities `[n, 1 + k]`: `target` `[n]` at index 0, the rest distributed as `tail` `[k]` or `[n, k]`."""
    rest = torch.log1p(-target).unsqueeze(-1) + tail.log()
    return torch.cat((target.log().unsqueeze(-1), rest), -1)


def push(objective: Objective, student: Tensor, teacher: Tensor) -> Tensor:
    """The full gradient on the target's logit `[n]`; negative raises it."""
    result = decompose(student, teacher, objective=objective)
    return result.target_push + result.tail_push


def rest(objective: Objective, p_t: Tensor, student_tail: Tensor, teacher_tail: Tensor) -> Tensor:
    """The lowest q_t `[n]` at which nothing pushes the target, the student's tail held; to 1e-10 of its log-odds."""
    steps = torch.linspace(0, 1, 65, dtype=torch.float64)
    teacher = log_probs(p_t, teacher_tail).repeat_interleave(len(steps), 0)
    low, high = torch.full_like(p_t, -EDGE), torch.full_like(p_t, EDGE)
    for _ in range(6):
        tried = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), steps)
        pushes = push(objective, log_probs(torch.sigmoid(tried.flatten()), student_tail), teacher)
        first_down = (pushes.view_as(tried) > 0).int().argmax(-1, keepdim=True)
        low, high = tried.gather(-1, first_down - 1).squeeze(-1), tried.gather(-1, first_down).squeeze(-1)
    return torch.sigmoid((low + high) / 2)


def flow() -> list[Row]:
    """Figure 1: on a grid of (p_t, q_t), the push on the target, and the q_t at which it is 0, tails held at K."""
    p_t, q_t = (axis.flatten() for axis in torch.meshgrid(_float64(FLOW_P), _float64(FLOW_Q), indexing="ij"))
    rows = []
    for name in ("rkl", "drkl"):
        objective = drkl.make_objective(name)
        for K in FLOW_K:
            tail = tail_at(K)
            pushes = push(objective, log_probs(q_t, tail), log_probs(p_t, uniform()))
            at_rest = rest(objective, _float64(FLOW_P), tail, uniform()).repeat_interleave(len(FLOW_Q))
            rows += _rows({"objective": name, "K": K}, p_t=p_t, q_t=q_t, push=pushes, rest_q_t=at_rest)
    return rows


def aligned() -> list[Row]:
    """Figure 2: where q_t = p_t, the push on the target and the norm of the gradient on the tail, against K."""
    mismatches = [2.5 * (step / 30) ** 2 for step in range(31)]
    tails = torch.stack([tail_at(K) for K in mismatches])
    rows = []
    for name in ("rkl", "drkl"):
        for q_t in PUSH_TARGETS:
            target = torch.full((len(mismatches),), q_t, dtype=torch.float64)
            result = decompose(log_probs(target, tails), log_probs(target, uniform()), objective=name)
            on_target = result.target_push + result.tail_push
            on_tail = (result.target_grad + result.tail_grad)[:, 1:].norm(dim=-1)
            rows += _rows({"objective": name, "q_t": q_t}, K=result.K, push=on_target, tail_norm=on_tail)
    return rows


def path_ends() -> tuple[Tensor, Tensor]:
    """Logits `[PATH_VOCAB]` of a Zipf-like teacher, and the noise that makes the student of it."""
    teacher = -1.3 * torch.arange(1, PATH_VOCAB + 1, dtype=torch.float64).log()
    return teacher, PATH_SPREAD * shuffled_normal(PATH_VOCAB, 617)


def shuffled_normal(size: int, stride: int) -> Tensor:
    """Quantiles of a standard Gaussian `[size]`, in the order of the multiples of `stride` (coprime to `size`)."""
    order = (torch.arange(size) * stride) % size
    return torch.special.ndtri((order.double() + 0.5) / size)


def path() -> list[Row]:
    """Figure 3: every registered objective's value and gradient norm on the way from the student to the teacher.

    The student's logits are y + r noise with r, the distance left, from 1 to 0. `ce` is its mean over labels that the
    teacher draws.
    """
    teacher, noise = path_ends()
    left = torch.cat((torch.logspace(0, -2, PATH_STEPS, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    logits = teacher + left.unsqueeze(-1) * noise
    logp = teacher.log_softmax(-1).expand_as(logits)
    rows = []
    for name in drkl.OBJECTIVES:
        objective = drkl.make_objective(name)
        leaf = logits.clone().requires_grad_()
        logq = leaf.log_softmax(-1)
        values = _mean_over_labels(objective, logq, logp) if name == "ce" else objective(logq, logp, None)
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        rows += _rows({"objective": name}, left=left, value=values.detach(), norm=grad.norm(dim=-1))
    return rows


def mixed() -> dict[str, Callable[[float], Objective]]:
    """DRKL, SRKL, the two ways to combine them, and reverse KL, each as a function of the skew."""
    return {
        "rkl": lambda skew: drkl.make_objective("rkl"),
        "srkl": lambda skew: drkl.make_objective("srkl", skew=skew),
        "drkl": lambda skew: drkl.make_objective("drkl"),
        "drkl(skew)": lambda skew: drkl.make_objective("drkl", skew=skew),
        "decoupled(srkl, srkl)": lambda skew: drkl.decoupled(SkewReverseKL(skew=skew), SkewReverseKL(skew=skew)),
    }


def mixture() -> list[Row]:
    """Figure 4: `against` says what `x` is, `y` what was measured.

    - ``q_t``: the push on the target where q_t = p_t = x; K = 1, skew .1.
    - ``skew``: the q_t at rest for p_t = .6, x the skew; K = 1.
    - ``share``: the value at q_t = p_t = .6, where the teacher gives a share x of its tail to the tokens that hold half
      of the student's; skew .1.
    """
    tail, q_t = tail_at(1.0), torch.linspace(0.04, 0.98, 48, dtype=torch.float64)
    rows = []
    for name, make in mixed().items():
        pushes = push(make(SKEW), log_probs(q_t, tail), log_probs(q_t, uniform()))
        rows += _rows({"objective": name, "against": "q_t"}, x=q_t, y=pushes)
        p_t = torch.full((1,), MIX_TARGET, dtype=torch.float64)
        # Reverse KL and DRKL do not depend on the skew: the two ends of their lines are enough.
        for skew in (MIX_SKEWS[0], MIX_SKEWS[-1]) if name in ("rkl", "drkl") else MIX_SKEWS:
            at_rest = rest(make(skew), p_t, tail, uniform())
            rows += _rows({"objective": name, "against": "skew"}, x=_float64([skew]), y=at_rest)
        share = torch.logspace(math.log10(0.5), -8, 24, dtype=torch.float64)
        student, teacher = _halves(share)
        values = make(SKEW)(student, teacher, None)
        rows += _rows({"objective": name, "against": "share"}, x=share, y=values)
    return rows


def weights() -> dict[str, Mapping[str, Any]]:
    """The forms of the tail's weight that figure 5 compares, beside a constant gamma."""
    return {"student": {"weight": "student"}, "floor": {"weight": "floor"}}


def gamma_map() -> list[Row]:
    """Figure 5: how hard DRKL's tail is supervised, as a multiple of reverse KL's `(1-q_t) q^_j (d_j - K)`.

    Measured as the ratio of the norms of two tail gradients. For a constant gamma, over a grid of gammas and q_t; for
    the other weights, over q_t (for ``floor`` with gamma .5).
    """
    log_odds = torch.linspace(math.log(0.03 / 0.97), math.log(999), 56, dtype=torch.float64)
    q_t = torch.sigmoid(log_odds)
    student, teacher = log_probs(q_t, tail_at(1.0)), log_probs(q_t, uniform())

    def force(**params: Any) -> Tensor:
        objective = drkl.make_objective("drkl", **params)
        return decompose(student, teacher, objective=objective).tail_grad[:, 1:].norm(dim=-1)

    reverse = force(weight="student")
    rows = []
    for gamma in sorted({*MAP_GAMMAS, 0.1, GAMMA}):
        rows += _rows({"weight": "constant", "gamma": gamma}, q_t=q_t, ratio=force(gamma=gamma) / reverse)
    for name, params in weights().items():
        gamma_of = GAMMA if name == "floor" else ""
        rows += _rows({"weight": name, "gamma": gamma_of}, q_t=q_t, ratio=force(**params) / reverse)
    return rows


def heat_logits(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits `[n, VOCAB]`: tails in two orders, the student's target `offset` `[n]` higher.

    At an offset of 0 the target has the same probability in both at every temperature: its logit is the same, and so
    is the log-sum-exp of the tail.
    """
    tail = HEAT_SPREAD * shuffled_normal(VOCAB - 1, 1)
    swapped = HEAT_SPREAD * shuffled_normal(VOCAB - 1, 18)
    target = tail.logsumexp(-1) + math.log(HEAT_TARGET / (1 - HEAT_TARGET))
    teacher = torch.cat((target.unsqueeze(0), tail)).expand(len(offset), -1)
    student = torch.cat(((target + offset).unsqueeze(-1), swapped.expand(len(offset), -1)), -1)
    return student, teacher


def temperature() -> list[Row]:
    """Figure 6: value, pushes and gradient norm of three objectives at several temperatures, as they are: no T² yet.

    With ``against`` = ``offset`` x is the student's target logit less the one at which it is aligned; with
    ``temperature``, at that one, x = T.
    """
    rows = []
    offset = torch.linspace(-6, 6, 49, dtype=torch.float64)
    for name in ("rkl", "fkl", "drkl"):
        for T in TEMPERATURES:
            rows += _heat({"objective": name, "against": "offset", "T": T}, name, offset, T)
        for T in torch.logspace(0, 4, 17, base=2.0).tolist():
            rows += _heat({"objective": name, "against": "temperature", "T": T}, name, torch.zeros(1).double(), T)
    return rows


def _heat(named: Row, name: str, offset: Tensor, T: float) -> list[Row]:
    student, teacher = heat_logits(offset)
    result = decompose(student, teacher, objective=name, temperature=T)
    values = distillation_loss(student, teacher, objective=name, temperature=T, reduction="none")
    norm = (result.target_grad + result.tail_grad).norm(dim=-1)
    return _rows(named, offset=offset, value=values, target_push=result.target_push, tail_push=result.tail_push,
                 norm=norm, q_t=result.q_t, p_t=result.p_t, K=result.K)  # fmt: skip


def _halves(share: Tensor) -> tuple[Tensor, Tensor]:
    """The student's tail is uniform; the teacher gives `share` `[n]` of its own to the first half of it."""
    half = (VOCAB - 2) // 2
    target = torch.full_like(share, MIX_TARGET)
    first, second = (mass.unsqueeze(-1).expand(-1, half) / half for mass in (share, 1 - share))
    return log_probs(target, uniform(2 * half)), log_probs(target, torch.cat((first, second), -1))


def _mean_over_labels(objective: Objective, logq: Tensor, logp: Tensor) -> Tensor:
    assert isinstance(objective, CrossEntropy)
    labels = torch.arange(logq.shape[1])
    each = torch.stack([objective(row.expand(len(labels), -1), None, labels) for row in logq])
    return (logp.exp() * each).sum(-1)


def _bisect(too_far: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if too_far(middle) else (middle, high)
    return (low + high) / 2


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _rows(named: Row, **columns: Tensor) -> list[Row]:
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [named | dict(zip(columns, row, strict=True)) for row in values]


def as_csv(rows: Sequence[Row]) -> str:
    """Six digits of each number; below 1e-12 it is a rounded zero, which differs between processors."""
    return to_csv([{key: _or_zero(value) for key, value in row.items()} for row in rows])


def _or_zero(value: Any) -> Any:
    return 0.0 if isinstance(value, float) and abs(value) < 1e-12 else value


ROWS: dict[str, Callable[[], list[Row]]] = {
    "article-1-flow": flow,
    "article-2-aligned": aligned,
    "article-3-path": path,
    "article-4-mixture": mixture,
    "article-5-gamma": gamma_map,
    "article-6-temperature": temperature,
}
"""By a figure's file name, the function that returns its rows."""
