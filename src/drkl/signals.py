"""Ends from outside: Ctrl-C, SIGTERM and SIGHUP end a command at once, and training after the step that runs.

Whatever is written is whole or does not count, so that an end at any moment loses nothing that was finished. What is
kept and how one goes on stands in `KEPT`, for the one line that is said.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from drkl.display import shell_line

PATIENCE = 25.0
"""Seconds from a signal to an end at once, whatever still runs: a wait for other processes cannot be interrupted."""
ONE = 1.0
"""Seconds within which signals count as one: a terminal and a launcher both pass Ctrl-C on."""
_SOON = 0.05
LEAVING = 5.0
"""Seconds from the line that is said to an end at once: threads that wait for a server hold an interpreter up."""
_END, _AGAIN, _LEAVES = b"\0", b"\xff", b"\xfe"
"""Told to the thread that watches, beside the numbers of signals."""
_SHOW_CURSOR = b"\r\x1b[?25h"
_SAID = {
    "SIGINT": "Interrupted (Ctrl-C, SIGINT)",
    "SIGTERM": "Ended from outside (SIGTERM)",
    "SIGHUP": "Ended from outside (SIGHUP, as when a terminal is closed)",
}
SIGNALS = tuple(getattr(signal, name) for name in _SAID if hasattr(signal, name))


class Stopped(SystemExit):
    """A signal has ended the program; its exit status is 128 and the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class CutShort(Exception):
    """Long work is left unfinished, so that training can be saved and end; `signum` is the signal that asks for it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return said_of(self.signum)


@dataclass
class Kept:
    """What an end from outside leaves, for the line that is said."""

    text: str = "Nothing was begun."
    again: Sequence[str] = ()
    """The command that was called."""
    resume: Sequence[str] = ()
    """The command that goes on with the run that was begun; empty before."""
    prepared: Sequence[str] = ()
    """That command, for a run that may be begun."""
    there: Callable[[], bool] = lambda: True
    """Whether the run that was begun is on the disk."""
    launcher: bool = False
    """Whether several processes were started together."""

    def begun(self, text: str) -> None:
        """A run can be resumed from now on; ``text`` says what is kept."""
        self.text, self.resume = text, self.prepared

    @property
    def way_on(self) -> str:
        """How one goes on, as a sentence; empty where no command was called."""
        words = self.resume if self.resume and self.there() else self.again
        under = ", under the same launcher" if self.launcher else ""
        return f"To go on{under}: {shell_line(words)}" if words else ""


KEPT = Kept()


def keep(text: str) -> None:
    """Note what an end from outside leaves from now on."""
    KEPT.text = text


def said_of(signum: int) -> str:
    """What ended a program, in words."""
    return _SAID.get(signal.Signals(signum).name, f"Ended from outside (signal {signum})")


def line_of(signum: int) -> str:
    """The line that is said: what ended it, what is kept, how one goes on."""
    return " ".join(filter(None, (f"{said_of(signum)}.", KEPT.text, KEPT.way_on)))


@dataclass
class _Handling:
    """The signals of this process while a command or a training runs."""

    taken: dict[int, Any]
    """Signals that are handled, each with its handler of before."""
    program: bool = True
    """Whether it is a command line; else a training in a user's own program, which may go on after Ctrl-C."""
    speaks: bool = True
    first: int = 0
    """The signal that came first."""
    defers: bool = False
    """Whether training ends after its step."""
    cuts: int = 0
    """Above 0 where work is cut short in the midst of it."""
    ends: bool = False
    """Whether the program ends already, and says why."""
    again: bool = False
    """Whether a signal that came is to end what runs at once."""
    raised: int = 0
    """The signal for which the program was to end at once."""
    pipe: tuple[int, int] = (-1, -1)
    wakes: int = -1
    """Where a signal wrote before."""
    hook: Any = None

    def begin(self) -> None:
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.wakes = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)
        for signum in self.taken:
            signal.signal(signum, self.on_signal)
        self.hook, sys.unraisablehook = sys.unraisablehook, self._on_lost
        threading.Thread(target=self._watch, daemon=True, name="drkl-signals").start()

    def end(self) -> None:
        for signum, handler in self.taken.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self.wakes)
        sys.unraisablehook = self.hook
        os.write(self.pipe[1], _END)

    def on_signal(self, signum: int, frame: Any) -> None:
        known, self.first = self.first, self.first or signum
        if self.ends or (known and not self.again):
            return
        if self.defers and not self.again:
            if self.cuts:
                raise CutShort(signum)
            return
        self.again, self.raised = False, signum
        raise self.ending(signum)

    def ending(self, signum: int) -> BaseException:
        """What a program ends with; in a user's own one Ctrl-C does what it always does."""
        return Stopped(signum) if self.program or signum != signal.SIGINT else KeyboardInterrupt()

    def say(self, signum: int) -> None:
        """Say the line at once: nothing is buffered, and no lock is waited for."""
        if not self.speaks or self.ends:
            return
        self.ends = True
        with suppress(OSError):  # the terminal may be gone
            shown = _SHOW_CURSOR if os.isatty(2) else b""
            os.write(2, shown + f"{line_of(signum)}\n".encode())

    def _on_lost(self, lost: Any) -> None:
        if isinstance(lost.exc_value, (Stopped, CutShort)):  # raised in a destructor, which is where it ends
            os.write(self.pipe[1], _AGAIN)
        else:
            self.hook(lost)

    def _watch(self) -> None:
        """In a thread: end the program at once where it does not end by itself, or where a second signal asks."""
        came: float | None = None
        signum = 0
        while True:
            left = None if came is None else max(0.0, came + PATIENCE - time.monotonic())
            if left and self.raised and self.program and not self.ends:
                left = min(left, ONE)
            told = os.read(self.pipe[0], 1) if select.select([self.pipe[0]], [], [], left)[0] else b""
            if told == _END:
                for handle in self.pipe:
                    os.close(handle)
                return
            if told == _AGAIN:
                time.sleep(_SOON)
                self._once_more(self.first)
            elif told == _LEAVES:
                came, signum = time.monotonic() + LEAVING - PATIENCE, self.first
            elif not told and came is not None and time.monotonic() - came < PATIENCE:
                if self.raised and not self.ends:
                    self._once_more(signum)  # some code went on
            elif not told:
                came = None
                self._at_once(signum)
            elif told[0] in self.taken:
                signum = told[0]
                came, before = came or time.monotonic(), came
                if before is not None and time.monotonic() - before > ONE:
                    self._at_once(signum)

    def _once_more(self, signum: int) -> None:
        self.again = True
        signal.pthread_kill(threading.main_thread().ident or 0, signum)

    def _at_once(self, signum: int) -> None:
        if not self.program and signum == signal.SIGINT:
            self._once_more(signum)  # a notebook goes on
            return
        self.say(signum)
        os._exit(128 + signum)


