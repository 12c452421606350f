"""Tokenised rows in Arrow files that are memory-mapped: a row is made when it is asked for.

A file is an Arrow stream, one record batch for each chunk of examples, which `datasets.Dataset.from_file` reads too.
"""

from __future__ import annotations

import bisect
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from drkl.data.classification import LabelledRow
from drkl.data.ends import ends_of, turn_ends
from drkl.data.examples import Example
from drkl.data.tokenize import Row

Ints = NDArray[np.int32]

NUMBERS: Mapping[str, Callable[[Any], int]] = {
    "length": lambda row: row.length,
    "prompt": lambda row: len(row.prompt_ids),
    "response": lambda row: len(row.response_ids),
    "sampling": lambda row: len(row.sampling_ids),
    "teacher": lambda row: len(row.teacher_prompt_ids or ()),
    "trained": lambda row: row.num_trained,
    "top": lambda row: max(row.all_ids),
    "label": lambda row: row.label,
}
"""What `column` knows of a row: its length, the tokens of its prompt, of its response, of what a sample follows and of
the teacher's prompt (0: none of its own), its trained tokens, its largest token id, and a classified text's class."""


class NotStorable(Exception):
    """A row has something that a file of rows cannot hold."""


def column(rows: Sequence[Any], name: str) -> Ints:
    """One number of every row, `[rows]`, by its name in `NUMBERS`."""
    if isinstance(rows, StoredRows | JoinedRows):
        return rows.column(name)
    return np.fromiter(map(NUMBERS[name], rows), np.int32, len(rows))


def take(rows: Sequence[Any], numbers: ArrayLike) -> Sequence[Any]:
    """The rows of some numbers, in their order."""
    if isinstance(rows, StoredRows):
        return rows.take(np.asarray(numbers, np.int64))
    return [rows[number] for number in np.asarray(numbers).tolist()]


# writing ----------------------------------------------------------------------------------------------------------


def to_record(rows: Sequence[Row] | Sequence[LabelledRow]) -> pa.RecordBatch:
    """Return rows of one kind, at least one, as a record batch.

    Raises:
        NotStorable: a row has something that such a file cannot hold.
    """
    try:
        return _record(rows)
    except UnicodeEncodeError as error:  # half of a surrogate pair, in an id
        raise NotStorable(f"A row's id or text is no Unicode: {error}.") from error


def _record(rows: Sequence[Row] | Sequence[LabelledRow]) -> pa.RecordBatch:
    fields = {"id": pa.array([row.id for row in rows], pa.string()), **tokens_of(rows)}
    if isinstance(rows[0], LabelledRow):
        labelled: Any = rows
        fields["text"] = pa.array([row.text for row in labelled], pa.string())
        numbers: tuple[str, ...] = ("length", "trained", "top")
    else:
        plain: Any = rows
        fields["ends"] = _lists(map(ends_of, plain))
        fields["example"] = pa.array([to_json(row.example) for row in plain], pa.string())
        numbers = ("length", "prompt", "response", "sampling", "teacher", "trained", "top")
    fields |= {name: pa.array(column(list(rows), name)) for name in numbers}
    return pa.RecordBatch.from_pydict(fields)


def tokens_of(rows: Sequence[Row] | Sequence[LabelledRow]) -> dict[str, Any]:
    """What the models read and learn of rows of one kind, at least one, as columns by their names in a file."""
    if isinstance(rows[0], LabelledRow):
        labelled: Any = rows
        return {"ids": _lists(row.ids for row in labelled), "label": pa.array(column(list(labelled), "label"))}
    plain: Any = rows
    return {
        "prompt_ids": _lists(row.prompt_ids for row in plain),
        "response_ids": _lists(row.response_ids for row in plain),
        "trained_runs": _lists(_runs(row.trained) for row in plain),
        "context_start": pa.array([_context(row)[0] for row in plain], pa.int32()),
        "context_tail": _lists(_context(row)[1] for row in plain),
        "teacher_prompt_ids": _lists(row.teacher_prompt_ids or () for row in plain),
        "encoder_decoder": pa.array([row.encoder_decoder for row in plain], pa.bool_()),
    }


def _lists(values: Iterable[Sequence[int]]) -> pa.ListArray:
    lists = list(values)
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _runs(trained: Sequence[bool] | None) -> list[int]:
    """Where runs of equal marks end, the first of unmarked ones; empty for None."""
    if trained is None:
        return []
    ends = np.cumsum([len(list(run)) for _, run in groupby(trained)]).tolist()
    return [0, *ends] if trained[0] else ends


