"""Run models over held-out rows: the only loop from rows through batches and hidden states to logits.

Every pass over held-out rows is made of the same steps::

    for batch in batches(rows, pad_id=0):              # rows of like length together, each position with its label
        hidden = batch.states(model)                   # [n, hidden] at the positions that count
        for part in chunks(len(hidden), CHUNK):        # no [tokens, vocab] tensor ever exists whole
            logits = logits_of(hidden[part], output_head(model))

`read` does it once and keeps the states, so that a second model can take the device before the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.batching import bucket_by_length
from drkl.data.classification import LabelledRow
from drkl.data.collate import IGNORE_INDEX, collate, teacher_inputs
from drkl.data.stored import column
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.losses.merged import MergedIds, make_merged
from drkl.models.check import check_forward
from drkl.models.classes import is_classifier
from drkl.models.forward import decoder_start as decoder_start_of
from drkl.models.forward import hidden_states, output_head
from drkl.models.memory import memory_told
from drkl.models.weights import check_numbers, is_finite, listed
from drkl.processes import ALONE, Share

TOKENS_PER_BATCH = 2048
"""Tokens of a batch at most, with padding; rows of like length go together. In bf16 another size moves digits."""
SHORT_TOKENS_PER_BATCH = 4096
"""The same for texts to classify, and for the few rows of a held-out loss during training."""
READING = "A smaller max_tokens (data.max_tokens) shortens rows, and bf16 in place of fp32 halves the model."
"""What needs less memory where a model reads rows."""
CHUNK = 256
"""Positions whose logits exist at once."""


@dataclass(frozen=True)
class Batch:
    """Some rows, padded or packed, and the positions of them that are read; everything on the CPU."""

    rows: list[int]
    """The places of these rows among all rows."""
    inputs: dict[str, Tensor]
    """The arguments of `drkl.models.forward.hidden_states`, `[batch, tokens]` each; packed `[1, tokens]`."""
    keep: Tensor
    """As large, true at the `n` positions that are read."""
    labels: Tensor
    """`[n]`, the observed tokens (or classes) there."""
    row_ids: list[str]
    teacher: tuple[dict[str, Tensor], Tensor] | None = None
    """``inputs`` and ``keep`` of the teacher, where it reads the prompts in a rendering of its own."""

    @property
    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it: the same labels, in the same order."""
        if self.teacher is None:
            return self
        inputs, keep = self.teacher
        return replace(self, inputs=inputs, keep=keep, teacher=None)

    def size(self) -> str:
        """Its numbers of rows and positions, for a message."""
        positions = max(value.numel() for value in self.inputs.values())
        return f"{len(self.row_ids)} rows, {positions:,} positions with padding"

    def states(self, model: PreTrainedModel) -> Tensor:
        """The model's last hidden states `[n, hidden]`, on its device; of a classifier its class logits."""
        device = next(model.parameters()).device
        hidden = hidden_states(model, {name: value.to(device) for name, value in self.inputs.items()})
        return hidden[self.keep.to(device)]


def batches(
    rows: Sequence[Row | LabelledRow],
    *,
    pad_id: int,
    decoder_start: int | None = None,
    positions: Mapping[int, Sequence[int]] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    rows_per_batch: int | None = None,
    packed: bool = False,
) -> Iterator[Batch]:
    """Yield the rows in batches, the shortest rows first.

    Args:
        rows: tokenised for the kind of model that reads them.
        pad_id: fills batches; its value changes nothing.
        decoder_start: of an encoder-decoder, `drkl.models.forward.decoder_start` of it; None for others.
        positions: by row, which of its trained positions are read, from 0; rows without an entry are left out.
            None reads every trained position of every row.
        tokens_per_batch: a batch has at most this many tokens with padding; a longer row is alone.
        rows_per_batch: a batch has this many rows, whatever their tokens; None counts tokens.
        packed: lay the rows of a batch one after the other; the batches have the same rows.
    """
    settings: dict[str, Any] = {"pad_id": pad_id, "decoder_start": decoder_start, "positions": positions}
    used = list(range(len(rows))) if positions is None else [row for row in positions if positions[row]]
    lengths = column(rows, "length") if positions is None else [rows[i].length for i in used]
    for group in batch_rows(lengths, tokens_per_batch, rows_per_batch):
        yield to_batch(rows, [used[i] for i in group], packed=packed, **settings)


