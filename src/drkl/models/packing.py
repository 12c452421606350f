"""Whether the rows of a batch can be laid one after the other for a model, tried on a few tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.collate import collate_packed
from drkl.models.check import FAILURES, plain_ids, same_logits
from drkl.models.classes import is_classifier
from drkl.models.context import context_of
from drkl.models.forward import (
    hidden_states,
    in_eval_mode,
    is_encoder_decoder,
    lm_head,
    named_arguments,
    right_padded,
)
from drkl.models.memory import is_out_of_memory, told_of_trial

_LENGTHS = (40, 1, 2, 7)
"""Tokens of the rows that are tried: one that a window or a block of a small model does not hold, and the shortest."""
_LEAK = 1 / 16
"""What a row may change in another, of what it changes in itself: rounding, where experts are given all tokens."""


@torch.no_grad()
def packing_fault(model: PreTrainedModel, most: int, dtype: torch.dtype | None = None) -> str | None:
    """Say why packed rows would not be read as each is alone; None where they are, tried on a few short ones.

    Args:
        model: where it is trained or read, with the attention that it then has.
        most: the most tokens of a packed batch.
        dtype: computed in, where autocast makes it another than that of the weights.
    """
    if (fault := _kind(model)) is not None:
        return fault
    with told_of_trial(model):
        return _fault_in_trial(model, most, dtype)


def _fault_in_trial(model: PreTrainedModel, most: int, dtype: torch.dtype | None) -> str | None:
    own = dtype in (None, model.dtype)
    try:
        with nullcontext() if own else torch.autocast(model.device.type, dtype=dtype):
            _try_in_training(model)
            with in_eval_mode(model):
                return _tried(model, most, dtype or model.dtype)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return f"it fails on them ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _kind(model: PreTrainedModel) -> str | None:
    """What kind of model it is, where that kind cannot be packed."""
    if is_classifier(model):
        return "it is a classifier, which looks for the end of each line"
    if is_encoder_decoder(model):
        return "it is an encoder-decoder, which reads a prompt and writes a response in two lines"
    if getattr(model, "_is_stateful", False):
        return "it hands a state from each token to the next, also from one row to another"
    config: Any = model.config.get_text_config()
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        return "its attention counts distances from the beginning of the line (ALiBi), which loses digits in a long one"
    names, hands_on = named_arguments(type(model).forward)
    if "position_ids" not in names and not (hands_on and "input_ids" not in names):
        return "it takes no position_ids, by which rows are told apart"
    return None


_ALIBI = ("bloom", "mpt")


def _try_in_training(model: PreTrainedModel) -> None:
    """Fail where an attention does so in training alone, for want of dropout."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng():
            _packed_states(model.train(), [plain_ids(model, 1), plain_ids(model, 2)])
    finally:
        for module, training in modes:
            module.training = training


def _tried(model: PreTrainedModel, most: int, dtype: torch.dtype) -> str | None:
    context = context_of(model.config)
    lengths = [min(length, context or length) for length in _LENGTHS]
    ids = plain_ids(model, sum(lengths) + 1)
    rows = [row.tolist() for row in torch.tensor(ids[:-1]).split(lengths)]
    head = lm_head(model).gathered()
    states = _packed_states(model, rows)
    padded = hidden_states(model, right_padded(model, rows))
    for own, line in zip(states, padded, strict=True):
        if not same_logits(head.logits(own), head.logits(line[: len(own)]), dtype):
            return "it gives a row other logits there than alone"
    changed = _packed_states(model, [ids[-1 : -lengths[0] - 1 : -1], *rows[1:]])
    within, *across = (_difference(*pair) for pair in zip(states, changed, strict=True))
    if max(across) > _LEAK * within:
        return "what a row says changes what is predicted in another"
    if context is not None and sum(lengths) <= context < most:
        _packed_states(model, [*rows, plain_ids(model, context)])  # fails where it has a table of so many positions
    return None


def _packed_states(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    """The hidden states `[tokens, hidden]` of each of some packed rows."""
    batch = {name: value.to(model.device) for name, value in collate_packed(rows).items()}
    return list(hidden_states(model, batch)[0].split([len(row) for row in rows]))


def _difference(before: Tensor, after: Tensor) -> float:
    return float((after.float() - before.float()).abs().max())
