"""From prompts to new tokens, by the fastest way that gives a model's own logits.

The logits of a token are those of the whole sequence so far, read at once and without padding. A cache, padding on the
left, and one reading of a prompt for several answers are ways to have them sooner, and whether they leave them as they
are differs from family to family: states of a state-space model, windows, positions that are counted from the edge.
So each way is tried on a few tokens before it is used, once for a model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from drkl.data.collate import collate_prompts, collate_sources
from drkl.models.check import FAILURES, check_forward, own_logits, plain_ids, same_logits
from drkl.models.context import contexts_of
from drkl.models.forward import (
    accepted_inputs,
    decoder_start,
    hidden_states,
    in_eval_mode,
    is_encoder_decoder,
    lm_head,
    right_padded,
)


@dataclass(frozen=True)
class Way:
    """How new tokens are made."""

    cache: bool = True
    """Each step reads the newest token only. False reads the whole sequence again for each."""
    pad: bool = True
    """A batch has prompts of several lengths."""
    share: bool = True
    """A prompt is read once for all its samples."""


WAYS = (Way(), Way(share=False), Way(pad=False), Way(pad=False, share=False))
"""The fastest first."""
WITHOUT_CACHE = Way(cache=False, share=False)
"""Right for every model that `check_forward` lets pass."""

_log = logging.getLogger("drkl")

_TOKENS = 3
"""New tokens of a trial: the first comes from the prompt, the second from a state that one step has moved."""
_LENGTHS = (2, 9)
"""Tokens of a trial's prompts; one with a single token is tried where there is one, as some families read it as a
step that goes on."""

_WITHOUT_BLOCKS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Layers of a cache that hold tokens, or one state, and no blocks of tokens."""

_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[int, Way]] = weakref.WeakKeyDictionary()


def way_of(model: PreTrainedModel, shortest: int, max_new_tokens: int) -> Way:
    """The fastest way that gives a model's own logits.

    Args:
        model: on its device.
        shortest: tokens of the shortest prompt that is to come.
        max_new_tokens: of the answers.

    Raises:
        DrklError: a model that `check_forward` refuses.
    """
    chosen = _CHOSEN.setdefault(model, {})
    shortest = min(shortest, _LENGTHS[0])
    if shortest not in chosen:
        check_forward(model)
        with plain_decoding(model):
            chosen[shortest] = _first_right(model, shortest)
        if not chosen[shortest].cache:
            _log.warning(
                f"{type(model).__name__} gives other logits with transformers' cache than without. It answers without: "
                "the whole sequence is read again for each new token, which is slow."
            )
    capacity = getattr(model.config, "expert_capacity", None)
    if capacity is not None and max_new_tokens >= capacity:
        # Experts drop tokens over their capacity when they read a whole sequence, and none when they read one token.
        return WITHOUT_CACHE
    return chosen[shortest]


def _first_right(model: PreTrainedModel, shortest: int) -> Way:
    room = min((context - _TOKENS for context in contexts_of(model.config) if context is not None), default=_LENGTHS[1])
    if room < 1:
        return WAYS[0]
    short, long = (plain_ids(model, min(length, room)) for length in (shortest, _LENGTHS[1]))
    for way in WAYS:
        # Short after long, in batches of one size: a model that keeps its state in itself may go on where it was.
        batches = [[short, long], [short, short]] if way.pad else [[long], [short]]
        try:
            if (_may_shift(model) or not way.pad) and _is_right(model, batches, way):
                return way
        except torch.OutOfMemoryError:
            raise
        except FAILURES:
            continue
    return WITHOUT_CACHE


