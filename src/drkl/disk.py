"""What a disk refuses, in words: the file, the cause, and the cure."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from drkl.errors import DrklError

_AWAY = "Bring its disk back"
_RIGHTS = "Give this user the right to it"
CURES = {
    errno.ENOSPC: "Make room on its disk",
    errno.EDQUOT: "Make room within the quota, or have it raised",
    errno.EROFS: "Mount its disk for writing (after a fault the system itself may have made it read-only; see its log)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: "Check its disk; the system's log says more",
    errno.EFBIG: "Raise the limit on a file's size (`ulimit -f`), or use a disk that allows larger files",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "Raise the limit on open files",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Bring it back",
    errno.ENOTDIR: "Move it away",
    errno.EEXIST: "Move it away",
    errno.EISDIR: "Move it away",
    **dict.fromkeys((errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT), _AWAY),
}
"""What helps against each of the system's errors."""
_OF_NETWORKS = (errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)
"""Errors that processes which speak with each other have, too."""
_ALWAYS_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that no reading has."""
_NEVER_OURS = (
    errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG,
)  # fmt: skip
"""Errors that no fault of a program has, or hardly ever."""
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
_UNNAMED = re.compile(r"iostream error|unexpected pos \d+|\d+ requested and \d+ written|PytorchStreamWriter failed")
"""What torch and numpy say where the system's error is lost."""
_NO_TEMPORARY = "No usable temporary directory"
"""Python's words."""
_TRIED = 1 << 16
"""Bytes that are written to find out why a disk does not take any."""


class CannotWrite(DrklError):
    """Something could not be written: which file, why, and what helps.

    Args:
        message: the whole of it.
        path: the file or folder.
        number: the system's error number; None where it is not known.
    """

    def __init__(self, message: str, path: str | Path = "", number: int | None = None) -> None:
        super().__init__(message)
        self.path, self.number = Path(path), number


def cannot_write(path: str | Path, error: BaseException, *, what: str = "", then: str = "") -> CannotWrite:
    """Return the error that says what could not be written, why, and what helps.

    Args:
        path: the file or folder that was to be written.
        error: what came of it; of a library that loses the system's error, the disk is tried.
        what: the content, where the path alone does not tell it.
        then: what to do once the cause is mended, as an order.
    """
    path = Path(path)
    number = _number_of(error)
    is_lost = number is None and bool(_UNNAMED.search(str(error)))
    if is_lost:
        number = _try(path)
    if _NO_TEMPORARY in str(error):
        cause, cure = "no folder for temporary files can be written", "Make room there, or set TMPDIR to another folder"
    elif number is None and is_lost:  # it failed once, and takes what is written to it now
        cause, cure = f"a write failed, and why is lost ({_one_line(error)})", CURES[errno.EIO]
    elif number is None:
        cause, cure = _one_line(error) or type(error).__name__, "Mend that"
    else:
        cause, cure = _cause(path, number), CURES.get(number, "Mend that")
    where = f"{what} to {str(path)!r}" if what else repr(str(path))
    return CannotWrite(f"Cannot write {where}: {cause}. {cure}{f', then {then}' if then else ''}.", path, number)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def is_failed_write(error: BaseException) -> bool:
    """Whether an error that came as files were written is the disk's, and not of what was to be written."""
    if isinstance(error, DrklError):
        return isinstance(error, CannotWrite)
    return _number_of(error) is not None or bool(_UNNAMED.search(str(error)))


def explained(error: Exception) -> Exception:
    """The same error, or where it is the system's about a file, whoever came upon it, one that says what helps."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return error
    if error.errno in _ALWAYS_WRITES or _NO_TEMPORARY in str(error):
        return cannot_write(error.filename or "a file", error)
    if error.errno in _NEVER_OURS:
        where = "a file" if error.filename is None else repr(str(error.filename))
        text = f"Cannot read or write {where}: {os.strerror(error.errno)}. {CURES[error.errno]}."
        return CannotWrite(text, error.filename or "", error.errno)
    return error


@contextlib.contextmanager
def writing(path: str | Path, *, what: str = "", then: str = "") -> Iterator[None]:
    """Inside, raise what a disk refuses as `CannotWrite`; arguments as `cannot_write`'s."""
    try:
        yield
    except CannotWrite:
        raise
    except Exception as error:  # safetensors, tokenizers, torch and pyarrow each raise another
        if not is_failed_write(error):
            raise
        raise cannot_write(path, error, what=what, then=then) from error


def _number_of(error: BaseException | None) -> int | None:
    """The system's error number, of the error or of what it came from."""
    while error is not None:
        if isinstance(error, DrklError):
            return getattr(error, "number", None)
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        text = str(error)
        if found := _NUMBER.search(text):
            return int(found[1] or found[2])
        named = [number for number in CURES if text.endswith(os.strerror(number)) and number not in _OF_NETWORKS]
        if named:
            return named[0]
        error = error.__cause__ or error.__context__
    return None


def _cause(path: Path, number: int) -> str:
    ancestors = list(path.absolute().parents)
    if number == errno.ENOENT and (missing := [folder for folder in ancestors if not folder.exists()]):
        return f"the folder {str(missing[-1])!r} is gone"
    if number in (errno.ENOTDIR, errno.EEXIST):
        files = [str(place) for place in (path.absolute(), *ancestors) if place.exists() and not place.is_dir()]
        if files:
            return f"{files[-1]!r} is a file where a folder is expected"
    if number == errno.EISDIR:
        return "a folder of that name is there"
    return os.strerror(number)


def _try(path: Path) -> int | None:
    """Write something beside a path, and return the error number of what goes wrong."""
    folder = next((place for place in path.absolute().parents if place.is_dir()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None
