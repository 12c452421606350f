"""Read the rows of a file or a data set from any place on, so that a stream goes on where it was."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from drkl.data.examples import check_readable
from drkl.data.files import (
    SUFFIXES,
    Rows,
    dataset_of,
    file_rows,
    is_dataset_name,
    json_values,
    labelled_by_name,
    open_bytes,
    parquet_rows,
    suffix_of,
)
from drkl.errors import DrklError

SHUFFLED = "BufferShuffledExamplesIterable"
"""The part of a ``datasets.IterableDataset`` that shuffles in a buffer, whose content its state leaves out."""


class Cursor(Protocol):
    """The rows of a source from a position on."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield ``(place, row)``."""

    def position(self) -> Any:
        """Return where the row begins that comes next, as json."""


Open = Callable[[Any], Cursor]
"""Opens a source at a position; None is its begin."""


def open_path(where: str | os.PathLike[str], row_format: str = "auto") -> Open:
    """Return what opens a file, bundled data, a local folder of ``datasets`` or a hub id.

    Raises:
        DrklError: a plain text file, rows that were passed in memory, or a data set that cannot be loaded.
    """
    check_readable(os.fspath(where))
    return open_dataset(os.fspath(where)) if is_dataset_name(where) else open_file(os.fspath(where), row_format)


def open_file(path: str, row_format: str = "auto") -> Open:
    """Return what opens one file.

    Raises:
        DrklError: it is a plain text (txt), which is one row, or cannot be read.
    """
    check_readable(path)
    suffix = suffix_of(Path(path))
    if suffix == ".txt":
        raise DrklError(
            f"{path} is one plain text, which a stream would hold in memory as a whole. Write it as jsonl, one "
            '{"text": …} in each line, or leave data.streaming out.'
        )
    if suffix == ".parquet":
        return counted(lambda count: _parquet_after(path, count))
    if suffix not in SUFFIXES[1:] and not path.startswith("bundled:") and _has_lines(path):
        return lambda position: _Lines(path, position)
    return counted(lambda count: itertools.islice(file_rows(path, row_format), count, None))


def open_dataset(name: str) -> Open:
    """Return what opens the split train of a ``datasets`` id or folder.

    Raises:
        DrklError: it cannot be loaded, or has plain text files.
    """
    if Path(name).expanduser().is_file():
        return open_file(name)
    files, dataset, is_csv = dataset_of(name, streaming=True)
    if files:
        return _open_files([open_file(str(file)) for file in files])
    return open_stream(dataset, name, nulls_are_empty=is_csv)


def open_stream(dataset: Any, name: str, *, nulls_are_empty: bool = False) -> Open:
    """Return what opens a data set of ``datasets``; ``nulls_are_empty`` writes null as "", as a csv file has it.

    Raises:
        DrklError: it shuffles in a buffer of its own, or was cut for several processes.
    """
    import datasets

    plain = dataset.with_format(None)
    if isinstance(plain, datasets.Dataset):
        return counted(lambda count: labelled_by_name(plain, name, count) if count < len(plain) else iter(()))
    if any(type(part).__name__ == SHUFFLED for part in _parts(plain._ex_iterable)):
        raise DrklError(
            f"{name} shuffles in a buffer of its own, and what is in there would be lost where a run is interrupted. "
            "Leave .shuffle(…) out: the stream is shuffled here (shuffle_buffer)."
        )
    if getattr(plain, "_distributed", None) is not None:
        raise DrklError(
            f"{name} was cut for several processes (split_dataset_by_node). Pass the whole of it: every process plans "
            "the same steps, and takes its own part of each."
        )
    return lambda position: _Streamed(plain, name, position, nulls_are_empty=nulls_are_empty)


def counted(rows_after: Callable[[int], Rows]) -> Open:
    """Return what opens rows of which the position is their number; ``rows_after`` leaves out so many of them."""
    return lambda position: _Counted(rows_after, position or 0)


def _open_files(files: Sequence[Open]) -> Open:
    return lambda position: _Files(files, position)


class _Lines:
    """One json object in each line of a file."""

    def __init__(self, path: str, position: Sequence[int] | None) -> None:
        self._path = path
        self._start, self._line = position or (0, 0)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        with open_bytes(self._path) as stream:
            stream.seek(self._start)
            for data in stream:
                self._start += len(data)
                self._line += 1
                if data.strip():
                    yield _value_of(data, self._path, self._line)

    def position(self) -> list[int]:
        return [self._start, self._line]


