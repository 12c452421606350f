"""The run folder: the one interface between distilling, evaluating and reporting."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from drkl.disk import writing
from drkl.errors import DrklError
from drkl.folders import sync
from drkl.locks import HELD, take_lock
from drkl.parsing import check_ends, parse_json, parse_yaml
from drkl.sealed import CHECKSUM, sealed, unsealed

IN_MEMORY = "in memory"
"""The prefix, in a config.yaml, of the name of a model or of rows that were passed as objects."""
OF_A_STUDY = {kind: (f"{kind}.json", f"{kind}.yaml", "log.txt") for kind in ("cell", "start", "cache")}
"""The files that a study keeps in a folder that it has made, by what it made: its record, the config that it runs
there, and what that printed. A run may begin beside them."""
_LOOK = 4096
"""Bytes of a log's end that are looked at at once."""
_MOST_STEPS = 1 << 53
"""More than a run can take: a step of the log is below."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and readers of one run; nothing is loaded until it is asked for."""

    root: Path

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the run at ``path``.

        Raises:
            DrklError: the folder is not there, holds no ``config.yaml``, or has a path that is no text.
        """
        root = unexpanded(Path(path))
        check_is_text(root)
        if not root.is_dir():
            raise DrklError(f"There is no run folder {str(root)!r}. `drkl distill CONFIG` makes one under its run.dir.")
        run = cls(root)
        if not run.config_path.is_file():
            if run.env_path.is_file() or run.student_path.is_dir():
                raise DrklError(
                    f"The run {str(root)!r} has lost its config.yaml. Bring it back from a copy: env.json names the "
                    "command that made it. Its student is usable as a model of its own."
                )
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
        """Return what ``config.yaml`` holds.

        Raises:
            DrklError: the file is damaged.
        """
        values = read_yaml(self.config_path)
        if not values:
            raise DrklError(f"{self.config_path} is empty: the rest of the file was lost.")
        return values

    def read_env(self) -> dict[str, Any]:
        """Return what the run says of itself; nothing where there is no ``env.json``.

        Raises:
            DrklError: the file is damaged.
        """
        if not os.path.lexists(self.env_path):
            return {}
        try:
            return read_sealed(self.env_path)
        except DrklError as error:
            raise DrklError(f"{error} {_ENV_IS}") from error

    def write_env(self, values: Mapping[str, Any], *, lasting: bool = False) -> None:
        """Write ``env.json``; ``lasting`` as `write_text` takes it."""
        write_json(self.env_path, sealed(values), lasting=lasting)

    def last_step(self) -> int:
        """The optimiser step of the last whole line of ``train.jsonl``; 0 where there is none."""
        try:
            with self.train_log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOOK))
                lines = file.read().split(b"\n")
        except OSError:
            return 0
        for line in reversed(lines[:-1]):
            with contextlib.suppress(ValueError):
                if is_log_line(value := parse_json(line.decode())):
                    return int(value["step"])
        return 0

    def read_train_log(self) -> list[dict[str, Any]]:
        """Return the lines of ``train.jsonl``; none where there is no such file.

        Raises:
            DrklError: a line is damaged.
        """
        return log_lines(self.train_log_path)

    def read_rollouts(self) -> list[dict[str, Any]]:
        """Return the lines of ``rollouts.jsonl``; none where there is no such file.

        Raises:
            DrklError: a line is damaged.
        """
        return log_lines(self.rollouts_path)


_ENV_IS = (
    "It says whether the run has ended, and what its files were. Bring it back from a copy; without one move it away, "
    "and the student in student/ is no longer checked."
)


def unexpanded(path: Path) -> Path:
    """Return a path that no library takes for one in somebody's home: one that begins with a tilde is made absolute."""
    return path.absolute() if str(path).startswith("~") else path


def check_is_text(path: Path) -> None:
    """Raise DrklError where the path of a run is no UTF-8 text: safetensors, which has its weights, opens no other."""
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise DrklError(
            f"The path {str(path.absolute())!r} is no UTF-8 text, and safetensors, which keeps the weights of a run, "
            "opens no such file. Rename the folder."
        ) from error


def check_no_link(path: Path) -> None:
    """Raise DrklError where a path that drkl writes to is a link: what it points to may be somebody's own.

    Args:
        path: of a folder or a file in a run folder; one that is not there is let through.

    Raises:
        DrklError: it is a link.
    """
    if path.is_symlink():
        raise DrklError(
            f"{str(path)!r} is a link to {os.readlink(path)!r}, where something is that drkl has not written: it would "
            "be overwritten. Remove the link; what it points to stays."
        )


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


