"""The training loss of one micro-batch and the numbers that are logged with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drkl.losses import LMHead, LogitChunk, distillation_loss, fused_distillation_loss
from drkl.losses.config import LossConfig
from drkl.losses.fused import block_rows
from drkl.losses.kernel_statistics import kernel_statistics
from drkl.losses.topk import TopK
from drkl.objectives.logspace import argmax
from drkl.positions import token_statistics
from drkl.rollouts.config import PREFIX

STATISTICS_POSITIONS = 256
"""At most this many positions of a step, evenly spread, give the logged entropies and KLs."""
POSITIONS = "positions"


def loss_of(
    hidden: Tensor,
    head: LMHead | None,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: LMHead | None,
    labels: Tensor,
    loss: LossConfig,
    *,
    sampled: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """The fused loss of hidden states and heads; where there is no head, the dense one of class logits.

    Args:
        hidden: `[n, hidden]`, the student's; `[n, classes]` where there is no head.
        head: the student's.
        teacher_hidden: `[n, hidden]`, likewise, or the teacher's k largest logits; None where the objective needs none.
        teacher_head: the teacher's.
        labels: `[n]`.
        loss: the loss around the objective.
        sampled: `[n]`, true at the tokens of sampled answers. Their weight in the objective is the same, and in the
            cross-entropy 0: a student has nothing to learn from the tokens it chose itself.
        **settings: further keyword arguments of both losses.
    """
    if sampled is not None and loss.kd_weight < 1 and bool(sampled.any()):
        return _without_cross_entropy(
            hidden, head, teacher_hidden, teacher_head, labels, loss, sampled=sampled, **settings
        )
    settings |= {"temperature": loss.temperature, "kd_weight": loss.kd_weight, "t2_scaling": loss.t2_scaling}
    if head is None:
        return distillation_loss(hidden, teacher_hidden, labels, **settings)
    return fused_distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, **settings)


def _without_cross_entropy(
    hidden: Tensor,
    head: LMHead | None,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: LMHead | None,
    labels: Tensor,
    loss: LossConfig,
    *,
    sampled: Tensor,
    **settings: Any,
) -> Tensor:
    """Sampled answers and the data's responses apart, with one divisor."""
    num_tokens, observe = settings.pop("num_tokens", None), settings.pop("observe", None)
    num_tokens = labels.numel() if num_tokens is None else num_tokens
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, config in ((sampled, loss.model_copy(update={"kd_weight": 1.0})), (~sampled, loss)):
        if not bool(part.any()):
            continue
        value = loss_of(
            hidden[part],
            head,
            None if teacher_hidden is None else teacher_hidden[part],
            teacher_head,
            labels[part],
            config,
            num_tokens=num_tokens,
            observe=observe.at(part) if isinstance(observe, StatisticsSums) else observe,
            **settings,
        )
        total = total + (value * loss.kd_weight if part is sampled else value)
    return total