class _Counted:
    def __init__(self, rows_after: Callable[[int], Rows], count: int) -> None:
        self._rows_after, self._count = rows_after, count

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for place, row in self._rows_after(self._count):
            self._count += 1
            yield place, row

    def position(self) -> int:
        return self._count


class _Files:
    """Several files, one after the other."""

    def __init__(self, files: Sequence[Open], position: Mapping[str, Any] | None) -> None:
        self._files = files
        self._number = 0 if position is None else int(position["file"])
        self._cursor = files[self._number](None if position is None else position["position"])

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self._cursor
        while self._number + 1 < len(self._files):
            self._number += 1
            self._cursor = self._files[self._number](None)
            yield from self._cursor

    def position(self) -> dict[str, Any]:
        return {"file": self._number, "position": self._cursor.position()}


class _Streamed:
    """A ``datasets.IterableDataset``, which knows its own position."""

    def __init__(self, dataset: Any, name: str, position: Mapping[str, Any] | None, *, nulls_are_empty: bool) -> None:
        self._dataset, self._name, self._nulls_are_empty = dataset, name, nulls_are_empty
        self._position = position
        self._count = 0 if position is None else int(position["row"])

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        if self._position is not None:
            self._dataset.load_state_dict(self._position["state"])
        else:
            self._dataset.load_state_dict(None)
        rows = labelled_by_name(self._dataset, self._name)
        while True:
            try:
                _, row = next(rows)
            except StopIteration:
                return
            except DrklError:
                raise
            except Exception as error:  # of its readers, its functions and the network
                reason = " ".join(str(error).split())[:300].rstrip(".")
                raise DrklError(
                    f"{self._name}, after row {self._count:,}: cannot be read: {type(error).__name__}: {reason}."
                ) from error
            self._count += 1
            self._position = None
            if self._nulls_are_empty:
                row = {key: "" if value is None else value for key, value in row.items()}
            yield f"{self._name}, row {self._count}", row

    def position(self) -> Any:
        if self._count == 0 or self._position is not None:  # nothing was read yet
            return self._position
        return {"row": self._count, "state": self._dataset.state_dict()}


_LONGEST = 1 << 28
"""Bytes of a line."""


def _has_lines(path: str) -> bool:
    """Whether a file holds several json objects, the first in its first line that is not empty, in UTF-8."""
    with open_bytes(path) as stream:
        every = iter(lambda: stream.readline(_LONGEST), b"")
        lines = (line for line in every if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):  # another encoding, or an object of several lines
        return False


def _value_of(data: bytes, path: str, line: int) -> tuple[str, Any]:
    """The one json value of a line, and its place."""
    place, once = f"{path}:{line}", "A stream has one object in each line."
    try:
        values = list(json_values(iter([data.decode()]), path, line))
    except UnicodeDecodeError as error:
        raise DrklError(f"{place}: not UTF-8 text (byte {error.start} of the line). Save it as UTF-8.") from error
    except DrklError as error:
        raise DrklError(f"{error} {once}") from error
    if len(values) != 1:
        raise DrklError(f"{place}: {len(values)} values in one line. {once}")
    return values[0]


def _parquet_after(path: str, count: int) -> Rows:
    """The rows of a parquet file after so many; the row groups before are not read."""
    from pyarrow import ArrowException, parquet

    file = Path(path).expanduser()
    if not file.is_file():
        raise DrklError(f"There is no file {path!r}.")
    try:
        with parquet.ParquetFile(file) as opened:
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    except (ArrowException, OSError):
        sizes = [0]  # its reader says what is wrong
    before = 0
    for group, size in enumerate(sizes):
        if before + size > count or size == 0:
            rows = parquet_rows(file, path, group, before)
            yield from itertools.islice(rows, max(0, count - before), None)
        before += size


def _parts(iterable: Any) -> Iterator[Any]:
    """A data set of ``datasets`` is an iterable around others."""
    yield iterable
    inner = getattr(iterable, "ex_iterable", None)
    for part in getattr(iterable, "ex_iterables", [] if inner is None else [inner]):
        yield from _parts(part)
