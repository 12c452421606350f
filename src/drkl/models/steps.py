"""A batch of sequences that a model reads token by token, and that rows are taken out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from drkl.data.collate import collate_prompts, collate_sources
from drkl.models.forward import (
    accepted_inputs,
    decoder_start,
    hidden_states,
    is_encoder_decoder,
    lm_head,
    right_padded,
)

_PADDING = {"cpu": 32, "other": 4096}
"""Tokens of padding that cost about as much as a call of the model."""


@dataclass(frozen=True)
class Way:
    """How new tokens are made."""

    cache: bool = True
    """Each step reads the newest token only. False reads the whole sequence again for each."""
    pad: bool = True
    """A batch has prompts of several lengths."""
    share: bool = True
    """A prompt is read once for all its samples."""
    drop: bool = True
    """Rows that have ended leave the batch."""


class Steps(Protocol):
    """A batch that is being read."""

    def logits(self) -> Tensor:
        """Those of the next token, `[rows, vocab]`, fp32 or wider; the caller may overwrite them."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        ...

    def read(self, tokens: Tensor) -> None:
        """Read the next token of each row `[rows]`."""
        ...


def read_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    way: Way,
    *,
    max_new_tokens: int,
    pad_id: int,
    begin: Sequence[int] = (),
) -> Steps:
    """Read prompts, each for as many rows as ``counts`` says; the rows of a prompt follow each other.

    Args:
        model: in `plain_decoding`.
        prompts: token ids; of one length, unless the way pads.
        counts: at least 1 each.
        way: how.
        max_new_tokens: the most that will be read on top.
        pad_id: fills batches.
        begin: the tokens that an encoder-decoder's answers begin with.
    """
    start = decoder_start(model)
    first = None if start is None else [start, *begin]
    if way.cache:
        return _Cached(model, prompts, counts, way, first, max_new_tokens, pad_id)
    return _Again(
        model, [list(prompt) for prompt, n in zip(prompts, counts, strict=True) for _ in range(n)], first, pad_id
    )


class _Cached:
    """Keeps what transformers' ``generate`` prepares: its inputs, and a cache."""

    def __init__(
        self,
        model: Any,  # transformers types a PreTrainedModel without the generation mixin
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        way: Way,
        first: list[int] | None,
        max_new_tokens: int,
        pad_id: int,
    ) -> None:
        self.model = model
        encoder_decoder = is_encoder_decoder(model)
        batch = (collate_sources if encoder_decoder else collate_prompts)(prompts, pad_id=pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        rows = torch.arange(len(prompts), device=model.device).repeat_interleave(
            torch.tensor(counts, device=model.device)
        )
        inputs: dict[str, Any] = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
        if way.share and encoder_decoder:
            del inputs["input_ids"]
            inputs |= _shared_encoding(model, batch, rows)
        elif way.share:
            inputs |= _shared_prefix(model, batch, rows)
        if first is not None:
            inputs["decoder_input_ids"] = torch.tensor([first], device=model.device).repeat(len(rows), 1)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad_id,
            decoder_start_token_id=None if first is None else first[0],
        )
        model.generate(**inputs, generation_config=config, custom_generate=self._begin)

    def _begin(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **inputs: Any,
    ) -> None:
        """Stands in for the loop of ``generate``, which hands over what it has prepared."""
        self.ids, self.inputs = input_ids, inputs
        self._take(model._prefill(input_ids, generation_config, inputs))

    def _take(self, outputs: Any) -> None:
        scores = outputs.logits[:, -1]
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        # A copy: a view would keep the logits of a whole prompt.
        self.scores: Tensor = scores.to(wide, copy=True)
        self.inputs = self.model._update_model_kwargs_for_generation(
            outputs, self.inputs, is_encoder_decoder=is_encoder_decoder(self.model)
        )

    def logits(self) -> Tensor:
        return self.scores

    def keep(self, places: Sequence[int]) -> None:
        index = torch.tensor(places, device=self.ids.device)
        count = len(self.ids)
        self.ids = self.ids[index]
        self.inputs = {name: _kept(value, index, count) for name, value in self.inputs.items()}

    def read(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.inputs)
        self._take(self.model(**inputs, return_dict=True))


