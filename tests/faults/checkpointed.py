"""What is done to a run from inside of its process; each function is called before the command line is."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}
"""Held-out losses by their step, in the place of those that are measured: step 4 is the best."""
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def plant_losses() -> None:
    """Give every run the held-out losses above."""
    from drkl.training.trainer import DistillationTrainer

    log = DistillationTrainer.log

    def planted(self: Any, logs: dict[str, float], *args: Any, **words: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = LOSSES[self.state.global_step]
        log(self, logs, *args, **words)

    DistillationTrainer.log = planted  # type: ignore[method-assign]


def at_event(event: str, step: int, work: Callable[[], None]) -> None:
    """Do something when the training loop comes to an event after a step."""
    from transformers.trainer_callback import CallbackHandler

    call_event = CallbackHandler.call_event

    def watched(self: Any, name: str, args: Any, state: Any, control: Any, **words: Any) -> Any:
        control = call_event(self, name, args, state, control, **words)
        if name == event and state.global_step == step:
            work()
        return control

    CallbackHandler.call_event = watched


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(event: str, step: int) -> None:
    """A run with the planted losses, killed at an event."""
    plant_losses()
    at_event(event, step, kill)


def removed(event: str, step: int, path: str) -> None:
    """A run with the planted losses, of which a folder is removed as it trains."""
    plant_losses()
    at_event(event, step, lambda: shutil.rmtree(path, ignore_errors=True))


def given(event: str, step: int, source: str, target: str) -> None:
    """A run with the planted losses, into whose folder another folder is copied as it trains."""
    plant_losses()
    at_event(event, step, lambda: shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True) and None)


def at_changes(root: str, work: Callable[[int], None]) -> None:
    """Call ``work(0), work(1), ...`` before each change to the files of a run, from its save of step 8 on."""
    from drkl.training.trainer import DistillationTrainer

    count, active = 0, False
    save = DistillationTrainer._save_checkpoint

    def watched(self: Any, *args: Any) -> None:
        nonlocal active
        active |= self.state.global_step == 8
        save(self, *args)

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count, active
        changes = event in _CHANGES or (event == "open" and values[1] is not None and set(str(values[1])) & set("wax+"))
        changes = changes or (event == "open" and values[1] is None and bool(values[2] & (os.O_WRONLY | os.O_RDWR)))
        if active and changes and str(values[0]).startswith(root):
            active = False  # what is done now is none of the run's own changes
            work(count)
            count, active = count + 1, True

    DistillationTrainer._save_checkpoint = watched  # type: ignore[method-assign]
    sys.addaudithook(hook)


def killed_at_change(root: str, number: int) -> None:
    """A run with the planted losses, killed before one of the changes from its last checkpoint on."""
    plant_losses()
    at_changes(root, lambda count: kill() if count == number else None)


def counted(root: str, path: str) -> None:
    """A run with the planted losses that writes down how many changes there are."""
    plant_losses()
    at_changes(root, lambda count: Path(path).write_text(str(count + 1)) and None)


def copied_at_changes(root: str, numbers: list[int], copies: str) -> None:
    """A run with the planted losses whose folder is copied before some of its changes."""
    plant_losses()

    def copy(count: int) -> None:
        if count in numbers:
            shutil.copytree(root, Path(copies) / str(count), symlinks=True)

    at_changes(root, copy)
