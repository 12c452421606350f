"""Name the tensor at fault, and whose it is, when a loss is not a finite number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drkl.losses import LMHead
from drkl.losses.topk import TopK
from drkl.models.sharded import local, runs_together
from drkl.models.weights import broken_weights, is_finite
from drkl.objectives import Objective
from drkl.teachers.cached import TeacherCache
from drkl.teachers.served import ServedTeacher
from drkl.teachers.teacher import Teacher

LEARNING_RATE = "A lower learning rate, a warm-up, or training.precision=fp32 often help, in a new run."
_COPY = "The teacher is at fault and no setting of the training mends it: take a copy of it that is whole."
_CHUNK = 256
"""Positions whose logits are looked at at once."""


@dataclass(frozen=True)
class Fault:
    """The first tensor that is not finite, in the order of the computation."""

    tensor: str
    remedy: str = LEARNING_RATE
    is_permanent: bool = False
    """Whether every later step has it too."""


@dataclass(frozen=True)
class Way:
    """What a micro-batch went through on its way to the loss.

    Attributes:
        student: the model that is trained.
        hidden: `[n, hidden]`, its states.
        teacher: what teaches; None where the loss reads no teacher.
        teacher_hidden: what it knows at the same positions.
        objective: what is minimised.
        heads: of the student and of the teacher; None for logits that need none.
        read_again: calls the student once more on the same rows, and the teacher, to see in which of their modules it
            begins; None where that is not wanted.
    """

    student: nn.Module
    hidden: Tensor
    teacher: Teacher | None
    teacher_hidden: Tensor | TopK | None
    objective: Objective
    heads: tuple[LMHead | None, LMHead | None] = (None, None)
    read_again: tuple[Callable[[], Any], Callable[[], Any]] | None = None


@torch.no_grad()
def find_fault(way: Way) -> Fault:
    """Say which tensor stopped being finite first on the way to the loss. No process waits for another."""
    for found in (_of_teacher(way), _of_student(way)):
        if found is not None:
            return found
    return Fault(
        f"the loss itself (objective {way.objective.name!r} on finite logits; a token that one model excludes and the "
        "other does not makes a KL infinite)",
        "The objectives srkl, sfkl and gjs stay finite there.",
    )


def _of_teacher(way: Way) -> Fault | None:
    teacher, known = way.teacher, way.teacher_hidden
    if teacher is None or known is None:
        return None
    whose, cure = _source(teacher)
    if isinstance(known, TopK):
        numbers = [known.logits, known.log_rest] + ([] if known.label_logits is None else [known.label_logits])
        bad = sum(_bad_logits(one) for one in numbers)
        return Fault(f"{bad} of the teacher's largest logits, {whose}", cure) if bad else None
    if broken := [name for name in broken_weights(teacher.model) if not _is_meta(teacher.model, name)]:
        return Fault(_weight("teacher", teacher.model, broken[0]), _COPY, is_permanent=True)
    if count := _count(known):
        where = "" if way.read_again is None else first_module(teacher.model, way.read_again[1])
        return Fault(f"{count} in the teacher hidden states{where}, {whose}", cure)
    if bad := _bad_in_head(way.heads[1], known):
        return Fault(f"{bad} numbers in the teacher logits, {whose}", cure)
    return None


def _source(teacher: Teacher) -> tuple[str, str]:
    """Where a teacher's numbers come from, and the cure."""
    if isinstance(teacher, TeacherCache):
        folder = repr(str(teacher.folder))
        return f"of the cache {folder}", f"The cache {folder} is at fault: make it again with `drkl cache`."
    if isinstance(teacher, ServedTeacher):
        return "of its server", "The teacher's server is at fault: start it again, with raw log-probabilities."
    dtype = str(getattr(teacher.model, "dtype", "its dtype")).removeprefix("torch.")
    return f"which overflow in {dtype}", "The teacher is at fault, not the student: teacher.dtype=fp32 has more room."


def _of_student(way: Way) -> Fault | None:
    student = way.student
    if broken := broken_weights(student):
        return Fault(_weight("student", student, broken[0]), is_permanent=True)
    if count := _count(way.hidden):
        where = "" if way.read_again is None else first_module(student, way.read_again[0])
        return Fault(f"{count} in the student hidden states{where}")
    if bad := _bad_in_head(way.heads[0], way.hidden):
        return Fault(f"{bad} numbers in the student logits")
    return None


def _weight(whose: str, model: nn.Module, name: str) -> str:
    return f"{_count(model.get_parameter(name))} in the {whose} weight {name!r}"


def _is_meta(model: nn.Module, name: str) -> bool:
    return model.get_parameter(name).is_meta  # those of a cached teacher


def _count(tensor: Tensor) -> str:
    """How many numbers are not finite; empty for none."""
    tensor = local(tensor)
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} numbers" if bad else ""


def _bad_logits(logits: Tensor) -> int:
    return int((logits.isnan() | (logits == torch.inf)).sum())  # minus infinity excludes a token


def _bad_in_head(head: LMHead | None, hidden: Tensor) -> int:
    if head is None:
        return 0
    with suppress(RuntimeError):  # a head whose parts are elsewhere, or no memory: there is less to tell then
        return sum(_bad_logits(head.logits(part)) for part in hidden.split(_CHUNK))
    return 0


def first_module(model: nn.Module, call: Callable[[], Any]) -> str:
    """Call a model again and name the first of its modules whose output is not finite; empty where none is found."""
    found: list[str] = []

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def look(module: Any, given: Any, output: Any) -> None:
            if not found and not all(is_finite(local(tensor)) for tensor in _tensors(output)):
                found.append(name)

        return look

    if runs_together(model):
        return ""
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with suppress(Exception), torch.random.fork_rng():  # it says where a fault is, and may have none of its own
            call()
    finally:
        for handle in handles:
            handle.remove()
    return f", first in what its {found[0]!r} gives" if found else ""


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from _tensors(one)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))


def gradient_fault(student: nn.Module) -> Fault:
    """Which gradient stopped being finite first: the backward pass comes to the last weights first."""
    gradients = [(name, weight.grad) for name, weight in student.named_parameters() if weight.grad is not None]
    bad = [name for name, gradient in gradients if not is_finite(local(gradient))]
    if not bad:
        return Fault("the norm of the gradient, whose numbers are finite by themselves")
    others = f" (and {len(bad) - 1} of {len(gradients) - 1} others)" if len(bad) > 1 else ""
    return Fault(f"the gradient of {bad[-1]!r}{others}")


def state_faults(optimizer: torch.optim.Optimizer | None, student: nn.Module) -> list[str]:
    """The parts of an optimiser's state that are not finite, each with the name of its weight."""
    names = {id(weight): name for name, weight in student.named_parameters()}
    return [
        f"{key} of {names.get(id(weight), 'a weight')!r}"
        for weight, state in getattr(optimizer, "state", {}).items()
        if isinstance(state, Mapping)
        for key, value in state.items()
        if isinstance(value, Tensor) and not is_finite(local(value))
    ]


def list_rows(row_ids: Iterable[str], at_most: int = 20) -> str:
    """The rows' ids, cut where they are many."""
    ids = list(row_ids)
    rest = f" and {len(ids) - at_most} more" if len(ids) > at_most else ""
    return ", ".join(ids[:at_most]) + rest
