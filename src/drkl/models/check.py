"""Whether a language model can be read as it is here, tried on a few tokens before it is trained or measured."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.at_head import head_of
from drkl.models.context import contexts_of
from drkl.models.forward import (
    accepted_inputs,
    decoder_start,
    hidden_states,
    in_eval_mode,
    lm_head,
    output_module,
    right_padded,
)
from drkl.models.memory import told_of_trial

FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, NotImplementedError
)  # fmt: skip
"""What a model that is called in a way it does not know raises."""

_LONG = 72
"""Tokens of the longest row: more than the blocks in which some families read (Reformer's have 64)."""

_MOST_ROUNDING = 0.25
"""Share of the largest logit above which no difference is called rounding."""

_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that `check_forward` has found right."""


def check_forward(model: PreTrainedModel) -> None:
    """Raise DrklError unless a language model can be read as it is here, tried on a few tokens, once for a model.

    Its logits have to be those of `lm_head` and `hidden_states`, the same in a padded batch as alone, and may not
    depend on later tokens. A family that computes them in another way would be distilled on other numbers than it
    generates with.
    """
    if model in _CHECKED:
        return
    try:
        with in_eval_mode(model), torch.no_grad(), told_of_trial(model):
            _check_forward(model)
    except DrklError:
        raise
    except FAILURES as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DrklError(
            f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} cannot be run on token ids alone, as "
            f"a language model is. Load it in another dtype, or use a model of another family. ({reason})"
        ) from error
    _CHECKED.add(model)


def check_student(model: PreTrainedModel) -> None:
    """Raise DrklError unless a language model can be trained here: `check_forward`, and what training adds.

    Its head has to be one whose weight the loss can read, and its loss may not depend on which rows share a batch.
    """
    check_forward(model)
    head_of(model, "student")
    if hasattr(model.config, "moe_eval_capacity_token_fraction"):
        raise DrklError(
            f"{type(model).__name__} drops tokens in training where a batch has more for an expert than its capacity, "
            "so its loss would depend on which rows share a batch. Use a student of another family."
        )
    _check_training(model)


def _check_training(model: PreTrainedModel) -> None:
    """Raise DrklError for a family that reads rows of some lengths only in training, as Reformer does."""
    read, written = (min(7, context or 7) for context in contexts_of(model.config))
    source = None if decoder_start(model) is None else [plain_ids(model, read)]
    batch = right_padded(model, [plain_ids(model, written)], source)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(), told_of_trial(model):
            hidden_states(model.train(), batch)
    except DrklError:
        raise
    except FAILURES as error:
        raise DrklError(
            f"{type(model).__name__} can be read but not trained on rows of any length. Use a student of another "
            f"family. ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _check_forward(model: PreTrainedModel) -> None:
    start = decoder_start(model)
    read, written = (min(_LONG, context or _LONG) for context in contexts_of(model.config))
    ids = plain_ids(model, _LONG)
    rows = [ids[: min(6, written)], ids[: min(3, written)]]
    sources: list[Any] = [None, None] if start is None else [ids[-min(3, read) :], ids[-min(6, read) :]]
    own = [own_logits(model, row, source) for row, source in zip(rows, sources, strict=True)]
    hidden = hidden_states(model, right_padded(model, rows, None if start is None else sources))
    ours = lm_head(model).gathered().logits(hidden)
    for i, row in enumerate(rows):
        if not same_logits(ours[i, : len(row)], own[i], model.dtype):
            raise DrklError(_fault(model, row, sources[i], own[i]))
    longer = own_logits(model, ids[:written], sources[0])
    if same_logits(longer[: len(own[0])], own[0], model.dtype):
        return
    if not same_logits(own_logits(model, ids[:written], sources[0]), longer, model.dtype):
        raise DrklError(
            f"{type(model).__name__} gives other logits each time it reads the same tokens, even in eval mode. Use a "
            "model of another family."
        )
    raise DrklError(
        f"What {type(model).__name__} predicts at a position changes with the tokens after it, so it cannot be trained "
        "to write one token after the other. Use a decoder-only language model; a BERT that was trained as one has "
        "`is_decoder: true` in its config.json."
    )


def _fault(model: PreTrainedModel, row: list[int], source: list[int] | None, own: Tensor) -> str:
    """What is wrong with a row's logits in a batch, which differ from its own."""
    name = type(model).__name__
    alone = hidden_states(model, right_padded(model, [row], None if source is None else [source]))
    if not same_logits(lm_head(model).gathered().logits(alone)[0], own, model.dtype):
        return (
            f"{name} does not compute its logits as softcap(scale * (hidden @ weight.T + bias)), so its head cannot be "
            "used chunk by chunk. Use a model of another family."
        )
    return (
        f"{name} gives a row other logits in a padded batch than alone: they depend on the padding or on the other "
        "rows, and so would its loss. Use a model of another family."
    )


def plain_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Ids of ordinary tokens, from the middle of the vocabulary: none that the config gives a meaning."""
    special = special_ids(model)
    modules: tuple[Any, ...] = (model.get_input_embeddings(), output_module(model))
    size = min(module.weight.shape[0] for module in modules)
    plain = [i for i in ((size // 2 + j) % size for j in range(size)) if i not in special][:count]
    return [plain[i % len(plain)] for i in range(count)]


def special_ids(model: PreTrainedModel) -> set[Any]:
    """The ids that a model's config gives a meaning, such as padding or an image."""
    special: set[Any] = set()
    for config in (model.config, model.config.get_text_config()):
        values = [value for key, value in config.to_dict().items() if key.endswith(("_token_id", "_token_index"))]
        special.update(*(value if isinstance(value, list) else [value] for value in values))
    return special


def own_logits(model: PreTrainedModel, ids: Sequence[int], source: Sequence[int] | None = None) -> Tensor:
    """The logits `[tokens, vocab]` that a model itself gives for one row, unpadded and read at once.

    Args:
        model: a language model.
        ids: what it reads; of an encoder-decoder what its decoder does.
        source: what the encoder reads.
    """
    batch = right_padded(model, [ids], None if source is None else [source])
    logits: Tensor = model(**accepted_inputs(model, batch)).logits
    return logits[0]


def rounding_of(model: PreTrainedModel, rows: Sequence[Sequence[int]], source: Sequence[int] | None = None) -> float:
    """The most that a model's rounding changes a logit, by reading rows alone and in a batch padded on the right.

    `check_forward` has found the two alike at most positions, so what is left of a difference is rounding. 0 for fp32
    and fp64. In bf16 a pruned Llama changed by up to 3.3, of logits up to 27.

    Args:
        model: a language model that `check_forward` lets pass.
        rows: tokens of more than one length.
        source: what an encoder reads.
    """
    if model.dtype in (torch.float32, torch.float64):
        return 0.0
    batch = right_padded(model, rows, None if source is None else [source] * len(rows))
    together = model(**accepted_inputs(model, batch)).logits.float()
    apart = [own_logits(model, row, source).float() for row in rows]
    errors = [
        float((logits[: len(row)] - own).abs().max()) for logits, own, row in zip(together, apart, rows, strict=True)
    ]
    largest = max(float(own.abs().max()) for own in apart)
    return min(max(errors), _MOST_ROUNDING * largest)


def same_logits(
    ours: Tensor, theirs: Tensor, dtype: torch.dtype, *, strict: bool = False, rounding: float = 0.0
) -> bool:
    """Whether logits differ by rounding only; True where theirs are not numbers, which is another fault.

    Args:
        ours: `[tokens, vocab]`.
        theirs: what they should be, computed in another order.
        dtype: that of the model.
        strict: at every position. Else at most of them: a wrong mask or state changes most, but rounding that a sharp
            attention or a router amplifies a few.
        rounding: a difference of so much is rounding in any case, as `rounding_of` measures it.
    """
    ours, theirs = ours.float(), theirs.float()
    if not torch.isfinite(theirs).all():
        return True
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return False
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    errors = (ours - theirs).abs().amax(-1)
    error = float(errors.max() if strict else errors.median())
    return error <= max(tolerance * max(float(theirs.abs().max()), 1.0), rounding)