def batch_rows(
    lengths: ArrayLike, tokens_per_batch: int = TOKENS_PER_BATCH, rows_per_batch: int | None = None
) -> list[list[int]]:
    """The rows of each batch, the shortest rows first; see `batches`."""
    groups = bucket_by_length(lengths, tokens_per_batch)
    if rows_per_batch is None:
        return groups
    order = [i for group in groups for i in group]
    return [order[part] for part in chunks(len(order), rows_per_batch)]


def to_batch(
    rows: Sequence[Row | LabelledRow],
    members: list[int],
    *,
    pad_id: int,
    decoder_start: int | None = None,
    positions: Mapping[int, Sequence[int]] | None = None,
    packed: bool = False,
) -> Batch:
    """One batch: the rows at the places ``members``; the other arguments are those of `batches`."""
    batch = collate([rows[i] for i in members], pad_id=pad_id, decoder_start=decoder_start, packed=packed)
    own_view = "teacher_keep" in batch
    inputs, places = teacher_inputs(batch)
    labels, row_ids = batch.pop("labels"), batch.pop("row_ids")
    keep = labels != IGNORE_INDEX
    if positions is not None:
        chosen = [(positions[row], rows[row].num_trained) for row in members]
        keep, places = _only(keep, chosen), _only(places, chosen)
    return Batch(members, batch, keep, labels[keep], row_ids, (inputs, places) if own_view else None)


