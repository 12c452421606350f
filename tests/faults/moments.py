"""Signals that a command sends itself after so much work: no other process has to be fast enough.

Work is counted in seconds of this process's own processor time, which a busy machine does not stretch.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.forked import Ended, Runner

KILLED = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
"""The status that a command ends with after a signal."""


def note_work(path: str) -> None:
    """Injected: write to a file how much work the command did."""
    atexit.register(lambda: Path(path).write_text(str(time.process_time())))


def send_after(seconds: float, signum: int, again: float = 0.0) -> None:
    """Injected: send a signal after so much work, and once more after so many further seconds of the clock."""

    def send(*_: Any) -> None:
        os.kill(os.getpid(), signum)
        if again:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signum))
            signal.setitimer(signal.ITIMER_REAL, again)

    atexit.register(signal.setitimer, signal.ITIMER_PROF, 0)  # the command is over
    signal.signal(signal.SIGPROF, send)
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))


def send_at(event: str, step: int, signum: int) -> None:
    """Injected: send a signal where transformers' loop comes to an event at a step."""
    from transformers.trainer_callback import CallbackHandler

    call_event = CallbackHandler.call_event

    def watched(self: Any, name: str, args: Any, state: Any, control: Any, **words: Any) -> Any:
        control = call_event(self, name, args, state, control, **words)
        if (name, state.global_step) == (event, step):
            os.kill(os.getpid(), signum)
        return control

    CallbackHandler.call_event = watched


def work_of(runner: Runner, folder: Path, *arguments: object) -> float:
    """Run a command to its end, and return how much work it was."""
    path = folder / "work"
    done = runner.call(*arguments, inject="tests.faults.moments:note_work", given=[str(path)])
    assert done.code == 0, done.err
    return float(path.read_text())


def stop(runner: Runner, seconds: float, signum: int, *arguments: object, again: float = 0.0) -> Ended:
    """Run a command that a signal ends, and look at how it does."""
    given = [seconds, int(signum), again]
    done = runner.start(*arguments, inject="tests.faults.moments:send_after", given=given).wait(300)
    if done.code:
        look(done, signum)
    return done


def look(done: Ended, signum: int) -> None:
    """A command that a signal ended has its status and says one line, without a traceback."""
    assert done.code == KILLED[signal.Signals(signum)], f"status {done.code}: {done.err[-300:]}"
    lines = [line for line in done.err.splitlines() if line.strip() and "Writing model shards" not in line]
    if signum == signal.SIGKILL:
        assert not lines, done.err
        return
    assert len(lines) == 1, f"{len(lines)} lines: {done.err[-300:]}"
    assert signal.Signals(signum).name in lines[0] and "To go on: drkl " in lines[0], lines[0]


def way_on(done: Ended, otherwise: list[str]) -> list[str]:
    """The words of the command that a message names."""
    _, found, line = done.err.rpartition("To go on: drkl ")
    return shlex.split(line) if found else otherwise


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def log_of(path: Path, *times: str) -> list[dict[str, Any]]:
    """The lines of a log without what tells the time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(times)} for line in lines]
