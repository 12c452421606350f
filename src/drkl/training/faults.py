"""Name the tensor at fault when a loss is not a finite number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from drkl.losses.topk import TopK
from drkl.models.sharded import local
from drkl.objectives import Objective
from drkl.teachers.teacher import Teacher


def find_fault(
    student: nn.Module,
    hidden: Tensor,
    teacher: Teacher | None,
    teacher_hidden: Tensor | TopK | None,
    objective: Objective,
) -> str:
    """Say which tensor stopped being finite first on the way to the loss."""
    for name, tensor in _on_the_way(student, hidden, teacher, teacher_hidden):
        tensor = local(tensor)  # other processes may have no fault to look for
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return f"{bad} of {tensor.numel()} numbers in the {name}"
    return (
        f"the loss itself (objective {objective.name!r} on finite hidden states; a token that one model excludes and "
        "the other does not makes a KL infinite)"
    )


def _on_the_way(
    student: nn.Module, hidden: Tensor, teacher: Teacher | None, teacher_hidden: Tensor | TopK | None
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in student.named_parameters():
        yield f"student weight {name!r}", weight
    yield "student hidden states", hidden
    if teacher is not None and isinstance(teacher_hidden, Tensor):  # a few logits are finite or excluded
        for name, weight in teacher.model.named_parameters():
            if not weight.is_meta:  # those of a cached teacher
                yield f"teacher weight {name!r}", weight
        yield "teacher hidden states", teacher_hidden


def list_rows(row_ids: Iterable[str], at_most: int = 20) -> str:
    """The rows' ids, cut where they are many."""
    ids = list(row_ids)
    rest = f" and {len(ids) - at_most} more" if len(ids) > at_most else ""
    return ", ".join(ids[:at_most]) + rest
