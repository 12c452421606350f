"""The files of a teacher cache: numbered shards of rows, each written whole or not at all, and a manifest of all.

A finished folder holds, directly in it::

    manifest.json               what the cache is of, and the bytes and the checksum of every other file
    rows-00000.safetensors      digests [rows, 16], counts [rows], positions [sum of counts]: what the shard has; where
                                the values depend on them also labels [sum of counts], the observed tokens
    values-00000.safetensors    the values at those positions, row after row, tensors [positions, …] by name

and what the maker of the cache adds (the head, the tokenizer, …). The shards are the same whoever wrote them, and so is
the finished folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drkl.disk import cannot_write, writing
from drkl.errors import DrklError
from drkl.runs import locked, new_file_mode, read_json, write_json
from drkl.sealed import CHECKSUM, sealed, unsealed

FORMAT = 1
"""Version of the folder's layout."""
MANIFEST = "manifest.json"
DIGEST_BYTES = 16
OPEN_FILES = 64
"""Shards that are kept open at once."""
GO_ON = "go on with the same command: what was written before is kept"
MADE_WITH = "made_with"
"""What the manifest said before rows were added."""
_READ_AT_ONCE = 1 << 24
_SHARDS = ("rows-*.safetensors", "values-*.safetensors")
_LEFT = (".part-rows-*", ".part-values-*", ".part-head.*", ".part-files-*", f".{MANIFEST}.*")
"""What a process that is killed may leave."""


class CacheRow(NamedTuple):
    """A row of a cache: the digest of what the teacher reads, and the positions of it that are kept, ascending."""

    digest: bytes
    positions: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    """The tokens observed there, where what is kept depends on them: the last one of a text is not read."""

    @property
    def entries(self) -> list[tuple[int, ...]]:
        """What tells the kept positions of one text apart."""
        columns = (self.positions,) if self.labels is None else (self.positions, self.labels)
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class RowPlace:
    """Where the values of a row lie: entries ``start`` to ``start + count`` of a shard."""

    shard: int
    start: int
    count: int


