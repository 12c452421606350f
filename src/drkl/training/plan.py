"""The plan of a run: the rows of every optimiser step, and the micro-batches that they are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drkl.data.batching import plan_epochs, split_rows
from drkl.data.classification import LabelledRow
from drkl.data.tokenize import Row
from drkl.training.arguments import DistillationConfig


def plan_run(lengths: Sequence[int], args: DistillationConfig, world_size: int) -> tuple[list[list[int]], list[int]]:
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
    steps: list[list[int]] = []
    ends: list[int] = []
    left = float(args.num_train_epochs)
    while len(steps) < args.max_steps if args.max_steps > 0 else left > 1e-9:
        epoch = next(epochs)
        steps += epoch[: math.ceil(len(epoch) * min(left, 1.0) - 1e-9)] if args.max_steps < 0 else epoch
        ends.append(len(steps))
        left -= 1
    if args.max_steps > 0 and len(steps) > args.max_steps:
        steps, ends = steps[: args.max_steps], [*ends[:-1], args.max_steps]
    return steps, ends


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
    """

    def __init__(self, rows: Sequence[Row | LabelledRow], steps: Sequence[Sequence[int]], parts: int) -> None:
        self._rows = rows
        self._batches = [part for step in steps for part in split_rows(step, parts)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Any]:
        return [self._rows[i] for i in self._batches[index]]


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
