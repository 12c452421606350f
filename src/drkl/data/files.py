"""Read the rows of files and data sets, each with its place; `drkl.data.examples` interprets them."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from drkl.errors import DrklError, did_you_mean
from drkl.parsing import check_ends

BUNDLED = {
    f"bundled:{name}{end}": f"{name}_{part}.jsonl"
    for name in ("dolly", "sgd", "scitldr", "banking77")
    for end, part in (("", "train"), ("-eval", "eval"))
}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark begins the same.
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_ASCII = re.compile(r"[\x01-\x7f]")
_WAYS_OUT = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as csv (UTF-8)."),
    **dict.fromkeys((".zip", ".zst", ".tar", ".7z"), "Unpack it first; .gz, .bz2 and .xz are read as they are."),
    **dict.fromkeys((".arrow", ".feather"), "Name the folder that it lies in as data.dataset, or save it as parquet."),
}
_READERS = ("csv", "json", "text")
"""The readers of `datasets` whose files are read here: it takes "None" for null, "007" for 7, text for a date."""
_WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Under these names one json object may hold the list of its rows."""

BLOCK_BYTES = 1 << 20
"""A file of text is read in blocks of so many bytes."""
MOST_PACKED = 200
"""The largest packed file, by the size of the packing; text is packed to a fifth, logs to a fiftieth."""
_LEAST_UNPACKED = 1 << 28
"""Bytes that any packed file may hold."""
ROWS_AT_ONCE = 1024
"""Rows of a parquet file that are Python objects at once."""

Rows = Iterator[tuple[str, Any]]


def file_rows(path: str, row_format: str = "auto") -> Rows:
    """Yield ``(place, value)`` of every row of a file, read as its suffix says; an unknown suffix is read as jsonl.

    ``.json`` and ``.jsonl`` hold objects one after another, or one list of them, or one object of columns. ``.csv``
    has a header, and commas (or semicolons or tabs) between fields, which are text whatever they look like; an empty
    field is "". ``.tsv`` has tabs, ``.txt`` is one plain text. Text is UTF-8, or what its byte order mark says; a file
    may be packed (``.csv.gz``, ``.bz2``, ``.xz``).

    Raises:
        DrklError: an unknown bundled name; a file that is missing, unreadable or broken, with its line.
    """
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DrklError(
                f"There is no bundled data {path!r}; there is {', '.join(BUNDLED)}.{did_you_mean(path, BUNDLED)}"
            )
        return _json(_blocks(bundled_path(path)), path)
    file = Path(path).expanduser()
    check_ends(file)
    suffix = suffix_of(file)
    if suffix == ".parquet":
        return parquet_rows(file, path)
    blocks = _blocks(file)
    if suffix == ".txt":
        if row_format not in ("auto", "text"):
            raise DrklError(f"{path} is plain text, but its format is {row_format!r}; a .txt file has format text.")
        return _one_text(blocks, path, file.stem)
    if suffix in (".csv", ".tsv"):
        return _csv(blocks, path, tabs=suffix == ".tsv")
    return _json(blocks, path)


def bundled_path(name: str) -> Path:
    """The file of bundled data."""
    return Path(str(resources.files("drkl.data").joinpath("bundled", BUNDLED[name])))


def _one_text(blocks: Iterator[str], place: str, name: str) -> Rows:
    yield place, {"text": "".join(blocks).replace("\r\n", "\n").replace("\r", "\n"), "id": name}


def suffix_of(file: Path) -> str:
    """What kind of file it is, packed or not."""
    return Path(file.stem if file.suffix.lower() in _PACKED else file.name).suffix.lower()


def _elsewhere(name: str) -> str:
    """What a name that is no file's may be, and where that goes."""
    if "*" in name or "?" in name:
        return " A name stands for one file: list several in data.sources, or name their folder as data.dataset."
    if re.match("[a-z0-9]+:/", name):
        return " Nothing is fetched from an address: download it first."
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).suffix
    return " The id of a data set on the hub goes into data.dataset." if is_id else ""


