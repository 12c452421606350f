"""Code of somebody else's, such as a chat template: it ends soon and in little memory, or it is refused."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from drkl.errors import DrklError

SECONDS = 5
"""A processor's time for one conversation; a template takes a thousandth of one."""
MEMORY = 1 << 30
"""Bytes, beside what the process has already."""
_NO_MEMORY = 3
"""How a child says it."""

_tried: set[object] = set()
_refused: dict[object, str] = {}

T = TypeVar("T")


def bounded(key: object, what: str, way_out: str, action: Callable[[], T]) -> T:
    """Return what an action gives, unless it takes too long or too much memory.

    The first action of a key is tried in a child process before, where there are forks: what one call of a library
    takes, such as a text that is repeated, is stopped there alone. Later ones, whose input may be another, are stopped
    between two steps of Python, in the main thread. Once one was refused, all of its key are, at once.

    Args:
        key: of what is limited, such as the text of a template.
        what: its name, at the beginning of a sentence.
        way_out: the last sentence of the error.
        action: called in this process, after a trial in another one.

    Raises:
        DrklError: it takes more than `SECONDS` or `MEMORY`.
    """
    if key not in _tried:
        _tried.add(key)
        if (excess := _try_out(action)) is not None:
            _refused[key] = excess
    if key not in _refused:
        try:
            with _timed():
                return action()
        except _Late:
            _refused[key] = f"more than {SECONDS} seconds"
    raise DrklError(f"{what} takes {_refused[key]}. It is broken, or made to stop this program. {way_out}")


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turn a panic of a library in Rust, which no `except Exception` catches, into an error.

    Args:
        what: what was done, at the beginning of a sentence.

    Raises:
        DrklError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise DrklError(
            f"{what} ended in a fault of the library tokenizers: {reason}. A regular expression in tokenizer.json may "
            "take too long for this text; use a tokenizer without it."
        ) from None


class _Late(BaseException):
    """An action has taken its time; no `except Exception` inside of it holds this up."""


def _try_out(action: Callable[[], Any]) -> str | None:
    """What an action takes too much of in a child process; None where it ends well, or there are no forks."""
    if sys.platform != "linux":
        return None
    with warnings.catch_warnings():
        # Newer Pythons warn of forks beside threads; an action needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _be_child(action)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"more than {SECONDS} seconds" if os.WTERMSIG(status) == signal.SIGXCPU else "all of the memory"
    return f"more than {MEMORY >> 30} GiB of memory" if os.WEXITSTATUS(status) == _NO_MEMORY else None


def _be_child(action: Callable[[], Any]) -> None:
    """Run an action within the limits of the system, and end."""
    import resource

    status = 0
    try:
        for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for stream in (1, 2):  # whatever goes wrong is said where the action is called again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_AS: size + MEMORY}
        for kind, limit in limits.items():
            highest = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (limit if highest < 0 else min(limit, highest), highest))
        action()
    except MemoryError:
        status = _NO_MEMORY
    except BaseException as error:
        status = _NO_MEMORY if isinstance(error.__cause__, MemoryError) else 0
    finally:
        os._exit(status)


@contextmanager
def _timed() -> Iterator[None]:
    """Raise `_Late` once the process has computed for `SECONDS`; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