class ShardWriter:
    """Writes the shards of one part of a cache; those that are there already are not written again.

    Args:
        folder: the cache's; it is made.
        about: what the cache is of; every part has to say the same.
        shards: the rows of each shard.
        part: this part's number, from 0.
        parts: the number of parts; part i has the shards i, i + parts, ….

    Raises:
        DrklError: the folder holds a cache of something else, or another process writes this part.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        shards: Sequence[Sequence[CacheRow]],
        *,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        self.folder, self._about, self._shards = folder, dict(about), shards
        self._first = 0
        """The number of the first shard of the plan."""
        self._mine = range(part, len(shards), parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(locked(folder / f".part-{part}-of-{parts}.lock"))
        except BlockingIOError as error:
            raise DrklError(
                f"Another process is writing part {part + 1} of {parts} of the cache {str(folder)!r}. Wait until it "
                "has ended, or give each process a part of its own."
            ) from error
        except OSError as error:
            raise cannot_write(folder, error, then=GO_ON) from error
        with self._lock:  # let go where the folder is refused
            self._begin()
            self._lock = self._lock.pop_all()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def missing(self) -> list[int]:
        """The shards of this part that are not there yet."""
        return [number for number in self._mine if not self._is_whole(number)]

    def write(self, number: int, values: Mapping[str, Tensor]) -> None:
        """Write a shard.

        Args:
            number: of the shard.
            values: tensors `[positions, …]` by name, the rows in the order of the plan.

        Raises:
            DrklError: a row has not as many entries as positions, a value is not finite, or the disk is full.
        """
        rows = self._shards[number]
        counts = [len(row.positions) for row in rows]
        for name, value in values.items():
            if len(value) != sum(counts):
                raise DrklError(
                    f"Shard {number} of the cache has {sum(counts)} positions, and {name!r} {len(value)} entries; "
                    "expected one for each."
                )
            if value.is_floating_point() and not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()[0])
                row = int(np.searchsorted(np.cumsum(counts), bad, side="right"))
                raise DrklError(
                    f"The teacher gives {name} that are not finite, first at position {bad - sum(counts[:row])} of "
                    f"row {row} of shard {self._first + number}. Nothing of that shard was kept."
                )
        tensors = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        save_whole(self.folder / _values(self._first + number), tensors)
        digests = torch.frombuffer(bytearray(b"".join(row.digest for row in rows)), dtype=torch.uint8)
        index = {
            "digests": digests.reshape(-1, DIGEST_BYTES),
            "counts": torch.tensor(counts, dtype=torch.int32),
            **{name: torch.tensor(column, dtype=torch.int32) for name, column in _columns(rows).items()},
        }
        # Last: a shard is there where its rows are.
        save_whole(self.folder / _rows(self._first + number), index)

    def finish(self, files: Callable[[], Sequence[str]] = tuple) -> bool:
        """Write the manifest if every part is there, and say whether that is so; a finished cache is left as it is.

        Args:
            files: writes further files of the cache into the folder, and returns their names.
        """
        if not all(self._is_whole(number) for number in range(len(self._shards))):
            return False
        with locked(self.folder / ".part-finish.lock", wait=True):
            if not read_manifest(self.folder)["finished"]:
                self._finish(files())
        return True

    def _finish(self, files: Sequence[str]) -> None:
        names = [*files, *self._names()]
        self._sweep(names)
        listed = {name: _facts(self.folder / name) for name in sorted(names)}
        _write_manifest(self.folder, self._manifest() | {"finished": True, "files": listed})

    def _names(self) -> list[str]:
        """The files of the plan's shards."""
        numbers = range(self._first, self._first + len(self._shards))
        return [name(number) for number in numbers for name in (_rows, _values)]

    def _sweep(self, names: Collection[str]) -> None:
        """Remove what killed processes left: files that are not whole, and shards that are none of ``names``."""
        for left in (path for kind in _LEFT for path in self.folder.glob(kind)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        for left in (path for kind in _SHARDS for path in self.folder.glob(kind) if path.name not in names):
            left.unlink(missing_ok=True)

    def _manifest(self) -> dict[str, Any]:
        rows = [row for shard in self._shards for row in shard]
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for row in rows:
            entries = [len(row.positions), *row.positions, *(row.labels or ())]
            digest.update(row.digest + np.array(entries, "<i8").tobytes())
        sizes = {"shards": len(self._shards), "rows": len(rows), "positions": sum(len(row.positions) for row in rows)}
        return {"format": FORMAT, **self._about, **sizes, "rows_digest": digest.hexdigest()}

    def _begin(self) -> None:
        path = self.folder / MANIFEST
        wanted = self._manifest()
        if not path.is_file():
            # A process that starts at the same time may have written the manifest by now, the same as this one would.
            others = [one for one in self.folder.iterdir() if not one.name.startswith(".") and one.name != MANIFEST]
            if others and not path.is_file():
                raise DrklError(
                    f"{str(self.folder)!r} holds {others[0].name!r} and no {MANIFEST}; expected an empty folder or a "
                    "cache. Choose another one."
                )
        if not path.is_file():
            _write_manifest(self.folder, wanted | {"finished": False})
            return
        found = read_manifest(self.folder)
        # Rows that were added to it are none of this plan's, and stay where nothing is broken.
        if differing := differences({**found, **found.get(MADE_WITH, {})}, wanted):
            raise DrklError(
                f"{str(self.folder)!r} is a cache of something else: {differing}. Choose another folder; rows are "
                "added to a cache by teacher.fill_cache, in Python by drkl.cache_teacher(..., fill=True)."
            )
        if found["finished"]:
            self._begin_again(found["files"], wanted)

    def _begin_again(self, listed: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Where files of a finished cache are broken or gone, remove those, so that they are written again."""
        paths = {self.folder / name: facts for name, facts in listed.items()}
        broken = [path for path, facts in paths.items() if not path.is_file() or _facts(path) != facts]
        for path in broken:
            if path.is_dir():
                raise DrklError(f"{str(path)!r} is a folder; expected a file of the cache. Remove it.")
            path.unlink(missing_ok=True)
        if broken:
            _write_manifest(self.folder, {**wanted, "finished": False})

    def _is_whole(self, number: int) -> bool:
        """Whether a shard has the rows of the plan, and all of their values."""
        rows = self._shards[number]
        columns = _columns(rows)
        try:
            index = load_file(self.folder / _rows(self._first + number))
            with safe_open(self.folder / _values(self._first + number), framework="pt") as values:
                lengths = {values.get_slice(name).get_shape()[0] for name in values.keys()}  # noqa: SIM118
            found = index["digests"].numpy().tobytes(), index["counts"].tolist()
            same = {name: index[name].tolist() for name in columns} == columns
        except (OSError, SafetensorError, KeyError):
            return False
        expected = b"".join(row.digest for row in rows), [len(row.positions) for row in rows]
        return same and found == expected and lengths == {len(columns["positions"])}


class ShardFiller(ShardWriter):
    """Adds shards to a finished cache, behind those that it has; until all are there the cache is what it was.

    Args:
        reader: of the cache, opened after `filling` began.
        shards: the rows of each new shard.
        settings: further entries of the manifest's ``data``.

    Raises:
        DrklError: another process writes to the cache.
    """

    def __init__(
        self, reader: ShardReader, shards: Sequence[Sequence[CacheRow]], settings: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._found, self._settings = reader.manifest, settings
        super().__init__(reader.folder, {}, shards)
        self._first = self._found["shards"]

    def finish(self, files: Callable[[], Sequence[str]] = tuple) -> bool:
        """Replace the manifest if all new shards are there, and say whether that is so.

        Raises:
            DrklError: the cache is another one by now.
        """
        if self.missing:
            return False
        with locked(self.folder / ".part-finish.lock", wait=True):
            if read_manifest(self.folder) != self._found:
                raise DrklError(
                    f"The cache {str(self.folder)!r} was changed while rows were added to it; the same command goes on."
                )
            self._finish(files())
        return True

    def _finish(self, files: Sequence[str]) -> None:
        names = [*files, *self._names()]
        self._sweep({*names, *self._found["files"]})
        listed = self._found["files"] | {name: _facts(self.folder / name) for name in names}
        _write_manifest(self.folder, self._manifest() | {"finished": True, "files": dict(sorted(listed.items()))})

    def _manifest(self) -> dict[str, Any]:
        found, new = self._found, super()._manifest()
        sizes = {name: found[name] + new[name] for name in ("shards", "rows", "positions")}
        both = hashlib.blake2b((found["rows_digest"] + new["rows_digest"]).encode(), digest_size=DIGEST_BYTES)
        data = [*found["data"], *(dict(own) for own in self._settings if own not in found["data"])]
        before = {name: found[name] for name in (*sizes, "rows_digest", "data")}
        return {MADE_WITH: before, **found, **sizes, "rows_digest": both.hexdigest(), "data": data}

    def _begin(self) -> None:
        """Nothing: the cache is finished."""


class ShardReader:
    """Random access to the rows of a finished cache; values are read where they lie, and checked before the first use.

    Args:
        folder: the cache's.

    Raises:
        DrklError: it is none, is not finished, is of another version, or a file of it is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if not self.manifest.get("finished"):
            have = sum((folder / _rows(number)).is_file() for number in range(self.manifest["shards"]))
            raise DrklError(
                f"The cache {str(folder)!r} is not finished: it has {have} of {self.manifest['shards']} shards. The "
                "command that began it goes on with it."
            )
        self._checked: set[str] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._index()
        if len(self) != self.manifest["rows"]:
            raise _edited(folder / MANIFEST)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, digest: bytes) -> list[RowPlace]:
        """The places of a row: several where one text is kept at other positions too, and none where it is not."""
        found = []
        first, second = _halves(np.frombuffer(digest, np.uint8).reshape(1, DIGEST_BYTES))
        at = int(np.searchsorted(self._keys, first[0]))
        while at < len(self._keys) and self._keys[at] == first[0]:
            if self._others[at] == second[0]:
                found.append(RowPlace(*self._places[at].tolist()))
            at += 1
        return found

    def positions(self, place: RowPlace) -> Tensor:
        """The positions `[count]` of a row that are kept, ascending."""
        return self._positions[place.shard][place.start : place.start + place.count]

    def labels(self, place: RowPlace) -> Tensor | None:
        """The tokens `[count]` that are observed there; None where no value depends on them."""
        labels = self._labels[place.shard]
        return None if labels is None else labels[place.start : place.start + place.count]

    def read(self, place: RowPlace) -> dict[str, Tensor]:
        """The values of a row, `[count, …]` by name, on the CPU."""
        file = self._file(place.shard)
        end = place.start + place.count
        return {name: file.get_slice(name)[place.start : end] for name in file.keys()}  # noqa: SIM118

    def check(self, name: str) -> Path:
        """The path of a file of the cache, its checksum compared once.

        Raises:
            DrklError: it is not there, or not what was written.
        """
        path = self.folder / name
        if name in self._checked:
            return path
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise DrklError(f"The cache {str(self.folder)!r} has no {name!r} in its {MANIFEST}.")
        if not path.is_file():
            raise DrklError(
                f"The cache {str(self.folder)!r} misses its file {name!r}. Bring it back, or make the cache again."
            )
        found = _facts(path)
        if found != expected:
            bytes_ = f"{found['bytes']:,} of {expected['bytes']:,} bytes"
            what = "has a wrong checksum" if found["bytes"] == expected["bytes"] else f"has {bytes_}"
            raise DrklError(
                f"{str(path)!r} is not the file that {MANIFEST} lists: it {what}. Bring back the one that is wrong, or "
                "make the cache again."
            )
        self._checked.add(name)
        return path

    def verify(self) -> Iterator[str]:
        """Check every file; yields the name of each before it is read.

        Raises:
            DrklError: a file is missing or broken.
        """
        for name in self.manifest["files"]:
            yield name
            self.check(name)

    def check_descriptions(self) -> None:
        """Check every file that is no shard: whoever opens the cache reads those by other means.

        Raises:
            DrklError: a file is missing or broken.
        """
        for name in self.manifest["files"]:
            if not name.startswith(("rows-", "values-")):
                self.check(name)

    def _index(self) -> None:
        digests, places, self._positions, self._labels = [], [], list[Tensor](), list[Tensor | None]()
        for number in range(self.manifest["shards"]):
            tensors = load_file(self.check(_rows(number)))
            counts = tensors["counts"].numpy().astype(np.int64)
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else counts
            digests.append(tensors["digests"].numpy())
            self._positions.append(tensors["positions"])
            self._labels.append(tensors.get("labels"))
            places.append(np.stack([np.full_like(counts, number), starts, counts], 1))
        every = np.concatenate(digests) if digests else np.zeros((0, DIGEST_BYTES), np.uint8)
        self._keys, self._others = _halves(every)
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._others = self._keys[order], self._others[order]
        self._places = np.concatenate(places)[order] if places else np.zeros((0, 3), np.int64)

    def _file(self, shard: int) -> Any:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.check(_values(shard))
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)
        self._open[shard] = safe_open(path, framework="pt")
        return self._open[shard]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        DrklError: there is none, or it is of another version.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise DrklError(
            f"There is no folder {str(folder)!r}, which is to be a teacher cache. `drkl cache` makes one; a path that "
            f"is relative starts at the working directory, {str(Path.cwd())!r}."
        )
    if not path.is_file():
        raise DrklError(f"{str(folder)!r} is no teacher cache: it has no {MANIFEST}. `drkl cache` makes one.")
    try:
        manifest = read_json(path)
    except DrklError as error:
        raise DrklError(f"{error} Bring it back, or remove the folder and make the cache again.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise DrklError(
            f"{str(path)!r} has the format {version!r}; this version of drkl reads {FORMAT}. Make the cache again, "
            "in another folder or where this one was removed."
        )
    kinds = {"shards": int, "rows": int, "positions": int, "finished": bool}
    kinds |= {"files": dict} if manifest.get("finished") else {}
    if not has_kinds(manifest, kinds):
        raise DrklError(f"{str(path)!r} does not list the files of a cache. Remove the folder, and make it again.")
    if CHECKSUM not in manifest:
        raise _edited(path)
    try:
        return unsealed(manifest)
    except ValueError as error:
        raise _edited(path) from error