def _kept(value: Any, index: Tensor, count: int) -> Any:
    """The rows of whatever a model is given at each step."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if len(value) != count:
            raise ValueError(f"expected {count} rows, got a tensor {list(value.shape)}")
        return value.index_select(0, index.to(value.device))
    if isinstance(value, Mapping):
        return type(value)(**{name: _kept(part, index, count) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_kept(part, index, count) for part in value)
    # Layers of every kind can be reordered, as beams are; not all can select rows by a method of their own.
    value.reorder_cache(index)
    return value


class _Again:
    """Reads the whole of each sequence again for each new token; ``first`` is what a decoder is fed at first."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], first: list[int] | None, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.rows = prompts if first is None else [list(first) for _ in prompts]
        self.sources = None if first is None else prompts

    def logits(self) -> Tensor:
        batch = right_padded(self.model, self.rows, self.sources, self.pad_id)
        last = torch.tensor([len(row) - 1 for row in self.rows], device=self.model.device)
        states = hidden_states(self.model, batch)[torch.arange(len(last), device=last.device), last]
        scores = lm_head(self.model).logits(states)
        return scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32, copy=True)

    def keep(self, places: Sequence[int]) -> None:
        self.rows = [self.rows[place] for place in places]
        self.sources = None if self.sources is None else [self.sources[place] for place in places]

    def read(self, tokens: Tensor) -> None:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)


def _shared_encoding(model: Any, batch: dict[str, Tensor], rows: Tensor) -> dict[str, Any]:
    """Encode each prompt once for all its samples."""
    states = model.get_encoder()(**batch).last_hidden_state
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=states[rows]),
        # The one that generate would make is as deep as the encoder, which breaks under a deeper decoder.
        "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }


def _shared_prefix(model: Any, batch: dict[str, Tensor], rows: Tensor) -> dict[str, Any]:
    """Read each prompt once for all its samples, except for its last token, whose logits the decoding loop takes.

    Prompts of like length are read together, so that little padding is read. Empty where all that saves nothing.
    """
    lengths = batch["attention_mask"].sum(1).tolist()
    groups, width = _alike(model, lengths), max(lengths)
    if len(groups) == 1 and (len(rows) == len(lengths) or width == 1):
        return {}
    caches = []
    for group in groups:
        longest = max(lengths[row] for row in group)
        part = {name: tensor[group][:, width - longest : -1] for name, tensor in batch.items()}
        caches.append(new_cache(model))
        # Families with ALiBi take no positions; they count from the attention mask.
        inputs = accepted_inputs(model.base_model, part) | {"past_key_values": caches[-1], "use_cache": True}
        model.base_model(**inputs)
    cache = _joined(caches)
    # Layers of every kind can be reordered, as beams are; not all can be repeated by a method of their own.
    places: Any = torch.tensor([row for group in groups for row in group], device=rows.device).argsort()[rows]
    cache.reorder_cache(places)
    return {"past_key_values": cache}


def _alike(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts by number, in groups that are read together: all in one, unless the cache can be put together again."""
    layers = new_cache(model).layers
    most = _PADDING["cpu" if model.device.type == "cpu" else "other"]
    groups: list[list[int]] = [[]]
    longest = 1
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        padding = len(groups[-1]) * (lengths[row] - longest)
        # A prompt of one token has nothing before its last.
        if longest > 1 and padding > most and layers and all(type(layer) is DynamicLayer for layer in layers):
            groups.append([])
        groups[-1].append(row)
        longest = lengths[row]
    return groups


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of the rows of all, those of shorter prompts padded on the left as their tokens are."""
    if len(caches) > 1:
        for parts in zip(*(cache.layers for cache in caches), strict=True):
            for name in ("keys", "values"):
                tensors = [getattr(part, name) for part in parts]
                width = max(tensor.shape[-2] for tensor in tensors)
                padded = [torch.nn.functional.pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors]
                setattr(parts[0], name, torch.cat(padded))
    return caches[0]


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of a decoder-only model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))
