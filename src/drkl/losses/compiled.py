"""The closed form of a loss under torch.compile, for what the Triton kernel does not do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from drkl.losses.common import LossSettings
from drkl.losses.topk import TopK
from drkl.objectives import Objective

ClosedForm = Callable[[Tensor, Tensor | TopK | None, Tensor | None, LossSettings], Tensor]
"""Values `[n]` from both logits `[n, vocab]` and labels `[n]`; the student's are overwritten with their gradient."""


_MOST = 64
_made: dict[Any, tuple[Objective, ClosedForm]] = {}
"""With the objective, whose identity is part of its key where it has no hash."""


def compiled(
    closed_form: ClosedForm, settings: LossSettings, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> ClosedForm:
    """The same function, compiled for any number of rows; as it is, with a warning, where it cannot be.

    It is tried once on three rows.
    """
    words = settings.temperature, settings.kd_weight, settings.t2_scaling, settings.merged
    key = closed_form, _name_of(settings.objective), *words, vocab_size, dtype, device
    if key not in _made:
        if len(_made) >= _MOST:
            _made.clear()
        _made[key] = settings.objective, _tried(closed_form, settings, vocab_size, dtype, device)
    return _made[key][1]


def _name_of(objective: Objective) -> Any:
    try:
        hash(objective)
    except TypeError:
        return id(objective)
    return objective


def _tried(
    closed_form: ClosedForm, settings: LossSettings, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> ClosedForm:
    def bound(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return closed_form(student, teacher, labels, settings)

    # A code object of its own: torch.compile stops compiling one, without an error, after a few sets of settings.
    code = bound.__code__.replace()
    run = torch.compile(FunctionType(code, bound.__globals__, bound.__name__, None, bound.__closure__))

    def step(student: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, settings: LossSettings) -> Tensor:
        if len(student) < 2:  # what is compiled for any number is not compiled for one
            return closed_form(student, teacher, labels, settings)
        whole = student.contiguous()  # it is not compiled for strides, over which torch.compile stumbles
        given = whole, teacher.contiguous() if isinstance(teacher, Tensor) else teacher, labels
        for tensor in given:
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        values: Tensor = run(*given)
        if whole is not student:
            student.copy_(whole)
        return values

    student, teacher = (torch.zeros(3, vocab_size, dtype=dtype, device=device) for _ in range(2))
    labels = torch.zeros(3, dtype=torch.long, device=device) if settings.uses_labels else None
    try:
        step(student, teacher if settings.uses_teacher else None, labels, settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # without a C compiler, say, or for code that torch.compile cannot read
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"torch.compile cannot compile the closed form of objective {settings.objective.name!r}; the loss goes on "
            f"without it, slower. {reason}",
            stacklevel=2,
        )
        return closed_form
    return step