def has_kinds(manifest: Mapping[str, Any], kinds: Mapping[str, type]) -> bool:
    """Whether a manifest has some values, each of its type."""
    return all(isinstance(manifest.get(name), kind) for name, kind in kinds.items())


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_json(folder / MANIFEST, sealed(manifest))


def _edited(path: Path) -> DrklError:
    return DrklError(
        f"{str(path)!r} is not the file that was written: it has a wrong checksum. Bring it back, or remove the folder "
        "and make the cache again."
    )


def check_is_no_cache(name: str) -> None:
    """Raise DrklError where the name of a model is the folder of a teacher cache."""
    if is_cache(name):
        raise DrklError(
            f"{name!r} is a teacher cache, which has no weights. Training reads it as teacher.cache, in Python as "
            "drkl.TeacherCache.open(FOLDER); what a teacher writes needs the teacher itself."
        )


def is_cache(name: str) -> bool:
    """Whether the name of a model is the folder of a teacher cache."""
    return (Path(name) / MANIFEST).is_file() and (Path(name) / _rows(0)).is_file()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where two descriptions of a cache differ, in words; empty where they do not."""
    names = [name for name in wanted if found.get(name) != wanted[name]]
    return "; ".join(f"{name} is {json.dumps(found.get(name))}, not {json.dumps(wanted[name])}" for name in names)


def _columns(rows: Sequence[CacheRow]) -> dict[str, list[int]]:
    """What an index has of each kept position."""
    columns = {"positions": [position for row in rows for position in row.positions]}
    if any(row.labels is not None for row in rows):
        columns["labels"] = [label for row in rows for label in row.labels or ()]
    return columns


def _halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digests `[n, 16]` as two numbers each."""
    numbers = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    return numbers[:, 0].copy(), numbers[:, 1].copy()


def _rows(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


def _values(number: int) -> str:
    return f"values-{number:05d}.safetensors"


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def save_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors whole or not at all, for whoever may read new files.

    Raises:
        DrklError: it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".part-{path.name}-{os.getpid()}")
    with writing(path, then=GO_ON):
        try:
            save_file(dict(tensors), temporary)
            os.chmod(temporary, new_file_mode())  # safetensors' own is the user's alone
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def filling(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a cache to add rows to it; where another process does so, call ``on_wait`` and wait until it has ended.

    Raises:
        DrklError: there is no cache, or nothing can be written into its folder.
    """
    read_manifest(folder)
    path = folder / ".part-fill.lock"
    with contextlib.ExitStack() as held:
        try:
            try:
                held.enter_context(locked(path))
            except BlockingIOError:
                on_wait()
                held.enter_context(locked(path, wait=True))
        except OSError as error:
            raise cannot_write(folder, error, then=GO_ON) from error
        yield
