"""Token ids that count as one class: the columns of a smaller vocabulary, and the way back for gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.errors import DrklError


@dataclass(frozen=True)
class MergedIds:
    """Some of ``vocab_size`` ids as one class, the event; the merged vocabulary has the others and it.

    The event stands at the smallest of the ids. The places of the others are taken by the last columns, and the rest
    stays where it is: nothing of the size of a vocabulary is copied in place.
    """

    ids: tuple[int, ...]
    """Ascending."""
    vocab_size: int

    @property
    def size(self) -> int:
        """The number of classes of the merged vocabulary."""
        return self.vocab_size - len(self.ids) + 1

    @property
    def event(self) -> int:
        """The class that stands for all of the ids."""
        return self.ids[0]

    @property
    def moves(self) -> list[tuple[int, int]]:
        """Which column goes to which: (from, to)."""
        sources = (column for column in range(self.size, self.vocab_size) if column not in self.ids)
        return [(next(sources), place) for place in self.ids[1:] if place < self.size]

    def labels(self, labels: Tensor | None) -> Tensor | None:
        """Ids `[n]` as classes of the merged vocabulary."""
        if labels is None:
            return None
        for token in self.ids[1:]:
            labels = labels.masked_fill(labels == token, self.event)
        for source, place in self.moves:
            labels = labels.masked_fill(labels == source, place)
        return labels

    def columns(self, classes: Tensor) -> Tensor:
        """Classes as the ids that they stand for, the event as the first of its own; what is below 0 stays."""
        moved = classes
        for source, place in self.moves:
            moved = moved.masked_fill(classes == place, source)
        return moved

    def merged(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities `[n, vocab]` as new ones `[n, size]`, differentiable."""
        columns = torch.arange(self.size, device=logits.device)
        for source, place in self.moves:
            columns[place] = source
        kept = logits.index_select(-1, columns)
        event = log_sum_exp(self._members(logits))
        return kept.index_copy(-1, columns.new_tensor([self.event]), event)

    def merge_(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same in place: the first ``size`` columns of finite ``logits``, and what they held at the ids."""
        members = self._members(logits)
        for source, place in self.moves:
            logits[:, place] = logits[:, source]
        logits[:, self.event] = torch.logsumexp(members, -1)
        return logits[:, : self.size], members

    def spread_(self, grad: Tensor, members: Tensor) -> None:
        """From the gradient on merged logits, in the first columns of ``grad``, to that on the logits themselves."""
        shares = torch.softmax(members, -1) * grad[:, self.event].unsqueeze(-1)
        for source, place in self.moves:
            grad[:, source] = grad[:, place]
        for number, token in enumerate(self.ids):
            grad[:, token] = shares[:, number]

    def _members(self, logits: Tensor) -> Tensor:
        return torch.stack([logits[:, token] for token in self.ids], -1)


def make_merged(ids: Sequence[int] | None, vocab_size: int) -> MergedIds | None:
    """Check the ids that a loss is to merge; None for none. Raises DrklError."""
    if ids is None:
        return None
    found = list(ids)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in found):
        raise DrklError(f"merged_ids is {found}; expected token ids, whole numbers.")
    if repeated := sorted({token for token in found if found.count(token) > 1}):
        raise DrklError(f"merged_ids has the id {repeated[0]} more than once; expected each once.")
    if len(found) < 2:
        raise DrklError(f"merged_ids is {found}; expected at least two ids, which count as one class.")
    if outside := [token for token in found if not 0 <= token < vocab_size]:
        raise DrklError(f"merged_ids has the id {outside[0]}; expected ids in [0, {vocab_size}), which are compared.")
    return MergedIds(tuple(sorted(found)), vocab_size)


def log_sum_exp(members: Tensor) -> Tensor:
    """`[n, 1]`; torch's own has no gradient where all of a row are -inf."""
    empty = (members == -math.inf).all(-1, keepdim=True)
    return torch.logsumexp(members.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, -math.inf)


def shares(members: Tensor) -> Tensor:
    """The softmax `[n, m]` of some logits; 0 where all of a row are -inf."""
    together = log_sum_exp(members)
    return (members - together.masked_fill(together == -math.inf, 0.0)).exp()


@functools.lru_cache
def ids_on(merged: MergedIds, device: torch.device) -> Tensor:
    """The ids `[m]` on a device, where they stay: it is waited for once."""
    return torch.tensor(merged.ids, device=device)


@functools.lru_cache
def swaps_on(merged: MergedIds, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Columns on a device, and those they change places with for all classes to stand in their order; None for none."""
    pairs = [pair for source, place in merged.moves for pair in ((source, place), (place, source))]
    return torch.tensor(pairs, device=device).unbind(1) if pairs else None  # type: ignore[return-value]


def swap_(columns: Tensor, merged: MergedIds) -> None:
    """Let the columns of `[..., vocab]` change places; twice is as before."""
    swaps = swaps_on(merged, columns.device)
    if swaps is not None:
        columns.index_copy_(-1, swaps[0], columns.index_select(-1, swaps[1]))