def _blocks(file: Path) -> Iterator[str]:
    """The text of a file, block by block, with its line breaks as they are."""
    name, suffix = str(file), file.suffix.lower()
    try:
        with _PACKED.get(suffix, open)(file, "rb") as stream:
            yield from _decoded(_Unpacked(stream, file) if suffix in _PACKED else stream, name, suffix)
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """Open a file, packed or not; what goes wrong as it is read is a DrklError."""
    file = Path(path).expanduser()
    try:
        with _PACKED.get(file.suffix.lower(), open)(file, "rb") as stream:
            yield stream
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


class _Unpacked:
    """What a packed file holds; it ends where there is far more than text can be packed into the file."""

    def __init__(self, stream: Any, file: Path) -> None:
        self._stream, self._name = stream, str(file)
        self._left = max(_LEAST_UNPACKED, MOST_PACKED * file.stat().st_size)

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise DrklError(
                f"{self._name!r} holds more than {MOST_PACKED} times its size, which no text does: it is made to fill "
                "the memory. Unpack it first if it is good."
            )
        return data


_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _unreadable(file: Path, error: Exception) -> DrklError:
    name = str(file)
    if isinstance(error, FileNotFoundError):
        return DrklError(f"There is no file {name!r}.{_elsewhere(name)}")
    way_out = " A folder of files goes into data.dataset." if file.is_dir() else ""
    return DrklError(f"Cannot read {name!r}: {getattr(error, 'strerror', None) or error}.{way_out}")


def _decoded(stream: Any, name: str, suffix: str) -> Iterator[str]:
    data = stream.read(BLOCK_BYTES)
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    if encoding in ("utf-16", "utf-32"):
        text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
        # Every format has some ASCII, a comma or a line break: the bytes were no mark.
        encoding = encoding if _ASCII.search(text) else "utf-8"
    decoder = codecs.getincrementaldecoder(encoding)()
    read, lines = 0, 0
    while True:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = lines + data.count(b"\n", 0, max(0, error.start - pending)) + 1
            way_out = _WAYS_OUT.get(suffix, "Save it as UTF-8, or name a text file.")
            kind, place = encoding.removesuffix("-sig").upper(), read - pending + error.start
            raise DrklError(f"{name!r} is not {kind} text (byte {place}), in line {line}. {way_out}") from error
        if text:
            yield text
        if not data:
            return
        read, lines = read + len(data), lines + data.count(b"\n")
        data = stream.read(BLOCK_BYTES)


# json -------------------------------------------------------------------------------------------------------------


