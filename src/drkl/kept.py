"""What a finished run wrote, and whether it is still that: checksums of its files stand in ``env.json``."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drkl.display import shell_word
from drkl.errors import DrklError
from drkl.folders import check_files, checksum, describe_file, describe_files
from drkl.runs import RunFolder

STUDENT, FILES = "student", "files"
"""Keys of ``env.json``: the files of ``student/``, and those beside it that are read again."""
MARK = "student_files"
"""In ``settings`` of ``eval.json`` and ``analysis.json``: the `student_mark` of the student that was looked at."""
REMOVED = "student_removed"
"""Key of ``env.json``: when a study removed the student of a run that was evaluated."""
_FREE = ("README.md",)
"""Files of a student that anybody may edit."""
_log = logging.getLogger("drkl")
_said: set[str] = set()
"""Warnings that were given."""
_checked: dict[str, Any] = {}
"""Students that were found whole, by their folders: the times and sizes of their files."""


def describe_run_files(run: RunFolder) -> dict[str, Any]:
    """Return the entries of ``env.json`` that tell a run's files from others."""
    paths = (run.config_path, run.train_log_path, run.rollouts_path, run.eval_rows_path)
    try:
        student = {name: said for name, said in describe_files(run.student_path).items() if name not in _FREE}
        beside = {path.name: describe_file(path) for path in paths if path.is_file()}
    except OSError as error:
        raise DrklError(
            f"Cannot read {error.filename!r}, which was just written: {error.strerror or error}."
        ) from error
    return {STUDENT: student, FILES: beside}


def student_mark(env: Mapping[str, Any]) -> str | None:
    """Return what tells the student of a run from another one, by its ``env.json``; None in a run of before."""
    files = env.get(STUDENT)
    return checksum(json.dumps(files, sort_keys=True).encode()) if files else None


def note_other_student(run: RunFolder, mark: Any) -> None:
    """Warn where the evaluation in a run's folder is not that of its student.

    Args:
        run: a run.
        mark: the `student_mark` of the student that was evaluated; None where it is not known.
    """
    try:
        now = student_mark(run.read_env())
    except DrklError:  # whoever reads env.json for what it says tells of that
        return
    if mark is not None and now is not None and mark != now:
        _warn(
            f"{run.eval_path} is of another student than the one that is in {run.student_path} now. `drkl evaluate "
            f"{shell_word(run.root)}` measures that one."
        )


def described(data: bytes) -> dict[str, Any]:
    """What `drkl.folders.describe_files` says of a file with this content."""
    return {"bytes": len(data), "xxh3": checksum(data)}


def check_student(folder: str | Path) -> None:
    """Check the files of a model's folder where that is the student of a finished run.

    Raises:
        DrklError: a file is missing or damaged, or ``env.json`` of the run is.
    """
    path = Path(folder)
    run = RunFolder(path.parent)
    if path.name != run.student_path.name or not run.config_path.is_file():
        return
    if when := run.read_env().get(REMOVED):
        raise DrklError(
            f"The student of the run {str(run.root)!r} was not kept: its study removed it once it was evaluated "
            f"({when}), as keep_students is false there. A new run of its config.yaml trains it again."
        )
    files = files_of(run, STUDENT)
    stamps = {str(file): _stamp(path / file) for file in files}
    if _checked.get(str(path.resolve())) == stamps:
        return
    if reasons := check_files(path, files):
        raise DrklError(
            f"The student {str(path)!r} is not the one that its run wrote, by its env.json: "
            f"{'; '.join(reasons)}. Bring it back from a copy. A student that was changed on purpose is a model of its "
            "own: copy it to another folder, and use it by that name."
        )
    _checked[str(path.resolve())] = stamps


def note_removed(run: RunFolder) -> None:
    """Note that the student of a run that is finished and evaluated is removed; a reader says so."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run.write_env(run.read_env() | {REMOVED: when}, lasting=True)


def _stamp(path: Path) -> Any:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def files_of(run: RunFolder, key: str) -> Mapping[str, Any]:
    """What ``env.json`` says of files; nothing in a run of before, or one that has not ended.

    Raises:
        DrklError: ``env.json`` is damaged.
    """
    said = run.read_env().get(key, {})
    try:
        if not isinstance(said, Mapping):
            raise ValueError(f"it has a {type(said).__name__}")
        check_files(run.root / "none", said)
    except ValueError as error:
        raise DrklError(
            f"{run.env_path} does not list files as {key!r}: {error}. Bring it back from a copy."
        ) from error
    files: Mapping[str, Any] = said
    return files


def check_log(run: RunFolder, path: Path) -> None:
    """Check the lines of a log that were there when the run ended; later ones may follow.

    A log that is gone is a warning.

    Raises:
        DrklError: the file is damaged, or ``env.json`` is.
    """
    said = files_of(run, FILES).get(path.name)
    if said is None:
        return
    if not path.exists():
        _log.warning("Warning: %s is gone: what it says is left out.", path)
        return
    try:
        with path.open("rb") as file:
            same = described(file.read(said["bytes"])) == said
        reason = "has another content than was written"
    except OSError as error:
        same, reason = False, f"cannot be read ({error.strerror or error})"
    if not same:
        raise DrklError(
            f"{path} {reason}: it does not have the checksum in {run.env_path.name}. Bring it back from a copy, or "
            "move it away: what it says is left out then."
        )


def note_changes(run: RunFolder, *, strict: bool = True) -> None:
    """Warn where ``config.yaml`` of a finished run is not the one that trained it; each thing once.

    Args:
        run: the run.
        strict: whether what needs ``env.json`` follows: it is an error if that is damaged, a warning if it is gone.

    Raises:
        DrklError: ``env.json`` is damaged.
    """
    if not os.path.lexists(run.env_path):
        if strict:
            _warn(
                f"{run.root} has no env.json: nothing tells whether its student and its config.yaml are those that the "
                "run wrote, nor which ids its models share."
            )
        return
    try:
        said = files_of(run, FILES)
    except DrklError:
        if strict:
            raise
        return
    names = [name for name in (run.config_path.name, run.eval_rows_path.name) if name in said]
    for reason in check_files(run.root, {name: said[name] for name in names}):
        _warn(f"in {run.root}, since the run ended, {reason}.")


def _warn(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("Warning: %s", text)
