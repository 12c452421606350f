"""The row step of the fused loss as one Triton kernel: a position's value, and its gradient in place of its logits.

The same equations as the objectives' definitions, in fp32, for rows of any width. A program takes a row and sweeps over
it, reading both models' products with their heads once in each sweep:

1. the log-sum-exps, with the sums of the two KLs beside them; a target class is left out of them, and where it is the
   teacher's top token it is found in the same sweep;
2. for akl alone, the teacher's head set, unless its top token is all of it, and the gaps in and out of it;
3. the sums of the objective's terms and slopes, unless the first sweep's give them;
4. the gradient.

Infinite logits are what they are in the definition: an infinite value comes with the finite gradient of the other
classes, which takes such a row sweep 3. Imported only where Triton is there and used. Triton's interpreter runs all of
it on a processor, one program after the other and with numpy's functions: it cuts to bf16 where a GPU rounds, and shows
nothing of a GPU's own exponentials, of threads that do not wait for each other, or of what the compiler refuses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from drkl.losses import row_programs, row_terms
from drkl.losses.common import LossSettings
from drkl.losses.head import LMHead
from drkl.objectives import (
    AdaptiveKL,
    AlphaBeta,
    CrossEntropy,
    Decoupled,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
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
from drkl.objectives.adaptive import reached
from drkl.objectives.alpha_beta import SMALL_SUM

BLOCK, WARPS = 2048, 8


class Part(NamedTuple):
    """A divergence as the kernel has it: which sweeps it needs, and its parameters."""

    term: Any
    """Its device function, in `drkl.losses.row_terms`."""
    needs_sweep: bool
    """Whether its value takes a sweep of its own; else the first sweep gives it as a mean of the two KLs."""
    parameters: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """What its function takes; where it needs no sweep, the first is the weight of forward KL."""
    is_adaptive: bool = False
    """Whether that weight is the row's own; the first parameter is then the mass of the head."""


def _mixed(term: Any, teacher_weight: float, student_weight: float) -> Part:
    return Part(term, True, (teacher_weight, student_weight, math.log(teacher_weight), math.log(student_weight)))


def _alpha_beta(objective: AlphaBeta) -> Part:
    total = objective.alpha + objective.beta
    term = row_terms.ab if total >= SMALL_SUM else row_terms.ab_small if total > 0 else row_terms.ab_zero
    return Part(term, True, (objective.alpha, objective.beta, total, 0.0))


FKL, RKL = Part(row_terms.fkl, False, (1.0, 0.0, 0.0, 0.0)), Part(row_terms.rkl, False)
PARTS: dict[type[Objective], Any] = {
    ForwardKL: lambda o: FKL,
    ReverseKL: lambda o: RKL,
    SymmetricKL: lambda o: Part(row_terms.symmetric_kl, False, (o.forward_weight, 0.0, 0.0, 0.0)),
    AdaptiveKL: lambda o: Part(
        row_terms.symmetric_kl, False, (reached(o.mu, torch.float32) if o.mu < 1 else 2.0, 0.0, 0.0, 0.0), True
    ),
    GeneralizedJensenShannon: lambda o: _mixed(row_terms.gjs, o.beta, 1.0 - o.beta),
    SkewForwardKL: lambda o: _mixed(row_terms.sfkl, o.skew, 1.0 - o.skew) if o.skew > 0 else FKL,
    SkewReverseKL: lambda o: _mixed(row_terms.srkl, 1.0 - o.skew, o.skew) if o.skew > 0 else RKL,
    TotalVariation: lambda o: Part(row_terms.tvd, True),
    TokenWiseKL: lambda o: Part(row_terms.todi, True),
    AlphaBeta: _alpha_beta,
}
"""Every divergence over a list of classes."""


@dataclass(frozen=True)
class Program:
    """An objective as the kernel has it: one divergence on all classes, or on the target and on the tail."""

    on_classes: Part
    on_target: Part = RKL
    target: str = "none"
    weight: str = "constant"
    gamma: float = 1.0
    target_weight: float = 1.0
    is_skewed: bool = False


def _program(objective: Objective) -> Program | None:
    """None for an objective that the kernel does not know; a subclass may compute anything."""
    if type(objective) is DecoupledKnowledgeDistillation:
        return _program(objective._operator)
    if type(objective) is DecoupledReverseKL:
        program = _program(objective._operator)
        if program is None or objective.skew == 0:
            return program
        skewed = PARTS[SkewReverseKL](SkewReverseKL(objective.skew))
        return Program(skewed, skewed, program.target, program.weight, program.gamma, is_skewed=True)
    if type(objective) is Decoupled:
        if type(objective.on_target) not in PARTS or type(objective.on_tail) not in PARTS:
            return None
        on_target, on_tail = (PARTS[type(part)](part) for part in (objective.on_target, objective.on_tail))
        o = objective
        return Program(on_tail, on_target, o.target, o.weight, o.gamma, o.target_weight)
    return Program(PARTS[type(objective)](objective)) if type(objective) in PARTS else None


