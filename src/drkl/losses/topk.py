"""A teacher that is known on its k most probable tokens at each position, and on all others together.

Student and teacher are compared on k + 1 classes: the k tokens, and one class of all the rest. For an f-divergence that
is a lower bound of its value on the whole vocabulary, and 0 where the two agree (data processing); the student cannot
escape by moving mass outside of the k tokens, for that is the mass of the last class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.losses.merged import MergedIds, log_sum_exp
from drkl.objectives import Objective
from drkl.objectives.base import on_classes, why_not_on_classes
from drkl.objectives.closed_form import EXCLUDED, softmax_
from drkl.objectives.logspace import most_probable

SPARE = 8
"""Tokens that are looked at beyond the k, so that of tied ones those of lower ids are taken."""


@dataclass(frozen=True)
class TopK:
    """A teacher's k largest logits at some positions, and the log-sum-exp of all others.

    It stands where the teacher's logits or its hidden states stand in a loss. ``topk[rows]`` is that of some positions.

    Args:
        ids: `[..., k]`, int64, distinct at a position and in descending order of their logits, so that the first is the
            teacher's most probable token; -1 where fewer than k are known.
        logits: `[..., k]`, before the temperature. Log-probabilities are logits too.
        log_rest: `[..., m]`, the log of the sum of exp(logit / T) over all ids that are not listed, for each of m
            temperatures; from it and the logits follows the log of the partition function, and not the other way round:
            where little is left, 1 - sum p has no digits.
        vocab_size: the number of ids, from 0, that all this is over.
        temperatures: the m temperatures.
        label_logits: `[...]`, the logit of the observed token, for objectives whose target it is; it may not be among
            the k. None where it is not known.

    Raises:
        DrklError: shapes that do not fit together.
    """

    ids: Tensor
    logits: Tensor
    log_rest: Tensor
    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)
    label_logits: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.ids.shape[:-1]
        rest = (*shape, len(self.temperatures))
        labels = None if self.label_logits is None else self.label_logits.shape
        if self.ids.dim() < 1 or self.logits.shape != self.ids.shape or self.log_rest.shape != rest:
            raise DrklError(
                f"TopK has ids {list(self.ids.shape)}, logits {list(self.logits.shape)} and log_rest "
                f"{list(self.log_rest.shape)}; expected [..., k], the same, and [..., {len(self.temperatures)}], one "
                "for each temperature."
            )
        if labels is not None and labels != shape:
            raise DrklError(f"TopK has label_logits {list(labels)}; expected {list(shape)}, one for each position.")

    @classmethod
    def of_logits(
        cls, logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,), labels: Tensor | None = None
    ) -> TopK:
        """Keep of a teacher's logits the k largest, of equal ones those of the lower ids.

        Args:
            logits: `[n, vocab]`, before the temperature, fp32 or wider.
            k: at least 1 and at most the vocabulary.
            temperatures: those of the losses that will be asked for.
            labels: `[n]`, the observed tokens.

        Raises:
            DrklError: k is out of range.
        """
        vocab_size = logits.shape[-1]
        if not 1 <= k <= vocab_size:
            raise DrklError(f"k is {k}; expected a number from 1 to {vocab_size}, the teacher's vocabulary.")
        ids = most_probable(logits, k, spare=SPARE).ids
        others = logits.scatter(-1, ids, -math.inf)
        log_rest = torch.stack([log_sum_exp(others / t).squeeze(-1) for t in temperatures], -1)
        observed = None if labels is None else logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return cls(ids, logits.gather(-1, ids), log_rest, vocab_size, tuple(map(float, temperatures)), observed)

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """The positions of several, one after the other; all are of one k, vocabulary and list of temperatures."""
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        known = [part.label_logits for part in parts if part.label_logits is not None]
        labels = torch.cat(known) if len(known) == len(parts) else None
        return dataclasses.replace(parts[0], **joined, label_logits=labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> TopK:
        return self._each(lambda tensor: tensor[rows])

    @property
    def shape(self) -> torch.Size:
        """That of the positions."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.ids.device

    def to(self, device: torch.device | str) -> TopK:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def at(self, keep: Tensor | None) -> TopK:
        """The positions of these numbers, in one dimension; None takes all."""
        count = self.shape.numel()
        flat = self._each(lambda tensor: tensor.reshape(count, *tensor.shape[len(self.shape) :]))
        return flat if keep is None else flat[keep]

    def rest(self, temperature: float) -> Tensor:
        """``log_rest`` `[...]` of one temperature.

        Raises:
            DrklError: it is not among ``temperatures``.
        """
        if temperature not in self.temperatures:
            known = " and ".join(f"{t:g}" for t in self.temperatures)
            raise DrklError(
                f"The temperature is {temperature:g}, and the teacher's k most probable tokens are known with the rest "
                f"at {known} alone: what the other tokens add up to is another number at each temperature. Use one of "
                "those, or make a cache with this one."
            )
        return self.log_rest[..., self.temperatures.index(temperature)]

    def classes(self, temperature: float) -> Tensor:
        """The teacher's logits `[..., k + 1]` of the classes over a temperature; -inf for what is excluded or none."""
        known = (self.logits / temperature).masked_fill((self.ids < 0) | (self.logits <= EXCLUDED), -math.inf)
        rest = self.rest(temperature).to(known.dtype)
        return torch.cat([known, rest.masked_fill(rest <= EXCLUDED, -math.inf).unsqueeze(-1)], -1)

    def masses(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The teacher's mass in the k tokens `[...]`, and the share of its tail's that they hold; the tail is without
        the most probable token, and its share is 1 where there is none."""
        logp = torch.log_softmax(self.classes(temperature), -1)
        listed, tail = log_sum_exp(logp[..., 1:-1]), log_sum_exp(logp[..., 1:])
        empty = tail == -math.inf
        share = torch.where(empty, 0.0, listed - tail.masked_fill(empty, 0.0)).exp().squeeze(-1)
        return log_sum_exp(logp[..., :-1]).squeeze(-1).exp(), share

    def student_classes(self, logits: Tensor) -> Tensor:
        """Another model's logits `[n, k + 1]` of the same classes, differentiable; its own `[n, vocab]` are over the
        temperature."""
        places, unused = self.places
        known = logits.gather(-1, places).masked_fill(unused, -math.inf)
        return torch.cat([known, log_sum_exp(logits.scatter(-1, places, -math.inf))], -1)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the k tokens stand in a vocabulary, and which of them are none; those stand where the first one is."""
        unused = self.ids < 0
        return torch.where(unused, self.ids[..., :1], self.ids), unused

    def with_labels(self, labels: Tensor) -> tuple[TopK, Tensor]:
        """The classes with the observed tokens among them, and their numbers `[n]`.

        Where a label is not among the k tokens it becomes one more class, which is taken from the rest.

        Args:
            labels: `[n]`.

        Raises:
            DrklError: a label is not among them, and its logit is not known.
        """
        same = self.ids == labels.unsqueeze(-1)
        found = same.any(-1)
        # A GPU is not waited for: a class that is none changes nothing.
        if (self.label_logits is None or not labels.is_cuda) and bool(found.all()):
            return self, same.to(torch.uint8).argmax(-1)
        if self.label_logits is None:
            raise DrklError(
                "The objective's target is the label, which is not always among the teacher's k most probable tokens, "
                "and its logit is not known. Use target='teacher', or a teacher that knows the labels' logits."
            )
        logit = torch.where(found, EXCLUDED, self.label_logits)
        ids = torch.cat([self.ids, torch.where(found, -1, labels).unsqueeze(-1)], -1)
        scaled = torch.stack([logit / t for t in self.temperatures], -1).double()
        taken = (scaled - self.log_rest.double()).exp().clamp(max=1.0 - torch.finfo(torch.float32).eps)
        taken = taken.masked_fill(scaled == -math.inf, 0.0)  # also where nothing is left to take it from
        left = (self.log_rest.double() + torch.log1p(-taken)).to(self.log_rest.dtype)
        # A last other token is all of the rest: nothing is left but rounding.
        left = left.masked_fill(((ids >= 0).sum(-1) == self.vocab_size).unsqueeze(-1), -math.inf)
        log_rest = torch.where(found.unsqueeze(-1), self.log_rest, left)
        number = torch.where(found, same.to(torch.uint8).argmax(-1), ids.shape[-1] - 1)
        logits = torch.cat([self.logits, logit.to(self.logits.dtype).unsqueeze(-1)], -1)
        return dataclasses.replace(self, ids=ids, logits=logits, log_rest=log_rest), number

    def merged(self, merged: MergedIds | None, temperature: float) -> TopK:
        """The same over a vocabulary in which some ids count as one class, at one temperature.

        Of the ids that are one class, those among the k tokens are it; what the others have stays in the rest, at most
        the k-th probability each.
        """
        if merged is None:
            return self
        labels = merged.labels(self.ids)
        assert labels is not None
        event = labels == merged.event
        first = event & (event.cumsum(-1) == 1)
        members = (self.logits / temperature).masked_fill(~event, -math.inf)
        together = log_sum_exp(members) * temperature
        ids = torch.where(event & ~first, -1, labels)
        logits = torch.where(first, together.to(self.logits.dtype), self.logits)
        # The first stays the most probable one, as the target of an objective.
        order = torch.where(ids < 0, -math.inf, logits).sort(dim=-1, descending=True, stable=True).indices
        rest = self.rest(temperature).unsqueeze(-1)
        return dataclasses.replace(
            self, ids=ids.gather(-1, order), logits=logits.gather(-1, order), log_rest=rest,
            temperatures=(temperature,), vocab_size=merged.size,
        )  # fmt: skip

    def check(self, vocab_size: int) -> None:
        """Raise DrklError unless it is over as many ids, and has no others."""
        if self.vocab_size != vocab_size:
            raise DrklError(
                f"The teacher's k most probable tokens are of {self.vocab_size} ids, and the student is compared on "
                f"{vocab_size}. What all other tokens add up to cannot be cut afterwards: compare on "
                f"{self.vocab_size}, or make the cache with these two models."
            )
        if self.ids.is_meta or not self.ids.numel():
            return
        highest, first = torch.stack((self.ids.max(), self.ids[..., 0].min())).tolist()
        if highest >= vocab_size or first < 0:
            raise DrklError(f"TopK has ids up to {highest}; expected ids in [0, {vocab_size}), or -1 after the first.")

    def is_finite(self, temperature: float) -> bool:
        """Whether the teacher excludes no token, as far as this tells, and no number is infinite or none."""
        listed = torch.where(self.ids < 0, 0.0, self.logits)
        whole = (self.ids >= 0).sum(-1) == self.vocab_size
        rest = torch.where(whole, 0.0, self.rest(temperature))
        numbers = (listed, rest) if self.label_logits is None else (listed, rest, self.label_logits)
        return all(bool((n.isfinite() & (n > EXCLUDED)).all()) for n in numbers)

    def _each(self, change: Any) -> TopK:
        tensors = {name: change(getattr(self, name)) for name in _TENSORS}
        labels = None if self.label_logits is None else change(self.label_logits)
        return dataclasses.replace(self, **tensors, label_logits=labels)


_TENSORS = ("ids", "logits", "log_rest")


def objective_on_classes(objective: Objective) -> Objective:
    """The objective as it is called on the classes of a `TopK`, where its target is the first class or the label's.

    Raises:
        DrklError: it cannot be had from them.
    """
    if on_classes(objective) is None:
        raise DrklError(
            f"Objective {objective.name!r} cannot be had from a teacher's k most probable tokens and the rest as one "
            f"class: {why_not_on_classes(objective)} Use a live teacher, or a cache of hidden states."
        )
    if getattr(objective, "target", None) == "teacher" and hasattr(objective, "__dataclass_fields__"):
        return cast(Objective, dataclasses.replace(cast(Any, objective), target="label"))
    return objective


def class_labels(original: Objective, teacher: TopK, labels: Tensor | None) -> tuple[TopK, Tensor | None]:
    """The classes that an objective is called on, and the number of each position's label `[n]` among them.

    The teacher's most probable token is the first class; never the rest, whatever mass that has.
    """
    if getattr(original, "target", None) == "teacher":
        return teacher, torch.zeros(len(teacher), dtype=torch.long, device=teacher.device)
    if not original.needs_labels:
        return teacher, None
    assert labels is not None
    return teacher.with_labels(labels)


def class_values(
    objective: Objective, student_logp: Tensor, teacher: TopK, labels: Tensor | None, temperature: float
) -> Tensor:
    """Values `[n]` of an objective on the classes, differentiable: the definition.

    Args:
        objective: as it is called on a whole vocabulary.
        student_logp: `[n, vocab]`, at the temperature.
        teacher: of the same positions and vocabulary.
        labels: `[n]`.
        temperature: of the loss.
    """
    teacher, numbers = class_labels(objective, teacher, labels)
    ours = torch.log_softmax(teacher.student_classes(student_logp), -1)
    theirs = torch.log_softmax(teacher.classes(temperature).to(ours.dtype), -1)
    return objective_on_classes(objective)(ours, theirs, numbers)


def class_values_and_grads_(
    objective: Objective, student_logits: Tensor, teacher: TopK, labels: Tensor | None, temperature: float
) -> Tensor:
    """The same values, and their gradient in place of ``student_logits``, which are finite and over the temperature."""
    teacher, numbers = class_labels(objective, teacher, labels)
    places, unused = teacher.places
    known = student_logits.gather(-1, places).masked_fill_(unused, EXCLUDED)
    student_logits.scatter_(-1, places, EXCLUDED)
    classes = torch.cat([known, softmax_(student_logits)], -1)
    theirs = teacher.classes(temperature).to(classes.dtype).clamp_(min=EXCLUDED)
    values = objective_on_classes(objective).value_and_grad_(classes, theirs, numbers)
    # The rest's share goes to its tokens by their probability within it; at the k tokens that is 0.
    student_logits.mul_(classes[:, -1:])
    student_logits.scatter_add_(-1, places, classes[:, :-1].masked_fill(unused, 0.0))
    return values