class _SameName(ValueError):
    """An object has two keys of one name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _SameName(f"an object has two keys {next(n for n in names if names.count(n) > 1)!r}; rename one of them")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BETWEEN = re.compile(r"[\s\ufeff]*")
_LONGEST_LITERAL = len("-Infinity") + 1


class _Window:
    """The part of a json text that is read and not used yet.

    Args:
        blocks: the text, in parts that are cut anywhere.
        name: of its file.
        line: the number of its first line.
    """

    def __init__(self, blocks: Iterator[str], name: str, line: int = 1) -> None:
        self.text, self.at = "", 0
        self.line = line
        """The number of the line at ``at``."""
        self._blocks, self._name = blocks, name
        self._column = 0
        """The characters of the line that the text begins in before it."""

    def grow(self) -> bool:
        """Read about as much again and forget what is before ``at``, if there is more; say whether there was."""
        parts = [self.text[self.at :]]
        wanted = max(1, len(parts[0]))
        while wanted > 0 and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            wanted -= len(block)
        if len(parts) == 1:
            return False
        before = self.text.rfind("\n", 0, self.at)
        self._column = self.at - before - 1 if before >= 0 else self._column + self.at
        self.text, self.at = "".join(parts), 0
        return True

    def skip(self) -> bool:
        """Go to the beginning of the next value, and say whether there is one."""
        while True:
            found = _BETWEEN.match(self.text, self.at)
            assert found is not None
            self._go_to(found.end())
            if self.at < len(self.text):
                return True
            if not self.grow():
                return False

    def value(self) -> Any:
        """The value that begins here; afterwards ``at`` is the character after it."""
        while True:
            place = f"{self._name}:{self.line}"
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Where the text was cut the error is at its end, or where the last string or literal begins.
                cut = error.pos > len(self.text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated string")
                if cut and self.grow():
                    continue
                raise self._fault(error) from error
            except _SameName as error:
                raise DrklError(f"{place}: {error}.") from error
            except RecursionError as error:
                raise DrklError(f"{place}: not valid JSON: nested too deeply.") from error
            except ValueError as error:  # int() refuses more than 4,300 digits
                raise DrklError(f"{place}: a number has too many digits; write it as text, in quotes.") from error
            is_number = isinstance(value, int | float) and end > len(self.text) - _LONGEST_LITERAL
            if is_number and self.grow():
                continue
            self._go_to(end)
            return value

    def _go_to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _fault(self, broken: json.JSONDecodeError) -> DrklError:
        """What is wrong with the value that begins here."""
        text, start, name = self.text, self.at, self._name
        place = f"{name}:{self.line}"
        if text[start] == ",":
            return DrklError(
                f"{place}: not valid JSON: a comma follows an object. Write one object a line without commas, or put "
                "the whole into [ ]."
            )
        end = text.find("\n", start, broken.pos)
        if end >= 0 and suffix_of(Path(name)) != ".json":
            # One object a line, and this one breaks off: the fault is in its own line.
            try:
                _DECODER.decode(text[start:end].rstrip("\r"))
            except json.JSONDecodeError as error:
                return DrklError(f"{place}: not valid JSON: {error.msg} (column {error.colno}).")
            except ValueError:
                pass
        line, before = self.line + text.count("\n", start, broken.pos), text.rfind("\n", 0, broken.pos)
        column = broken.pos - before if before >= 0 else self._column + broken.pos + 1
        known = suffix_of(Path(name)) in (*SUFFIXES, "") or name.startswith("bundled:")
        return DrklError(
            f"{name}:{line}: not valid JSON: {broken.msg} (column {column})."
            + ("" if known else " It is read as jsonl, since its suffix is unknown; plain text is called .txt.")
        )


def _json(blocks: Iterator[str], name: str) -> Rows:
    """The rows of a text that is one list or one object, or holds values one after another, each in a line or more."""
    values = json_values(blocks, name)
    first, second = next(values, None), next(values, None)
    if first is not None and second is None:
        yield from _only_value(first[1], first[0], name)
        return
    yield from (item for item in (first, second) if item is not None)
    yield from values


def json_values(blocks: Iterator[str], name: str, line: int = 1) -> Rows:
    """Yield ``(place, value)`` of json values one after another, each in a line or more.

    Args:
        blocks: the text, in parts that are cut anywhere.
        name: of its file.
        line: the number of its first line.

    Raises:
        DrklError: a value that is broken, with its line.
    """
    window = _Window(blocks, name, line)
    while window.skip():
        place = f"{name}:{window.line}"
        yield place, window.value()


def _only_value(value: Any, place: str, name: str) -> Rows:
    """The rows of a file that is one json value."""
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        columns = _columns(value)
        if len(lists) == 1 and lists[0] in _WRAPPERS:
            value = value[lists[0]]
        elif columns:
            value = [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    one_a_line = suffix_of(Path(name)) != ".json"
    if not isinstance(value, list) or (one_a_line and value and not isinstance(value[0], dict)):
        yield place, value
        return
    for number, row in enumerate(value, start=1):
        yield f"{name}, row {number}", row


def _columns(table: dict[str, Any]) -> list[list[Any]]:
    """The columns of a table written one after the other, as pandas writes it or as lists; empty for a single row."""
    columns = list(table.values())
    is_row = any(isinstance(column, dict) and column.keys() & {"role", "from"} for column in columns)  # of messages
    if not is_row and all(isinstance(column, dict) and list(column) == list(columns[0]) for column in columns):
        return [list(column.values()) for column in columns]
    if not all(isinstance(column, list) and column and len(column) == len(columns[0]) for column in columns):
        return []
    # One row may have lists too: messages, and token ids.
    firsts = [column[0] for column in columns]
    is_table = any(isinstance(first, str | list) for first in firsts) and not any(isinstance(f, dict) for f in firsts)
    return columns if is_table else []


# csv --------------------------------------------------------------------------------------------------------------

# str.splitlines breaks lines at form feeds, U+0085, U+2028 and others too.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_BREAK = re.compile(r"[\r\n]")
_LONGEST_FIELD = 2**31 - 1


def _csv(blocks: Iterator[str], name: str, *, tabs: bool) -> Rows:
    lines = _lines(blocks)
    before = []  # the empty lines before the header, and the header
    for line in lines:
        before.append(line)
        if line.strip("\r\n"):
            break
    header: list[str] | None = None
    delimiter = "\t" if tabs else _delimiter(before[-1].strip("\r\n") if before else "")
    for place, record in _records(chain(before, lines), name, delimiter):
        if header is None:
            header = record
            _check_names(header, place)
        elif len(record) != len(header):
            raise DrklError(
                f"{place}: expected {len(header)} columns as in the header; found {len(record)}. A field that "
                "holds a separator, a line break or a quote stands in quotes, with each quote in it written twice."
            )
        else:
            yield place, {column: value for column, value in zip(header, record, strict=True) if column}


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    """The lines of a text, each with its line break."""
    held: list[str] = []  # the blocks of a line that has no end yet; joined once, however long it is
    for block in blocks:
        held.append(block)
        if len(held) > 1 and not _BREAK.search(held[-2][-1:] + block):
            continue
        lines = _LINE.findall("".join(held))
        # A line without an end goes on in the next block, and "\r" may be half of a line break.
        held = [] if lines[-1].endswith("\n") else [lines.pop()]
        yield from lines
    yield from _LINE.findall("".join(held))


def _records(lines: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The records of a csv text that are not empty, each with its place; what follows a closing quote belongs to it."""
    count = 0
    ended = False

    def counted() -> Iterator[str]:
        nonlocal count, ended
        for text in lines:
            count += 1
            yield text
        ended = True
        yield "\n"  # the empty line is no record of its own where a quote is still open

    reader = csv.reader(counted(), delimiter=delimiter)
    line = 1
    while (record := _next_record(reader)) is not None:
        if record and ended and reader.line_num > count:
            raise DrklError(
                f"{name}:{line}: not valid csv: a quoted field has no end. Inside of a quoted field a quote is "
                "written twice."
            )
        if record:
            yield f"{name}:{line}", record
        line = reader.line_num + 1


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record, its fields of any length: the limit is the whole process's, and is given back."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str) -> str:
    """The comma, unless the header has none and has what spreadsheets write in its place."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _check_names(names: Sequence[str], place: str) -> None:
    """Raise DrklError if two columns have one name; those without a name are left out."""
    repeated = [name for name in names if name and list(names).count(name) > 1]
    if repeated:
        raise DrklError(f"{place}: two columns are called {repeated[0]!r}; rename one of them.")


# parquet and data sets --------------------------------------------------------------------------------------------


def parquet_rows(file: Path, name: str, group: int | None = None, before: int = 0) -> Rows:
    """Yield ``(place, value)`` of every row of a parquet file, or of one of its row groups.

    Args:
        file: its path.
        name: what errors call it.
        group: the row group; None for all.
        before: the number of rows before the row group.

    Raises:
        DrklError: a file that is missing, unreadable or broken.
    """
    from pyarrow import ArrowException, parquet

    if not file.is_file():
        raise DrklError(f"There is no file {name!r}.")
    try:
        number = before
        with parquet.ParquetFile(file) as opened:
            _check_names(opened.schema_arrow.names, name)
            to_name = _class_names(opened.schema_arrow, name)
            for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=None if group is None else [group]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", _with_name(row, to_name)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DrklError(f"Cannot read {name!r} as parquet: {reason}.") from error


def dataset_rows(name: str, *, split: str = "train", data_files: str | None = None) -> Rows:
    """Yield ``(place, value)`` of every row of one split of a ``datasets`` id or folder; class numbers become names.

    ``data_files`` is the only file of a repository to read, as split ``train``. The text files of a local folder are
    read as `file_rows` reads them.

    Raises:
        DrklError: no such data set.
    """
    if Path(name).expanduser().is_file():
        yield from file_rows(name)
        return
    files, rows, is_csv = dataset_of(name, split=split, data_files=data_files)
    for file in files:
        yield from file_rows(file)
    if rows is not None:
        for place, row in labelled_by_name(rows, name):
            yield place, {key: "" if value is None else value for key, value in row.items()} if is_csv else row


def dataset_of(
    name: str, *, split: str = "train", data_files: str | None = None, streaming: bool = False
) -> tuple[Sequence[str], Any, bool]:
    """Load one split of a ``datasets`` id or folder.

    Returns:
        The text files of a local folder, which `file_rows` reads; else the ``datasets.Dataset`` (where it is to be
        streamed, and was not saved as one, an ``IterableDataset``), and whether it was made of csv, in which an empty
        field is "".

    Raises:
        DrklError: no such data set.
    """
    import datasets

    local = Path(name).expanduser()
    where, config_name = (str(local), None) if local.exists() else _split_config(name)
    files: Sequence[str] = ()
    rows, is_csv = None, False
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            split = "train" if data_files is not None else split
            builder = datasets.load_dataset_builder(where, config_name, data_files=data_files)
            if local.is_dir() and builder.name in _READERS and not builder.info.features:
                files = (builder.config.data_files or {}).get(split, ())
            if not files:
                is_csv = builder.name == "csv"
                options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if is_csv else {}
                options |= {"streaming": True} if streaming else {}
                rows = datasets.load_dataset(where, config_name, split=split, data_files=data_files, **options)
    # `datasets` raises what its readers raise: OSError, KeyError, ValueError, its own, the network's.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        looked = "found the local folder" if local.exists() else f"no local folder {str(local)!r}, then the hub"
        raise DrklError(
            f"Cannot load the data set {where!r} (config {config_name or 'default'}, split {split!r}); looked at: "
            f"{looked}. {type(error).__name__}: {reason.rstrip('.')}. A jsonl file in data.path needs no hub."
        ) from error
    return files, rows, is_csv


def labelled_by_name(dataset: Any, name: str, start: int = 0, end: int | None = None) -> Rows:
    """Yield ``(place, row)`` of a ``datasets.Dataset`` called ``name`` in errors; class numbers become names.

    ``start`` and ``end`` are a range of its rows; all by default.
    """
    to_name = getattr(dataset.features.get("label") if dataset.features else None, "int2str", None)
    part = dataset if start == 0 and end is None else dataset.select(range(start, len(dataset) if end is None else end))
    for number, row in enumerate(part, start=start + 1):
        yield f"{name}, row {number}", _with_name(row, to_name)


def _class_names(schema: Any, name: str) -> Callable[[int], str] | None:
    """What names a class number in the column ``label``, where `datasets` wrote the file."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features

    try:
        return getattr(Features.from_arrow_schema(schema).get("label"), "int2str", None)
    except Exception as error:  # whatever somebody has written there makes `datasets` raise
        reason = " ".join(str(error).split())[:200]
        raise DrklError(
            f"Cannot read {name!r} as parquet: its metadata of datasets is broken: {reason}. Write the file anew."
        ) from error


