"""The pushes on the target while a student is trained: a callback that splits the gradient at held-out positions.

It logs means over the positions (see `decompose`): ``watch_target_push``, ``watch_tail_push``, ``watch_q_t``,
``watch_p_t``, ``watch_B``, ``watch_K``, ``watch_D``; ``watch_matched_push``, the mean tail push where the target is
matched (abs(D) <= 0.25 as in `drkl analyze`; left out where it is matched nowhere); ``watch_raised``, the share of
positions where the tail raises the target, with a push below -0.0001.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drkl.analysis.gradients import decompose
from drkl.analysis.states import MATCHED
from drkl.data.classification import LabelledRow
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses.common import shared_vocabulary
from drkl.losses.merged import make_merged
from drkl.losses.topk import TopK
from drkl.models.forward import decoder_start, in_eval_mode, output_head
from drkl.models.readout import batches, chunks, logits_of
from drkl.objectives import Objective, make_objective
from drkl.teachers.live import LiveTeacher
from drkl.teachers.teacher import Teacher

if TYPE_CHECKING:
    from drkl.analysis.config import AnalysisConfig
    from drkl.training.trainer import DistillationTrainer

_log = logging.getLogger("drkl")
PREFIX = "watch_"
MEANS = ("target_push", "tail_push", "q_t", "p_t", "B", "K", "D")
"""The fields of a `Decomposition` whose means are logged."""
RAISED = -1e-4
"""The tail raises the target where its push is below this: a push of 0 on paper is near 1e-6 in fp32, mostly below."""
CHUNK = 32
"""Positions decomposed at once."""


class Probe:
    """Fixed positions of held-out rows, with the teacher's states there; the teacher runs once, here.

    Args:
        rows: rows of `drkl.data`, tokenised for the student's kind of model; each labelled row is one position.
        teacher: the teacher, on its device.
        pad_id: fills batches; its value changes nothing.
        positions: maximum number of positions, evenly spread over the trained positions of all rows.
        decoder_start: `drkl.models.forward.decoder_start` of an encoder-decoder student; None for others.
        vocab_size: compare on this many ids, from 0, that both models share; None for all.
        merged_ids: ids that are one class when the models are compared.

    Raises:
        DrklError: there is no teacher or no position, or the rows are for the other kind of model.
    """

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        teacher: Teacher | PreTrainedModel | None,
        *,
        pad_id: int,
        positions: int = 256,
        decoder_start: int | None = None,
        vocab_size: int | None = None,
        merged_ids: Sequence[int] = (),
    ) -> None:
        if teacher is None:
            raise DrklError("There is no teacher to compare the student with, so there is no push to watch.")
        _check_rows(rows, positions, decoder_start)
        self.vocab_size, self._merged_ids = vocab_size, merged_ids
        self._teacher = LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
        chosen = _choose([row.num_trained for row in rows], positions)
        self._batches = list(batches(rows, pad_id=pad_id, decoder_start=decoder_start, positions=chosen))
        self._states = [_whole(self._teacher.states(batch)) for batch in self._batches]

    def __len__(self) -> int:
        return sum(batch.labels.numel() for batch in self._batches)

    def check(self, student: PreTrainedModel) -> None:
        """Raise DrklError unless student and teacher can be compared."""
        shared_vocabulary(_num_outputs(student), _num_outputs(self._teacher.model), self.vocab_size)

    @torch.no_grad()
    def decompose(self, student: PreTrainedModel, objective: Objective, temperature: float) -> dict[str, Tensor]:
        """Return the fields `MEANS` of `drkl.analysis.decompose` at every position, each `[n]`, float64, on the CPU.

        The student runs in the mode that it is in: put it into eval mode before. Where the objective has no target of
        its own, the target is the teacher's top token.
        """
        device = next(student.parameters()).device
        head, teacher_head = output_head(student), self._teacher.head
        size = self.vocab_size if self.vocab_size is not None else _num_outputs(student)
        merged = make_merged(self._merged_ids or None, size)
        parts: list[list[Tensor]] = []
        for batch, teacher_states in zip(self._batches, self._states, strict=True):
            states = batch.states(student)
            for part in chunks(len(states), CHUNK):
                logits = logits_of(states[part], head, self.vocab_size)
                teacher_logits = logits_of(teacher_states[part], teacher_head, self.vocab_size).to(device)
                labels = batch.labels[part].to(device) if objective.needs_labels else None
                if merged is not None:
                    logits, teacher_logits = merged.merged(logits), merged.merged(teacher_logits)
                    labels = merged.labels(labels)
                result = decompose(logits, teacher_logits, labels, objective, temperature)
                parts.append([getattr(result, name).double().cpu() for name in MEANS])
        return {name: torch.cat(columns) for name, columns in zip(MEANS, zip(*parts, strict=True), strict=True)}


def _whole(states: Tensor | TopK) -> Tensor:
    if isinstance(states, TopK):
        raise DrklError(
            "The pushes on the target are of the teacher's whole distribution, and this one is known on its largest "
            "logits alone. Leave analysis.watch_every out, or use a cache of hidden states or the teacher itself."
        )
    return states


def _num_outputs(model: PreTrainedModel) -> int:
    head = output_head(model)
    return int(model.config.num_labels or 0) if head is None else head.vocab_size


def _check_rows(rows: Sequence[Row | LabelledRow], positions: int, decoder_start: int | None) -> None:
    if positions < 1:
        raise DrklError(f"positions is {positions}; expected at least 1.")
    if not sum(row.num_trained for row in rows):
        raise DrklError(f"The {len(rows)} rows to watch have no position that the loss counts; give held-out rows.")
    encoder_decoder = decoder_start is not None
    if any(isinstance(row, Row) and row.encoder_decoder != encoder_decoder for row in rows):
        kinds = ("a decoder-only model", "an encoder-decoder")
        raise DrklError(
            f"The rows to watch are tokenised for {kinds[not encoder_decoder]}, but decoder_start is {decoder_start}, "
            f"which belongs to {kinds[encoder_decoder]}; pass decoder_start(student) of `drkl.models.forward`."
        )


def _choose(counts: Sequence[int], wanted: int) -> dict[int, list[int]]:
    """By row, the positions that are used, evenly spread over all; rows without one are left out."""
    ends = np.cumsum(counts)
    total = int(ends[-1])
    picks = np.arange(total) if total <= wanted else np.arange(wanted) * total // wanted
    chosen: dict[int, list[int]] = {}
    for row, pick in zip(np.searchsorted(ends, picks, side="right").tolist(), picks.tolist(), strict=True):
        chosen.setdefault(row, []).append(pick - int(ends[row]) + counts[row])
    return chosen


def summary(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers to log, from the columns `[n]` of `Probe.decompose`."""
    numbers = {name: float(columns[name].mean()) for name in MEANS}
    matched = columns["D"].abs() <= MATCHED
    if bool(matched.any()):
        numbers["matched_push"] = float(columns["tail_push"][matched].mean())
    numbers["raised"] = float((columns["tail_push"] < RAISED).double().mean())
    return {PREFIX + name: value for name, value in numbers.items()}