def _marks(runs: Sequence[int]) -> tuple[bool, ...] | None:
    if not runs:
        return None
    return tuple(
        chain.from_iterable(
            [number % 2 == 1] * (end - start)
            for number, (start, end) in enumerate(zip([0, *runs[:-1]], runs, strict=True))
        )
    )


def _context(row: Row) -> tuple[int, Sequence[int]]:
    """How many of the row's first tokens a sampling context begins with, and the rest of it; -1 for none."""
    if row.sampling_context is None:
        return -1, ()
    context, ids = row.sampling_context, row.all_ids
    same = next((place for place, pair in enumerate(zip(context, ids, strict=False)) if pair[0] != pair[1]), None)
    same = min(len(context), len(ids)) if same is None else same
    return same, context[same:]


_USUAL = ("weight", 1.0)


def to_json(example: Example) -> str:
    """Return all of an example but its id as json that `from_json` reads.

    Raises:
        NotStorable: json cannot hold it.
    """
    values = {
        "messages": example.messages, "label": example.label, "context_start": example.context_start,
        "weight": example.weight, "references": example.references, "tools": example.tools,
        "template_kwargs": example.template_kwargs, "unlearnt": example.unlearnt, "shape": example.shape,
    }  # fmt: skip
    given = {name: value for name, value in values.items() if value not in (None, ()) and (name, value) != _USUAL}
    try:
        text = json.dumps(given, ensure_ascii=False)
        if from_json(example.id, text) != example:
            raise NotStorable(f"The row {example.id!r} is not the same once it is written as json.")
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(json.loads(text))
    except (TypeError, ValueError) as error:
        raise NotStorable(f"The row {example.id!r} cannot be written as json: {error}.") from error
    return text


def from_json(row_id: str, text: str) -> Example:
    """Return the example of this id that `to_json` wrote."""
    values = json.loads(text)
    for name in ("messages", "references", "tools", "unlearnt"):
        if name in values:
            values[name] = tuple(values[name])
    return Example(row_id, **values)


# reading ----------------------------------------------------------------------------------------------------------


class RowFiles:
    """Rows in the order of their files, each mapped into memory.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._batches: list[pa.RecordBatch] = []
        for path in paths:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                self._batches += stream
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self._views: list[dict[str, Any]] = [{} for _ in self._batches]
        self._numbers: dict[str, Ints] = {}

    @property
    def folder(self) -> Path:
        """Where the first file lies."""
        return self.paths[0].parent

    def __reduce__(self) -> Any:
        return RowFiles, (self.paths,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Ints:
        """One number of every row, `[rows]`."""
        if name not in self._numbers:
            parts = [self._view(number, name) for number in range(len(self._batches))]
            self._numbers[name] = np.concatenate([np.empty(0, np.int32), *parts])
        return self._numbers[name]

    def lists(self, name: str) -> tuple[NDArray[np.int64], Ints]:
        """A list of every row: how long each is, `[rows]`, and what they have one after the other."""
        parts = [self._view(number, name) for number in range(len(self._batches))]
        sizes = np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for offsets, _ in parts)])
        empty = np.empty(0, np.int32)
        return sizes, np.concatenate([empty, *(values[offsets[0] : offsets[-1]] for offsets, values in parts)])

    def read(self, index: int) -> Row | LabelledRow:
        """The row of this number, from 0."""
        number = bisect.bisect_right(self._starts, index) - 1
        batch, place = self._batches[number], index - self._starts[number]
        row_id = batch.column("id")[place].as_py()

        def ids(name: str) -> tuple[int, ...]:
            offsets, values = self._view(number, name)
            return tuple(values[offsets[place] : offsets[place + 1]].tolist())

        if "ids" in batch.schema.names:
            label = int(self._view(number, "label")[place])
            return LabelledRow(row_id, ids("ids"), label, batch.column("text")[place].as_py())
        prompt, response = ids("prompt_ids"), ids("response_ids")
        start = int(self._view(number, "context_start")[place])
        return Row(
            row_id,
            prompt,
            response,
            from_json(row_id, batch.column("example")[place].as_py()),
            _marks(ids("trained_runs")),
            None if start < 0 else ((prompt + response)[:start] + ids("context_tail")),
            batch.column("encoder_decoder")[place].as_py(),
            ids("teacher_prompt_ids") or None,
        )

    def ids(self) -> Iterator[str]:
        """The ids of all rows."""
        for batch in self._batches:
            yield from batch.column("id").to_pylist()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, chunk by chunk."""
        return iter(self._batches)

    def _view(self, number: int, name: str) -> Any:
        """A column of a record batch as it lies in its file: numbers, or of lists the offsets and the values."""
        view = self._views[number].get(name)
        if view is None:
            found = self._batches[number].column(name)
            if pa.types.is_list(found.type):
                view = found.offsets.to_numpy(zero_copy_only=True), found.values.to_numpy(zero_copy_only=True)
            else:
                view = found.to_numpy(zero_copy_only=True)
            self._views[number][name] = view
        return view


