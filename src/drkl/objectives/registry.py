"""The list of objectives, and functions that make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from drkl.errors import DrklError, did_you_mean
from drkl.objectives import adaptive, alpha_beta, divergences
from drkl.objectives.base import FunctionObjective, Objective, check_choice, check_number
from drkl.objectives.decoupled import GAMMA, Decoupled, DecoupledKnowledgeDistillation, DecoupledReverseKL
from drkl.runs import IN_MEMORY

CLASSES: tuple[type[Objective], ...] = (
    divergences.CrossEntropy,
    divergences.ForwardKL,
    divergences.ReverseKL,
    divergences.SymmetricKL,
    divergences.GeneralizedJensenShannon,
    divergences.SkewForwardKL,
    divergences.SkewReverseKL,
    divergences.TotalVariation,
    adaptive.AdaptiveKL,
    alpha_beta.AlphaBeta,
    adaptive.TokenWiseKL,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
)
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in CLASSES}
ObjectiveLike = str | Objective | Callable[..., Tensor]
"""A name in `OBJECTIVES`, an objective, or a function ``(student_logp, teacher_logp, labels) -> [n]``."""


def make_objective(name: ObjectiveLike, **params: Any) -> Objective:
    """Make an objective by its name, or of a function.

    Args:
        name: a key of `drkl.OBJECTIVES`, or ``decoupled`` with the parameters of `drkl.decoupled`; or a function
            ``(student_logp, teacher_logp, labels) -> [n]``; an objective is returned as it is.
        **params: the hyper-parameters of a named objective; those left out take the default.

    Raises:
        DrklError: an unknown name or parameter, a value outside its domain, a class in place of an instance, or a
            function of other arguments.

    >>> make_objective("drkl", gamma=0.25).gamma
    0.25
    >>> make_objective(lambda student_logp, teacher_logp, labels: -student_logp[:, 0]).name
    '<lambda>'
    """
    if not isinstance(name, str):
        if isinstance(name, type):
            raise DrklError(f"objective is the class {name.__name__}; expected an instance, {name.__name__}(...).")
        if params:
            raise DrklError(f"Parameters {sorted(params)} were given beside an objective that is already made.")
        if isinstance(name, Objective):
            return name
        if callable(name):
            return FunctionObjective(name)
        raise DrklError(
            f"objective is {name!r}; expected a name in drkl.OBJECTIVES, an objective, or a function of "
            "(student_logp, teacher_logp, labels)."
        )
    if name.startswith(IN_MEMORY):
        raise DrklError(
            f"The objective was passed {name.replace(':', ',', 1)}, so it cannot be made again by a name. Train in "
            "Python: drkl.DistillationConfig(output_dir=..., objective=your_function)."
        )
    known = (*OBJECTIVES, Decoupled.name)
    if name not in known:
        raise DrklError(f"There is no objective {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    cls: Any = Decoupled if name == Decoupled.name else OBJECTIVES[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in params:
        if key not in fields:
            has = f"it has {', '.join(fields)}" if fields else "it has none"
            raise DrklError(f"Objective {name!r} has no parameter {key!r}; {has}.{did_you_mean(key, fields)}")
    objective: Objective = decoupled(**params) if cls is Decoupled else cls(**params)
    return objective


def settings_of(objective: Objective) -> tuple[str, dict[str, Any]] | None:
    """The name and the parameters by which `make_objective` makes an objective again; None where it cannot."""
    cls: Any = type(objective)
    fields = (
        {f.name: getattr(objective, f.name) for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    )
    if OBJECTIVES.get(objective.name) is cls:
        return objective.name, fields
    if cls is not Decoupled:
        return None
    parts = {place: getattr(objective, place) for place in ("on_target", "on_tail")}
    if any(part != _default(part.name) for part in parts.values()):
        return None
    return objective.name, fields | {place: part.name for place, part in parts.items()}


def _default(name: str) -> Objective | None:
    return OBJECTIVES[name]() if name in OBJECTIVES else None


def is_divergence(objective: Objective) -> bool:
    """Whether it compares student and teacher and nothing else, so that a decoupled objective may be made of it."""
    return objective.needs_teacher and not objective.needs_labels and not hasattr(objective, "target")


def decoupled(
    on_target: ObjectiveLike = "rkl",
    on_tail: ObjectiveLike = "rkl",
    gamma: float = GAMMA,
    target_weight: float = 1.0,
    target: str = "teacher",
    weight: str = "constant",
) -> Decoupled:
    """Compose a decoupled objective: ``target_weight * F(b_q, b_p) + w * G(q^, p^)``.

    Args:
        on_target: the divergence F on (target, rest): the name of one without a target of its own, an objective, or a
            function ``(student_logp, teacher_logp, labels) -> [n]``.
        on_tail: the divergence G on the renormalised tails, likewise.
        gamma: the tail's weight, > 0.
        target_weight: the factor a, >= 0.
        target: ``teacher`` (its top token) or ``label`` (the observed token).
        weight: ``constant`` (w = gamma), ``student`` (1 - q_t, detached), ``teacher`` (1 - p_t) or ``floor``
            (max(gamma, 1 - q_t), detached).

    Raises:
        DrklError: an unknown part, or a value outside its domain.

    >>> decoupled("rkl", "gjs", gamma=0.25).on_tail.name
    'gjs'
    """
    parts = []
    for place, given in (("on_target", on_target), ("on_tail", on_tail)):
        if isinstance(given, str):
            check_choice("decoupled", place, given, [n for n, cls in OBJECTIVES.items() if is_divergence(cls())])
        part = make_objective(given)
        if part.needs_labels or not part.needs_teacher:
            raise DrklError(f"decoupled.{place} is {part.name!r}; expected a divergence between student and teacher.")
        parts.append(part)
    check_number("decoupled", "gamma", gamma, "greater than 0", lambda value: value > 0)
    return Decoupled(parts[0], parts[1], gamma, target_weight, target, weight)
