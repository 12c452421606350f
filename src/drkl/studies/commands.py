"""Commands in processes of their own: what they print is kept, and an end from outside is handed to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from drkl.studies.records import LONGEST, Record

Steps = Generator[None, None, int]
"""Work that waits: it yields while it does, and returns the status of a command."""
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launcher of several processes; what a study starts is alone."""
_GPUS = "CUDA_VISIBLE_DEVICES"


class Process(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its status, below 0 for a signal that killed it; None while it runs."""

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""


Launch = Callable[[Sequence[str], Path, Mapping[str, str]], Process]
"""Starts ``drkl`` with these words, what it prints added to a file, under these variables."""


def launch(words: Sequence[str], log: Path, variables: Mapping[str, str]) -> Process:
    """Start ``drkl`` in a new interpreter; see `Launch`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "drkl", *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=dict(variables),
        )  # fmt: skip


class Failed(Exception):
    """A command has failed: with what status, and its last message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Commands:
    """Starts commands, and knows those that run.

    Args:
        jobs: how many run at once.
        launch: starts one.
    """

    jobs: int = 1
    launch: Launch = field(default_factory=lambda: launch)
    running: list[Process] = field(default_factory=list)
    ended_by: int = 0
    """The signal that ends the study; 0 for none."""
    devices: list[str] = field(default_factory=list)
    """That of each command that runs, where several share a machine's GPUs."""

    def run(self, record: Record, part: str, words: Sequence[str]) -> Steps:
        """Run a command of a record's folder to its end, and note how long it took.

        Raises:
            Failed: its status is not 0, or the study ends.
        """
        if self.ended_by:
            raise Failed(128 + self.ended_by, "")
        start = record.log_path.stat().st_size if record.log_path.exists() else 0
        began = time.monotonic()
        device = self._free_device()
        process = self.launch(words, record.log_path, self._variables() | device)
        self.running.append(process)
        self.devices += device.values()
        try:
            while (status := process.poll()) is None:
                yield
        finally:
            self.running.remove(process)
            for name in device.values():
                self.devices.remove(name)
        record.add(part, time.monotonic() - began)
        if status:
            status = 128 - status if status < 0 else status
            raise Failed(status, _last_message(record.log_path, start, status))
        return status

    def signal(self, signum: int) -> None:
        """Hand a signal to all that run."""
        self.ended_by = signum
        for process in self.running:
            with suppress(ProcessLookupError):
                process.send_signal(signum)

    def _variables(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        if self.jobs > 1:
            found.setdefault("OMP_NUM_THREADS", str(max(1, own_cores() // self.jobs)))
        return found

    def _free_device(self) -> dict[str, str]:
        """The variable that gives a command the GPU that fewest others use; none where there is no choice."""
        names = visible_gpus() if self.jobs > 1 else []
        return {_GPUS: min(names, key=self.devices.count)} if len(names) > 1 else {}


def own_cores() -> int:
    """The cores that this process may use, which a scheduler may have limited."""
    with suppress(AttributeError):  # macOS and Windows do not tell
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has them."""
    if (given := os.environ.get(_GPUS)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]


def _last_message(log: Path, start: int, status: int) -> str:
    """What a command said last: its error, or else its last line."""
    with suppress(OSError):
        with log.open("rb") as file:
            file.seek(start)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith("Error")]
        said = " ".join(lines[errors[-1] :]) if errors else lines[-1] if lines else ""
        if status == 128 + signal.SIGKILL:
            said = "It was killed (SIGKILL), often for want of memory. " + said
        return (said or f"It ended with status {status}, without a word.")[:LONGEST].strip()
    return f"It ended with status {status}."