def logged_columns(student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """What is logged at each of `[n]` positions, from logits `[n, vocab]`: by a kernel where one runs.

    Args:
        student: the student's.
        teacher: the teacher's; without it only what is the student's own.
        labels: `[n]`.
    """
    if (found := kernel_statistics(student, teacher, labels)) is not None:
        return found
    values = token_statistics(student, teacher, labels)
    columns = {
        "nll": values.nll,
        "student_entropy": values.entropy,
        "fkl": values.fkl,
        "rkl": values.rkl,
        "agreement": values.agreement,
        "teacher_entropy": values.teacher_entropy,
    }
    return {name: value for name, value in columns.items() if value is not None}


@torch.no_grad()
def class_columns(student: Tensor, teacher: TopK, temperature: float) -> dict[str, Tensor]:
    """What is logged of a student and a teacher of which a few logits are known, at each of `[n]` positions.

    The KLs and the teacher's entropy are those of the k + 1 classes at temperature 1, lower bounds of those over the
    vocabulary. The agreement is exact.

    Args:
        student: `[n, vocab]`, its logits.
        teacher: of the same positions.
        temperature: at which the teacher's masses are told.
    """
    student = student.to(torch.promote_types(torch.float32, student.dtype))
    classes = teacher.student_classes(student), teacher.classes(1.0).to(student.dtype)
    values = logged_columns(*classes, torch.zeros(len(teacher), dtype=torch.long, device=teacher.device))
    mass, tail_mass = teacher.masses(temperature)
    return {
        "fkl": values["fkl"],
        "rkl": values["rkl"],
        "agreement": (argmax(student) == teacher.ids[:, 0]).to(student.dtype),
        "teacher_entropy": values["teacher_entropy"],
        "teacher_mass": mass,
        "teacher_tail_mass": tail_mass,
    }


class StatisticsSums:
    """Sums of token statistics over every ``every``-th position of a loss: an observer of its logits.

    ``sums`` has those that training logs, by the names it logs them under, and the number of ``positions``. Positions
    that ``sampled`` marks are summed apart, under the same names with ``rollout_`` before them.

    Args:
        every: 1 takes all positions.
        sampled: `[n]` bool over the positions of the loss, true in answers that a model wrote; None marks none.
        temperature: of the loss, at which a teacher's masses are told.
        places: `[n]` ints, by which the positions are counted, where the loss is one part of a step: the same positions
            are taken however the step is cut. None counts from 0.
    """

    def __init__(
        self,
        every: int = 1,
        sampled: Tensor | None = None,
        *,
        temperature: float = 1.0,
        places: Tensor | None = None,
    ) -> None:
        self.sums: dict[str, Tensor] = {POSITIONS: torch.tensor(0)}
        self._every, self._sampled, self._temperature, self._places = every, sampled, temperature, places

    def __call__(self, chunk: LogitChunk) -> None:
        assert chunk.labels is not None
        if chunk.rows is None:
            rows = self.chosen(chunk.start, chunk.labels.numel(), chunk.labels.device)
            theirs = None if chunk.teacher is None else chunk.teacher[rows]
            chunk = LogitChunk(chunk.student[rows], theirs, chunk.labels[rows], chunk.start, rows)
        student, teacher, labels = chunk.student, chunk.teacher, chunk.labels
        assert labels is not None
        if not labels.numel():
            return
        size = 4 * block_rows(student)  # what a call costs beside its numbers is more here than a cache saves
        blocks = [
            self._columns(student[block], None if teacher is None else teacher[block], labels[block])
            for block in (slice(start, start + size) for start in range(0, len(labels), size))
        ]
        parts = self._parts(chunk, labels.device)
        for name in blocks[0]:
            value = torch.cat([block[name] for block in blocks])
            for prefix, part in parts:
                some = value[part if isinstance(part, slice) else part.to(value.device)]
                self.sums[prefix + name] = self.sums.get(prefix + name, 0) + some.sum()

    def _columns(self, student: Tensor, teacher: Tensor | TopK | None, labels: Tensor) -> dict[str, Tensor]:
        """The statistics of some positions, each `[n]`."""
        columns = logged_columns(student, teacher if isinstance(teacher, Tensor) else None, labels)
        columns[POSITIONS] = torch.ones(labels.numel(), dtype=torch.int64)
        if isinstance(teacher, TopK):
            columns |= class_columns(student, teacher, self._temperature)
        return {name: value for name, value in columns.items() if value is not None}

    def at(self, places: Tensor) -> StatisticsSums:
        """An observer of a loss at some of the positions, `[n]` bool, that adds to the same sums."""
        part = copy.copy(self)
        part._sampled = None if self._sampled is None else self._sampled[places]
        part._places = None if self._places is None else self._places[places]
        return part

    def chosen(self, start: int, count: int, device: torch.device) -> slice | Tensor:
        """Which positions of a chunk are summed.

        Args:
            start: the number of positions before the chunk.
            count: the number of its own.
            device: where the indices are wanted.
        """
        if self._places is None:
            return slice(-start % self._every, count, self._every)
        own = self._places[start : start + count]
        return (own % self._every == 0).nonzero().squeeze(-1).to(device)

    def _parts(self, chunk: LogitChunk, device: torch.device) -> list[tuple[str, slice | Tensor]]:
        """The numbers of data rows and those of rollouts among a chunk's rows, each with the prefix of its names."""
        if self._sampled is None:
            return [("", slice(None))]
        own = self._sampled[chunk.start :].to(device)[chunk.rows]
        parts = [("", (~own).nonzero().squeeze(-1)), (PREFIX, own.nonzero().squeeze(-1))]
        return [(prefix, part) for prefix, part in parts if part.numel()]


def means_of(sums: Mapping[str, float]) -> dict[str, float]:
    """The means over positions of what `StatisticsSums` added up, those of data rows and those of rollouts."""
    means = {}
    for name, value in sums.items():
        count = sums.get(PREFIX + POSITIONS if name.startswith(PREFIX) else POSITIONS, 0.0)
        if not name.endswith(POSITIONS) and count:
            means[name] = value / count
    return means
