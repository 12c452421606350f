"""From prompts to new tokens, by the fastest way that gives a model's own logits.

The logits of a token are those of the whole sequence so far, read at once and without padding. A cache, padding on the
left, and one reading of a prompt for several answers are ways to have them sooner, and whether they leave them as they
are differs from family to family: states of a state-space model, windows, positions that are counted from the edge.
So each way is tried on a few tokens before it is used, once for a model.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from drkl.models.check import FAILURES, check_forward, own_logits, plain_ids, rounding_of, same_logits
from drkl.models.context import contexts_of
from drkl.models.forward import decoder_start, in_eval_mode, is_encoder_decoder, replaced
from drkl.models.memory import is_out_of_memory, told_of_trial
from drkl.models.steps import Steps, Way, new_cache, read_prompts

Pick = Callable[[Sequence[Tensor], Sequence[int], int], Tensor]

WAYS = tuple(Way(pad=pad, share=share, drop=drop) for pad, share, drop in itertools.product((True, False), repeat=3))
"""The fastest first."""
WITHOUT_CACHE = Way(cache=False, share=False)
"""Right for every model that `check_forward` lets pass."""

_log = logging.getLogger("drkl")

_TOKENS = 3
"""New tokens of a trial: the first comes from the prompt, the second from a state that one step has moved."""
_SAMPLES = 3
"""Rows of a prompt in a trial: one that leaves, and more than one that stay."""
_LENGTHS = (2, 9, 49)
"""Tokens of a trial's prompts. One with a single token is tried where there is one, as some families read it as a step
that goes on; the longest is read apart from the others."""

_WITHOUT_BLOCKS = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Layers of a cache that hold tokens, or one state, and no blocks of tokens."""

_LEAVING = 0.125
"""Share of a batch's rows that leave together: taking rows out copies the cache."""

_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, torch.dtype], Way]] = weakref.WeakKeyDictionary()


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
    case = min(shortest, _LENGTHS[0]), model.dtype
    if case not in chosen:
        # In the weights' own dtype: a mask or a position that is wrong is so in every one, and what bf16 rounds away
        # from fp32 weights, in another order with padding than without, can be as large as what such a fault changes.
        with torch.autocast(model.device.type, enabled=False):
            check_forward(model)
            with plain_decoding(model), told_of_trial(model):
                chosen[case] = _first_right(model, case[0])
        if not chosen[case].cache:
            _log.warning(
                f"{type(model).__name__} gives other logits with transformers' cache than without. It answers without: "
                "the whole sequence is read again for each new token, which is slow."
            )
    capacity = getattr(model.config, "expert_capacity", None)
    if capacity is not None and max_new_tokens >= capacity:
        # Experts drop tokens over their capacity when they read a whole sequence, and none when they read one token.
        return WITHOUT_CACHE
    return chosen[case]


def _first_right(model: PreTrainedModel, shortest: int) -> Way:
    room = min(
        (context - _TOKENS for context in contexts_of(model.config) if context is not None), default=_LENGTHS[-1]
    )
    if room < 1:
        return WAYS[0]
    short, long, longest = (plain_ids(model, min(length, room)) for length in (shortest, *_LENGTHS[1:]))
    source = None if decoder_start(model) is None else long
    rounding = rounding_of(model, [long, longest, short], source)
    for way in WAYS:
        # Short after long, in batches of one size: a model that keeps its state in itself may go on where it was.
        batches = [[short, long, longest], [short] * 3] if way.pad else [[long], [short]]
        try:
            if (_may_shift(model) or not way.pad) and _is_right(model, batches, way, rounding):
                return way
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
    return WITHOUT_CACHE