def why_not(settings: LossSettings) -> str | None:
    """Why the kernel cannot compute this loss, as a sentence; None where it can."""
    objective = settings.objective
    if not settings.uses_objective or type(objective) is CrossEntropy or _program(objective) is not None:
        return None
    return f"The row kernel has no device function for objective {objective.name!r}, which is none of drkl.OBJECTIVES."


def supports(settings: LossSettings) -> bool:
    """Whether the kernel computes this loss."""
    return why_not(settings) is None


Event = tuple[int, Tensor, Tensor | None]


def row_step_(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    settings: LossSettings,
    *,
    vocab_size: int | None = None,
    student_head: LMHead | None = None,
    teacher_head: LMHead | None = None,
    event: Event | None = None,
    needs_grad: bool = True,
) -> Tensor:
    """Return the values `[n]` in fp32 and overwrite ``student`` with their gradient on it.

    Args:
        student: `[n, width]` in fp32, bf16 or fp16, ``hidden @ weight.T``; rows may be any distance apart. A product of
            -inf is a class that is excluded, also below a soft-cap. The gradient is that on the products, which is that
            on ``product + bias`` too: the bias's is its sum over the rows.
        teacher: the same of the teacher, left as it is; None where the loss needs none.
        labels: `[n]`, where the loss needs them.
        settings: what `supports` accepts; ``merged`` is not looked at.
        vocab_size: the number of columns that count, from 0; None for all.
        student_head: its bias, scale and soft-cap, which stand between the products and the logits.
        teacher_head: the same of the teacher.
        event: a column, and both models' logits `[n]` in fp32 that stand there instead of what the rows hold (ids that
            count as one class); what is written there is the gradient on that logit itself. One temperature at a time:
            no cross-entropy beside an objective whose temperature is not 1.
        needs_grad: False leaves ``student`` as it is.
    """
    count, width = student.shape
    vocab_size = width if vocab_size is None else vocab_size
    values = torch.empty(count, dtype=torch.float32, device=student.device)
    launch = launched(settings, vocab_size)
    compared_with = student if teacher is None else teacher
    assert student.stride(-1) == 1 and compared_with.stride(-1) == 1 and compared_with.shape[0] == count
    column, ours, theirs = (-1, values, None) if event is None else event
    assert event is None or not launch.constants["UNIT"]
    has_event = event is not None
    heads = [_Head.of(head, values, has_event) for head in (student_head, teacher_head)]
    if count:
        row_programs.row_step[(count,)](
            student,
            compared_with,
            values if labels is None else labels.contiguous(),
            values,
            heads[0].bias,
            heads[1].bias,
            student.stride(0),
            compared_with.stride(0),
            vocab_size,
            column,
            ours.contiguous(),
            (ours if theirs is None else theirs).contiguous(),
            *heads[0].numbers,
            *heads[1].numbers,
            *launch.numbers,
            HEADS=(heads[0].flags, heads[1].flags),
            GRAD=needs_grad,
            **launch.constants,
        )
    return values


def rest_log_sum_exp(
    products: Tensor, temperatures: Sequence[float], *, vocab_size: int | None = None, head: LMHead | None = None
) -> Tensor:
    """Return the log-sum-exps `[n, m]` in fp32 of logits over each of m temperatures, one or two, in one sweep.

    A column whose product is -inf is left out: put -inf where the tokens of a `TopK` stand, once they are gathered.

    Args:
        products: `[n, width]`, as in `row_step_`.
        temperatures: m numbers.
        vocab_size: as in `row_step_`.
        head: what stands between the products and the logits.
    """
    count, width = products.shape
    vocab_size = width if vocab_size is None else vocab_size
    sums = torch.empty(count, len(temperatures), dtype=torch.float32, device=products.device)
    first, last, taken = temperatures[0], temperatures[-1], _Head.of(head, sums)
    if count:
        row_programs.rest_sums[(count,)](
            products,
            taken.bias,
            sums,
            products.stride(0),
            vocab_size,
            *taken.numbers,
            1.0 / first,
            first / last,
            HEAD=taken.flags,
            COUNT=len(temperatures),
            **_shape(vocab_size),
        )
    return sums


