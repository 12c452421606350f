"""Teacher-forced metrics: both models read the held-out responses. q = student, p = teacher; nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drkl.data.batching import bucket_by_length
from drkl.data.collate import IGNORE_INDEX, collate
from drkl.data.tokenize import Row
from drkl.losses import LMHead, token_statistics
from drkl.losses.common import check_vocabularies
from drkl.models import forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_BINS = 30
_OWN = ("nll", "accuracy", "entropy", "confidence")
_RELATIVE = ("fkl", "rkl", "tvd", "agreement", "overconfidence", "target_gap", "teacher_entropy", "teacher_confidence")
FIDELITY_KEYS = (
    "fkl", "rkl", "tvd", "agreement", "nll", "accuracy", "entropy", "confidence", "overconfidence", "confidence_gap",
    "entropy_gap", "target_gap", "num_tokens",
)  # fmt: skip


@dataclass
class FidelityMetrics:
    """Means over positions, and two histograms, from chunks of logits; nothing of a chunk is kept."""

    num_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
        """Add positions.

        Args:
            student_logits: `[n, vocab]`.
            teacher_logits: `[n, vocab]`, or None throughout.
            labels: `[n]`, the observed tokens; every one counts.

        Raises:
            DrklError: the vocabularies differ.
        """
        if teacher_logits is not None:
            check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
        if not labels.numel():
            return
        assert not self.num_tokens or (teacher_logits is None) == ("fkl" not in self.sums), "a teacher for all or none"
        values = token_statistics(student_logits, teacher_logits, labels)
        for name in _OWN if teacher_logits is None else _OWN + _RELATIVE:
            total = float(getattr(values, name).sum(dtype=torch.float64))
            self.sums[name] = self.sums.get(name, 0.0) + total
        for name, top in _tops(student_logits.shape[-1]).items():
            counts = _histogram(getattr(values, name), top)
            self.counts[name] = self.counts[name] + counts if name in self.counts else counts
        self.num_tokens += labels.numel()

    def compute(self) -> dict[str, float | None]:
        """Return the means by name (``FIDELITY_KEYS``); None for what needs a teacher, and for means of nothing."""
        means: dict[str, float | None] = {name: total / self.num_tokens for name, total in self.sums.items()}
        means["confidence_gap"] = _difference(means.get("confidence"), means.get("teacher_confidence"))
        means["entropy_gap"] = _difference(means.get("entropy"), means.get("teacher_entropy"))
        means["num_tokens"] = self.num_tokens
        return {key: means.get(key) for key in FIDELITY_KEYS}

    def distributions(self) -> dict[str, list[int]]:
        """Return how many positions fall in each of the ``NUM_BINS`` bins of entropy and of confidence."""
        return {name: self.counts[name].tolist() if name in self.counts else [0] * NUM_BINS for name in _tops(2)}


def bin_edges(vocab_size: int) -> dict[str, list[float]]:
    """Return the edges of the histograms: entropy from 0 to log(vocab), confidence from 0 to 1, of equal width."""
    return {name: [top * i / NUM_BINS for i in range(NUM_BINS + 1)] for name, top in _tops(vocab_size).items()}


@dataclass(frozen=True)
class HeldOutStates:
    """What a model makes of the held-out responses: enough to get every logit, without the model's body.

    ``hidden`` is `[n, hidden]` at the positions that predict a response token, ``labels`` `[n]` are those tokens.
    """

    hidden: Tensor
    labels: Tensor
    head: LMHead


@torch.no_grad()
def held_out_states(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_id: int,
    tokens_per_batch: int = 2048,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeldOutStates:
    """Run a model over the rows once and keep the hidden states of the response positions, in the order of the rows.

    Args:
        model: on its device, in eval mode.
        rows: at least one.
        pad_id: fills batches; its value changes nothing.
        tokens_per_batch: rows of like length go together, up to this many tokens with padding.
        vocab_size: keep the head of the first so many ids only, those that the compared models share.
        progress: called after each batch with the number of rows in it.
    """
    assert rows, "at least one held-out row"
    assert not model.training, "dropout would make every number a random one"
    kept: list[Tensor | None] = [None] * len(rows)
    start, head = forward.decoder_start(model), forward.lm_head(model)
    for group in bucket_by_length([row.length for row in rows], tokens_per_batch):
        batch = collate([rows[i] for i in group], pad_id=pad_id, decoder_start=start)
        inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        hidden = forward.hidden_states(model, inputs)
        for position, index in enumerate(group):
            keep = inputs["labels"][position] != IGNORE_INDEX
            # To the cpu: the states wait there while other models take the device.
            kept[index] = hidden[position][keep].cpu()
        if progress is not None:
            progress(len(group))
    labels = torch.tensor([token for row in rows for token in row.trained_ids])
    head = head if vocab_size is None else head.trimmed(vocab_size)
    return HeldOutStates(torch.cat([states for states in kept if states is not None]), labels, head)


@torch.no_grad()
def compare(
    student: HeldOutStates,
    teacher: HeldOutStates | None,
    *,
    chunk_tokens: int = 256,
    progress: Callable[[int], None] | None = None,
) -> FidelityMetrics:
    """Compare two models at every position, ``chunk_tokens`` rows of logits at a time.

    ``compare(teacher, teacher)`` is how the teacher gets its own column: its distances are exactly 0.

    Raises:
        DrklError: the vocabularies differ.
    """
    if teacher is not None:
        check_vocabularies(student.head.vocab_size, teacher.head.vocab_size)
        assert torch.equal(student.labels, teacher.labels), "both models read the same rows"
    metrics = FidelityMetrics()
    for start in range(0, len(student.labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        student_logits = _logits(student, part)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = student_logits if teacher is student else _logits(teacher, part).to(student_logits.device)
        labels = student.labels[part].to(student_logits.device)
        metrics.update(student_logits, teacher_logits, labels)
        if progress is not None:
            progress(len(labels))
    return metrics


def _logits(states: HeldOutStates, part: slice) -> Tensor:
    return states.head.logits(states.hidden[part].to(states.head.weight.device))


def _tops(vocab_size: int) -> dict[str, float]:
    return {"entropy": math.log(vocab_size), "confidence": 1.0}


def _histogram(values: Tensor, top: float) -> Tensor:
    bins = (values.double() * (NUM_BINS / top)).long().clamp(0, NUM_BINS - 1)
    return torch.bincount(bins.cpu(), minlength=NUM_BINS)


def _difference(own: float | None, teacher: float | None) -> float | None:
    return None if own is None or teacher is None else own - teacher