def _with_name(row: Any, to_name: Callable[[int], str] | None) -> Any:
    if to_name is None or not isinstance(row["label"], int) or row["label"] < 0:
        return row
    return {**row, "label": to_name(row["label"])}


def rows_at(where: str | os.PathLike[str], row_format: str = "auto", *, split: str = "train") -> Rows:
    """Yield ``(place, value)`` of every row of a file, bundled data, a local ``datasets`` folder or a hub id.

    Raises:
        DrklError: as `file_rows` and `dataset_rows`.
    """
    name = os.fspath(where)
    return dataset_rows(name, split=split) if is_dataset_name(where) else file_rows(name, row_format)


def is_dataset_name(where: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a ``datasets`` folder or id, and not of a file or of bundled data.

    Raises:
        DrklError: it is a path, and nothing is there.
    """
    name = os.fspath(where)
    path = Path(name).expanduser()
    if name.startswith("bundled:") or path.is_file():
        return False
    is_local = name.startswith((".", "/", "~")) or suffix_of(path) in SUFFIXES or not isinstance(where, str)
    if is_local and not path.exists():
        raise DrklError(f"There is no file {name!r}.")
    return True


def _split_config(name: str) -> tuple[str, str | None]:
    where, _, config_name = name.partition(":")
    return where, config_name or None
