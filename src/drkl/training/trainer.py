"""The trainer: `transformers.Trainer` with the distillation loss, its token count and its checkpoint marker."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from drkl.data.batching import plan_steps, split_rows
from drkl.data.classification import LabelledRow
from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.losses.config import LossConfig
from drkl.models.forward import decoder_start
from drkl.objectives import Objective
from drkl.teachers.live import LiveTeacher
from drkl.training.checkpoints import mark_complete, rotate
from drkl.training.faults import find_fault, list_rows
from drkl.training.forward import KEY, Distillation, attach_loss
from drkl.training.heldout import HeldOut, NonFiniteLoss

MASKS = ("attention_mask", "decoder_attention_mask")
REMEDY = "A lower learning rate, a warm-up, or training.precision=fp32 often help."


class MicroBatches(Dataset[list[Any]]):
    """Every micro-batch of a run, in order: item ``(step * accumulation + i) * processes + rank``."""

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        *,
        tokens_per_step: int,
        num_steps: int,
        parts: int,
        seed: int,
        same_batches: bool = False,
    ) -> None:
        self._rows = rows
        lengths = [row.length for row in rows]
        steps = plan_steps(
            lengths, tokens_per_step=tokens_per_step, num_steps=num_steps, seed=seed, same_batches=same_batches
        )
        # Whole steps are planned, then cut: however many parts, the optimiser sees the same rows in the same step.
        self._batches = [part for step in steps for part in split_rows(step, parts)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Any]:
        return [self._rows[i] for i in self._batches[index]]


class DistillationTrainer(Trainer):
    """Trains a student on an objective; the loop, checkpoints and parallelism are transformers' and accelerate's.

    Args:
        model: the student, a `PreTrainedModel`.
        args: its ``max_steps`` and ``gradient_accumulation_steps`` decide how the rows are cut.
        rows: tokenised training rows; labelled ones for a classifier.
        heldout: what is evaluated during training, or None.
        teacher: None where the objective needs none.
        objective: what is minimised.
        loss: temperature and weights.
        tokens_per_step: the token budget of an optimiser step over all processes.
        same_batches: every epoch has the same batches.
        vocab_size: how many ids, from 0, the two models are compared on; None for all.
        pad_id: the padding token.
        callbacks: as in `Trainer`.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole optimiser step already

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        rows: Sequence[Row | LabelledRow],
        heldout: HeldOut | None,
        teacher: LiveTeacher | None,
        objective: Objective,
        loss: LossConfig,
        tokens_per_step: int,
        same_batches: bool = False,
        vocab_size: int | None = None,
        pad_id: int,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._objective, self._loss, self._teacher, self._heldout = objective, loss, teacher, heldout
        # Done here: transformers removes old checkpoints before the new one is marked whole.
        self._keep_checkpoints, args.save_total_limit = args.save_total_limit, None
        attach_loss(model, objective, loss, vocab_size)
        start = decoder_start(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=MicroBatches(
                rows,
                tokens_per_step=tokens_per_step,
                num_steps=args.max_steps,
                parts=args.gradient_accumulation_steps * args.world_size,
                seed=args.seed,
                same_batches=same_batches,
            ),
            eval_dataset=[0] if heldout is not None else None,  # never read: `evaluate` has its own rows
            data_collator=lambda items: collate(items[0], pad_id=pad_id, decoder_start=start),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._sums: dict[str, float] = {}
        self._since = time.monotonic()
        self._input_tokens = 0
        self.num_tokens_seen = 0
        self._row_ids: list[str] = []

    @property
    def student(self) -> nn.Module:
        """The model being trained, whatever is wrapped around it."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The summed loss of a micro-batch over the valid tokens of the whole optimiser step, all ranks together."""
        row_ids, labels = inputs.pop("row_ids"), inputs.pop("labels")
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        teacher_hidden = teacher_head = None
        if self._teacher is not None:
            teacher_hidden = self._teacher.hidden_at(inputs, labels != IGNORE_INDEX)
            teacher_head = self._teacher.head
        step = self.state.global_step + 1
        at_log = step % max(1, int(self.state.logging_steps)) == 0 or step >= self.state.max_steps
        wanted = Distillation(
            labels, teacher_hidden, teacher_head, torch.as_tensor(count, device=labels.device), at_log
        )
        # A plain tuple: data-parallel wrappers move tensors through containers they know.
        loss, statistics, hidden = model(**inputs, **{KEY: tuple(wanted)})
        if not torch.isfinite(loss):
            self._stop_non_finite(loss, row_ids, hidden, teacher_hidden)
        for name, value in statistics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._input_tokens += sum(int(inputs[name].sum()) for name in MASKS if name in inputs)
        # Ranks' gradients are averaged; the sum over ranks is what was divided by the global count.
        return loss * self.accelerator.num_processes

    def _stop_non_finite(self, loss: Tensor, row_ids: list[str], hidden: Tensor, teacher_hidden: Tensor | None) -> None:
        fault = find_fault(self.student, hidden, self._teacher, teacher_hidden, self._objective)
        raise DrklError(
            f"The loss became {float(loss.detach())} at step {self.state.global_step + 1}, rows {list_rows(row_ids)}. "
            f"Not finite first: {fault}. Training stopped; the last good checkpoint is kept. {REMEDY}"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # fp16 skips such steps by itself; anywhere else the step would spoil the weights.
        if norm is not None and self.args.fp16 is False and not math.isfinite(float(norm)):
            gradients = {n: p.grad for n, p in self.student.named_parameters() if p.grad is not None}
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            # Clipping by a norm that is NaN makes every gradient NaN; then none can be named.
            where = "" if len(bad) == len(gradients) else f" (first in {next(iter(bad), 'its norm')!r})"
            raise DrklError(
                f"The gradient is not finite at step {self.state.global_step + 1}, rows {list_rows(self._row_ids)}"
                f"{where}, though the loss is. Training stopped before the step was taken; the last good checkpoint is "
                f"kept. {REMEDY}"
            )
        return norm

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        # Labels are aligned here: every one that is not ignored counts, the first column too.
        if not batch_samples:
            return None
        count = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in batch_samples]).sum().to(device)
        total: Tensor = self.accelerator.gather(count).sum() if self.args.world_size > 1 else count
        self.num_tokens_seen += int(total)
        self._row_ids = [row_id for batch in batch_samples for row_id in batch["row_ids"]]
        return total

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate on the held-out rows; every mean is over all of their response tokens."""
        assert self._heldout is not None
        model: Any = self.student
        training = model.training
        model.eval()
        try:
            values = self._heldout.evaluate(model, self._objective, self._loss)
        except NonFiniteLoss as error:
            raise DrklError(
                f"After step {self.state.global_step} {error} Training stopped; the last good checkpoint is kept. "
                f"{REMEDY}"
            ) from error
        model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what `compute_loss` gathered since the last training line."""
        if "loss" in logs:
            positions = self._sums.pop("positions", 0.0)
            logs |= {name: value / positions for name, value in self._sums.items()} if positions else {}
            now = time.monotonic()
            tokens = self._input_tokens * self.accelerator.num_processes  # steps are cut evenly between the processes
            logs["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
            logs["num_tokens"] = self.num_tokens_seen
            self._sums, self._input_tokens, self._since = {}, 0, now
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Only a step that is also saved can be the best that is kept.
        return self.control.should_save and super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        # A full disk is an OSError to Python, a SafetensorError to safetensors and a RuntimeError to torch.save.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DrklError(
                f"Could not write the checkpoint of step {self.state.global_step} to {str(folder)!r}: "
                f"{' '.join(str(error).split())[:200]}. The last good checkpoint is kept; make room, then "
                "`drkl distill --resume`."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody needs
            mark_complete(folder, self.state.global_step, self.num_tokens_seen)
            if self._keep_checkpoints:
                best = self.state.best_model_checkpoint
                rotate(folder.parent, self._keep_checkpoints, Path(best) if best else None)
