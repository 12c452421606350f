"""Sources of rows in blocks that any process can read: what a block has is known by its place, or comes with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from drkl.data.files import (
    BUNDLED,
    Rows,
    bundled_path,
    dataset_of,
    file_rows,
    is_dataset_name,
    json_values,
    labelled_by_name,
    parquet_rows,
    suffix_of,
)
from drkl.errors import DrklError
from drkl.folders import describe_file

BLOCK_BYTES = 4 << 20
"""The size of a block of a file of lines."""
BLOCK_ROWS = 2048
"""The rows of a block of any other source."""


class Source:
    """Rows, each with its place, in blocks.

    Args:
        name: what errors call the source.
        rows: yields all rows, again each time.
        identity: what the rows are read from, by which they are known again; None where that cannot be told.
    """

    def __init__(self, name: str, rows: Callable[[], Rows], identity: Callable[[], Any] | None) -> None:
        self.name, self._rows, self._identity = name, rows, identity

    def identity(self) -> Any | None:
        """What the rows are read from, as json; None where that cannot be told."""
        return None if self._identity is None else self._identity()

    def first(self) -> tuple[str, Any] | None:
        """The first row with its place; None where there is none."""
        return next(self._rows(), None)

    def blocks(self) -> Iterator[Any]:
        """The blocks in order; each is small, or has its rows with it."""
        rows = self._rows()
        while block := list(islice(rows, BLOCK_ROWS)):
            yield block

    def read(self, block: Any) -> Rows:
        """The rows of a block."""
        return iter(block)

    def whole(self) -> Source:
        """The same rows, read from the start to the end by one process."""
        return Source(self.name, self._rows, self._identity)


@dataclass(frozen=True)
class Lines:
    """A part of a file: bytes ``start`` to ``end``, which begins in line ``line``."""

    start: int
    end: int
    line: int


class LinesSource(Source):
    """A file with a json value in each line, in blocks of lines.

    A value that goes over several lines may be cut by that; the block is then refused, and all is to be read `whole`.
    """

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, lambda: file_rows(name), lambda: file_identity(path))
        self._path = path

    def blocks(self) -> Iterator[Lines]:
        line = 1
        with self._path.open("rb") as file:
            start = 0
            while data := file.read(BLOCK_BYTES):
                data += file.readline()
                yield Lines(start, start + len(data), line)
                start, line = start + len(data), line + data.count(b"\n")

    def read(self, block: Lines) -> Rows:
        with self._path.open("rb") as file:
            file.seek(block.start)
            data = file.read(block.end - block.start)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:  # the whole file's reader says where
            raise DrklError(f"{self.name!r} is not UTF-8 text.") from error
        return json_values(iter([text]), self.name, block.line)


class ParquetSource(Source):
    """A parquet file, in blocks of row groups."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, lambda: parquet_rows(path, name), lambda: file_identity(path))
        self._path = path

    def blocks(self) -> Iterator[tuple[int, int]]:
        from pyarrow import parquet

        with parquet.ParquetFile(self._path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        before = 0
        for number, size in enumerate(sizes):
            yield number, before
            before += size

    def read(self, block: tuple[int, int]) -> Rows:
        return parquet_rows(self._path, self.name, *block)


class DatasetSource(Source):
    """A ``datasets.Dataset``, in blocks of its rows."""

    def __init__(self, name: str, dataset: Any, empty_as_text: bool = False) -> None:
        super().__init__(name, lambda: self.read((0, len(dataset))), lambda: dataset_identity(dataset))
        self._dataset, self._empty_as_text = dataset, empty_as_text

    def blocks(self) -> Iterator[tuple[int, int]]:
        size = len(self._dataset)
        return ((start, min(start + BLOCK_ROWS, size)) for start in range(0, size, BLOCK_ROWS))

    def read(self, block: tuple[int, int]) -> Rows:
        rows = labelled_by_name(self._dataset, self.name, *block)
        if not self._empty_as_text:
            return rows
        return ((place, {key: "" if v is None else v for key, v in row.items()}) for place, row in rows)


def source_of(where: str | os.PathLike[str], row_format: str = "auto") -> Source:
    """The source that `drkl.data.files.rows_at` reads.

    Raises:
        DrklError: there is none.
    """
    name = os.fspath(where)
    return source_of_dataset(name) if is_dataset_name(where) else source_at(name, row_format)


def source_at(name: str, row_format: str = "auto") -> Source:
    """The source that a path, or the name of bundled data, stands for.

    Raises:
        DrklError: an unknown name of bundled data.
    """
    if name in BUNDLED:
        return Source(name, lambda: file_rows(name, row_format), lambda: file_identity(bundled_path(name)))
    path = Path(name).expanduser()
    if path.is_file():
        suffix = suffix_of(path)
        if suffix == ".parquet":
            return ParquetSource(name, path)
        is_large = path.stat().st_size > BLOCK_BYTES
        if is_large and suffix not in (".json", ".csv", ".tsv", ".txt") and _has_objects(path):
            return LinesSource(name, path)
    return Source(name, lambda: file_rows(name, row_format), lambda: file_identity(path))


def source_of_dataset(name: str, split: str = "train") -> Source:
    """The source that an id or a folder of `datasets` stands for.

    Raises:
        DrklError: no such data set.
    """
    if Path(name).expanduser().is_file():
        return source_at(name)
    files, dataset, empty_as_text = dataset_of(name, split=split)
    if dataset is not None:
        return DatasetSource(name, dataset, empty_as_text)

    def rows() -> Rows:
        for file in files:
            yield from file_rows(file)

    return Source(name, rows, lambda: [file_identity(Path(file)) for file in files])


def _has_objects(path: Path) -> bool:
    """Whether a file begins as one with an object in each line does, in UTF-8."""
    if path.suffix.lower() in (".gz", ".bz2", ".xz"):
        return False
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    except OSError:  # said where it is read
        return False


# what sources are known by ----------------------------------------------------------------------------------------


def file_identity(path: Path) -> Any | None:
    """The name of a file and a hash of its bytes, as json; None where it cannot be read."""
    try:
        return [path.name, describe_file(path)["xxh3"]]
    except OSError:
        return None


def dataset_identity(dataset: Any) -> Any | None:
    """What a ``datasets.Dataset`` is known by, as json; None where a function of the caller's own makes its rows."""
    if dataset.format["type"] == "custom":
        return None
    files = [Path(file["filename"]) for file in dataset.cache_files]
    stamps = [[file.name, (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files]
    return [dataset._fingerprint, len(dataset), str(dataset.features), stamps]


def tokenizer_identity(tokenizer: Any) -> Any | None:
    """All of a tokenizer that may change what it makes of texts, as json; None for code that is not transformers'."""
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # How it cut and padded last is said anew in each call.
    core = {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
    plain = {name: value for name, value in vars(tokenizer).items() if _is_plain(value) and name not in _NAMES}
    facts = [
        type(tokenizer).__name__, core, plain, dict(tokenizer.special_tokens_map), tokenizer.chat_template,
        tokenizer.all_special_ids,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


_NAMES = ("name_or_path", "_processor_class", "deprecation_warnings", "verbose")
"""What a tokenizer knows of its own past."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return False
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