def _is_right(model: PreTrainedModel, batches: list[list[list[int]]], way: Way) -> bool:
    """Whether the logits of each step are those of the whole sequence."""
    start, answers = decoder_start(model), []
    for prompts in batches:
        scores = _Scores()
        new = decode(model, prompts, 2, way, stops=[], max_new_tokens=_TOKENS, processors=[scores], pad_id=0).tolist()
        answers += [(prompts[row // 2], tokens, torch.stack(scores.seen, 1)[row]) for row, tokens in enumerate(new)]
    known: dict[tuple[int, ...], Tensor] = {}
    for prompt, tokens, logits in answers:
        source, fed = (None, prompt) if start is None else (prompt, [start])
        key = (*prompt, *tokens[:-1])
        if key not in known:
            known[key] = own_logits(model, [*fed, *tokens[:-1]], source)[-_TOKENS:]
        if not same_logits(logits.to(known[key].device), known[key], model.dtype, strict=True):
            return False
    return True


def _may_shift(model: Any) -> bool:
    """Whether padding on the left moves no border of a block: caches of compressed or indexed blocks count from it."""
    if is_encoder_decoder(model) or not model._supports_default_dynamic_cache():
        return True
    return all(type(layer).__name__ in _WITHOUT_BLOCKS for layer in _new_cache(model).layers)


class _Scores(LogitsProcessor):
    """Remembers the logits of each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        return scores


def decode(
    model: Any,  # transformers types a PreTrainedModel without the generation mixin
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    way: Way,
    *,
    stops: list[int],
    max_new_tokens: int,
    processors: list[LogitsProcessor],
    pad_id: int,
    begin: Sequence[int] = (),
) -> Tensor:
    """Return the most probable new tokens `[prompts * num_samples, steps]`, the samples of a prompt in a row.

    Args:
        model: in `plain_decoding`.
        prompts: token ids; of one length, unless the way pads.
        num_samples: at least 1.
        way: how.
        stops: the ids that end a row; decoding ends when each row has one.
        max_new_tokens: at least 1.
        processors: change the logits `[prompts * num_samples, vocab]` of each step.
        pad_id: fills batches.
        begin: the tokens that an encoder-decoder's answers begin with; they are not returned.
    """
    start = decoder_start(model)
    first = None if start is None else [start, *begin]
    if not way.cache:
        rows = [list(prompt) for prompt in prompts for _ in range(num_samples)]
        return _read_again(model, rows, first, stops, max_new_tokens, processors, pad_id)
    encoder_decoder = is_encoder_decoder(model)
    batch = (collate_sources if encoder_decoder else collate_prompts)(prompts, pad_id=pad_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    inputs: dict[str, Any] = {
        name: batch[name].repeat_interleave(num_samples, 0) for name in ("input_ids", "attention_mask")
    }
    if way.share and encoder_decoder:
        del inputs["input_ids"]
        inputs |= _shared_encoding(model, batch, num_samples)
    elif way.share:
        inputs |= _shared_prefix(model, batch, num_samples)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        decoder_start_token_id=start,
    )
    if first is not None:
        inputs["decoder_input_ids"] = torch.tensor([first], device=model.device).repeat(len(prompts) * num_samples, 1)
    out = model.generate(**inputs, generation_config=config, logits_processor=processors)
    new: Tensor = out[:, batch["input_ids"].shape[1] if first is None else len(first) :]
    return new


def _shared_encoding(model: Any, batch: dict[str, Tensor], num_samples: int) -> dict[str, Any]:
    """Encode each prompt once for all its samples."""
    states = model.get_encoder()(**batch).last_hidden_state
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=states.repeat_interleave(num_samples, 0)),
        # The one that generate would make is as deep as the encoder, which breaks under a deeper decoder.
        "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }


def _shared_prefix(model: Any, batch: dict[str, Tensor], num_samples: int) -> dict[str, Any]:
    """Read each prompt once for all its samples, except for its last token, whose logits the decoding loop takes.

    Empty where that saves nothing.
    """
    if num_samples == 1 or batch["input_ids"].shape[1] == 1:
        return {}
    cache = _new_cache(model)
    # Families with ALiBi take no positions; they count from the attention mask.
    before_last = accepted_inputs(model.base_model, {name: tensor[:, :-1] for name, tensor in batch.items()})
    model.base_model(**before_last | {"past_key_values": cache, "use_cache": True})
    # Layers of every kind can be reordered, as beams are; not all can be repeated by a method of their own.
    rows: Any = torch.arange(len(batch["input_ids"]), device=model.device).repeat_interleave(num_samples)
    cache.reorder_cache(rows)
    return {"past_key_values": cache}


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _read_again(
    model: PreTrainedModel,
    prompts: list[list[int]],
    first: list[int] | None,
    stops: list[int],
    max_new_tokens: int,
    processors: list[LogitsProcessor],
    pad_id: int,
) -> Tensor:
    """Read the whole of each sequence again for each new token; ``first`` is what a decoder is fed at first."""
    head = lm_head(model)
    rows = prompts if first is None else [list(first) for _ in prompts]
    ended = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    new: list[Tensor] = []
    while len(new) < max_new_tokens and not bool(ended.all()):
        batch = right_padded(model, rows, None if first is None else prompts, pad_id)
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        scores = head.logits(hidden_states(model, batch)[torch.arange(len(rows), device=model.device), last])
        for processor in processors:
            scores = processor(batch["input_ids"], scores)
        new.append(scores.argmax(-1))
        ended |= torch.isin(new[-1], torch.tensor(stops, device=model.device))
        for row, token in zip(rows, new[-1].tolist(), strict=True):
            row.append(token)
    return torch.stack(new, 1)


@contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradients, and no generation defaults of the model's own inside the block.

    ``generate`` takes every setting that its config leaves out from ``model.generation_config``, such as top-k or a
    repetition penalty.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        # Not inference_mode: what it leaves in a model's buffers could not be trained through afterwards.
        with in_eval_mode(model), torch.no_grad():
            yield
    finally:
        model.generation_config = own
