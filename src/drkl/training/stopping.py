"""Training that is ended from outside: the step is finished and saved, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed

from drkl.processes import joined
from drkl.signals import KEPT, CutShort, Deferred, deferred, keep, said_of
from drkl.training.checkpoints import Reached, step_of

_log = logging.getLogger("drkl")


@dataclass(frozen=True)
class Due:
    """What a step that ended a run early left to do."""

    evaluate: bool = False
    save: bool = False


class Stopping:
    """Ends the loop of a trainer after a step where a signal asks for it; in all processes after the same one.

    Args:
        trainer: a `DistillationTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._signals = Deferred(None)
        self._saved = 0
        """The step of the newest checkpoint."""
        self._due = Due()
        """What is left to do after the step that ends the run."""
        self._before: Callable[[], None] | None = None
        """Undoes a step that was begun."""
        self._is_extra = False
        """Whether the checkpoint that is being written stands beside those that were asked for."""

    def marked(self, reached: Reached) -> Reached:
        """Note in a checkpoint why it is written, and what is left to do after its step."""
        if not self._is_extra:
            return reached
        return replace(reached, extra=True, evaluation_due=self._due.evaluate, save_due=self._due.save)

    @contextmanager
    def training(self, checkpoint: Path | None) -> Iterator[None]:
        """While the block trains, anew or from a checkpoint, a signal may wait; see `drkl.signals`."""
        self._saved, self._before, self._due = 0, None, Due()
        keep("No checkpoint was written yet.")
        if checkpoint is not None:
            self._saved = step_of(checkpoint)
            keep(f"The newest checkpoint is {checkpoint}.")
        with deferred() as self._signals:
            try:
                yield
            finally:
                self._signals = Deferred(None)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """While the block takes steps, the first signal waits for the end of one."""
        self._signals.begin()
        try:
            yield
        except CutShort as cut:
            if self._before is not None:
                self._before()
            self._stop(cut.signum)
        self._signals.end()

    def remember(self) -> None:
        """Keep what a step changes before its end, so that a step that waits for a server can be given up."""
        self._before = _moment(self._trainer)

    @contextmanager
    def step_end(self) -> Iterator[None]:
        """Around what is logged, measured and saved after a step."""
        self._before = None
        control = self._trainer.control
        if signum := self._agreed():
            self._due = Due(control.should_evaluate, control.should_evaluate and control.should_save)
            if self._due.evaluate:  # it may take long; a resumed run does it first of all
                control.should_evaluate = control.should_save = False
        long = control.should_evaluate or control.should_save
        try:
            yield
        except CutShort as cut:
            self._due = Due(True, control.should_save)
            self._stop(cut.signum)
        if signum or (long and (signum := self._agreed())):
            self._stop(signum)

    def saved(self) -> None:
        """Note that the checkpoint of the present step is whole."""
        self._saved = self._trainer.state.global_step
        keep(f"The newest checkpoint is {self._folder()}.")

    def _folder(self) -> Path:
        folder: Path = self._trainer.run.checkpoints_path / f"checkpoint-{self._trainer.state.global_step}"
        return folder

    def _agreed(self) -> int:
        """The signal that came to any of the processes; 0 for none. All of them ask."""
        if joined().count == 1:
            return self._signals.signum
        came = torch.tensor([self._signals.signum], device=self._trainer.args.device)
        distributed.all_reduce(came, distributed.ReduceOp.MAX)
        return int(came)

    def _stop(self, signum: int) -> NoReturn:
        """Save what is not saved yet, and end."""
        trainer, step = self._trainer, self._trainer.state.global_step
        if step > self._saved:
            self._is_extra = True
            try:
                trainer._save_checkpoint(trainer.model_wrapped, None)
            finally:
                self._is_extra = False
        if step:
            keep(f"Step {step} was finished, and is saved in {self._folder()}.")
        if not self._signals.is_told and trainer.is_world_process_zero():
            _log.warning("%s. %s", said_of(signum), KEPT.text)
        raise self._signals.ending(signum)


def _moment(trainer: Any) -> Callable[[], None]:
    """Note what a step changes before the optimiser does, and return what undoes it."""
    fields = {name: getattr(trainer, name) for name in ("num_tokens_seen", "current_flos")}
    tokens, loss, feeding = trainer.state.num_input_tokens_seen, trainer._tr_loss.clone(), deepcopy(trainer._feeding)
    numbers = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    answers = None if trainer._on_policy is None else trainer._on_policy.moment()

    def undo() -> None:
        trainer.model_wrapped.zero_grad()
        vars(trainer).update(fields)
        trainer.state.num_input_tokens_seen, trainer._feeding = tokens, feeding
        trainer._tr_loss.copy_(loss)
        for set_state, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), numbers, strict=True):
            set_state(state)  # type: ignore[operator]
        for number, state in enumerate(of_gpus):
            torch.cuda.set_rng_state(state, number)
        if answers is not None:
            answers()

    return undo
