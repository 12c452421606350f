"""The closed form of a loss under torch.compile, for what the Triton kernel does not do."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

from drkl.losses.common import LossSettings
from drkl.losses.topk import TopK

ClosedForm = Callable[[Tensor, Tensor | TopK | None, Tensor | None, LossSettings], Tensor]
"""Values `[n]` from both logits `[n, vocab]` and labels `[n]`; the student's are overwritten with their gradient."""


@functools.lru_cache(maxsize=64)
def compiled(
    closed_form: ClosedForm, settings: LossSettings, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> ClosedForm:
    """The same function, compiled for any number of rows; as it is, with a warning, where it cannot be.

    It is tried once on two rows.
    """

    def bound(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        return closed_form(student, teacher, labels, settings)

    # A code object of its own: torch.compile stops compiling one, without an error, after a few sets of settings.
    code = bound.__code__.replace()
    run = torch.compile(FunctionType(code, bound.__globals__, bound.__name__, None, bound.__closure__))

    def step(student: Tensor, teacher: Tensor | None, labels: Tensor | None, settings: LossSettings) -> Tensor:
        if len(student) < 2:  # what is compiled for any number is not compiled for one
            return closed_form(student, teacher, labels, settings)
        for tensor in (student, teacher, labels):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        values: Tensor = run(student, teacher, labels)
        return values

    student, teacher = (torch.zeros(3, vocab_size, dtype=dtype, device=device) for _ in range(2))
    labels = torch.zeros(3, dtype=torch.long, device=device)
    try:
        step(student, teacher if settings.uses_teacher else None, labels if settings.uses_labels else None, settings)
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
