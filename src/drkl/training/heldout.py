"""The loss on held-out rows while training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.batching import bucket_by_length
from drkl.data.classification import LabelledRow
from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.losses import IGNORE_INDEX
from drkl.losses.config import LossConfig
from drkl.models.forward import hidden_states, output_head
from drkl.objectives import Objective
from drkl.teachers.live import LiveTeacher
from drkl.training.faults import find_fault, list_rows
from drkl.training.forward import StatisticsSums, loss_of

CHUNK = 256


class NonFiniteLoss(ArithmeticError):
    """A held-out loss is not a finite number; the message says which rows and which tensor."""


class HeldOut:
    """Held-out rows in batches, with the teacher's hidden states at the response positions kept from the first use."""

    def __init__(
        self,
        rows: Sequence[Row | LabelledRow],
        pad_id: int,
        teacher: LiveTeacher | None,
        tokens_per_batch: int,
        *,
        rows_per_batch: int | None = None,
        decoder_start: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._teacher, self._vocab_size = teacher, vocab_size
        groups = bucket_by_length([row.length for row in rows], tokens_per_batch)
        if rows_per_batch is not None:
            order = [i for group in groups for i in group]
            groups = [order[i : i + rows_per_batch] for i in range(0, len(order), rows_per_batch)]
        self._batches = [
            collate([rows[i] for i in group], pad_id=pad_id, decoder_start=decoder_start) for group in groups
        ]
        self._teacher_hidden: list[Tensor | None] = [None] * len(self._batches)

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, objective: Objective, loss: LossConfig) -> dict[str, float]:
        """Means over the response tokens of all rows: loss, nll, entropies and, with a teacher, KLs and agreement.

        All come from one product with each head.
        """
        device = next(model.parameters()).device
        head = output_head(model)
        sums: dict[str, float] = {}
        for index, batch in enumerate(self._batches):
            batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            keep = batch["labels"] != IGNORE_INDEX
            labels, hidden = batch["labels"][keep], hidden_states(model, batch)[keep]
            teacher_hidden = self._teacher_states(index, batch, keep)
            for start in range(0, labels.numel(), CHUNK):
                part = slice(start, start + CHUNK)
                statistics = StatisticsSums()
                values = loss_of(
                    hidden[part],
                    head,
                    None if teacher_hidden is None else teacher_hidden[part],
                    None if self._teacher is None else self._teacher.head,
                    labels[part],
                    loss,
                    objective=objective,
                    vocab_size=self._vocab_size,
                    reduction="none",
                    observe=statistics,
                )
                for name, value in (statistics.sums | {"loss": values.sum()}).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            if not math.isfinite(sums.get("loss", 0.0)):
                rows = list_rows(self._batches[index]["row_ids"])
                fault = find_fault(model, hidden, self._teacher, teacher_hidden, objective)
                raise NonFiniteLoss(f"the held-out loss is not finite, rows {rows}. Not finite first: {fault}.")
        count = sums.pop("positions", 0.0)
        return {name: value / max(count, 1) for name, value in sums.items()}

    def _teacher_states(self, index: int, batch: dict[str, Tensor], keep: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        states = self._teacher_hidden[index]
        if states is None:
            states = self._teacher.hidden_at(batch, keep)  # a teacher that remembers has them from the stage before
            self._teacher_hidden[index] = states
        return states