_handling: _Handling | None = None


@contextmanager
def handled(command: Sequence[str] = (), *, last: bool = True) -> Iterator[None]:
    """Inside, a signal raises `Stopped` at once, and one line is said on standard error; of several processes by one.

    Signals that were ignored before stay ignored, as ``nohup`` wants it. In a thread nothing is changed.

    Args:
        command: what was called, to be named as the way to go on.
        last: nothing comes after the block, so that what hangs there after a signal is ended too.
    """
    global _handling
    if _handling is not None or not _is_main():
        yield
        return
    vars(KEPT).update(vars(Kept(again=command, launcher=_are_several())))
    speaks = os.environ.get("RANK", "0") == "0"
    taken = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _handling = own = _Handling({s: h for s, h in taken.items() if h not in (signal.SIG_IGN, None)}, speaks=speaks)
    own.begin()
    try:
        yield
    except BaseException as error:
        # What was raised may have become another error: of a class that is made, for instance.
        signum = error.signum if isinstance(error, Stopped) else own.raised
        if signum and not own.ends:
            own.say(signum)
            os.write(own.pipe[1], _LEAVES)
            raise Stopped(signum) from None
        raise
    finally:
        if _handling is own and not (last and own.first):  # nor a forked child
            _handling = None
            own.end()


