"""Who works in a folder: one process at a time, until it ends, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from drkl.display import shell_line
from drkl.errors import DrklError
from drkl.processes import first_alone
from drkl.signals import KEPT

TRAINING, EVALUATION, ANALYSIS, STUDY = ".lock", ".evaluation.lock", ".analysis.lock", ".study.lock"
"""Lock files of a folder: of who trains in it, who writes its results of one kind, and the study that makes it."""
LOCKS = frozenset((TRAINING, EVALUATION, ANALYSIS, STUDY))
_DOING = {TRAINING: "trains in it", EVALUATION: "evaluates it", ANALYSIS: "analyses it", STUDY: "makes it for a study"}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems say that lock no files."""
_log = logging.getLogger("drkl")
HELD: set[int] = set()
"""Open lock files, which a forked child closes."""


class InUse(DrklError):
    """Another process works in the folder."""


@contextmanager
def holding(folder: Path, name: str, *free_of: str) -> Iterator[None]:
    """Hold a folder for one kind of work; it is let go when the process ends, however it ends.

    A folder that is not there is made, and removed again where nothing is written into it. Where nothing can be
    written, or the file system has no locks, the block is entered all the same.

    Args:
        folder: where the lock file is.
        name: of the lock file.
        free_of: further lock files there, which no one may hold.

    Raises:
        InUse: another process holds one of them.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _taken(folder / name)
    except OSError:
        handle = None  # whatever is written there next says why it cannot be
    try:
        for other in free_of:
            check_free(folder, other)
        yield
    finally:
        if handle is not None:
            _let_go(folder / name, handle)
        with suppress(OSError):
            for path in made:
                path.rmdir()


@contextmanager
def first_holding(folder: Path, name: str, *free_of: str) -> Iterator[None]:
    """As `holding`, of several processes in the first one; the others get its error."""
    with ExitStack() as stack:
        first_alone(lambda: stack.enter_context(holding(folder, name, *free_of)))
        yield


def check_free(folder: Path, name: str) -> None:
    """Raise InUse where another process holds a lock file of a folder."""
    try:
        handle = os.open(folder / name, os.O_RDWR)
    except OSError:
        return
    try:
        _lock(handle)
    except BlockingIOError:
        raise _in_use(folder / name) from None
    finally:
        os.close(handle)


def is_held(folder: Path, *names: str) -> bool:
    """Whether another process holds one of these lock files of a folder."""
    try:
        for name in names:
            check_free(folder, name)
    except InUse:
        return True
    return False


def _taken(path: Path) -> int | None:
    """The handle of a lock file that this process holds now; None where the file system has no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(handle):
                os.close(handle)
                return None
        except BlockingIOError:
            os.close(handle)
            raise _in_use(path) from None
        with suppress(FileNotFoundError):
            # Whoever held it may have removed the file by now: another process may lock a new one of that name.
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)
    HELD.add(handle)
    about = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": shell_line(KEPT.again),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # it is held with nothing in it, too
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)
    return handle


def _lock(handle: int) -> bool:
    """Take a lock; False where there are none."""
    try:
        import fcntl  # Windows has none
    except ImportError:
        return False
    return take_lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_lock(handle: int, kind: int) -> bool:
    """Take a lock of a kind of `fcntl.flock`; False, with a warning, where the file system has none.

    Raises:
        BlockingIOError: another process holds it, and this one is not to wait.
    """
    import fcntl

    try:
        fcntl.flock(handle, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "Warning: this file system has no locks (%s), so that a second run in the same folder is not refused.",
            error.strerror,
        )
        return False
    return True


def _let_go(path: Path, handle: int) -> None:
    HELD.discard(handle)
    with suppress(OSError):
        if os.path.samestat(os.fstat(handle), path.stat()):
            path.unlink()
    os.close(handle)


def _in_use(path: Path) -> InUse:
    try:
        about = json.loads(path.read_text())
        who = f"process {about['process']} on {about['host']}, since {about['since']}"
        who = f"`{about['command']}` ({who})" if about["command"] else f"Another program ({who})"
    except (OSError, ValueError, TypeError, KeyError):
        who = "Another process"
    return InUse(
        f"The folder {str(path.parent)!r} is in use: {who} {_DOING.get(path.name, 'works in it')}. Wait until that has "
        "ended, or end it; or choose another folder."
    )


def _after_fork() -> None:
    """A forked child holds nothing: the folder is free once its parent has ended."""
    for handle in HELD:
        with suppress(OSError):
            os.close(handle)
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