class StoredRows(Sequence[Any]):
    """Rows of `RowFiles`; a slice of them is such rows too.

    Args:
        files: the rows.
        order: the numbers of the rows, each as often as it comes, `[rows]`; None is all of them in their order.
        copies: how often a row came before in an epoch, `[rows]`; None is never.
        renamed: the ids of repeated rows that are not the row's own with ``#2`` and so on, by number and copy.
    """

    def __init__(
        self,
        files: RowFiles,
        order: NDArray[np.int64] | None = None,
        copies: Ints | None = None,
        renamed: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        self._files, self._order, self._copies, self._renamed = files, order, copies, renamed or {}

    def __len__(self) -> int:
        return len(self._files) if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} rows, and none of the number {index}.")
        index = int(index) % len(self)
        number = index if self._order is None else int(self._order[index])
        row = self._files.read(number)
        copy = 0 if self._copies is None else int(self._copies[index])
        if copy:
            name = self._renamed.get((number, copy), f"{row.id}#{copy + 1}")
            object.__setattr__(row, "id", name)  # not shared yet
        return row

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, numbers: NDArray[np.int64]) -> StoredRows:
        """The rows of some numbers, in their order."""
        order = numbers if self._order is None else self._order[numbers]
        copies = None if self._copies is None else self._copies[numbers]
        return StoredRows(self._files, order, copies, self._renamed)

    def column(self, name: str) -> Ints:
        """One number of every row, `[rows]`, by its name in `NUMBERS`."""
        values = self._files.column(name)
        return values if self._order is None else values[self._order]

    def ids(self) -> Iterator[str]:
        """The ids of the rows as they are in their files."""
        return self._files.ids()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as they are in their files; `arrangement` says which of them come, and in what order."""
        return self._files.batches()

    def arrangement(self) -> dict[str, NDArray[Any]]:
        """The numbers of the rows in their files, and how often each came before; empty for all of them in order."""
        found = {"order": self._order, "copies": self._copies}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def is_known(self, fact: str) -> bool:
        """Whether `note` was told a fact of these rows, in this process or in another."""
        return self._order is None and (self._files.folder / f"{fact}.known").is_file()

    def note(self, fact: str) -> None:
        """Keep beside the rows that something is so of all of them, for example that a cache has them."""
        if self._order is None:
            with contextlib.suppress(OSError):  # a cache that is read-only is still read
                (self._files.folder / f"{fact}.known").touch()

    def turn_ends(self) -> Ints:
        """The last token of every learnt turn of every row, in order."""
        sizes, values = self._files.lists("ends")
        if self._order is None:
            return values
        starts, chosen = (np.cumsum(sizes) - sizes)[self._order], sizes[self._order]
        before = np.cumsum(chosen) - chosen
        return values[np.repeat(starts - before, chosen) + np.arange(chosen.sum())]


class JoinedRows(Sequence[Any]):
    """Rows of several sequences, one after the other.

    Args:
        parts: the sequences.
    """

    def __init__(self, *parts: Sequence[Any]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        for part in self._parts:
            if index < len(part):
                break
            index -= len(part)
        return part[index]

    def column(self, name: str) -> Ints:
        """One number of every row, `[rows]`, by its name in `NUMBERS`."""
        return np.concatenate([np.empty(0, np.int32), *(column(part, name) for part in self._parts)])

    def turn_ends(self) -> Ints:
        """The last token of every learnt turn of every row, in order."""
        return np.concatenate([np.empty(0, np.int32), *map(turn_ends, self._parts)])