def read_sealed(path: str | Path) -> dict[str, Any]:
    """Read a json object that may have a checksum of its own.

    Raises:
        DrklError: the file cannot be read, holds no object, or is not what was written.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DrklError(f"{path} holds a {type(value).__name__}; expected an object.")
    try:
        return unsealed(value)
    except ValueError as error:
        raise DrklError(
            f"{path} is damaged, or was edited: {error}. Where it was edited on purpose, take out its {CHECKSUM!r}."
        ) from error


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a json-lines file; a last line that was cut off in writing is left out.

    Raises:
        DrklError: the file cannot be read, or a line is damaged.
    """
    rows = []
    for number, value in json_lines(path):
        if isinstance(value, ValueError):
            raise DrklError(f"{path}:{number}: not valid json: {value}. Mend or remove the line.") from value
        rows.append(value)
    return rows


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, of each line of a file and what it holds; a ValueError for a damaged one.

    An object may have a checksum of its own.

    A last line that was cut off in writing is left out.

    Raises:
        DrklError: the file cannot be read.
    """
    check_ends(path)
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DrklError(f"There is no file {str(path)!r}.") from error
    except OSError as error:
        raise DrklError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value: Any
        try:
            value = parse_json(line.decode())
            value = unsealed(value) if isinstance(value, dict) else value
        except ValueError as error:
            if number == len(lines) and line.strip(b"\0"):
                return
            value = ValueError(str(error))
        yield number, value


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, objects with a ``step`` each; none where there is no file.

    Raises:
        DrklError: the file cannot be read, or has a line that is none of a log.
    """
    if not os.path.lexists(path):
        return []
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if not is_log_line(row):
            raise DrklError(
                f"{path}, entry {number}: {json.dumps(row)[:80]} is no line of a run: expected an object with the "
                "optimiser step as `step`. Remove the line."
            )
        rows.append(row)
    return rows


def readable_log(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of a log that can be read, and what is wrong with the first of the others; empty for nothing."""
    rows: list[dict[str, Any]] = []
    wrong = ""
    if not os.path.lexists(path):
        return rows, wrong
    try:
        for number, value in json_lines(path):
            if is_log_line(value):
                rows.append(value)
            else:
                wrong = wrong or f"line {number} is damaged"
    except DrklError as error:
        wrong = str(error)
    return rows, wrong


def is_log_line(value: Any) -> bool:
    """Whether a value of json is an object with the number of an optimiser step as ``step``."""
    step = value.get("step") if isinstance(value, dict) else None
    return type(step) is int and 0 <= step < _MOST_STEPS


def lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log that are not of a later step; see `log_lines`."""
    return [row for row in log_lines(path) if row["step"] <= step]


def write_text(path: str | Path, text: str, *, lasting: bool = False) -> None:
    """Write a file whole or not at all: a temporary file beside it, then a rename.

    Args:
        path: the file.
        text: its content.
        lasting: return once it is on the disk itself, so that a power cut leaves it.

    Raises:
        CannotWrite: it cannot be written there.
    """
    # A path of bytes that are no text has lone surrogates; so written, json and yaml read them back.
    write_bytes(path, text.encode(errors="backslashreplace"), lasting=lasting)


def write_bytes(path: str | Path, data: bytes, *, lasting: bool = False) -> None:
    """Write a file whole or not at all, as `write_text` does."""
    path = Path(path)
    with writing(path), _beside(path, data, lasting=lasting) as temporary:
        os.replace(temporary, path)
        if lasting:
            with contextlib.suppress(OSError):  # the file is there; only a power cut now may bring the earlier one back
                sync(path.parent)


@contextlib.contextmanager
def _beside(path: Path, data: bytes, *, lasting: bool) -> Iterator[str]:
    """A temporary file with the content of one, for the block to give it the name; else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, new_file_mode())
        yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_together(files: Mapping[Path, str]) -> None:
    """Write files of one folder of which the last one says that all are there, lasting as `write_text` has it.

    Those of before stay where there is no room. Where a disk fails in the midst of it, the last one is gone.

    Raises:
        CannotWrite: they cannot be written.
    """
    last = [*files][-1]
    with contextlib.ExitStack() as opened:
        temporaries = {}
        for path, text in files.items():
            with writing(path):
                temporaries[path] = opened.enter_context(_beside(path, text.encode(), lasting=True))
        with writing(last):
            last.unlink(missing_ok=True)
        for path, temporary in temporaries.items():
            with writing(path):
                os.replace(temporary, path)
        with writing(last):
            sync(last.parent)


def write_json(path: str | Path, value: Any, *, lasting: bool = False) -> None:
    """Write json whole or not at all, as `write_text` does; NaN and infinities are refused."""
    write_text(path, json_text(value), lasting=lasting)


def json_text(value: Any) -> str:
    """The text of a json file; NaN and infinities are refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write json lines whole or not at all."""
    write_text(path, jsonl_text(rows))


def jsonl_text(rows: Iterable[dict[str, Any]]) -> str:
    """The text of a file of json lines."""
    return "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows)


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

    On a file system that has no locks, which is said, the block is entered all the same.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    import fcntl  # Windows has none, and reads run folders all the same

    kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        HELD.add(handle)
        try:
            take_lock(handle, kind)
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
