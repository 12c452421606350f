"""Steps of finite numbers only: a run stops at the step that has others, or leaves that step out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from drkl.errors import Halted
from drkl.models.draw import BrokenLogits
from drkl.models.weights import broken_weights, listed
from drkl.processes import gather, raise_in_all
from drkl.training.checkpoints import Reached, find_checkpoint
from drkl.training.faults import LEARNING_RATE, Fault, gradient_fault, list_rows, state_faults

_log = logging.getLogger("drkl")


@dataclass(frozen=True)
class _Seen:
    """What a process saw in a step."""

    what: str
    fault: Fault
    rows: Sequence[str]
    but: str = ""

    def __str__(self) -> str:
        rows = f", rows {list_rows(self.rows)}" if self.rows else ""
        return f"{self.what}{rows}{self.but}. First non-finite tensor: {self.fault.tensor}."


class FiniteSteps:
    """Looks at the loss of every micro-batch and at the gradient of every step before it is taken.

    Several processes stop together, or leave out the same step: the loss of one that is not finite makes every number
    of the gradient NaN, and that is the gradient of all. Nothing is exchanged and no tensor is read in a step that is
    right, beyond the loss and the norm.

    Args:
        trainer: a `DistillationTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._skips, self._most = trainer.config.nan == "skip", trainer.config.nan_skips
        self.begin(Reached(0))

    def begin(self, reached: Reached) -> None:
        """Start anew, or where a checkpoint was written."""
        self.skipped, self.in_row = reached.skipped, reached.skipped_in_row
        """Steps that were left out so far, and those of them since the last one that was taken."""
        self._seen: _Seen | None = None
        self._restore: Callable[[], None] = lambda: None
        self._logged = self.skipped

    def step_begins(self) -> None:
        """Note what a step adds to, so that it can be left out."""
        trainer = self._trainer
        self._seen = None
        if self._skips:
            loss, sums = trainer._tr_loss.clone(), dict(trainer._sums)

            def restore() -> None:
                trainer._tr_loss.copy_(loss)
                trainer._sums = sums

            self._restore = restore

    def refuse_loss(self, loss: Tensor, rows: Sequence[str], find: Callable[[], Fault]) -> Tensor:
        """Stop at a loss that is not finite, or return one whose gradient tells every process of it.

        Args:
            loss: of a micro-batch.
            rows: the ids of its rows.
            find: says what is at fault.

        Raises:
            Halted: the run has one process and does not go on.
        """
        if self._seen is None:
            step = self._trainer.state.global_step + 1
            self._seen = _Seen(f"The loss became {float(loss.detach())} at step {step}", find(), rows)
        waits = self._skips and not self._seen.fault.is_permanent
        if self._trainer.is_deepspeed_enabled or not (waits or self._trainer.accelerator.num_processes > 1):
            raise self._stop(self._seen)
        return loss * math.nan

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """Clip the gradients to a norm as torch does, and return the norm; None where the trainer has its own way.

        By a norm that is not finite torch would make every gradient NaN. Here they stay what they are then, so that
        the one at fault can be named.
        """
        trainer = self._trainer
        kind = trainer.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU") or trainer._sharded_by_caller:
            return None
        trainer.accelerator.unscale_gradients()
        weights = list(model.parameters())
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        # On the device, so that nothing waits for the norm before the clipping is on its way.
        clip_grads_with_norm_(weights, max_norm, torch.where(torch.isfinite(norm), norm, 0.0))
        return norm

    def is_taken(self, norm: Any) -> bool:
        """Whether the step is taken, before it is; called in every process.

        Args:
            norm: of the gradient; None where it is not known.

        Raises:
            Halted: the run does not go on.
        """
        rates = [group["lr"] for group in self._trainer.optimizer.param_groups]
        if not all(math.isfinite(rate) for rate in rates):
            self._refuse(Fault(f"the learning rate, {rates}", "Another lr_scheduler_type has none.", is_permanent=True))
        if self._seen is None and (norm is None or math.isfinite(norm)):
            self.in_row = 0
            self._trainer.optimizer._is_overflow = False
            return True
        told = [seen for seen in gather([self._seen]) if seen is not None]
        by_scaler = not told and self._trainer.accelerator.scaler is not None
        seen = told[0] if told else self._of_gradient()
        if not (self._skips or by_scaler) or seen.fault.is_permanent:
            raise_in_all(self._stop(seen))
        counts = not (by_scaler and self._finds_its_scale())
        self.in_row += counts
        if self.in_row > self._most:
            raise_in_all(self._stop(seen, by_scaler=by_scaler))
        if counts and self._trainer.args.process_index == 0:
            left = "fp16 leaves it out, and makes the scale of the loss smaller" if by_scaler else "it is left out"
            _log.warning(
                "Warning: %s The step is not taken: %s (%d in a row, of at most %d).",
                seen, left, self.in_row, self._most,
            )  # fmt: skip
        self._leave_out(by_scaler)
        return False

    def _of_gradient(self) -> _Seen:
        step, rows = self._trainer.state.global_step + 1, gather(self._trainer._row_ids)
        fault = gradient_fault(self._trainer.student)
        return _Seen(f"The gradient is not finite at step {step}", fault, rows, ", though the loss is")

    def _finds_its_scale(self) -> bool:
        """Whether fp16's scale of the loss still falls from where it starts, before the first step is taken."""
        trainer = self._trainer
        return bool(trainer.state.global_step == self.skipped and trainer.accelerator.scaler.get_scale() > 1)

    def _leave_out(self, by_scaler: bool) -> None:
        """Let the loop go on without the step: accelerate's optimiser takes none, and the schedule waits."""
        trainer = self._trainer
        self.skipped += 1
        if (scaler := trainer.accelerator.scaler) is not None:
            # Without an argument it makes its scale smaller, for what it saw as the gradients were unscaled. A fused
            # optimiser leaves such a step out by itself, of which accelerate does not know.
            scaler.update(*([] if by_scaler else [scaler.get_scale()]))
        if not by_scaler:
            self._restore()
            # The means of the log are over steps that were taken.
            trainer._globalstep_last_logged += 1
            trainer._initial_global_step += 1
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        trainer.optimizer._is_overflow = True

    def numbers(self) -> dict[str, float]:
        """What is logged: nothing before the first step that was left out."""
        self._logged = self.skipped
        return {"skipped_steps": self.skipped} if self.skipped else {}

    @property
    def has_news(self) -> bool:
        """Whether steps were left out since the last line of the log."""
        return self.skipped > self._logged

    def check_weights(self, *, optimizer: bool = False) -> None:
        """Raise Halted, in every process, where the student, or its optimiser's state, is not to be saved.

        Args:
            optimizer: look at the optimiser's state too.
        """
        student, step = self._trainer.student, self._trainer.state.global_step
        bad = [f"student weight {name!r}" for name in broken_weights(student)]
        if optimizer and not bad:
            bad = [f"optimiser's state {name}" for name in state_faults(self._trainer.optimizer, student)]
        if bad := gather(bad[:1]):
            what = f"After step {step} the student is not finite, and is not saved"
            raise_in_all(self._stop(_Seen(what, Fault(f"the {bad[0]}", is_permanent=True), ()), when=""))

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Say of answers that cannot be sampled inside which model is at fault, and what is left of the run."""
        try:
            yield
        except BrokenLogits as error:
            trainer = self._trainer
            broken = [f"the student weight {name!r}" for name in broken_weights(trainer.student)]
            seen = _Seen(
                f"No answers can be sampled after step {trainer.state.global_step}",
                Fault(broken[0] if broken else "the logits that an answer is sampled from", is_permanent=True),
                (),
            )
            raise self._stop(seen, when="") from error

    def at_heldout_rows(self, fault: Fault, rows: Sequence[str]) -> Halted:
        """Return the error of a held-out loss that is not finite.

        Args:
            fault: the first tensor that is not finite.
            rows: the ids of the held-out rows of that loss.
        """
        what = f"After step {self._trainer.state.global_step} the held-out loss is not finite"
        return self._stop(_Seen(what, fault, rows), when="", is_left_out=False)

    def _refuse(self, fault: Fault) -> None:
        step = self._trainer.state.global_step + 1
        raise_in_all(self._stop(_Seen(f"Step {step} cannot be taken", fault, self._trainer._row_ids)))

    def _stop(
        self,
        seen: _Seen,
        *,
        by_scaler: bool = False,
        when: str = " before the step was taken",
        is_left_out: bool = True,
    ) -> Halted:
        """The error of a run that does not go on; ``is_left_out``: whether training.nan=skip is of any use."""
        fault, remedy = seen.fault, seen.fault.remedy
        if by_scaler:
            remedy = "training.precision=bf16, or fp32, has the range that fp16 lacks."
        elif is_left_out and not (self._skips or fault.is_permanent) and remedy == LEARNING_RATE:
            remedy += " training.nan=skip leaves single steps out."
        elif fault.is_permanent and "student weight" in fault.tensor and (broken := self._broken_state()):
            fault, remedy = Fault(f"the optimiser's state {broken}, and so {fault.tensor}"), ""
        many = ""
        if self.in_row > self._most:
            many = f"{self.in_row} steps in a row were not finite, and training.nan_skips is {self._most}. "
        told = replace(seen, fault=fault)
        return Halted(f"{told} {many}Training stopped{when}; {self.kept()}. {remedy}".rstrip())

    def _broken_state(self) -> str:
        return listed(state_faults(self._trainer.optimizer, self._trainer.student), 1)

    def kept(self) -> str:
        """What is left of the run, in a clause."""
        return kept(self._trainer.run.checkpoints_path)


def kept(folder: Path) -> str:
    """What a run can go on from, in a clause.

    Args:
        folder: the checkpoints'.
    """
    whole = find_checkpoint(folder).path
    return "there is no checkpoint yet" if whole is None else f"the last good checkpoint, {whole.name}, is kept"
