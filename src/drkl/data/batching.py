"""Divide rows into optimiser steps of about equal cost, each with rows of about equal length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drkl.errors import DrklError

T = TypeVar("T")

# Rows are sorted within windows of this many steps' worth, and never within more than this share of an epoch: large
# enough for little padding, small enough that a row meets other rows in every epoch, in small data sets too.
_WINDOW_STEPS = 32
_WINDOW_SHARE = 0.5


class Steps(Sequence[list[int]]):
    """Optimiser steps, each a list of row indices, in four bytes for each row and eight for each step.

    Args:
        rows: the row indices of all steps, one step after the other.
        ends: where in ``rows`` each step ends.

    >>> steps = Steps.of([[3, 1], [2]])
    >>> steps[0], steps[1:] == [[2]], len(steps)
    ([3, 1], True, 2)
    """

    def __init__(self, rows: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.rows, self.ends = rows, ends

    @classmethod
    def of(cls, steps: Iterable[Sequence[int]]) -> Steps:
        """The same steps, given as lists."""
        lists = list(steps)
        rows = np.fromiter(itertools.chain.from_iterable(lists), np.int32)
        return cls(rows, np.cumsum([len(step) for step in lists], dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Steps]) -> Steps:
        """The steps of several plans, one after the other."""
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        empty = np.empty(0, np.int32)
        return cls(np.concatenate([empty, *(p.rows for p in parts)]), np.concatenate([empty.astype(np.int64), *ends]))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The number of rows of each step."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Steps: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.reordered(np.arange(len(self))[index])
        end = int(self.ends[index])
        start = int(self.ends[index - 1]) if index % len(self) else 0
        return self.rows[start:end].tolist()

    def reordered(self, order: NDArray[np.int64]) -> Steps:
        """The steps of these numbers, in this order."""
        sizes, starts = self.sizes[order], (self.ends - self.sizes)[order]
        ends = np.cumsum(sizes, dtype=np.int64)
        return Steps(self.rows[np.repeat(starts - (ends - sizes), sizes) + np.arange(sizes.sum())], ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(list.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Steps.of({list(self)})"


def plan_epochs(
    lengths: ArrayLike,
    *,
    tokens_per_step: int | None = None,
    rows_per_step: int | None = None,
    seed: int,
    same_batches: bool = False,
    drop_last: bool = False,
    first: int = 0,
) -> Iterator[Steps]:
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
        first: the number of the first epoch, which its shuffle follows from.

    Raises:
        DrklError: no rows, a size below 1, or ``drop_last`` where it leaves no step.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise DrklError("There are no rows to plan steps for.")
    for name, size in (("tokens_per_step", tokens_per_step), ("rows_per_step", rows_per_step)):
        if size is not None and size < 1:
            raise DrklError(f"{name} must be at least 1, got {size}.")
    if rows_per_step is not None and drop_last and len(lengths) < rows_per_step:
        raise DrklError(
            f"dataloader_drop_last leaves out every step: there are {len(lengths)} rows and a step has {rows_per_step}."
        )
    return _epochs(lengths, tokens_per_step, rows_per_step, seed, same_batches, drop_last, first)


def _epochs(
    lengths: NDArray[np.int64],
    tokens_per_step: int | None,
    rows_per_step: int | None,
    seed: int,
    same_batches: bool,
    drop_last: bool,
    number_of_first: int,
) -> Iterator[Steps]:
    first: Steps | None = None
    for epoch in itertools.count(number_of_first):
        generator = np.random.default_rng([seed, epoch])
        if first is not None and same_batches:
            yield first.reordered(generator.permutation(len(first)))
            continue
        if rows_per_step is not None:
            order = generator.permutation(len(lengths)).astype(np.int32)
            ends = np.minimum(np.arange(rows_per_step, len(order) + rows_per_step, rows_per_step), len(order))
            steps = Steps(order, ends)
            steps = steps[:-1] if drop_last and len(steps[-1]) < rows_per_step else steps
        else:
            assert tokens_per_step is not None, "one of the two sizes is given"
            steps = _plan_epoch(lengths, tokens_per_step, generator)
        if same_batches:
            first = steps
        yield steps


def bucket_by_length(lengths: ArrayLike, tokens_per_batch: int, *, packed: bool = False) -> list[list[int]]:
    """Return row indices in batches of near-equal length, shortest first, for passes whose order does not matter.

    A batch has at most ``tokens_per_batch`` positions, padded to its longest row or ``packed``; a longer row is alone.

    >>> bucket_by_length([9, 3, 4], tokens_per_batch=8)
    [[1, 2], [0]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    ends = _fill_packed(lengths[order], tokens_per_batch) if packed else _fill(lengths[order], tokens_per_batch)[0]
    return list(Steps(order.astype(np.int32), np.asarray([*ends, len(order)] if len(order) else [])))


def split_rows(rows_of_step: Sequence[T], parts: int) -> list[list[T]]:
    """Cut a step into ``parts`` contiguous micro-batches of near-equal size; some are empty if rows are fewer.

    >>> split_rows([7, 8, 9], 2)
    [[7, 8], [9]]
    """
    if parts < 1:
        raise DrklError(f"A step is split into at least 1 part, got {parts}.")
    return [part_of(rows_of_step, part, parts) for part in range(parts)]


def part_of(rows_of_step: Sequence[T], part: int, parts: int) -> list[T]:
    """The micro-batch of number ``part``, from 0, of `split_rows`."""
    size, larger = divmod(len(rows_of_step), parts)
    start = part * size + min(part, larger)
    return list(rows_of_step[start : start + size + (part < larger)])


def split_by_cost(lengths: Sequence[int], parts: int, *, packed: bool = False) -> list[list[int]]:
    """Cut rows into contiguous parts, of which the costliest costs as little as it can.

    Side by side on several processes, such parts end at about the same time. None is empty where there are rows enough.

    Args:
        lengths: of the rows.
        parts: how many.
        packed: a part costs the tokens of its rows; else as many positions as it has, padded to its longest row.

    >>> split_by_cost([1, 1, 1, 1, 2, 4], 2)
    [[0, 1, 2, 3], [4, 5]]
    >>> split_by_cost([1, 1, 1, 1, 2, 4], 2, packed=True)
    [[0, 1, 2, 3], [4, 5]]
    """
    if parts < 1:
        raise DrklError(f"A step is split into at least 1 part, got {parts}.")
    low, high = max(lengths, default=0), sum(lengths) if packed else max(lengths, default=0) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, parts, middle, packed)) <= parts else (middle + 1, high)
    cut = _filled(lengths, parts, low, packed)
    return [*cut, *([] for _ in range(parts - len(cut)))]


