"""What pushes the target while a student is trained: a callback that splits the gradient on fixed held-out positions.

Logged are means over the positions (see `decompose`): ``watch_target_push``, ``watch_tail_push``, ``watch_q_t``,
``watch_p_t``, ``watch_B``, ``watch_K``, ``watch_D``; ``watch_matched_push``, the mean tail push where the target is
matched, abs(D) <= 0.25 as in `drkl analyze`, left out where it is so nowhere; ``watch_raised``, the share of positions
where the tail raises the target, with a push below -0.0001.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drkl.analysis.gradients import decompose
from drkl.analysis.states import MATCHED
from drkl.data.batching import bucket_by_length
from drkl.data.classification import LabelledRow
from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.losses.common import shared_vocabulary
from drkl.models.forward import decoder_start, hidden_states, output_head
from drkl.objectives import Objective, make_objective
from drkl.teachers.live import LiveTeacher
from drkl.training.forward import logits_of

if TYPE_CHECKING:
    from drkl.analysis.config import AnalysisConfig
    from drkl.training.run import OnTrainer, Prepared
    from drkl.training.trainer import DistillationTrainer

PREFIX = "watch_"
MEANS = ("target_push", "tail_push", "q_t", "p_t", "B", "K", "D")
"""The fields of a `Decomposition` whose means are logged."""
RAISED = -1e-4
"""A push below this is one: what is 0 on paper comes out near 1e-6 in fp32, mostly below 0."""
TOKENS_PER_BATCH = 2048
CHUNK = 32
"""Positions decomposed at once."""


class _Batch(NamedTuple):
    inputs: dict[str, Tensor]
    keep: Tensor
    """`[batch, tokens]`, true at the probe's positions."""
    labels: Tensor
    """`[n]`, the observed tokens there."""
    teacher_hidden: Tensor
    """`[n, hidden]`; of a classifier its class logits."""


class Probe:
    """Fixed positions of held-out rows, and what a teacher says there: it runs once, here.

    Args:
        rows: tokenised for the student's kind of model; labelled ones for a classifier, of which each is one position.
        teacher: on its device.
        pad_id: fills batches; its value changes nothing.
        positions: how many of the positions that the loss counts are used, at most; evenly over all rows.
        decoder_start: of an encoder-decoder student, `drkl.models.forward.decoder_start` of it; None for others.
        vocab_size: compare on the first so many ids, those that both models share; None for all.

    Raises:
        DrklError: no teacher, no position, or rows for the other kind of model.
    """

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        teacher: LiveTeacher | None,
        *,
        pad_id: int,
        positions: int = 256,
        decoder_start: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if teacher is None:
            raise DrklError("There is no teacher to compare the student with, so there is no push to watch.")
        _check_rows(rows, positions, decoder_start)
        self.vocab_size, self._teacher = vocab_size, teacher
        self._batches: list[_Batch] = []
        chosen = _choose([row.num_trained for row in rows], positions)
        used, device = list(chosen), teacher.model.device
        for group in bucket_by_length([rows[i].length for i in used], TOKENS_PER_BATCH):
            batch = collate([rows[used[i]] for i in group], pad_id=pad_id, decoder_start=decoder_start)
            labels = batch.pop("labels")
            keep = torch.zeros_like(labels, dtype=torch.bool)
            for line, i in enumerate(group):
                counting = (labels[line] != IGNORE_INDEX).nonzero().squeeze(1)
                keep[line, counting[chosen[used[i]]]] = True
            inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            # Not hidden_at: what a teacher remembers is for the training.
            self._batches.append(_Batch(inputs, keep, labels[keep], teacher.hidden(inputs)[keep.to(device)]))

    def __len__(self) -> int:
        return sum(batch.labels.numel() for batch in self._batches)

    def check(self, student: PreTrainedModel) -> None:
        """Raise DrklError unless student and teacher can be compared."""
        shared_vocabulary(_num_outputs(student), _num_outputs(self._teacher.model), self.vocab_size)

    @torch.no_grad()
    def decompose(self, student: PreTrainedModel, objective: Objective, temperature: float) -> dict[str, Tensor]:
        """The fields `MEANS` of `drkl.analysis.decompose` at every position, each `[n]` in float64 on the CPU.

        The student is run as it is: put it into eval mode before. Where the objective has no target of its own, the
        target is the teacher's top token.
        """
        device = next(student.parameters()).device
        head, teacher_head = output_head(student), self._teacher.head
        parts: list[list[Tensor]] = []
        for batch in self._batches:
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            hidden = hidden_states(student, inputs)[batch.keep.to(device)]
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                logits = logits_of(hidden[part], head, self.vocab_size)
                teacher_logits = logits_of(batch.teacher_hidden[part], teacher_head, self.vocab_size).to(device)
                labels = batch.labels[part].to(device) if objective.needs_labels else None
                found = decompose(logits, teacher_logits, labels, objective, temperature)
                parts.append([getattr(found, name).double().cpu() for name in MEANS])
        return {name: torch.cat(columns) for name, columns in zip(MEANS, zip(*parts, strict=True), strict=True)}


def _num_outputs(model: PreTrainedModel) -> int:
    head = output_head(model)
    return int(model.config.num_labels or 0) if head is None else head.vocab_size


