"""Read the rows of files and data sets, each with its place; `drkl.data.examples` interprets them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from drkl.errors import DrklError, did_you_mean
from drkl.runs import read_text

BUNDLED = {
    f"bundled:{name}{end}": f"{name}_{part}.jsonl"
    for name in ("dolly", "sgd", "scitldr", "banking77")
    for end, part in (("", "train"), ("-eval", "eval"))
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")

Rows = Iterator[tuple[str, Any]]


def file_rows(path: str, row_format: str = "auto") -> Rows:
    """Yield ``(place, value)`` of every row of a file, read as its suffix says; an unknown suffix is read as jsonl.

    ``.json`` is one list of objects (or json lines), ``.csv`` has a header, ``.txt`` is one plain text.

    Raises:
        DrklError: an unknown bundled name; a file that is missing, unreadable or broken, with its line.
    """
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DrklError(
                f"There is no bundled data {path!r}; there is {', '.join(BUNDLED)}.{did_you_mean(path, BUNDLED)}"
            )
        text = resources.files("drkl.data").joinpath("bundled", BUNDLED[path]).read_text(encoding="utf-8")
        return _json_lines(text, path)
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(file, path)
    text = read_text(file).removeprefix("\ufeff")
    if suffix == ".txt":
        if row_format not in ("auto", "text"):
            raise DrklError(f"{path} is plain text, but its format is {row_format!r}; a .txt file has format text.")
        return iter([(path, {"text": text, "id": file.stem})])
    if suffix == ".csv":
        return _csv(text, path)
    if suffix == ".json" and text.lstrip().startswith("["):
        return _json_list(text, path)
    return _json_lines(text, path)


def _json_lines(text: str, name: str) -> Rows:
    # split("\n"), not splitlines(): json strings may hold U+2028, U+0085 and the like unescaped.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise DrklError(f"{place}: not valid JSON: {error.msg} (column {error.colno}).") from error
        except RecursionError as error:
            raise DrklError(f"{place}: not valid JSON: nested too deeply.") from error


def _json_list(text: str, name: str) -> Rows:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DrklError(f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        raise DrklError(f"{name}: not valid JSON: nested too deeply.") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _csv(text: str, name: str) -> Rows:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    line = 1
    try:
        for row in reader:
            place, line = f"{name}:{line + 1}", reader.line_num
            if None in row or None in row.values():
                came = len([value for value in row.values() if isinstance(value, str)]) + len(row.get(None) or [])
                raise DrklError(
                    f"{place}: expected {len(reader.fieldnames or [])} columns as in the header; found {came}."
                )
            yield place, row
    except csv.Error as error:
        raise DrklError(f"{name}:{reader.line_num}: not valid csv: {error}.") from error


def _parquet(file: Path, name: str) -> Rows:
    from pyarrow import ArrowException, parquet

    if not file.is_file():
        raise DrklError(f"There is no file {name!r}.")
    try:
        number = 0
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DrklError(f"Cannot read {name!r} as parquet: {reason}.") from error


def dataset_rows(name: str, *, split: str = "train", data_files: str | None = None) -> Rows:
    """Yield ``(place, value)`` of every row of one split of a ``datasets`` id or folder; class numbers become names.

    ``data_files`` is the only file of a repository to read, as split ``train``.

    Raises:
        DrklError: no such data set.
    """
    import datasets

    local = Path(name).expanduser()
    where, config_name = (str(local), None) if local.exists() else _split_config(name)
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            split = "train" if data_files is not None else split
            rows = datasets.load_dataset(where, config_name, split=split, data_files=data_files)
    # `datasets` raises what its readers raise: OSError, KeyError, ValueError, its own, the network's.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        looked = "found the local folder" if local.exists() else f"no local folder {str(local)!r}, then the hub"
        raise DrklError(
            f"Cannot load the data set {where!r} (config {config_name or 'default'}, split {split!r}); looked at: "
            f"{looked}. {type(error).__name__}: {reason} A jsonl file in data.path needs no hub."
        ) from error
    yield from labelled_by_name(rows, name)


def labelled_by_name(dataset: Any, name: str) -> Rows:
    """Yield ``(place, row)`` of a ``datasets.Dataset`` called ``name`` in errors; class numbers become names."""
    names = getattr(dataset.features.get("label") if dataset.features else None, "int2str", None)
    for number, row in enumerate(dataset, start=1):
        if names is not None and isinstance(row["label"], int) and row["label"] >= 0:
            row = {**row, "label": names(row["label"])}
        yield f"{name}, row {number}", row


def rows_at(where: str | os.PathLike[str], row_format: str = "auto", *, split: str = "train") -> Rows:
    """Yield ``(place, value)`` of every row of a file, bundled data, a local ``datasets`` folder or a hub id.

    Raises:
        DrklError: as `file_rows` and `dataset_rows`.
    """
    name = os.fspath(where)
    path = Path(name).expanduser()
    if name.startswith("bundled:") or path.is_file():
        return file_rows(name, row_format)
    is_local = name.startswith((".", "/", "~")) or path.suffix in SUFFIXES or not isinstance(where, str)
    if is_local and not path.exists():
        raise DrklError(f"There is no file {name!r}.")
    return dataset_rows(name, split=split)


def _split_config(name: str) -> tuple[str, str | None]:
    where, _, config_name = name.partition(":")
    return where, config_name or None
