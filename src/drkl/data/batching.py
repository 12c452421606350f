"""Divide rows into optimiser steps of about equal cost, each with rows of about equal length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from drkl.errors import DrklError

T = TypeVar("T")

# Rows are sorted within windows of this many steps' worth, and never within more than this share of an epoch: large
# enough for little padding, small enough that a row meets other rows in every epoch, in small data sets too.
_WINDOW_STEPS = 32
_WINDOW_SHARE = 0.5


def plan_epochs(
    lengths: Sequence[int],
    *,
    tokens_per_step: int | None = None,
    rows_per_step: int | None = None,
    seed: int,
    same_batches: bool = False,
    drop_last: bool = False,
) -> Iterator[list[list[int]]]:
    """Yield the optimiser steps of one epoch after the other, without end; a step is a list of row indices.

    Each epoch sees every row once, in another shuffle, and no step spans two epochs. The plan depends on the arguments
    alone.

    Args:
        lengths: positions each row feeds (``Row.length``).
        tokens_per_step: padded positions in one optimiser step, at most; a row longer than that is a step of its own.
            Exactly one of this and ``rows_per_step``.
        rows_per_step: rows in an optimiser step, drawn at random; the last step of an epoch has what is left.
        seed: seed of the shuffles.
        same_batches: every epoch has the first one's steps, in another order.
        drop_last: with ``rows_per_step``, leave out the last step of an epoch where it has fewer rows.

    Raises:
        DrklError: no rows, a size below 1, or ``drop_last`` where it leaves no step.
    """
    if not lengths:
        raise DrklError("There are no rows to plan steps for.")
    for name, size in (("tokens_per_step", tokens_per_step), ("rows_per_step", rows_per_step)):
        if size is not None and size < 1:
            raise DrklError(f"{name} must be at least 1, got {size}.")
    if rows_per_step is not None and drop_last and len(lengths) < rows_per_step:
        raise DrklError(
            f"dataloader_drop_last leaves out every step: there are {len(lengths)} rows and a step has {rows_per_step}."
        )
    return _epochs(lengths, tokens_per_step, rows_per_step, seed, same_batches, drop_last)


def _epochs(
    lengths: Sequence[int],
    tokens_per_step: int | None,
    rows_per_step: int | None,
    seed: int,
    same_batches: bool,
    drop_last: bool,
) -> Iterator[list[list[int]]]:
    first: list[list[int]] = []
    for epoch in itertools.count():
        generator = np.random.default_rng([seed, epoch])
        if same_batches and epoch:
            yield [first[i] for i in generator.permutation(len(first)).tolist()]
            continue
        if rows_per_step is not None:
            order = generator.permutation(len(lengths)).tolist()
            steps = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
            steps = steps[:-1] if drop_last and len(steps[-1]) < rows_per_step else steps
        else:
            assert tokens_per_step is not None, "one of the two sizes is given"
            steps = _plan_epoch(lengths, tokens_per_step, generator)
        first = first or steps
        yield steps


def bucket_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Return row indices in batches of near-equal length, shortest first, for passes whose order does not matter.

    A batch, padded to its longest row, has at most ``tokens_per_batch`` positions; a longer row is alone.

    >>> bucket_by_length([9, 3, 4], tokens_per_batch=8)
    [[1, 2], [0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Sorted upwards, so this row would be the longest of the batch it joins.
        if batches and lengths[index] * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split_rows(rows_of_step: Sequence[T], parts: int) -> list[list[T]]:
    """Cut a step into ``parts`` contiguous micro-batches of near-equal size; some are empty if rows are fewer.

    >>> split_rows([7, 8, 9], 2)
    [[7, 8], [9]]
    """
    if parts < 1:
        raise DrklError(f"A step is split into at least 1 part, got {parts}.")
    size, larger = divmod(len(rows_of_step), parts)
    ends = np.cumsum([size + (index < larger) for index in range(parts)]).tolist()
    return [list(rows_of_step[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def split_by_cost(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Cut rows into contiguous parts, of which the costliest costs as little as it can: padded to its longest row.

    Side by side on several processes, such parts end at about the same time. None is empty where there are rows enough.

    >>> split_by_cost([1, 1, 1, 1, 2, 4], 2)
    [[0, 1, 2, 3], [4, 5]]
    """
    if parts < 1:
        raise DrklError(f"A step is split into at least 1 part, got {parts}.")
    low, high = max(lengths, default=0), max(lengths, default=0) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, parts, middle)) <= parts else (middle + 1, high)
    cut = _filled(lengths, parts, low)
    return [*cut, *([] for _ in range(parts - len(cut)))]


def _filled(lengths: Sequence[int], parts: int, most: int) -> list[list[int]]:
    """Parts of at most ``most`` padded positions, filled one after the other; a row is left for each part to come."""
    filled: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        left = len(lengths) - row  # this one and those after it
        if filled and longest * (len(filled[-1]) + 1) <= most and left > parts - len(filled):
            filled[-1].append(row)
        else:
            filled.append([row])
            longest = length
    return filled


def _plan_epoch(lengths: Sequence[int], tokens_per_step: int, generator: np.random.Generator) -> list[list[int]]:
    order = generator.permutation(len(lengths)).tolist()
    mean_length = max(1.0, sum(lengths) / len(lengths))
    window = max(1, round(min(_WINDOW_STEPS * tokens_per_step / mean_length, _WINDOW_SHARE * len(lengths))))
    steps: list[list[int]] = []
    longest = 0
    for start in range(0, len(order), window):
        # Every other window runs downwards: where two meet, rows have similar lengths and can share a step.
        rows = sorted(order[start : start + window], key=lambda i: lengths[i], reverse=start // window % 2 == 1)
        for row in rows:
            longest = max(longest, lengths[row])
            if steps and longest * (len(steps[-1]) + 1) <= tokens_per_step:
                steps[-1].append(row)
            else:
                steps.append([row])
                longest = lengths[row]
    return [steps[i] for i in generator.permutation(len(steps)).tolist()]
