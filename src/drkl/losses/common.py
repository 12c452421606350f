"""Code that the dense and the fused loss share: checks, the positions that count, the reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.losses.merged import MergedIds
from drkl.losses.topk import TopK, objective_on_classes
from drkl.objectives import Objective, ObjectiveLike, make_objective

IGNORE_INDEX = -100
"""The label of a position that does not count."""
Reduction = Literal["mean", "sum", "none"]


class LogitChunk(NamedTuple):
    """The logits of some positions that count, as a loss reads them; neither to be changed nor to be kept."""

    student: Tensor
    """`[m, vocab]`, before the temperature, detached; in the dtype of the products or wider. With ``merged_ids`` of the
    merged vocabulary, as are the teacher's and the labels."""
    teacher: Tensor | TopK | None
    """`[m, vocab]`, likewise, or what is known of them; None where no teacher is given. A loss without a teacher makes
    them for the observer."""
    labels: Tensor | None
    """`[m]`, or None where none are given."""
    start: int
    """The number of counted positions before these, or before the chunk that ``rows`` are of."""
    rows: slice | Tensor | None = None
    """Which positions of a chunk these are, where its observer has said by ``chosen`` that it looks at these alone."""


Observer = Callable[[LogitChunk], None]
"""Called once with every position that counts, in order and in chunks.

One that looks at some positions alone may have a method ``chosen``: of the number of positions before a chunk, the
number of its own, and the device, it returns which those are, a slice or indices. On a device with a kernel it is given
these, and the logits of the others are not made.
"""


@dataclass(frozen=True)
class LossSettings:
    """Everything about a loss that is not a tensor."""

    objective: Objective
    temperature: float
    kd_weight: float
    t2_scaling: bool
    reduction: str
    merged: MergedIds | None = None

    @property
    def kd_factor(self) -> float:
        return self.kd_weight * (self.temperature**2 if self.t2_scaling else 1.0)

    @property
    def uses_objective(self) -> bool:
        return self.kd_weight > 0

    @property
    def uses_cross_entropy(self) -> bool:
        return self.kd_weight < 1

    @property
    def uses_teacher(self) -> bool:
        return self.uses_objective and self.objective.needs_teacher

    @property
    def uses_labels(self) -> bool:
        return self.uses_cross_entropy or self.objective.needs_labels


