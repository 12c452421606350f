"""The command line in children forked from a warm process: a second for each, where a new interpreter takes six.

What is tested is the drkl of ``DRKL_UNDER_TEST``, a folder with a checkout's ``src``; by default that of these tests.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
WARM = (
    "drkl.cli", "drkl.training.run", "drkl.run_models", "drkl.analysis.watch", "drkl.reporting.page", "drkl.terminal",
    "drkl.reporting.exports", "drkl.reporting.picture", "drkl.evaluation.compare", "drkl.training.estimate",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "rich.progress", "rich.table",
    "rich._emoji_codes", "peft", "sacrebleu", "rouge_score.rouge_scorer", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "scipy.stats", "drkl.evaluation.comparison",
    "drkl.reporting.analysis", "drkl.reporting.differences", "datasets",
)  # fmt: skip
"""Modules that commands import; those that a checkout has not are left out."""
_STEP = 0.01
"""Seconds between two looks at whether a child has ended."""


class Ended(NamedTuple):
    """How a command ended: its exit status (below 0 for a signal that killed it), and what it wrote."""

    code: int
    out: str
    err: str


def source_under_test() -> Path:
    """The ``src`` folder of the drkl that is tested."""
    return Path(os.environ.get("DRKL_UNDER_TEST", ROOT / "src"))


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a command that is tested: one thread, no hub, and drkl's source in front."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
    path = f"{source_under_test()}{os.pathsep}{ROOT}"
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200", "PYTHONWARNINGS": "default"}
    return variables | fixed | dict(changes or {})


class Child:
    """A command that runs in a process of its own, the first of a session."""

    def __init__(self, runner: Runner, pid: int, folder: Path) -> None:
        self.pid, self._runner, self._folder, self._code = pid, runner, folder, None

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return (self._folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return (self._folder / "err").read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        if self._code is None:
            self._code = self._runner.ask(poll=self.pid)
        return self._code

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> bool:
        """Send a signal to it, or to its whole group; whether it was still there."""
        if self.poll() is not None:
            return False
        (os.killpg if group else os.kill)(self.pid, number)
        return True

    def wait(self, until: float | None = None) -> Ended:
        """Wait for its end, at most so many seconds.

        Raises:
            TimeoutError: it still runs, and is killed.
        """
        started = time.monotonic()
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() - started > until:
                self.kill(group=True)
                raise TimeoutError(f"The command still ran after {until} seconds: {self.err[-500:]}")
            time.sleep(_STEP)
        return Ended(code, self.out, self.err)


class Runner:
    """A warm process that forks a child for each command.

    Args:
        folder: where the children's output is kept.
        variables: of the environment, for all of them; a preloaded library, for instance.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        own, its = socket.socketpair()
        words = [sys.executable, "-m", "tests.faults.forked", str(its.fileno())]
        self._server = subprocess.Popen(words, env=environment(variables), pass_fds=[its.fileno()], cwd=ROOT)
        its.close()
        self._own, self._lines = own, own.makefile("r")

    def ask(self, **request: Any) -> Any:
        self._own.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        assert line, "the warm process has ended"
        return json.loads(line)

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        inject: str | None = None,
        given: Sequence[Any] = (),
    ) -> Child:
        """Start ``drkl ARGUMENTS``.

        Args:
            arguments: of the command line.
            cwd: the current folder.
            variables: added to the environment.
            inject: ``module:function``, called in the child before the command line, with ``given``.
            given: plain values for it.
        """
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self._folder))
        for name in ("out", "err"):
            (folder / name).touch()
        pid = self.ask(
            argv=["drkl", *map(str, arguments)], cwd=str(cwd or self._folder), folder=str(folder),
            variables=dict(variables or {}), inject=inject, given=list(given),
        )  # fmt: skip
        return Child(self, pid, folder)

    def call(self, *arguments: object, until: float | None = None, **words: Any) -> Ended:
        """Run ``drkl ARGUMENTS`` to its end; see `start`."""
        return self.start(*arguments, **words).wait(until)

    def close(self) -> None:
        """End the warm process; children that still run are killed by who started them."""
        self._own.close()
        self._lines.close()
        self._server.wait()


def _serve(connection: socket.socket) -> None:
    """Fork a child for each request, and say how children end."""
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a child that looks through what is there already, as at its end, would copy all of it
    ended: dict[int, int] = {}
    with connection, connection.makefile("r") as lines:
        for line in lines:
            request = json.loads(line)
            if "poll" in request:
                answer = _status_of(request["poll"], ended)
            elif (answer := os.fork()) == 0:
                connection.detach()
                os.closerange(3, 256)
                _run(**request)
            else:
                ended.pop(answer, None)  # of an earlier child that had the same number
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _status_of(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == 0:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _run(
    argv: list[str], cwd: str, folder: str, variables: dict[str, str], inject: str | None, given: list[Any]
) -> NoReturn:
    """Be the command. It ends as an interpreter of its own does, but for the memory, which is left as it is."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = argv
    if inject is not None:
        module, _, name = inject.partition(":")
        getattr(importlib.import_module(module), name)(*given)
    from drkl.cli import main

    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
