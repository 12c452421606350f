"""Tokenised rows on disk, under a hash of all that they depend on: made once, by all cores, and read ever after.

A finished folder has the rows in ``rows-*.arrow`` (`drkl.data.stored`) and what is said of them in ``manifest.json``.
One that is being made is called ``.making`` and has its parts, each written whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from drkl._version import __version__
from drkl.data.stored import NotStorable, RowFiles, StoredRows
from drkl.data.tokenize import DropReport
from drkl.data.workers import WorkerEnded
from drkl.disk import CannotWrite, cannot_write, is_failed_write, writing
from drkl.errors import DrklError
from drkl.folders import describe_file
from drkl.runs import cache_dir, locked, read_json, read_sealed, write_json
from drkl.sealed import sealed

FORMAT = 1
"""Version of the folder's layout."""
MANIFEST = "manifest.json"
CACHE_BYTES = 64 * 2**30
"""Size limit of the cache of rows; the folders used longest ago are deleted first."""
TOKENISING, READING = "Tokenising rows", "Reading rows"
TOTAL = "total"
_THEN = "go on; or set DRKL_CACHE to another folder. What is finished is kept, so that the next start goes on there"
LOOK_EVERY = 0.5
"""Seconds between two looks at what another process makes."""


@dataclass
class Watch:
    """Hooks for a front end; each does nothing by default."""

    on_message: Callable[[str], None] = lambda text: None
    on_rows: Callable[[str, int, int], None] = lambda what, done, of: None
    """Called with what is done, `READING` or `TOKENISING`, and with the rows done and in all (0: not known)."""


