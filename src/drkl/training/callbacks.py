"""Callbacks of the training loop: the log file, the last evaluation, progress."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drkl.display import as_number
from drkl.folders import sync
from drkl.processes import joined
from drkl.rollouts.health import Detector
from drkl.runs import RunFolder, append_jsonl, write_jsonl
from drkl.training.logs import begun, line_of

_log = logging.getLogger("drkl")

OnProgress = Callable[[int, int, dict[str, float]], None]
"""Called with (steps done, steps in all, the newest logged numbers)."""


class TrainLog(TrainerCallback):
    """Appends every logged line to ``train.jsonl`` and reports progress."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._path = run, run.train_log_path
        self._start = time.monotonic()
        self._newest: dict[str, float] = {}
        self.on_progress: OnProgress | None = None

    def begin(
        self, from_step: int, history: Sequence[Mapping[str, Any]] | None = None, *, measured: bool = True
    ) -> list[dict[str, Any]]:
        """Start after a step, and return the lines up to there; those beyond it will come again.

        Args:
            from_step: the step of the checkpoint, below 0 for none.
            history: what the checkpoint says was logged.
            measured: whether the evaluation of that step was before the checkpoint; its lines come again otherwise.
        """
        kept, said = begun(self._path, from_step, history)
        if said and joined().is_first:
            _log.warning("Warning: %s", said)
        if not measured:
            kept = [row for row in kept if row["step"] < from_step or "loss" in row]
        self._start = time.monotonic() - max((as_number(row.get("seconds")) or 0.0 for row in kept), default=0.0)
        self._newest = {}
        if joined().is_first:
            write_jsonl(self._path, kept)
        return kept

    def sync(self) -> None:
        """Return once the log is on the disk, so that a run that goes on from a checkpoint has the lines before it."""
        if self._path.is_file():
            sync(self._path)
            sync(self._path.parent)

    @property
    def seconds(self) -> float:
        """Seconds since the run began, the parts before a resume included."""
        return time.monotonic() - self._start

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line; the summary that ends training is left out."""
        line = line_of(logs or {}, state.global_step)
        if line is None or not state.is_world_process_zero:
            return
        line["seconds"] = round(self.seconds, 3)
        append_jsonl(self._path, [line])
        self._newest |= line
        self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report progress after every step."""
        self._report(state)

    def writing(self, state: TrainerState, done: int, of: int) -> None:
        """Report how many answers of a set are written."""
        if self.on_progress is not None and state.is_world_process_zero:
            self.on_progress(state.global_step, state.max_steps, self._newest | {"written": done, "to_write": of})

    def _report(self, state: TrainerState) -> None:
        if self.on_progress is not None and state.is_world_process_zero:
            self.on_progress(state.global_step, state.max_steps, dict(self._newest))


class AnswersWatch(TrainerCallback):
    """Warns, once for each kind, when the log says that the answers of a run are going wrong."""

    def __init__(self) -> None:
        self._detector = Detector()

    def begin(self, logged: Iterable[Mapping[str, Any]]) -> None:
        """Read the log of a run that goes on; what it says already was said before."""
        self._detector = Detector()
        for line in logged:
            self._detector.see(line)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read one more line."""
        for concern in self._detector.see({"step": state.global_step} | (logs or {})):
            if state.is_world_process_zero:
                _log.warning("Warning: %s", concern.text)


class OnBegin(TrainerCallback):
    """Calls a hook when training begins, anew or from a checkpoint."""

    def __init__(self, hook: Callable[[], None]) -> None:
        self._hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        self._hook()


class BeforeFirstStep(TrainerCallback):
    """Calls a hook when a run begins, and not where it goes on or begins with a whole evaluation."""

    def __init__(self, hook: Callable[[], None]) -> None:
        self._hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        if state.global_step == 0 and args.eval_strategy != "no" and not args.eval_on_start:
            self._hook()


class Epochs(TrainerCallback):
    """Evaluates, saves and logs where an epoch ends, for the strategies that say so, and keeps the number of epochs.

    transformers sees one long data set that holds every step of the run.

    Args:
        ends: the steps after which an epoch ends, ascending; the last ends the run.
        args: what the user asked for.
    """

    def __init__(self, ends: Sequence[int], args: TrainingArguments) -> None:
        self._ends = list(ends)
        self._on = {name: getattr(args, f"{name}_strategy").value == "epoch" for name in ("logging", "eval", "save")}

    def logs_at(self, step: int) -> bool:
        """Whether a line is logged after this step because an epoch ends there."""
        return self._on["logging"] and step in self._ends

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for what is due, and set ``state.epoch``."""
        step = state.global_step
        number = bisect.bisect_left(self._ends, step)
        first = self._ends[number - 1] if number else 0
        if number < len(self._ends):
            state.epoch = number + (step - first) / max(1, self._ends[number] - first)
        if step in self._ends:
            control.should_log |= self._on["logging"]
            control.should_evaluate |= self._on["eval"] and args.eval_strategy != "no"
            control.should_save |= self._on["save"]


class LastStep(TrainerCallback):
    """Evaluates after the last step, so that the last weights take part in the choice of the best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for an evaluation and a log line when training is about to end."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"


class EarlyStop(TrainerCallback):
    """Stops after ``patience`` held-out losses without a new best.

    Counted anew from the log each time, so that a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def _is_over(self, state: TrainerState) -> bool:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self._patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that was cut off after it had stopped takes no step more."""
        control.should_training_stop |= self._is_over(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count."""
        control.should_training_stop |= self._is_over(state)
