"""The run folder: the one interface between distilling, evaluating and reporting."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from drkl.disk import writing
from drkl.errors import DrklError
from drkl.folders import sync
from drkl.locks import HELD
from drkl.parsing import check_ends, parse_json, parse_yaml

IN_MEMORY = "in memory"
"""The prefix, in a config.yaml, of the name of a model or of rows that were passed as objects."""
_LOOK = 4096
"""Bytes of a log's end that are looked at at once."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and readers of one run; nothing is loaded until it is asked for."""

    root: Path

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the run at ``path``.

        Raises:
            DrklError: the folder is not there, or holds no ``config.yaml``.
        """
        root = Path(path)
        if not root.is_dir():
            raise DrklError(f"There is no run folder {str(root)!r}. `drkl distill CONFIG` makes one under its run.dir.")
        run = cls(root)
        if not run.config_path.is_file():
            raise DrklError(
                f"{str(root)!r} is not a run folder: it has no config.yaml. `drkl distill CONFIG` makes one."
            )
        return run

    @property
    def config_path(self) -> Path:
        return self.root / "config.yaml"

    @property
    def env_path(self) -> Path:
        return self.root / "env.json"

    @property
    def train_log_path(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def rollouts_path(self) -> Path:
        """Some of the answers to held-out prompts that the student wrote as training went on."""
        return self.root / "rollouts.jsonl"

    @property
    def student_path(self) -> Path:
        return self.root / "student"

    @property
    def checkpoints_path(self) -> Path:
        return self.root / "checkpoints"

    @property
    def eval_path(self) -> Path:
        return self.root / "eval.json"

    @property
    def samples_path(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def predictions_path(self) -> Path:
        return self.root / "predictions.jsonl"

    @property
    def heldout_path(self) -> Path:
        return self.root / "heldout.jsonl"

    @property
    def eval_rows_path(self) -> Path:
        """The held-out rows of a run that was given them in memory."""
        return self.root / "eval_rows.jsonl"

    @property
    def analysis_path(self) -> Path:
        return self.root / "analysis.json"

    @property
    def analysis_folder(self) -> Path:
        """The analysis' figures and its numbers position by position."""
        return self.root / "analysis"

    @property
    def parts_path(self) -> Path:
        """Finished parts of an evaluation that has not ended; gone once it has."""
        return self.root / ".evaluation"

    @property
    def report_path(self) -> Path:
        return self.root / "report.html"

    @property
    def name(self) -> str:
        return self.root.resolve().name

    def stages(self) -> list[RunFolder]:
        """The runs that came before this one, first to last (``stages/NN-name/``)."""
        folder = self.root / "stages"
        if not folder.is_dir():
            return []
        return [RunFolder(p) for p in sorted(folder.iterdir()) if (p / "config.yaml").is_file()]

    def is_finished(self) -> bool:
        """Whether training ended and its student was written (``env.json`` says so last of all)."""
        return self.read_env().get("finished") is not None

    def read_config(self) -> dict[str, Any]:
        return read_yaml(self.config_path)

    def read_env(self) -> dict[str, Any]:
        values = read_json(self.env_path) if self.env_path.is_file() else {}
        if not isinstance(values, dict):
            raise DrklError(
                f"{self.env_path} holds a {type(values).__name__}; expected a json object. Remove the file."
            )
        return values

    def read_train_log(self) -> list[dict[str, Any]]:
        return read_jsonl(self.train_log_path) if self.train_log_path.is_file() else []

    def read_rollouts(self) -> list[dict[str, Any]]:
        return read_jsonl(self.rollouts_path) if self.rollouts_path.is_file() else []


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml mapping (safe loader).

    Raises:
        DrklError: the file is missing, unreadable, broken, or not a mapping.
    """
    text = read_text(path)
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise DrklError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise DrklError(f"{path} holds a {type(value).__name__}; expected `key: value` lines.")
    return value


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, with errors that name it."""
    check_ends(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DrklError(f"There is no file {str(path)!r}.") from error
    except UnicodeDecodeError as error:
        raise DrklError(f"{str(path)!r} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise DrklError(f"Cannot read {str(path)!r}: {error.strerror}.") from error


def read_json(path: str | Path) -> Any:
    """Read a json file, with errors that name it."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise DrklError(f"{path} is not valid json: {error}.") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a json-lines file; a last line that was cut off in writing is left out."""
    lines = read_text(path).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DrklError(f"{path}:{number}: not valid json: {error}. Mend or remove the line.") from error
    return rows


def lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log, json lines with a ``step`` each, that are not of a later step; none where there is no file.

    Raises:
        DrklError: the file cannot be read, or has a line that is none of a log.
    """
    rows = read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DrklError(
                f"{path}, entry {number}: {json.dumps(row)[:80]} is no line of a run: expected an object with the "
                "optimiser step as `step`. Remove the line."
            )
    return [row for row in rows if row["step"] <= step]


def write_text(path: str | Path, text: str, *, lasting: bool = False) -> None:
    """Write a file whole or not at all: a temporary file beside it, then a rename.

    Args:
        path: the file.
        text: its content.
        lasting: return once it is on the disk itself, so that a power cut leaves it.

    Raises:
        CannotWrite: it cannot be written there.
    """
    write_bytes(path, text.encode(), lasting=lasting)


def write_bytes(path: str | Path, data: bytes, *, lasting: bool = False) -> None:
    """Write a file whole or not at all, as `write_text` does."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(temporary, new_file_mode())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if lasting:
            sync(path.parent)


def write_json(path: str | Path, value: Any, *, lasting: bool = False) -> None:
    """Write json whole or not at all, as `write_text` does; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", lasting=lasting)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write json lines whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add json lines to a log, all of them or none; a last line that was cut off before is removed.

    Raises:
        CannotWrite: they cannot be written.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with writing(path, then="resume the run"), path.open("ab+", buffering=0) as file:
        end = _end_of_lines(file)
        if end != file.seek(0, os.SEEK_END):
            file.truncate(end)
        try:
            while text:
                text = text[file.write(text) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _end_of_lines(file: FileIO) -> int:
    """The number of bytes up to the end of a file's last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _LOOK)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            return start + found
        end = start
    return 0


def write_yaml(path: str | Path, value: dict[str, Any]) -> None:
    """Write yaml whole or not at all, keys in the order given."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def new_file_mode() -> int:
    """The permissions of a new file: what the user's umask leaves of reading and writing for all."""
    current = os.umask(0)
    os.umask(current)
    return 0o666 & ~current


def cache_dir() -> Path:
    """Return drkl's cache folder: ``DRKL_CACHE``, else ``drkl`` in the user's cache folder."""
    if "DRKL_CACHE" in os.environ:
        return Path(os.environ["DRKL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drkl"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; it is let go when the process dies, however it dies.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    import fcntl  # Windows has none, and reads run folders all the same

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        HELD.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held it has removed the file by now: another process may lock a new one of that name.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # whoever comes next takes the one that stays
                        path.unlink(missing_ok=True)
                return
        finally:
            HELD.discard(handle)
            os.close(handle)