class GradientWatch(TrainerCallback):
    """Logs the pushes on the target at the positions of a probe, every few steps of any `transformers.Trainer`.

    `attach` it to the trainer; in a list of callbacks it would have no way to log::

        probe = Probe(heldout_rows, teacher, pad_id=tokenizer.pad_token_id)
        GradientWatch(probe, "rkl", every=50).attach(trainer)
        trainer.train()

    The numbers are a line of their own in ``trainer.state.log_history`` and in every tracker. Training is the same to
    the last bit: the student's modes, the random state and the gradients stay as they were.

    Args:
        probe: the held-out positions and the teacher.
        objective: the objective that is minimised. ``kd_weight`` and ``t2_scaling`` do not enter the pushes.
        every: optimiser steps between two measurements; the first and the last step are measured too.
        temperature: the temperature of the loss.

    Raises:
        DrklError: ``every`` is below 1, the objective is unknown or has no two terms, or the temperature is not above
            0.
    """

    def __init__(self, probe: Probe, objective: str | Objective, *, every: int, temperature: float = 1.0) -> None:
        if every < 1:
            raise DrklError(f"every is {every}; expected a number of optimiser steps, at least 1.")
        self.probe, self.objective, self.every, self.temperature = probe, make_objective(objective), every, temperature
        self._trainer: Trainer | None = None
        # Refuse now, not after the first step.
        zeros = torch.zeros(1, 2)
        decompose(zeros, zeros, torch.zeros(1, dtype=torch.int64), self.objective, temperature)

    @classmethod
    def for_trainer(cls, trainer: DistillationTrainer, config: AnalysisConfig) -> GradientWatch | None:
        """Watch a distillation as the `analysis` section of its config says, on its own held-out rows.

        Args:
            trainer: the trainer, before it trains.
            config: the section.

        Returns:
            The watch, attached to ``trainer``; None where the config does not ask for one, and, with a warning, where
            the held-out rows are prompts alone.

        Raises:
            DrklError: the trainer has no teacher or no held-out rows.
        """
        if config.watch_every is None:
            return None
        if trainer.eval_rows and not any(row.num_trained for row in trainer.eval_rows):
            if trainer.is_world_process_zero():
                _log.warning(
                    "Warning: analysis.watch_every has no effect: it watches the responses of the held-out rows, which "
                    "have none. Name rows with responses as data.eval_path, or leave it out."
                )
            return None
        probe = Probe(
            trainer.eval_rows,
            trainer.teacher,
            pad_id=trainer.pair.pad_id,
            positions=config.watch_positions,
            decoder_start=decoder_start(_student_of(trainer)),
            vocab_size=trainer.vocab_size,
            merged_ids=trainer.pair.merged_ids,
        )
        # With kd_weight 0 the loss is cross-entropy alone, at temperature 1.
        objective, temperature = trainer.objective, trainer.loss_config.temperature
        if trainer.loss_config.kd_weight == 0:
            objective, temperature = make_objective("ce"), 1.0
        watch = cls(probe, objective, every=config.watch_every, temperature=temperature)
        watch.attach(trainer)
        return watch

    def attach(self, trainer: Trainer) -> None:
        """Add this callback to ``trainer`` and log to it.

        Raises:
            DrklError: the trainer's model cannot be compared with the probe's teacher.
        """
        self.probe.check(_student_of(trainer))
        self._trainer = trainer
        trainer.add_callback(self)

    def measure(self, student: PreTrainedModel) -> dict[str, float]:
        """Return the numbers of a student as it is now; see the top of this module."""
        with _undisturbed(student):
            return summary(self.probe.decompose(student, self.objective, self.temperature))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to run unattached."""
        if self._trainer is None:
            raise DrklError(
                "GradientWatch is in the callbacks of a trainer that it is not attached to, so it could not log. Leave "
                "it out there and call watch.attach(trainer)."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log if this step is one to measure."""
        step = state.global_step
        if not (step == 1 or step % self.every == 0 or step >= state.max_steps):
            return
        assert self._trainer is not None
        should_log = control.should_log
        self._trainer.log(self.measure(_student_of(self._trainer)))
        # Logging resets the flag, but the trainer's own line is still to come.
        control.should_log = should_log


def _student_of(trainer: Trainer) -> PreTrainedModel:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "get_base_model"):
        student: PreTrainedModel = model
        return student
    if model.active_peft_config.is_prompt_learning:
        raise DrklError("The student has prompts that peft puts before its input; only adapters inside can be watched.")
    base: PreTrainedModel = model.get_base_model()
    return base


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and the random state are as they were."""
    device = next(model.parameters()).device
    with in_eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def watcher(config: AnalysisConfig) -> Callable[[DistillationTrainer], Any] | None:
    """`GradientWatch.for_trainer` with a config, to call on each stage's trainer; None where there is nothing to do."""
    return None if config.watch_every is None else functools.partial(GradientWatch.for_trainer, config=config)