def _filled(lengths: Sequence[int], parts: int, most: int, packed: bool) -> list[list[int]]:
    """Parts of at most ``most`` positions, filled one after the other; a row is left for each part to come."""
    filled: list[list[int]] = []
    longest = tokens = 0
    for row, length in enumerate(lengths):
        longest, tokens = max(longest, length), tokens + length
        left = len(lengths) - row  # this one and those after it
        cost = tokens if packed or not filled else longest * (len(filled[-1]) + 1)
        if filled and cost <= most and left > parts - len(filled):
            filled[-1].append(row)
        else:
            filled.append([row])
            longest = tokens = length
    return filled


def _plan_epoch(lengths: NDArray[np.int64], tokens_per_step: int, generator: np.random.Generator) -> Steps:
    order = generator.permutation(len(lengths))
    mean_length = max(1.0, int(lengths.sum()) / len(lengths))
    window = max(1, round(min(_WINDOW_STEPS * tokens_per_step / mean_length, _WINDOW_SHARE * len(lengths))))
    rows = np.empty(len(order), np.int32)
    ends: list[int] = []
    open_step = (0, 0)
    for start in range(0, len(order), window):
        part = order[start : start + window]
        # Every other window runs downwards: where two meet, rows have similar lengths and can share a step.
        keys = lengths[part] if start // window % 2 == 0 else -lengths[part]
        part = part[np.argsort(keys, kind="stable")]
        rows[start : start + window] = part
        found, open_step = _fill(lengths[part], tokens_per_step, open_step)
        ends += [start + end for end in found]
    steps = Steps(rows, np.asarray([*ends, len(rows)], np.int64))
    return steps.reordered(generator.permutation(len(steps)))


def _fill(
    lengths: NDArray[np.int64], tokens: int, open_step: tuple[int, int] = (0, 0)
) -> tuple[list[int], tuple[int, int]]:
    """Put rows into steps in their order, each into the one before it where that stays within ``tokens``.

    Args:
        lengths: of the rows.
        tokens: of a step, padding included.
        open_step: the number of rows of the step that is open, and its longest; none at first.

    Returns:
        The places at which a step ends and another begins, and the step that is open after the last row.
    """
    count, longest = open_step
    ends = []
    for place, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if count and longest * (count + 1) <= tokens:
            count += 1
            continue
        if count:
            ends.append(place)
        count, longest = 1, length
    return ends, (count, longest)


def _fill_packed(lengths: NDArray[np.int64], tokens: int) -> list[int]:
    """The places at which a batch ends and another begins, each of at most ``tokens`` without padding."""
    ends: list[int] = []
    filled = 0
    for place, length in enumerate(lengths.tolist()):
        if filled and filled + length > tokens:
            ends.append(place)
            filled = 0
        filled += length
    return ends
