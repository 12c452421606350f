"""The only place that pads, packs, masks and shifts: past it ``labels[b, t]`` is what ``logits[b, t]`` predict.

A batch is laid out in one of two ways. Padded, it has a line for each row, ``[batch, time]``, with an
``attention_mask``. Packed, its rows lie one after the other in one line, ``[1, tokens]``, with ``position_ids`` that
begin again at 0 with each row, and no mask: no position of it is padding. Read line by line, the positions of a batch
come in the same order either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from drkl.data.classification import LabelledRow
from drkl.data.tokenize import Row
from drkl.losses.common import IGNORE_INDEX

TEACHER_ONLY = ("teacher_input_ids", "teacher_attention_mask", "teacher_position_ids", "teacher_keep")
"""What a batch has where the teacher reads another rendering of a prompt."""


def collate(
    rows: Sequence[Row | LabelledRow], *, pad_id: int, decoder_start: int | None = None, packed: bool = False
) -> dict[str, Any]:
    """Return a batch with aligned labels, padded on the right or packed.

    Args:
        rows: for a classifier `LabelledRow` (see `_collate_labelled`), else `Row` of this kind of model.
        pad_id: fills the batch; its value changes no result.
        decoder_start: None for a decoder-only model; for an encoder-decoder the first token that its decoder is fed
            (see `_collate_seq2seq`).
        packed: lay the rows one after the other, without padding; for a decoder-only model.

    Padded, ``input_ids``, ``attention_mask`` and ``labels`` are int64 ``[batch, time]``; ``time`` is the longest
    ``row.length``. There are no ``position_ids``: where padding is on the right, a model counts positions by itself,
    and not every family counts from 0. Packed, ``input_ids``, ``position_ids`` and ``labels`` are int64
    ``[1, tokens]``; ``tokens`` is the sum of ``row.length``. ``row_ids`` is a list of the rows' ids.

    The model is fed ``(prompt + response)[:-1]``, and the last prompt position predicts the first response token. The
    label is ``IGNORE_INDEX`` at every position that predicts no response token, or one that ``row.trained`` leaves out.
    This follows from the place of the response, never from token ids: eos is learnt even where it is the padding token.

    Without rows the batch is one ignored position: every process needs a forward pass in every micro-step.

    Where the teacher reads a prompt in another rendering (``row.teacher_prompt_ids``), the batch has its inputs too:
    `teacher_inputs` takes them out.

    >>> row = Row("a", (5, 6), (7, 2), example=None)
    >>> batch = collate([row], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 7]], [[-100, 7, 2]])
    >>> collate([row, row], pad_id=0, packed=True)["position_ids"].tolist()
    [[0, 1, 2, 0, 1, 2]]
    """
    assert not packed or decoder_start is None, "only rows of decoder-only models are packed"
    if rows and isinstance(rows[0], LabelledRow):
        assert not packed, "only rows of decoder-only models are packed"
        return _collate_labelled(cast("Sequence[LabelledRow]", rows), pad_id)
    return _collate_causal(cast("Sequence[Row]", rows), pad_id, decoder_start, packed)


def _collate_labelled(rows: Sequence[LabelledRow], pad_id: int) -> dict[str, Any]:
    """A batch for a classifier: ``input_ids`` and ``attention_mask`` ``[batch, time]``, ``labels`` ``[batch, 1]``.

    A text is one position, whose class is predicted by the class logits ``[batch, 1, classes]``.
    """
    input_ids, attention_mask = _pad_right([row.ids for row in rows], pad_id)
    labels = torch.tensor([[row.label] for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "row_ids": [row.id for row in rows],
    }


def _collate_causal(rows: Sequence[Row], pad_id: int, decoder_start: int | None, packed: bool) -> dict[str, Any]:
    assert all(row.encoder_decoder == (decoder_start is not None) for row in rows), "rows of the other kind of model"
    if decoder_start is not None:
        return _collate_seq2seq(rows, pad_id, decoder_start)
    inputs, labels = _next_tokens([(row.prompt_ids, row) for row in rows], pad_id, packed)
    batch = {**inputs, "labels": labels, "row_ids": [row.id for row in rows]}
    if any(row.teacher_prompt_ids is not None for row in rows):
        theirs = [(row.teacher_prompt_ids or row.prompt_ids, row) for row in rows]
        inputs, labels = _next_tokens(theirs, pad_id, packed)
        batch |= {f"teacher_{name}": value for name, value in inputs.items()}
        batch["teacher_keep"] = labels != IGNORE_INDEX
    return batch


def _next_tokens(
    rows: Sequence[tuple[Sequence[int], Row]], pad_id: int, packed: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs and labels of rows, each after one rendering of its prompt."""
    assert all(len(prompt) and row.response_ids for prompt, row in rows), "a row has a prompt and a response"
    fed = [(*prompt, *row.response_ids[:-1]) for prompt, row in rows] or [(pad_id,)]
    labels = [(*[IGNORE_INDEX] * (len(prompt) - 1), *_learnt(row)) for prompt, row in rows] or [(IGNORE_INDEX,)]
    if packed:
        return collate_packed(fed), torch.tensor([[label for row in labels for label in row]])
    input_ids, attention_mask = _pad_right(fed, pad_id)
    return {"input_ids": input_ids, "attention_mask": attention_mask}, _pad_right(labels, IGNORE_INDEX)[0]


