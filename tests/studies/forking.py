"""A study whose commands are forked from it, where new interpreters would take most of the time."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

GROUP = 0
"""The commands stay in the study's group of processes."""


class Forked:
    """A command in a forked child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status

    def send_signal(self, signum: int) -> None:
        if self.status is None:
            os.kill(self.pid, signum)


def fork(words: Sequence[str], log: Path, variables: Mapping[str, str]) -> Forked:
    """Run ``drkl`` in a forked child."""
    if (pid := os.fork()) == 0:
        _be(words, log)
    return Forked(pid)


def _be(words: Sequence[str], log: Path) -> NoReturn:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    sys.argv = ["drkl", *words]
    status: Any = 1
    try:
        from drkl.cli import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1 if status else 0)


def fork_commands() -> None:
    """Injected: the commands of a study are forked."""
    from drkl.studies import commands, running

    commands.launch = fork
    running.TICK = 0.02
