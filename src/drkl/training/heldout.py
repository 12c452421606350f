"""The loss on held-out rows while training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.classification import LabelledRow
from drkl.data.tokenize import Row
from drkl.losses import LMHead
from drkl.losses.config import LossConfig
from drkl.losses.topk import TopK
from drkl.models.forward import output_head
from drkl.models.memory import memory_told
from drkl.models.readout import READING, SHORT_TOKENS_PER_BATCH, batches, chunks
from drkl.models.sharded import runs_together
from drkl.objectives import Objective
from drkl.processes import shared_work
from drkl.signals import cut_short
from drkl.teachers.teacher import Teacher
from drkl.training.faults import Fault, Way, find_fault
from drkl.training.forward import StatisticsSums, loss_of


class NonFiniteLoss(ArithmeticError):
    """A held-out loss is not a finite number.

    Args:
        fault: the first tensor that is not finite.
        rows: the ids of the rows of the loss.
    """

    def __init__(self, fault: Fault, rows: Sequence[str]) -> None:
        super().__init__(fault, rows)
        self.fault, self.rows = fault, tuple(rows)

    def __str__(self) -> str:
        return f"the held-out loss is not finite: {self.fault.tensor}"


class HeldOut:
    """Held-out rows in batches, with the teacher's hidden states at the response positions kept from the first use.

    Several processes share the batches; a process has the teacher read its own alone.

    ``remember=False`` is for rows that no later pass reads: a teacher that remembers keeps none of their states.
    """

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        pad_id: int,
        teacher: Teacher | None,
        *,
        rows_per_batch: int | None = None,
        decoder_start: int | None = None,
        vocab_size: int | None = None,
        remember: bool = True,
        merged_ids: Sequence[int] = (),
        packed: bool = False,
    ) -> None:
        self._teacher, self._vocab_size, self._remember = teacher, vocab_size, remember
        self._merged_ids = merged_ids or None
        self._batches = list(
            batches(
                rows,
                pad_id=pad_id,
                decoder_start=decoder_start,
                tokens_per_batch=SHORT_TOKENS_PER_BATCH,
                rows_per_batch=rows_per_batch,
                packed=packed,
            )
        )
        self._teacher_hidden: list[Tensor | TopK | None] = [None] * len(self._batches)

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, objective: Objective, loss: LossConfig) -> dict[str, float]:
        """Means over the response tokens of all rows: loss, nll, entropies and, with a teacher, KLs and agreement.

        All come from one product with each head. Every process returns them, to the same last digit whatever their
        number.
        """
        # Once, as every process has to ask for a head whose parts are spread over them.
        heads = output_head(model), None if self._teacher is None else self._teacher.head
        even = runs_together(model) or (self._teacher is not None and runs_together(self._teacher.model))

        def sums_of(index: int) -> list[dict[str, float]]:
            if not even:  # where all read a batch together, none leaves the others alone
                cut_short()
            return self._sums_of(index, model, heads, objective, loss)

        parts = shared_work(len(self._batches), sums_of, even=even)
        sums: dict[str, float] = {}
        for name, value in (item for batch in parts for part in batch for item in part.items()):
            sums[name] = sums.get(name, 0.0) + value
        count = sums.pop("positions", 0.0)
        return {name: value / max(count, 1) for name, value in sums.items()}

    def _sums_of(
        self,
        index: int,
        model: PreTrainedModel,
        heads: tuple[LMHead | None, LMHead | None],
        objective: Objective,
        loss: LossConfig,
    ) -> list[dict[str, float]]:
        """The sums over the positions of a batch, chunk by chunk: added up in this order they give the same digits
        whichever process read the batch."""
        batch, (head, teacher_head) = self._batches[index], heads
        compares = loss.kd_weight > 0 and objective.needs_teacher
        with memory_told(f"in the held-out loss, as the models read {batch.size()}", READING):
            hidden = batch.states(model)
            labels = batch.labels.to(hidden.device)
            teacher_hidden = self._teacher_states(index, hidden.device)
        sums = []
        for part in chunks(labels.numel()):
            statistics = StatisticsSums(temperature=loss.temperature if compares else 1.0)
            values = loss_of(
                hidden[part],
                head,
                None if teacher_hidden is None else teacher_hidden[part],
                teacher_head,
                labels[part],
                loss,
                objective=objective,
                vocab_size=self._vocab_size,
                merged_ids=self._merged_ids,
                reduction="none",
                observe=statistics,
            )
            sums.append({name: float(value) for name, value in (statistics.sums | {"loss": values.sum()}).items()})
        if not all(math.isfinite(part["loss"]) for part in sums):
            teacher, device = self._teacher, hidden.device
            again = (lambda: batch.states(model)), (lambda: teacher and self._read(teacher, index, device))
            fault = find_fault(Way(model, hidden, teacher, teacher_hidden, objective, heads, again))
            raise NonFiniteLoss(fault, batch.row_ids)
        return sums

    def _teacher_states(self, index: int, device: torch.device) -> Tensor | TopK | None:
        if self._teacher is None:
            return None
        if (states := self._teacher_hidden[index]) is None:
            # A teacher that remembers has them from the stage before.
            states = self._read(self._teacher, index, device, remember=self._remember)
            self._teacher_hidden[index] = states
        return states

    def _read(self, teacher: Teacher, index: int, device: torch.device, *, remember: bool = False) -> Tensor | TopK:
        batch = self._batches[index].for_teacher
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        keep, labels = batch.keep.to(device), batch.labels.to(device)
        return teacher.hidden_at(inputs, keep, labels=labels, remember=remember)