Share = tuple[float, Tensor, Tensor]
"""A temperature, the log-sum-exp `[n]` that belongs to it, and a factor `[n]`."""


def spread_rest_(
    products: Tensor,
    shares: Sequence[Share],
    *,
    labels: Tensor | None = None,
    label_share: float = 0.0,
    vocab_size: int | None = None,
    head: LMHead | None = None,
) -> None:
    """Overwrite ``products`` with the gradient of a value that saw some of the columns as one class.

    The gradient on a column's logit z is the sum over ``shares`` of factor exp(z / temperature - log_sum), less
    ``label_share`` at the label. A column whose product is -inf gets 0.

    Args:
        products: `[n, width]`, as in `row_step_`.
        shares: one or two.
        labels: `[n]`, where ``label_share`` is not 0.
        label_share: what the label's column loses.
        vocab_size: as in `row_step_`.
        head: what stands between the products and the logits.
    """
    count, width = products.shape
    vocab_size = width if vocab_size is None else vocab_size
    first, last = shares[0], shares[-1]
    taken = _Head.of(head, first[1])
    if count:
        row_programs.spread_rest[(count,)](
            products,
            taken.bias,
            *(vector.float().contiguous() for share in (first, last) for vector in share[1:]),
            first[1] if labels is None else labels.contiguous(),
            products.stride(0),
            vocab_size,
            *taken.numbers,
            1.0 / first[0],
            1.0 / last[0],
            float(label_share),
            HEAD=taken.flags,
            COUNT=len(shares),
            LABEL=labels is not None,
            **_shape(vocab_size),
        )


class _Head(NamedTuple):
    """What stands between products and logits, as the kernel takes it."""

    bias: Tensor
    numbers: tuple[float, float]
    flags: tuple[bool, bool, bool, bool]

    @classmethod
    def of(cls, head: LMHead | None, unused: Tensor, has_event: bool = False) -> _Head:
        if head is None:
            return cls(unused, (1.0, 1.0), (False, False, False, has_event))
        capped, biased = head.softcap is not None, head.bias is not None
        mapped = biased or capped or head.scale != 1.0
        bias = unused if head.bias is None else head.bias.contiguous()
        return cls(bias, (float(head.scale), float(head.softcap or 1.0)), (biased, mapped, capped, has_event))


class Launch(NamedTuple):
    """The arguments of the program that follow from the loss alone."""

    numbers: tuple[float, ...]
    constants: dict[str, Any]


def _shape(vocab_size: int) -> dict[str, int]:
    """The columns that a program takes at a time, and its warps: a row that is one block gets no more than it needs."""
    block = min(BLOCK, triton.next_power_of_2(vocab_size))
    return {"BLOCK": block, "num_warps": max(1, min(WARPS, block // 256))}


def launched(settings: LossSettings, vocab_size: int) -> Launch:
    """How the program is called for a loss that `supports` accepts."""
    observes = settings.uses_objective and type(settings.objective) is CrossEntropy
    program = _program(settings.objective) if settings.uses_objective and not observes else None
    assert supports(settings)
    temperature = settings.temperature if settings.uses_objective else 1.0
    at_temperature = settings.kd_factor if observes else 0.0
    at_one = 1.0 - settings.kd_weight
    if temperature == 1.0:
        at_temperature, at_one = 0.0, at_one + at_temperature
    parts = program or Program(RKL)
    constants: dict[str, Any] = {
        "COMPARES": program is not None,
        "AT_TEMPERATURE": at_temperature > 0,
        "AT_ONE": at_one > 0,
        "UNIT": at_one > 0 and temperature != 1.0,
        "TARGET": parts.target,
        "WEIGHT": parts.weight,
        "SKEWED": parts.is_skewed,
        "ON_TARGET": parts.on_target.term,
        "ADAPTIVE_TARGET": parts.on_target.is_adaptive,
        "ON_CLASSES": parts.on_classes.term,
        "ADAPTIVE_CLASSES": parts.on_classes.is_adaptive,
        "FORWARD": not parts.on_classes.needs_sweep and parts.on_classes.term is not row_terms.rkl,
        "REVERSE": not parts.on_classes.needs_sweep and parts.on_classes.term is not row_terms.fkl,
        **_shape(vocab_size),
    }
    numbers = [1.0 / temperature, temperature, settings.kd_factor, at_temperature, at_one]
    numbers += [parts.gamma, parts.target_weight, *parts.on_target.parameters, *parts.on_classes.parameters]
    return Launch(tuple(map(float, numbers)), constants)
