"""The plan of a run: the rows of every optimiser step, and the micro-batches that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from drkl.data.batching import Steps, part_of, plan_epochs, split_by_cost, split_rows
from drkl.data.classification import LabelledRow
from drkl.data.stored import column
from drkl.data.tokenize import Row
from drkl.training.arguments import DistillationConfig


def plan_run(lengths: ArrayLike, args: DistillationConfig, world_size: int) -> tuple[Steps, list[int]]:
    """Plan the optimiser steps of a run.

    Args:
        lengths: positions each row feeds (``Row.length``).
        args: the size of a step, and ``max_steps`` or, where it is -1, ``num_train_epochs``.
        world_size: number of processes.

    Returns:
        The row indices of every step, and the numbers of the steps after which an epoch ends.
    """
    epochs = plan_epochs(
        lengths,
        **step_size(args, world_size),
        seed=args.plan_seed,
        same_batches=args.same_batches,
        drop_last=args.dataloader_drop_last,
    )
    parts: list[Steps] = []
    ends: list[int] = []
    num_steps, left = 0, float(args.num_train_epochs)
    while num_steps < args.max_steps if args.max_steps > 0 else left > 1e-9:
        epoch = next(epochs)
        wanted = args.max_steps - num_steps if args.max_steps > 0 else math.ceil(len(epoch) * min(left, 1.0) - 1e-9)
        parts.append(epoch if wanted >= len(epoch) else epoch[:wanted])
        num_steps += len(parts[-1])
        ends.append(num_steps)
        left -= 1
    return Steps.joined(parts), ends


def step_size(args: DistillationConfig, world_size: int) -> dict[str, Any]:
    """The size of a step as `plan_epochs` takes it: in tokens, or in rows over all processes."""
    if args.per_device_train_batch_size is None:
        return {"tokens_per_step": args.tokens_per_step, "rows_per_step": None}
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    return {"tokens_per_step": None, "rows_per_step": rows}


class MicroBatches(Dataset[list[Any]]):
    """Every micro-batch of a run, in order: item ``(step * accumulation + i) * processes + rank``.

    Args:
        rows: tokenised rows.
        steps: the indices of the rows of every optimiser step.
        parts: micro-batches in a step, over all processes. Whole steps are planned and then cut, so that the optimiser
            sees the same rows in the same step however many parts there are.
        alike: the parts of a step are of like cost, as several processes wait for the costliest; else of as many rows.
        packed: they have no padding, which then costs nothing.
    """

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        steps: Sequence[Sequence[int]],
        parts: int,
        *,
        alike: bool = False,
        packed: bool = False,
    ) -> None:
        self._rows, self._steps, self._parts, self._packed = rows, steps, parts, packed
        self._lengths = column(rows, "length") if alike else None

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __getitem__(self, index: int) -> list[Any]:
        step, part = divmod(index, self._parts)
        if self._lengths is None:
            return [self._rows[i] for i in part_of(self._steps[step], part, self._parts)]
        numbers = list(self._steps[step])
        cut = split_by_cost([int(self._lengths[i]) for i in numbers], self._parts, packed=self._packed)
        return [self._rows[numbers[i]] for i in cut[part]]


def cut_step(rows: Sequence[Any], parts: int, *, alike: bool, packed: bool = False) -> list[list[Any]]:
    """Cut the rows of a step; arguments as of `MicroBatches`."""
    cut = cut_lengths([row.length for row in rows], parts, alike=alike, packed=packed)
    return [[rows[i] for i in part] for part in cut]


def cut_lengths(lengths: Sequence[int], parts: int, *, alike: bool, packed: bool = False) -> list[list[int]]:
    """Cut the rows of a step, known by their lengths; each part has the places of its rows in the step."""
    return split_by_cost(lengths, parts, packed=packed) if alike else split_rows(range(len(lengths)), parts)


def cuts_by_cost(args: DistillationConfig, world_size: int) -> bool:
    """Whether the steps are cut into parts of like cost: on several processes, unless the rows of each are counted."""
    return world_size > 1 and args.per_device_train_batch_size is None


class Places(Dataset[Tensor]):
    """Stands in for the rows of a run whose steps are known only once their answers are written.

    Args:
        count: micro-batches of the run, over all processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)