def _check_rows(rows: Sequence[Row | LabelledRow], positions: int, decoder_start: int | None) -> None:
    if positions < 1:
        raise DrklError(f"positions is {positions}; expected at least 1.")
    if not sum(row.num_trained for row in rows):
        raise DrklError(f"The {len(rows)} rows to watch have no position that the loss counts; give held-out rows.")
    apart = decoder_start is not None
    if any(isinstance(row, Row) and row.encoder_decoder != apart for row in rows):
        kinds = ("a decoder-only model", "an encoder-decoder")
        raise DrklError(
            f"The rows to watch are tokenised for {kinds[not apart]}, but decoder_start is {decoder_start}, which is "
            f"that of {kinds[apart]}; decoder_start(student) is the one that fits."
        )


def _choose(counts: Sequence[int], wanted: int) -> dict[int, list[int]]:
    """Which of each row's ``counts`` positions are used, row by row; a row without one is left out."""
    ends = np.cumsum(counts)
    total = int(ends[-1])
    picks = np.arange(total) if total <= wanted else np.arange(wanted) * total // wanted
    chosen: dict[int, list[int]] = {}
    for row, pick in zip(np.searchsorted(ends, picks, side="right").tolist(), picks.tolist(), strict=True):
        chosen.setdefault(row, []).append(pick - int(ends[row]) + counts[row])
    return chosen


def summary(found: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged of the columns `[n]` that `Probe.decompose` gives."""
    numbers = {name: float(found[name].mean()) for name in MEANS}
    matched = found["D"].abs() <= MATCHED
    if bool(matched.any()):
        numbers["matched_push"] = float(found["tail_push"][matched].mean())
    numbers["raised"] = float((found["tail_push"] < RAISED).double().mean())
    return {PREFIX + name: value for name, value in numbers.items()}


class GradientWatch(TrainerCallback):
    """Logs what pushes the target on the logits of a probe, every few steps of any `transformers.Trainer`.

    ``attach`` it; in the list of callbacks it has no way to log::

        probe = Probe(heldout_rows, LiveTeacher(teacher), pad_id=tokenizer.pad_token_id)
        GradientWatch(probe, "rkl", every=50).attach(trainer)
        trainer.train()

    The numbers are a line of their own in ``trainer.state.log_history`` and in every tracker. Training is the same to
    the last bit: the student's modes, the random state and the gradients stay as they were.

    Args:
        probe: where to look.
        objective: what is minimised; neither ``kd_weight`` nor ``t2_scaling`` enters the pushes.
        every: optimiser steps between two looks; after step 1 and after the last there is one too.
        temperature: that of the loss.

    Raises:
        DrklError: ``every`` below 1, an unknown objective or one without two terms, a temperature that is not above 0.
    """

    def __init__(self, probe: Probe, objective: str | Objective, *, every: int, temperature: float = 1.0) -> None:
        if every < 1:
            raise DrklError(f"every is {every}; expected a number of optimiser steps, at least 1.")
        self.probe, self.objective, self.every, self.temperature = probe, make_objective(objective), every, temperature
        self._trainer: Trainer | None = None
        # Said now, not after the first step.
        nothing = torch.zeros(1, 2)
        decompose(nothing, nothing, torch.zeros(1, dtype=torch.int64), self.objective, temperature)

    def attach(self, trainer: Trainer) -> None:
        """Watch this trainer.

        Raises:
            DrklError: its model cannot be compared with the probe's teacher.
        """
        self.probe.check(_student_of(trainer))
        self._trainer = trainer
        trainer.add_callback(self)

    def measure(self, student: PreTrainedModel) -> dict[str, float]:
        """The numbers of a student as it is now; see the top of this module."""
        with _undisturbed(student):
            return summary(self.probe.decompose(student, self.objective, self.temperature))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to watch nothing."""
        if self._trainer is None:
            raise DrklError(
                "GradientWatch is among the callbacks of a trainer that it is not attached to, so it could not log; "
                "leave it out there and call watch.attach(trainer)."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log where a look is due."""
        step = state.global_step
        if not (step == 1 or step % self.every == 0 or step >= state.max_steps):
            return
        assert self._trainer is not None
        wanted = control.should_log
        self._trainer.log(self.measure(_student_of(self._trainer)))
        # Logging takes back the wish for the trainer's own line, which is yet to come.
        control.should_log = wanted


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
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and the random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training


def watcher(config: AnalysisConfig) -> OnTrainer | None:
    """What `drkl.training.run.distill` takes as ``on_trainer`` to watch as a config's `analysis` section says."""
    return None if config.watch_every is None else functools.partial(_watch, config.watch_every, config.watch_positions)


def _watch(every: int, positions: int, prepared: Prepared, trainer: DistillationTrainer) -> None:
    spec = prepared.spec
    probe = Probe(
        prepared.loaded.heldout[: spec.training.eval_rows],
        prepared.teacher,
        pad_id=prepared.tokenizer.pad_token_id,
        positions=positions,
        decoder_start=decoder_start(prepared.student),
        vocab_size=prepared.vocab_size,
    )
    # With kd_weight 0 cross-entropy, at temperature 1, is all that is minimised.
    minimised: tuple[Objective | str, float] = ("ce", 1.0)
    if spec.loss.kd_weight > 0:
        minimised = spec.objective.make(), spec.loss.temperature
    GradientWatch(probe, minimised[0], every=every, temperature=minimised[1]).attach(trainer)
