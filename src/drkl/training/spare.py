"""A step that runs out of memory: done once more in halves where that gives the same, else told with its numbers."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drkl.data.collate import is_packed
from drkl.errors import Halted
from drkl.losses import IGNORE_INDEX, release_buffers
from drkl.models.memory import is_out_of_memory, memory_told, reason_of
from drkl.models.sharded import local
from drkl.teachers.live import LiveTeacher
from drkl.training.memory import CURES, PARTS, available_bytes, gigabytes

Batch = dict[str, Any]
Pass = Callable[[Batch], Tensor]
"""Forward and backward of a batch; returns its loss."""
_log = logging.getLogger("drkl")


class SpareMemory:
    """Does the forward and backward passes of a step, in halves where memory ran out.

    The loss of a step is a sum over positions that is divided by their number in the whole step, so that halves add up
    to the same gradient, in another order. The first time the step is done again and the next one is tried whole. From
    the second time on, batches of that size are cut before they are tried. A batch of one row has no halves; several
    processes meet inside a pass and cannot begin again by themselves.

    Args:
        trainer: a `DistillationTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._failed: list[int] = []
        """The positions of batches that did not fit, by two of which it is known what to cut before it is tried."""
        self._done: list[Sequence[Batch]] = []
        self._before: Callable[[], None] = lambda: None
        self._halved = False

    def step_begins(self) -> None:
        """Note what the passes of a step add to, beside the gradients."""
        trainer = self._trainer
        sums, fed = dict(trainer._sums), trainer._feeding.mark()

        def back() -> None:
            trainer._sums = dict(sums)
            trainer._feeding.back_to(fed)

        self._done, self._before, self._halved = [], back, False

    def micro_batch(self, model: nn.Module, parts: Sequence[Batch], one_pass: Pass) -> Tensor:
        """Do the passes of a micro-batch, and return its loss.

        Args:
            model: its gradients are dropped where the step begins again.
            parts: the batches that it is made of.
            one_pass: does one batch.

        Raises:
            Halted: there is not enough memory.
        """
        self._done.append(parts)
        try:
            return self._passes(parts, one_pass, halved=self._halved)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            cut = None if self._halved else self._why_not(error, parts)
            if self._halved or cut:
                raise self._told(error, parts, f" {cut}" if cut else " Halves of it do not fit either.") from error
            self._failed.append(max(map(positions_of, parts)))
            self._warn(parts, reason_of(error))
        # Outside of the block: the error holds the tensors of the pass that failed.
        return self._again(model, one_pass)

    def _passes(self, parts: Sequence[Batch], one_pass: Pass, *, halved: bool) -> Tensor:
        losses = []
        for part in parts:
            large = len(self._failed) > 1 and positions_of(part) >= min(self._failed)
            losses += [one_pass(batch) for batch in (halves(part) if halved or large else [part])]
        return functools.reduce(torch.add, losses)  # one after the other, as they came

    def _again(self, model: nn.Module, one_pass: Pass) -> Tensor:
        model.zero_grad(set_to_none=True)
        self._before()
        release_buffers()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._halved = True
        parts = self._done[-1]
        try:
            # The losses of the micro-batches before are counted already.
            return [self._passes(one, one_pass, halved=True) for one in self._done][-1]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._told(error, parts, " Halves of it do not fit either.") from error

    def _why_not(self, error: BaseException, parts: Sequence[Batch]) -> str:
        """Why the step is not done again in halves; empty where it is."""
        trainer = self._trainer
        if not any(isinstance(one, torch.OutOfMemoryError) for one in _causes(error)):
            return "Only on a GPU is a step done again in halves."
        if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
            return "It is not done again in halves: several processes wait for each other in a step."
        if all(len(halves(part)) == 1 for part in parts):
            return "It cannot be cut: it is one row."
        return ""

    def _warn(self, parts: Sequence[Batch], reason: str) -> None:
        largest = max(parts, key=positions_of)
        step = self._trainer.state.global_step + 1
        if len(self._failed) > 2:
            return
        further = ""
        if len(self._failed) == 2:
            further = f" From now on batches of {min(self._failed):,} positions or more are cut before they are tried."
        _log.warning(
            "Warning: step %d ran out of memory (%s) with %s. It is done again in halves: the same step up to "
            "rounding, and slower. training.arguments.gradient_accumulation_steps=%d cuts all steps so.%s",
            step, reason, _size(largest), 2 * self._trainer.args.gradient_accumulation_steps, further,
        )  # fmt: skip

    def _told(self, error: BaseException, parts: Sequence[Batch], tried: str) -> Halted:
        trainer = self._trainer
        step, largest = trainer.state.global_step + 1, max(parts, key=positions_of)
        ids = int(getattr(trainer.student.config.get_text_config(), "vocab_size", 0) or 0)
        return Halted(
            f"Step {step} ran out of memory ({reason_of(error)}). The batch of this pass has {_size(largest)}, and the "
            f"vocabulary {ids:,} tokens.{tried} {self.parts()} {self._cures(largest)} "
            f"{trainer._finite.kept().capitalize()}."
        )

    def parts(self) -> str:
        """What is known of the memory's use, in a sentence."""
        held = {name: size for name, size in held_by(self._trainer).items() if size}
        listed = ", ".join(f"{PARTS[name]} {gigabytes(size)}" for name, size in held.items())
        device, passes = self._trainer.args.device, ""
        if device.type == "cuda":
            taken = torch.cuda.max_memory_allocated(device) - sum(held.values())
            passes = f" Of {gigabytes(available_bytes(device) or 0)}, the passes took {gigabytes(max(0, taken))}."
        return f"Held beside the pass: {listed}.{passes}"

    def _cures(self, batch: Batch) -> str:
        trainer, rows = self._trainer, len(batch["row_ids"])
        args = trainer.config
        cures = []
        if rows > 1:
            more = 2 * trainer.args.gradient_accumulation_steps
            cures.append(f"training.arguments.gradient_accumulation_steps={more}, which gives the same steps")
        name = "tokens_per_step" if args.per_device_train_batch_size is None else "per_device_train_batch_size"
        if rows > 1:
            cures.append(f"a smaller training.{name} (it is {getattr(args, name)})")
        cures.append("a smaller data.max_tokens")
        if not args.activation_checkpointing:
            cures.append("training.gradient_checkpointing=true")
        held = held_by(trainer)
        largest = max(held, key=lambda part: held[part])
        of_largest = f" Of the {PARTS[largest]}: {CURES[largest]}." if held[largest] else ""
        return f"What needs less: {'; '.join(cures)}.{of_largest}"

    @contextmanager
    def around(self) -> Any:
        """Tell of memory that runs out in a step beside its passes, as in its update."""
        trainer = self._trainer

        def cure() -> str:
            return f"{self.parts()} What needs less: {CURES['optimiser']}. {trainer._finite.kept().capitalize()}."

        with memory_told("in training, beside the passes of a step", cure, Halted):
            yield


def held_by(trainer: Any) -> dict[str, int]:
    """Bytes of what is kept from step to step in this process, by the keys of `PARTS`."""
    student, teacher = trainer.student, trainer.teacher
    weights = list(student.parameters())
    state = getattr(trainer.optimizer, "state", {})
    moments = [value for one in state.values() if isinstance(one, dict) for value in one.values()]
    live = isinstance(teacher, LiveTeacher)
    return {
        "student_weights": _bytes(weights),
        "gradients": _bytes(weight.grad for weight in weights if weight.grad is not None),
        "optimiser": _bytes(value for value in moments if isinstance(value, Tensor)),
        "teacher_weights": _bytes(teacher.model.parameters()) if live else 0,
    }


def _bytes(tensors: Any) -> int:
    return sum(part.numel() * part.element_size() for part in map(local, tensors))


def positions_of(batch: Batch) -> int:
    """Positions that a student is fed, padding included."""
    return sum(batch[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch)


def _size(batch: Batch) -> str:
    rows, padding = len(batch["row_ids"]), "" if is_packed(batch) else " with padding"
    return (
        f"{rows} row{'' if rows == 1 else 's'}, {positions_of(batch):,} positions{padding} and a longest row of "
        f"{_longest(batch)}"
    )


def _longest(batch: Batch) -> int:
    if is_packed(batch):
        return int(batch["position_ids"].max()) + 1
    return max(int(batch[name].sum(-1).max()) for name in ("attention_mask", "decoder_attention_mask") if name in batch)


def halves(batch: Batch) -> list[Batch]:
    """Cut a batch of `drkl.data.collate.collate` in two, by rows; one of a single row stays whole.

    >>> from drkl.data.collate import collate
    >>> from drkl.data.tokenize import Row
    >>> rows = [Row("a", (5, 6), (7, 2), example=None), Row("b", (5,), (8, 2), example=None)]
    >>> [half["row_ids"] for half in halves(collate(rows, pad_id=0))]
    [['a'], ['b']]
    """
    rows = len(batch["row_ids"])
    if rows < 2:
        return [batch]
    lines = [batch["labels"].shape[0]] if not is_packed(batch) else []
    parts: list[Batch] = [{}, {}]
    cut = _middle(batch) if is_packed(batch) else rows // 2
    for name, value in batch.items():
        if name == "row_ids":
            first, second = value[:cut], value[cut:]
        elif name == "places":
            continue
        elif lines:
            first, second = value[:cut], value[cut:]
        else:
            place = _start(batch, cut, "teacher_" if name.startswith("teacher_") else "")
            first, second = value[:, :place], value[:, place:]
        parts[0][name], parts[1][name] = first, second
    if "places" in batch:
        count = int((parts[0]["labels"] != IGNORE_INDEX).sum())
        parts[0]["places"], parts[1]["places"] = batch["places"][:count], batch["places"][count:]
    return parts


def _middle(batch: Batch) -> int:
    """The number of rows in the first half of a packed batch: as near to half of the positions as rows allow."""
    starts = (batch["position_ids"][0] == 0).nonzero()[1:, 0]
    half = batch["input_ids"].shape[1] / 2
    return int((starts - half).abs().argmin()) + 1


def _start(batch: Batch, row: int, whose: str) -> int:
    """The first position of a row of a packed batch."""
    return int((batch[f"{whose}position_ids"][0] == 0).nonzero()[row, 0])


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