def _is_right(model: PreTrainedModel, batches: list[list[list[int]]], way: Way, rounding: float = 0.0) -> bool:
    """Whether the logits of each step are those of the whole sequence, but for rounding."""
    answers = [answer for prompts in batches for answer in _trial(model, prompts, way)]
    start = decoder_start(model)
    known: dict[tuple[int, ...], Tensor] = {}
    for prompt, tokens, logits in answers:
        source, fed = (None, prompt) if start is None else (prompt, [start])
        key = (*prompt, *tokens[:-1])
        if key not in known:
            known[key] = own_logits(model, [*fed, *tokens[:-1]], source)[-len(tokens) :]
        if not same_logits(logits.to(known[key].device), known[key], model.dtype, strict=True, rounding=rounding):
            return False
    return True


def _trial(model: PreTrainedModel, prompts: list[list[int]], way: Way) -> list[tuple[list[int], list[int], Tensor]]:
    """The prompt of each row of a batch, its new tokens, and the logits `[tokens, vocab]` that they were taken from."""
    seen: list[list[Tensor]] = [[] for _ in range(_SAMPLES * len(prompts))]

    def pick(logits: Sequence[Tensor], rows: Sequence[int], step: int) -> Tensor:
        for row, scores in zip(rows, logits[0], strict=True):
            seen[row].append(scores.clone())
        return logits[0].argmax(-1)

    # The first row of each prompt leaves after its first token, so that the places of the others change.
    limits = [1 if way.drop and row % _SAMPLES == 0 else _TOKENS for row in range(len(seen))]
    batch = read_prompts(model, prompts, [_SAMPLES] * len(prompts), way, max_new_tokens=_TOKENS, pad_id=0)
    new = decode([batch], pick, stops=(), limits=limits, drop=way.drop)
    return [
        (prompts[row // _SAMPLES], ids, torch.stack(scores[: len(ids)]))
        for row, (ids, scores) in enumerate(zip(new, seen, strict=True))
    ]


def _may_shift(model: Any) -> bool:
    """Whether padding on the left moves no border of a block: caches of compressed or indexed blocks count from it."""
    if is_encoder_decoder(model) or not model._supports_default_dynamic_cache():
        return True
    return all(type(layer).__name__ in _WITHOUT_BLOCKS for layer in new_cache(model).layers)


def decode(
    batches: Sequence[Steps],
    pick: Pick,
    *,
    stops: Collection[int],
    limits: Sequence[int],
    drop: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, up to and including the first that stops it.

    Args:
        batches: the same rows as one model reads them, or as each of several does.
        pick: chooses the next tokens `[rows]` from the logits `[rows, vocab]` of each model, the numbers of these rows
            and the number of the step.
        stops: the ids that end a row.
        limits: the most tokens of each row, at least 1.
        drop: rows that have ended leave the batch.
        progress: called after each step with the tokens that were written, or that an ended row will not need, and
            with the number of rows that ended.
    """
    new: list[list[int]] = [[] for _ in limits]
    rows = list(range(len(limits)))
    going = set(rows)
    for step in itertools.count():
        tokens = pick([batch.logits() for batch in batches], rows, step)
        done, ended = 0, 0
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in going:
                continue
            new[row].append(token)
            done += 1
            if token in stops or len(new[row]) == limits[row]:
                going.remove(row)
                done, ended = done + limits[row] - len(new[row]), ended + 1
        if progress is not None:
            progress(done, ended)
        if not going:
            return new
        if drop and len(rows) - len(going) >= _LEAVING * len(rows):
            places = [place for place, row in enumerate(rows) if row in going]
            rows = [rows[place] for place in places]
            tokens = tokens[places]
            for batch in batches:
                batch.keep(places)
        for batch in batches:
            batch.read(tokens)
    raise AssertionError("never")


@contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradients, and no generation defaults of the model's own inside the block.

    ``generate`` takes every setting that its config leaves out from ``model.generation_config``, such as top-k or a
    repetition penalty.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        # Not inference_mode: what it leaves in a model's buffers could not be trained through afterwards. Not by an
        # instance's own `forward`: hooks and autocast of a training around the model are not for these numbers.
        with in_eval_mode(model), torch.no_grad(), replaced(model, partial(type(model).forward, model)):
            yield
    finally:
        model.generation_config = own