def make_settings(
    objective: ObjectiveLike, temperature: float, kd_weight: float, t2_scaling: bool, reduction: str
) -> LossSettings:
    """Check the numbers and names; raises DrklError."""
    if not (temperature > 0 and temperature < float("inf")):
        raise DrklError(f"temperature is {temperature}; expected a finite number above 0.")
    if not 0 <= kd_weight <= 1:
        raise DrklError(f"kd_weight is {kd_weight}; expected a number in [0, 1].")
    if reduction not in ("mean", "sum", "none"):
        raise DrklError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'.")
    return LossSettings(make_objective(objective), temperature, kd_weight, t2_scaling, reduction)


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise DrklError unless both models score the same number of tokens."""
    if student != teacher:
        raise DrklError(
            f"The teacher scores {teacher} tokens and the student {student}. Every objective compares the two over "
            "one vocabulary. If the tokenizers agree up to padding, vocab_size (at most "
            f"{min(student, teacher)}, the ids they share) cuts both before the softmax; if they differ, the two "
            "cannot be compared."
        )


def shared_vocabulary(student: int, teacher: int | None, vocab_size: int | None) -> int:
    """The number of token ids, from 0, on which the models are compared; raises DrklError where that is not clear.

    ``teacher`` is None for a loss without a teacher.
    """
    if vocab_size is None:
        if teacher is not None:
            check_vocabularies(student, teacher)
        return student
    smallest = student if teacher is None else min(student, teacher)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= smallest:
        raise DrklError(
            f"vocab_size is {vocab_size!r}; expected a whole number in [1, {smallest}], what both models have."
        )
    return vocab_size


def check_topk(teacher: TopK, settings: LossSettings, shape: torch.Size, vocab_size: int) -> None:
    """Raise DrklError unless an objective can be had from what is known of a teacher, at these positions."""
    if teacher.shape != shape:
        raise DrklError(
            f"The teacher's TopK is of positions {list(teacher.shape)} and the student's are {list(shape)}; expected "
            "the same positions."
        )
    teacher.check(vocab_size)
    if settings.uses_teacher:
        objective_on_classes(settings.objective)
        teacher.rest(settings.temperature)


def valid_positions(
    shape: torch.Size,
    labels: Tensor | None,
    token_mask: Tensor | None,
    token_weights: Tensor | None,
    settings: LossSettings,
    vocab_size: int,
) -> Tensor | None:
    """Check shapes and labels; return the numbers of the positions that count, flat and ascending, or None for all.

    A position counts iff its label is not -100 and its mask is true. A device is waited for once.
    """
    for name, tensor in (("labels", labels), ("token_mask", token_mask), ("token_weights", token_weights)):
        if tensor is not None and tensor.shape != shape:
            raise DrklError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}, one per position.")
    if labels is None and settings.uses_labels:
        why = "kd_weight < 1 adds a cross-entropy" if settings.uses_cross_entropy else "its target is the label"
        raise DrklError(f"Objective {settings.objective.name!r} needs labels here ({why}), but labels is None.")
    keep = None if labels is None else (labels != IGNORE_INDEX).reshape(-1)
    if token_mask is not None:
        mask = token_mask.reshape(-1).bool()
        keep = mask if keep is None else keep & mask
    if keep is None or keep.is_meta or not keep.numel():
        return None
    facts = [keep.sum()]
    if labels is not None:
        facts += torch.where(keep, labels.reshape(-1), 0).long().aminmax()
    count, *ends = torch.stack(facts).tolist()
    if labels is not None and (ends[0] < 0 or ends[1] >= vocab_size):
        kept = labels.reshape(-1)[keep]
        raise DrklError(
            f"labels run from {int(kept.min())} to {int(kept.max())}; expected ids in [0, {vocab_size}) or "
            f"{IGNORE_INDEX} for positions that do not count."
        )
    if count == keep.numel():
        return None
    return keep.logical_not().byte().argsort(stable=True)[:count]  # nonzero would wait for the device once more


def select(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Flatten `[..., k]` to `[positions, k]`, the valid positions only."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if keep is None else flat[keep]


def select_flat(tensor: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """Flatten `[...]` to `[positions]`, the valid positions only."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    return flat if keep is None else flat[keep]


def select_labels(labels: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """The same for labels, as int64."""
    return None if labels is None else select_flat(labels.long(), keep)


def select_weights(weights: Tensor | None, keep: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """The same for weights, detached, in the dtype of the values."""
    return None if weights is None else select_flat(weights.detach().to(wide), keep)


def denominator(num_tokens: int | float | Tensor | None, count: int) -> float | Tensor:
    """The divisor of the sum: ``num_tokens``, or the number of positions of this call (1 where there are none)."""
    if num_tokens is None:
        return float(max(count, 1))
    if isinstance(num_tokens, Tensor):
        return torch.where(num_tokens > 0, num_tokens, 1)
    if num_tokens < 0:
        raise DrklError(f"num_tokens is {num_tokens}; expected the number of valid tokens of the optimiser step.")
    return float(num_tokens) or 1.0


def spread(values: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    """Put per-position values back into the shape of the labels, with 0 at the positions that do not count."""
    if keep is None:
        return values.reshape(shape)
    return values.new_zeros(shape.numel()).index_copy(0, keep, values).reshape(shape)


def log_softmax(logits: Tensor, temperature: float, merged: MergedIds | None = None) -> Tensor:
    """fp32 (or wider) log-probabilities of ``logits / temperature``, of the classes that are left after merging."""
    wide = logits.to(torch.promote_types(torch.float32, logits.dtype))
    logp = torch.log_softmax(wide if temperature == 1.0 else wide / temperature, -1)
    return logp if merged is None else merged.merged(logp)


def observed_chunk(
    student: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, start: int, merged: MergedIds | None
) -> LogitChunk:
    """What an observer is shown of logits over the whole vocabulary; ``labels`` are of the merged one already."""
    if merged is not None:
        student = merged.merged(student)
        teacher = teacher.merged(merged, 1.0) if isinstance(teacher, TopK) else teacher
        teacher = merged.merged(teacher) if isinstance(teacher, Tensor) else teacher
    return LogitChunk(student, teacher, labels, start)