def ignore() -> None:
    """Let no signal change how a program ends that has done its work."""
    for signum in SIGNALS:
        if _handling is None and _is_main():
            signal.signal(signum, signal.SIG_IGN)


def _are_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")


class Deferred:
    """The signals while training runs: the first one is kept for the end of the step."""

    def __init__(self, handling: _Handling | None) -> None:
        self._handling = handling

    @property
    def signum(self) -> int:
        """The signal that came; 0 for none."""
        return 0 if self._handling is None else self._handling.first

    def begin(self) -> None:
        """From now on a signal waits for the end of the step."""
        if self._handling is not None:
            self._handling.defers = True

    def end(self) -> None:
        """From now on a signal ends the program at once; one that came already does so now."""
        if self._handling is not None:
            self._handling.defers = False
            if self._handling.first:
                raise self.ending(self._handling.first)

    def ending(self, signum: int) -> BaseException:
        """What training ends with."""
        return Stopped(signum) if self._handling is None else self._handling.ending(signum)

    @property
    def is_told(self) -> bool:
        """Whether a command line says what ended training."""
        return self._handling is not None and self._handling.program


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Inside, a signal may wait for the end of a training step; see `Deferred`.

    Outside of a command line the main thread's signals are taken over where nobody handles them, and given back.
    """
    global _handling
    if _handling is not None or not _is_main():
        outer = _handling if _is_main() else None
        try:
            yield Deferred(outer)
        finally:
            if outer is not None:
                outer.defers = False
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    taken = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _handling = own = _Handling({s: h for s, h in taken.items() if h in defaults}, program=False)
    own.begin()
    try:
        yield Deferred(own)
    finally:
        if _handling is own:
            _handling = None
            own.end()


def cut_short() -> None:
    """Raise `CutShort` where training is to end: called again and again in work that takes long."""
    if _handling is not None and _handling.defers and _handling.first and _is_main():
        raise CutShort(_handling.first)


@contextmanager
def may_be_cut_short(*, alone: bool = False) -> Iterator[None]:
    """Inside, `CutShort` is raised wherever training is to end: around a wait that changes nothing.

    Args:
        alone: only where no other process would wait for this one.
    """
    own = _handling
    if own is None or not _is_main() or (alone and _are_several()):
        yield
        return
    own.cuts += 1
    try:
        cut_short()
        yield
    finally:
        own.cuts -= 1


def check_stopped() -> None:
    """Raise `Stopped` again where it has become another error on its way."""
    if _handling is not None and _handling.raised and _handling.program:
        raise Stopped(_handling.raised)


def say(signum: int) -> None:
    """Say the line of a command that a signal ends, where it was not said yet."""
    if _handling is not None:
        _handling.say(signum)


def wait(seconds: float) -> None:
    """Wait before an end that has another reason; a signal ends the waiting, and is not told of."""
    own, until = _handling, time.monotonic() + seconds
    if own is not None:
        own.ends = True
    while time.monotonic() < until and not (own is not None and own.first):
        time.sleep(_SOON)


def _after_fork() -> None:
    """A forked child ends as a process does that handles no signal, and without a word.

    Ctrl-C and a closed terminal reach all processes of a group: while training finishes its step, its helpers do too.
    """
    global _handling
    if _handling is None:
        return
    signal.set_wakeup_fd(-1)
    for signum in _handling.taken:
        waits = _handling.defers and signum != signal.SIGTERM
        signal.signal(signum, signal.SIG_IGN if waits else signal.SIG_DFL)
    sys.unraisablehook = _handling.hook
    _handling = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