def _only(keep: Tensor, chosen: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """The chosen ones among the kept positions of each row, counted from 0; with them how many are kept of it."""
    own = keep.flatten().nonzero().squeeze(1).split([count for _, count in chosen])
    kept = torch.zeros(keep.numel(), dtype=torch.bool)
    for places, (wanted, _) in zip(own, chosen, strict=True):
        kept[places[list(wanted)]] = True
    return kept.view(keep.shape)


@dataclass(frozen=True)
class Readout:
    """A model's states at the positions of held-out rows: enough for every logit, without the model's body.

    Attributes:
        hidden: `[n, hidden]`, the states that predict the labels; of a classifier its class logits `[n, classes]`.
        labels: `[n]`, the observed tokens or classes.
        row_index: `[n]`, which of the rows each position belongs to, from 0.
        head: makes logits of ``hidden``; None where ``hidden`` are the logits.
        merged: the ids that are one class of the logits; None where each is its own.
    """

    hidden: Tensor
    labels: Tensor
    row_index: Tensor
    head: LMHead | None
    merged: MergedIds | None = None
    positions: Tensor | None = None
    """`[n]`, ascending: the places of these positions among those of all rows; None where they are all."""

    @property
    def num_outputs(self) -> int:
        """The size of the vocabulary, or the number of classes."""
        if self.merged is not None:
            return self.merged.size
        return int(self.hidden.shape[-1]) if self.head is None else self.head.vocab_size

    def targets(self, at: slice | Tensor) -> Tensor:
        """The labels `[m]` at some positions, as classes of the logits."""
        merged = None if self.merged is None else self.merged.labels(self.labels[at])
        return self.labels[at] if merged is None else merged

    @torch.no_grad()
    def logits(self, at: slice | Tensor) -> Tensor:
        """The logits `[m, vocab]` at some positions, in fp32 or wider, on the head's device."""
        if self.head is None:
            return self.hidden[at]
        logits = self.head.logits(self.hidden[at].to(self.head.weight.device))
        return logits if self.merged is None else self.merged.merged(logits)

    def own(self, share: Share) -> Readout:
        """The positions that one of several processes compares: whole chunks, as one process would make them."""
        mine = in_own_chunks(len(self.labels), share)
        if mine is None:
            return self
        columns = [tensor[mine] for tensor in (self.hidden, self.labels, self.row_index)]
        return self._with(columns, mine.nonzero().squeeze(1))

    def at(self, wanted: Tensor, share: Share) -> Readout:
        """The positions ``wanted`` `[m]`, ascending, in every process; each process has some of all."""
        places = torch.arange(len(self.labels)) if self.positions is None else self.positions
        mine = torch.isin(places, wanted)
        own = [tensor[mine] for tensor in (places, self.hidden, self.labels, self.row_index)]
        parts = zip(*share.together(lambda: [own]), strict=True)
        found, *columns = (torch.cat(part) for part in parts)
        order = found.argsort()
        return self._with([column[order] for column in columns], found[order])

    def in_first(self, share: Share) -> Readout | None:
        """All positions, in the first process; each process has those of `own`. None in the others.

        They pass through every process, a block at a time.
        """
        if self.positions is None:
            return self
        count = sum(share.together(lambda: [len(self.labels)]))
        blocks = []
        for part in chunks(count, share.place.count * 16 * CHUNK):
            block = self.at(torch.arange(count)[part], share)
            if share.is_first:
                blocks.append(block)
        if not blocks:
            return None
        columns = [torch.cat(parts) for parts in zip(*((b.hidden, b.labels, b.row_index) for b in blocks), strict=True)]
        return replace(self._with(columns, torch.arange(count)), positions=None)

    def _with(self, columns: Sequence[Tensor], positions: Tensor) -> Readout:
        hidden, labels, row_index = columns
        return Readout(hidden, labels, row_index, self.head, self.merged, positions)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors by name, on the CPU, the head included: what safetensors saves."""
        tensors = {"hidden": self.hidden, "labels": self.labels, "row_index": self.row_index}
        if (head := self.head) is not None:
            tensors["head.weight"] = head.weight
            tensors["head.scale"] = torch.tensor(head.scale, dtype=torch.float64)
            if head.bias is not None:
                tensors["head.bias"] = head.bias
            if head.softcap is not None:
                tensors["head.softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], head: LMHead | None = None, merged_ids: Sequence[int] = ()
    ) -> Readout:
        """The readout that ``to_tensors`` gave; with a ``head``, the names that start with ``head.`` may be missing."""
        if head is None and "head.weight" in tensors:
            cap = tensors.get("head.softcap")
            head = LMHead(
                tensors["head.weight"],
                tensors.get("head.bias"),
                float(tensors["head.scale"]),
                None if cap is None else float(cap),
            )
        return cls(tensors["hidden"], tensors["labels"], tensors["row_index"], head, _merged(merged_ids, head))


def _merged(ids: Sequence[int], head: LMHead | None) -> MergedIds | None:
    return None if head is None else make_merged(ids or None, head.vocab_size)


@torch.no_grad()
def read(
    model: PreTrainedModel,
    rows: Sequence[Row | LabelledRow],
    *,
    pad_id: int,
    vocab_size: int | None = None,
    merged_ids: Sequence[int] = (),
    tokens_per_batch: int | None = None,
    share: Share = ALONE,
    whole: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Readout:
    """Run a model over the rows once and keep what it computed at every trained position, in the order of the rows.

    Args:
        model: on its device, in eval mode; a decoder-only model, an encoder-decoder or a classifier.
        rows: at least one, tokenised for this kind of model.
        pad_id: fills batches; its value changes nothing.
        vocab_size: keep the head of the first so many ids only, those that the compared models share.
        merged_ids: ids that count as one class, of which the logits have the summed probability.
        tokens_per_batch: see `batches`; default `TOKENS_PER_BATCH`, or `SHORT_TOKENS_PER_BATCH` for a classifier.
        share: of several processes, each of which runs the model over some of the batches.
        whole: return all positions in every process; otherwise those that this one compares, see `Readout.own`.
        progress: called after each batch with the number of rows in it.

    Raises:
        DrklError: weights or states of the model are not finite.
    """
    assert not model.training, "dropout would make every number a random one"
    name = f"The model {model.name_or_path or type(model).__name__!r}"
    check_numbers(model, name)
    if not is_classifier(model):
        check_forward(model)

    def states_of(batch: Batch) -> Tensor:
        with memory_told(f"as {name.lower()} reads {batch.size()}", READING):
            states = batch.states(model)
        if not is_finite(states):
            raise DrklError(
                f"{name} computes states that are not finite numbers, rows {listed(batch.row_ids)}: it overflows in "
                f"{str(states.dtype).removeprefix('torch.')}. Load it in fp32."
            )
        return states

    with _padded_with(model, pad_id):
        return readout_of(
            states_of,
            output_head(model),
            rows,
            pad_id=pad_id,
            decoder_start=decoder_start_of(model),
            vocab_size=vocab_size,
            merged_ids=merged_ids,
            tokens_per_batch=tokens_per_batch,
            share=share,
            whole=whole,
            progress=progress,
        )


def readout_of(
    states_of: Callable[[Batch], Tensor],
    head: LMHead | None,
    rows: Sequence[Row | LabelledRow],
    *,
    pad_id: int,
    decoder_start: int | None,
    vocab_size: int | None = None,
    merged_ids: Sequence[int] = (),
    tokens_per_batch: int | None = None,
    share: Share = ALONE,
    whole: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Readout:
    """The states at every trained position of rows, in their order, wherever they come from; see `read`.

    Args:
        states_of: gives the states `[n, hidden]` of a batch.
        head: makes logits of them; None where they are logits.
        rows: as in `read`, and so are those that follow.
        pad_id: see `read`.
        decoder_start: of an encoder-decoder; None for others.
        vocab_size: see `read`.
        merged_ids: see `read`.
        tokens_per_batch: see `read`.
        share: see `read`.
        whole: see `read`.
        progress: see `read`.
    """
    assert rows, "at least one held-out row"
    ends = np.cumsum([row.num_trained for row in rows])
    wanted = None if whole else in_own_chunks(int(ends[-1]), share)
    hidden: list[Tensor] = [torch.empty(0)] * len(rows)
    labels: list[Tensor] = [torch.empty(0)] * len(rows)

    def of_batch(members: list[int]) -> tuple[list[int], Tensor, Tensor]:
        batch = to_batch(rows, members, pad_id=pad_id, decoder_start=decoder_start)
        # To the CPU: the states wait there while other models take the device.
        return members, states_of(batch).cpu(), batch.labels

    size = tokens_per_batch or (SHORT_TOKENS_PER_BATCH if head is None else TOKENS_PER_BATCH)
    for members, states, observed in share.map(of_batch, batch_rows([row.length for row in rows], size)):
        counts = [rows[row].num_trained for row in members]
        for row, own, of_row in zip(members, states.split(counts), observed.split(counts), strict=True):
            some = slice(None) if wanted is None else wanted[ends[row] - len(own) : ends[row]]
            hidden[row], labels[row] = own[some], of_row[some]
        if progress is not None:
            progress(len(members))
    row_index = torch.repeat_interleave(torch.tensor([len(own) for own in labels]))
    states_of_all = torch.cat(hidden)
    if head is None:
        states_of_all = states_of_all.float()
    elif vocab_size is not None:
        head = head.trimmed(vocab_size)
    positions = None if wanted is None else wanted.nonzero().squeeze(1)
    return Readout(states_of_all, torch.cat(labels), row_index, head, _merged(merged_ids, head), positions)


def in_own_chunks(count: int, share: Share) -> Tensor | None:
    """`[count]` bool, the positions that one of several processes compares; None where it compares all.

    They are whole chunks of `CHUNK`, so that each logit comes of the same product as in one process.
    """
    if not share.is_divided:
        return None
    return torch.arange(count) // CHUNK % share.place.count == share.place.number


@torch.no_grad()
def read_logits(
    student: Readout, teacher: Readout | None, chunk: int = CHUNK
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
    """Yield the positions, both models' logits there `[m, vocab]`, and the labels `[m]`, on the student's device.

    The teacher's logits are None without a teacher, and the student's own tensor where both readouts are one object.
    """
    assert teacher is None or torch.equal(student.labels, teacher.labels), "both models read the same rows"
    for part in chunks(len(student.labels), chunk):
        logits = student.logits(part)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = logits if teacher is student else teacher.logits(part).to(logits.device)
        yield part, logits, teacher_logits, student.targets(part).to(logits.device)


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices of ``size`` that cover ``count`` positions."""
    return (slice(start, start + size) for start in range(0, count, size))


def logits_of(hidden: Tensor, head: LMHead | None, vocab_size: int | None = None) -> Tensor:
    """The logits `[n, ids]` of states `[n, hidden]`; states without a head are logits already."""
    if head is None:
        return hidden
    return (head if vocab_size is None else head.trimmed(vocab_size)).logits(hidden)


@contextmanager
def _padded_with(model: PreTrainedModel, pad_id: int) -> Iterator[None]:
    """Inside, a classifier that looks for the last token of a text knows what the padding is."""
    if not is_classifier(model):
        yield
        return
    config = model.config.get_text_config()
    before = getattr(config, "pad_token_id", None)  # some families' config has no such field
    config.pad_token_id = pad_id
    try:
        yield
    finally:
        config.pad_token_id = before