def key_of(facts: Mapping[str, Any]) -> str:
    """A hash of facts, as json, and of the code that makes rows of them."""
    text = json.dumps([facts, _code()], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _code() -> list[str]:
    """What makes rows: this package's own files, and the libraries' versions."""
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return [str(FORMAT), __version__, digest.hexdigest(), transformers.__version__, tokenizers.__version__]


_temporary: list[tempfile.TemporaryDirectory[str]] = []


def rows_folder(watch: Watch, *, kept: bool = True) -> Path:
    """The folder of the cache of rows; where that cannot be written, and for rows not ``kept``, one until the end."""
    folder = cache_dir() / "rows"
    if not kept:
        return _passing_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _elsewhere(watch, folder, error)


def _passing_folder() -> Path:
    """A folder that is removed when this process ends."""
    if not _temporary:
        with writing(Path(os.environ.get("TMPDIR", "/tmp")) / "drkl-rows"):
            _temporary.append(tempfile.TemporaryDirectory(prefix="drkl-rows-"))
    return Path(_temporary[0].name)


def _elsewhere(watch: Watch, folder: Path, error: Exception) -> Path:
    """Say that the cache of rows cannot be written, and return the folder that they are kept in."""
    other = _passing_folder()
    cause = str(cannot_write(folder, error))
    watch.on_message(
        f"{cause} Until this run ends the tokenised rows are kept in {str(other)!r}. Set DRKL_CACHE to a folder that "
        "can be written, to keep them for later runs."
    )
    return other


@dataclass
class Made:
    """Rows that were made, and what is said of them."""

    rows: StoredRows
    report: DropReport
    about: dict[str, Any] = field(default_factory=dict)
    cached: bool = True
    """Whether they were there already."""


Maker = Callable[["Parts"], dict[str, Any]]
"""Writes all parts, and returns the manifest."""


def made(key: str, make: Maker, watch: Watch, *, kept: bool = True) -> Made:
    """Return the rows of a key; they are made where they are not there yet.

    Of several processes that ask at once one makes them, and the others wait and read.

    Args:
        key: `key_of` all that the rows depend on.
        make: makes them.
        watch: hooks for a front end.
        kept: whether they are kept for later runs.

    Raises:
        CannotWrite: no disk takes them, neither that of the cache nor that of temporary files.
        DrklError: what ``make`` raises.
    """
    folder = rows_folder(watch, kept=kept) / key
    if (found := _open(folder)) is not None:
        return found
    try:
        return _make(folder, make, watch)
    except Exception as error:
        if not is_failed_write(error):
            raise
        if folder.parent != cache_dir() / "rows":
            raise cannot_write(folder.parent, error, what="the tokenised rows", then=_THEN) from error
        _elsewhere(watch, folder.parent, error)
        return made(key, make, watch, kept=False)


def _make(folder: Path, make: Maker, watch: Watch) -> Made:
    """Make the rows of a folder, unless another process has done so meanwhile."""
    with _held(folder, watch):
        if (found := _open(folder)) is not None:
            return found
        if os.path.lexists(folder):
            watch.on_message(f"The tokenised rows in {folder} are damaged: they are made anew.")
        making = folder.with_name(f".making-{folder.name}")
        try:
            parts = Parts(making)
            write_json(making / MANIFEST, sealed(make(parts)))
            shutil.rmtree(folder, ignore_errors=True)
            making.rename(folder)
        except (WorkerEnded, CannotWrite):  # what is finished is kept, so that the next start goes on there
            raise
        except (DrklError, NotStorable):  # of the rows: what was made of the others is of no use
            shutil.rmtree(making, ignore_errors=True)
            raise
        if (found := _open(folder)) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # it was written, and cannot be read
        found.cached = False
        _trim(folder)
        return found


@contextlib.contextmanager
def _held(folder: Path, watch: Watch) -> Iterator[None]:
    """Hold the folder of a key; while another process makes it, say how far that one is."""
    lock = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as held:
        waiting = False
        while True:
            try:
                held.enter_context(locked(lock))
                break
            except BlockingIOError:
                if not waiting:
                    watch.on_message("Another process reads and tokenises the same rows; this one waits for it.")
                waiting = True
                done, of = Parts(folder.with_name(f".making-{folder.name}"), make=False).progress()
                if of:
                    watch.on_rows(TOKENISING, done, of)
                time.sleep(LOOK_EVERY)
        yield


class Parts:
    """The files of rows that are being made, and what is said of each.

    Args:
        folder: where they are; what it has of an earlier start is used.
        make: whether the folder is made.
    """

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        self.folder = folder
        if make:
            folder.mkdir(parents=True, exist_ok=True)

    def expect(self, total: int) -> None:
        """Note how many rows are to be tokenised."""
        write_json(self.folder / TOTAL, total)

    def progress(self) -> tuple[int, int]:
        """How many rows are tokenised, and how many are to be; 0 while that is not known."""
        try:
            total = read_json(self.folder / TOTAL)
            parts = [read_json(path) for path in self.folder.glob("[0-9]*.json")]
            return sum(part["wanted"] for part in parts), total
        except (DrklError, KeyError, TypeError):
            return 0, 0

    def read(self, name: str) -> dict[str, Any] | None:
        """What is said of a part; None where it is not there, or not whole."""
        try:
            about = read_sealed(self.folder / f"{name}.json")
            whole = all(facts_of(self.folder / file) == facts for file, facts in about["files"].items())
        except (DrklError, OSError, KeyError, TypeError, AttributeError):
            return None
        return about if whole else None

    def write(
        self, name: str, batches: Iterable[tuple[str, pa.RecordBatch]], about: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Write the batches of a part, each kind into a file, and what ``about`` says in the end; return that."""
        files: dict[str, Path] = {}
        with contextlib.ExitStack() as opened:
            writers: dict[str, pa.RecordBatchStreamWriter] = {}
            for kind, batch in batches:
                if kind not in writers:
                    files[kind] = self.folder / f"{kind}-{name}.arrow"
                    sink = opened.enter_context(pa.OSFile(str(files[kind]), "wb"))
                    writers[kind] = opened.enter_context(pa.ipc.new_stream(sink, batch.schema))
                writers[kind].write_batch(batch)
        said = about() | {"files": {path.name: facts_of(path) for path in files.values()}}
        write_json(self.folder / f"{name}.json", sealed(said))
        return said


def facts_of(path: Path) -> list[Any]:
    """The size of a file, and a hash of its bytes."""
    said = describe_file(path)
    return [said["bytes"], said["xxh3"]]


def manifest_of(
    report: DropReport,
    files: Mapping[str, Sequence[Any]],
    renamed: Mapping[tuple[int, int], str] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """What ``manifest.json`` says.

    Args:
        report: the account of the rows.
        files: by the name of every file of rows in their order, and of every other, what `facts_of` it is.
        renamed: as `StoredRows` takes it.
        **about: what else is to be known of the rows.
    """
    names = [[number, copy, name] for (number, copy), name in (renamed or {}).items()]
    return {"report": asdict(report), "files": dict(files), "renamed": names, "about": about}


def _open(folder: Path) -> Made | None:
    """The rows of a finished folder; None where there is none, or a file of it is damaged."""
    try:
        manifest = read_sealed(folder / MANIFEST)
        if any(facts_of(folder / name) != facts for name, facts in manifest["files"].items()):
            return None
        rows = RowFiles([folder / name for name in manifest["files"] if name.endswith(".arrow")])
        order = np.load(folder / "order.npy", mmap_mode="r") if "order.npy" in manifest["files"] else None
        copies = np.load(folder / "copies.npy", mmap_mode="r") if order is not None else None
        renamed = {(number, copy): name for number, copy, name in manifest["renamed"]}
        found = Made(StoredRows(rows, order, copies, renamed), DropReport(**manifest["report"]), manifest["about"])
    except (DrklError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    with contextlib.suppress(OSError):  # a cache that is read-only is still read
        os.utime(folder / MANIFEST)
    return found


def _trim(kept: Path) -> None:
    """Remove the folders that were used longest ago, beyond the limit; those that are open stay readable."""
    found = []
    for folder in kept.parent.iterdir():
        if not folder.is_dir() or folder == kept:
            continue
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in folder.iterdir())
            used = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
            found.append((used, size, folder))
    total = sum(path.stat().st_size for path in kept.iterdir()) + sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total <= CACHE_BYTES:
            break
        key = folder.name.removeprefix(".making-")
        with contextlib.suppress(BlockingIOError), locked(folder.with_name(f".{key}.lock")):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def merged(reports: Iterable[Mapping[str, Any]], start: DropReport) -> DropReport:
    """The account of all parts."""
    for report in reports:
        start.add(DropReport(**report))
    return start


def order_by_weight(
    weights: NDArray[np.float64],
    ids: Callable[[NDArray[np.int64]], list[str]],
    more: Callable[[list[str], float], list[str]],
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The numbers of rows as an epoch takes them by their weights, and how often each came before.

    Args:
        weights: of the rows.
        ids: the ids of the rows of some numbers.
        more: of the ids of all rows of a weight, those that are taken once more for its fraction.
    """
    share = weights.astype(np.int64)
    for weight in np.unique(weights).tolist():
        if weight == int(weight):
            continue
        numbers = np.flatnonzero(weights == weight)
        names = ids(numbers)
        chosen = set(more(names, weight))
        share[[number for number, name in zip(numbers.tolist(), names, strict=True) if name in chosen]] += 1
    copies = range(int(share.max(initial=0)))
    parts = [np.flatnonzero(share > copy) for copy in copies]
    counts = [np.full(len(part), copy, np.int32) for copy, part in zip(copies, parts, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *parts]), np.concatenate([np.empty(0, np.int32), *counts])