def _learnt(row: Row) -> Sequence[int]:
    """The response, ignored where it is not trained on."""
    if row.trained is None:
        return row.response_ids
    return [token if trained else IGNORE_INDEX for token, trained in zip(row.response_ids, row.trained, strict=True)]


def collate_packed(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``position_ids``, int64 ``[1, tokens]``, of rows that lie one after the other.

    >>> {name: ids.tolist() for name, ids in collate_packed([[5], [6, 7]]).items()}
    {'input_ids': [[5, 6, 7]], 'position_ids': [[0, 0, 1]]}
    """
    assert rows and all(rows), "at least one row, none empty"
    ids = [token for row in rows for token in row]
    positions = [position for row in rows for position in range(len(row))]
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch of `collate` lie one after the other."""
    return "position_ids" in batch and "attention_mask" not in batch


def each_row(inputs: Mapping[str, Tensor], keep: Tensor) -> list[tuple[list[Tensor], Tensor]]:
    """Take a batch of `collate` apart, whichever way it is laid out.

    Args:
        inputs: what a model reads, as `collate` or `teacher_inputs` give it.
        keep: as large as the labels.

    Returns:
        For each row its ids, padding aside (of an encoder-decoder those of the prompt and those that its decoder is
        fed), and what ``keep`` says of it, from its first position.
    """
    if is_packed(inputs):
        ids, positions = inputs["input_ids"][0], inputs["position_ids"][0]
        starts = (positions == 0).nonzero()[1:, 0].cpu()
        return [([own], kept) for own, kept in zip(ids.tensor_split(starts), keep[0].tensor_split(starts), strict=True)]
    pairs = [("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")]
    sides = [(inputs[ids], inputs[mask] != 0) for ids, mask in pairs if ids in inputs]
    return [([ids[line][mask[line]] for ids, mask in sides], kept) for line, kept in enumerate(keep)]


def teacher_inputs(batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Take out of a batch what the teacher reads, and where the states are that predict the kept labels.

    Args:
        batch: of `collate`, ``labels`` included. Inputs that are the teacher's alone are removed from it.

    Returns:
        The teacher's inputs, and a mask of its positions, as large as its ``input_ids``, true as often and in the same
        order as ``labels != IGNORE_INDEX``: the same tokens are predicted, after each model's own rendering of the
        prompt.
    """
    own = {name: batch.pop(name) for name in TEACHER_ONLY if name in batch}
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_ids")}
    if not own:
        return inputs, batch["labels"] != IGNORE_INDEX
    keep = own.pop("teacher_keep")
    return inputs | {name.removeprefix("teacher_"): value for name, value in own.items()}, keep


def _collate_seq2seq(rows: Sequence[Row], pad_id: int, decoder_start: int) -> dict[str, Any]:
    """A batch for an encoder-decoder: the encoder reads the prompt, the decoder ``[start] + response[:-1]``.

    ``input_ids`` and ``attention_mask`` are ``[batch, prompt time]``, ``decoder_input_ids``,
    ``decoder_attention_mask`` and ``labels`` ``[batch, response time]``.
    """
    input_ids, attention_mask = _pad_right([row.prompt_ids for row in rows], pad_id)
    decoder_input_ids, decoder_mask = _pad_right([(decoder_start, *row.response_ids[:-1]) for row in rows], pad_id)
    labels, _ = _pad_right([row.response_ids for row in rows], IGNORE_INDEX)
    if not rows:
        attention_mask[0, 0] = decoder_mask[0, 0] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_input_ids,
        "decoder_attention_mask": decoder_mask,
        "labels": labels,
        "row_ids": [row.id for row in rows],
    }
    if any(row.teacher_prompt_ids is not None for row in rows):
        ids, mask = _pad_right([row.teacher_prompt_ids or row.prompt_ids for row in rows], pad_id)
        batch |= {"teacher_input_ids": ids, "teacher_attention_mask": mask, "teacher_keep": labels != IGNORE_INDEX}
    return batch


def _pad_right(sequences: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    shape = (max(1, len(sequences)), max((len(ids) for ids in sequences), default=1))
    ids, mask = torch.full(shape, fill), torch.zeros(shape, dtype=torch.int64)
    for index, sequence in enumerate(sequences):
        assert len(sequence), "a row has a prompt and a response"
        ids[index, : len(sequence)] = torch.tensor(list(sequence))
        mask[index, : len(sequence)] = 1
    return ids, mask


def collate_sources(prompts: Sequence[Sequence[int]], *, pad_id: int) -> dict[str, Tensor]:
    """Return right-padded ``input_ids`` and ``attention_mask``, int64 ``[batch, time]``, for an encoder.

    Padding on the left would shift the learnt positions of an encoder, which count from the left edge.

    >>> collate_sources([[5], [6, 7]], pad_id=0)["attention_mask"].tolist()
    [[1, 0], [1, 1]]
    """
    assert prompts and all(prompts), "at least one prompt, none empty"
    input_ids, attention_mask = _pad_right(prompts, pad_id)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def collate_prompts(prompts: Sequence[Sequence[int]], *, pad_id: int) -> dict[str, Tensor]:
    """Return left-padded ``input_ids``, ``attention_mask`` and ``position_ids``, int64 ``[batch, time]``.

    Positions start at 0 with the first real token of each prompt.

    >>> collate_prompts([[5], [6, 7]], pad_id=0)["position_ids"].tolist()
    [[0, 0], [0, 1]]
    """
    assert prompts and all(prompts), "at least one prompt, none empty"
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        input_ids[index, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[index, width - len(prompt) :] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
