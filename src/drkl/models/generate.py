"""Seeded sampling whose samples depend on the prompt and the seed, and not on the batch.

Each token is drawn by walking down a binary tree over the vocabulary (`draw`). The random numbers are a function of
(seed, prompt, sample, step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from drkl.errors import DrklError
from drkl.models.context import contexts_of
from drkl.models.decoding import decode, plain_decoding, way_of
from drkl.models.draw import Draw, most_probable, uniforms
from drkl.models.ends import answer_start, stops_of
from drkl.models.forward import is_encoder_decoder
from drkl.models.memory import memory_told
from drkl.models.packed import packed_products
from drkl.models.steps import Steps, Way, read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Progress = Callable[[int], None]

BATCH_TOKENS = 2**16
"""Most token slots of a batch, of prompts and answers together: they bound the memory of the cache."""


@dataclass(frozen=True)
class Generation:
    """One generated answer."""

    text: str
    """Decoded, without special tokens."""
    token_ids: tuple[int, ...]
    """The generated tokens up to the stop token, which is included."""
    finished: bool
    """Whether a stop token was generated within ``max_new_tokens``."""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens, the stop token included."""
        return len(self.token_ids)


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int = 1,
    first_sample: int = 0,
    sampling_temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 96,
    greedy: bool = False,
    keys: Sequence[str] | None = None,
    stop_ids: Sequence[int] | None = None,
    template: str = "auto",
    progress: Progress | None = None,
) -> list[list[Generation]]:
    """Sample answers from a language model: for every prompt, ``samples_per_prompt`` of them.

    The random numbers of a sample depend on (seed, key of the prompt, number of the sample) alone. Neither the batch
    size nor the order of the prompts changes a sample, except where rounding inside the model (about 1e-5 of a logit)
    decides between two tokens. Two models answer a prompt with the same random numbers. A sample is the beginning of
    the one with a larger ``max_new_tokens``. Of the model's own ``generation_config`` the ends alone are used, and
    the model is left as it was.

    Args:
        model: on its device; in eval mode during the call.
        tokenizer: decodes the answers and gives the default ``stop_ids``.
        prompts: token ids, none empty; for an encoder-decoder the input of its encoder.
        samples_per_prompt: at least 1.
        first_sample: number of the first sample; samples 2 and 3 are the same whether or not 0 and 1 are drawn.
        sampling_temperature: > 0; softmax(logits / sampling_temperature) over the whole vocabulary.
        max_new_tokens: at least 1, the stop token included.
        seed: at least 0.
        batch_size: sequences decoded at once; prompts of similar length share a batch.
        greedy: take the most probable token instead; all samples of a prompt are then equal.
        keys: a name per prompt (a row's id); by default the prompt's token ids.
        stop_ids: default what ends a turn in ``template``, eos, and what the model's generation_config lists; for an
            encoder-decoder eos and that list.
        template: how the prompts were written, as `drkl.data.template.encode_prompt` takes it.
        progress: called after each decoding step with the token slots done since the last call; they add up to
            ``len(prompts) * samples_per_prompt * max_new_tokens``.

    Raises:
        DrklError: a number out of range, an empty prompt, one that leaves no room in the model's context, or logits
            that are not finite.
    """
    _check(samples_per_prompt=samples_per_prompt, max_new_tokens=max_new_tokens)
    names = [",".join(map(str, prompt)) for prompt in prompts] if keys is None else list(keys)
    assert len(names) == len(prompts), "one key per prompt"
    stops = stops_of(model, tokenizer, template) if stop_ids is None else list(stop_ids)
    asked = [(i, first_sample + s) for i in range(len(prompts)) for s in range(samples_per_prompt)]
    answers = sample_ids(
        [Reader(model, [prompts[i] for i, _ in asked])],
        keys=[names[i] for i, _ in asked],
        streams=[stream for _, stream in asked],
        limits=[max_new_tokens] * len(asked),
        stops=stops,
        seed=seed,
        sampling_temperature=sampling_temperature,
        batch_size=batch_size,
        greedy=greedy,
        begin=answer_start(model, tokenizer),
        pad_id=stops[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
        progress=None if progress is None else lambda done, _: progress(done),
    )
    texts = [_decoded(tokenizer, ids, finished) for ids, finished in answers]
    return [texts[start : start + samples_per_prompt] for start in range(0, len(texts), samples_per_prompt)]


@dataclass(frozen=True)
class Reader:
    """A model, and how it reads the prompts."""

    model: PreTrainedModel
    """On its device; in eval mode during the call."""
    prompts: Sequence[Sequence[int]]
    """Token ids, none empty; for an encoder-decoder the input of its encoder."""
    share: float = 1.0
    """Weight of the model's distribution among those of all readers."""
    name: str = "model"
    """What errors call it."""


def sample_ids(
    readers: Sequence[Reader],
    *,
    keys: Sequence[str],
    streams: Sequence[int],
    limits: Sequence[int],
    stops: Sequence[int],
    pad_id: int,
    seed: int = 0,
    sampling_temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 96,
    greedy: bool = False,
    begin: Sequence[int] = (),
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[tuple[int, ...], bool]]:
    """Sample one answer to each prompt, from one model or from a mixture of several models' distributions.

    The random numbers of an answer depend on (seed, key, stream) alone, as `sample_texts` says. Equal prompts are read
    once, and rows that have ended leave the batch, where a model's logits stay the same by it.

    Args:
        readers: the models; each is given the same answer so far after its own prompt.
        keys: a name per answer.
        streams: at least 0; answers of one key and other streams have other random numbers.
        limits: the most tokens of each answer, at least 1, the stop token included.
        stops: the ids that end an answer.
        pad_id: fills batches.
        seed: at least 0.
        sampling_temperature: > 0; of each model softmax(logits / sampling_temperature).
        top_p: in (0, 1]; 1 is the whole vocabulary. Otherwise the most probable tokens of the mixture that together
            have this probability, with the one that reaches it.
        batch_size: sequences decoded at once; fewer where they are long. Prompts of similar length share a batch.
        greedy: take the first model's most probable token instead.
        begin: the tokens that an encoder-decoder's answers begin with; they are not returned.
        vocab_size: the ids that may be drawn are those below; None is all that the models share.
        progress: called after each step with the token slots that are done (they add up to those of ``limits``) and
            the number of answers that ended.

    Returns:
        The tokens of each answer up to its stop token, which is included, and whether there is one.

    Raises:
        DrklError: a number out of range, an empty prompt, one that leaves no room in a model's context, or logits
            that are not finite.
    """
    _check_sampling(sampling_temperature, top_p, seed, batch_size)
    for reader in readers:
        _check_prompts(reader, keys, limits, len(begin))
    if not keys:
        return []
    ways = [way_of(reader.model, min(map(len, reader.prompts)), max(limits)) for reader in readers]
    shares, ended = [reader.share for reader in readers], frozenset(stops)
    found: list[list[int]] = [[] for _ in keys]
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            memory_told(
                f"as answers of up to {max(limits)} tokens are written, {min(batch_size, len(keys))} at once",
                "A smaller batch_size (in training rollouts.batch_size, in Python rollout_batch_size; in an evaluation "
                "evaluation.batch_size) or max_new_tokens needs less.",
            )
        )
        for reader in readers:
            stack.enter_context(plain_decoding(reader.model))
            stack.enter_context(packed_products(reader.model, max(limits)))
        for batch in _batches(readers, limits, batch_size, ways):
            rows = [row for alike in batch for row in alike]
            longest = max(limits[row] for row in rows)
            draw = most_probable
            if not greedy:
                numbers = np.stack([uniforms(seed, keys[row], streams[row], longest) for row in rows])
                draw = Draw(numbers, sampling_temperature, top_p, shares, vocab_size)
            # No name for what was read: the caches of two batches would be there at a time.
            new = decode(
                _read_batch(readers, ways, batch, max_new_tokens=longest, pad_id=pad_id, begin=begin),
                draw,
                stops=ended,
                limits=[limits[row] for row in rows],
                drop=all(way.drop for way in ways),
                progress=progress,
            )
            for row, ids in zip(rows, new, strict=True):
                found[row] = ids
    return [(tuple(ids), ids[-1] in ended) for ids in found]


def _read_batch(
    readers: Sequence[Reader], ways: Sequence[Way], batch: Sequence[Sequence[int]], **settings: Any
) -> list[Steps]:
    """The prompts of a batch as each model reads them."""
    counts = [len(alike) for alike in batch]
    return [
        read_prompts(reader.model, [reader.prompts[alike[0]] for alike in batch], counts, way, **settings)
        for reader, way in zip(readers, ways, strict=True)
    ]


def _batches(
    readers: Sequence[Reader], limits: Sequence[int], batch_size: int, ways: Sequence[Way]
) -> Iterator[list[list[int]]]:
    """Yield the answers of a batch, those to one prompt together; prompts of similar length share a batch."""
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row in range(len(limits)):
        alike.setdefault(tuple(tuple(reader.prompts[row]) for reader in readers), []).append(row)
    pieces = [
        (tuple(map(len, prompts)), rows[start : start + batch_size])
        for prompts, rows in alike.items()
        for start in range(0, len(rows), batch_size)
    ]
    contexts = [None if is_encoder_decoder(r.model) else contexts_of(r.model.config)[1] for r in readers]
    batch: list[list[int]] = []
    widest, longest = tuple(0 for _ in readers), 0
    for lengths, rows in sorted(pieces, key=lambda piece: piece[0]):
        size = sum(map(len, batch)) + len(rows)
        own = max(limits[row] for row in rows)
        both, most = tuple(map(max, widest, lengths)), max(longest, own)
        full = size > batch_size or size * (sum(both) + len(both) * most) > BATCH_TOKENS
        unlike = any(not way.pad and a != b for way, a, b in zip(ways, lengths, widest, strict=True))
        # A row that has ended may be read on, as long as the others are.
        beyond = any(c is not None and width + most > c for c, width in zip(contexts, both, strict=True))
        if batch and (full or unlike or beyond):
            yield batch
            batch, both, most = [], lengths, own
        batch, widest, longest = [*batch, rows], both, most
    if batch:
        yield batch


def sampling_batches(lengths: Sequence[int], num_samples: int, batch_size: int) -> Iterator[tuple[list[int], range]]:
    """Yield prompts of similar length and the samples to draw for each, at most ``batch_size`` sequences at a time."""
    together = min(num_samples, batch_size)
    width = batch_size // together
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), width):
        for first in range(0, num_samples, together):
            yield order[start : start + width], range(first, min(first + together, num_samples))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], finished: bool) -> Generation:
    answer = list(ids[:-1] if finished else ids)
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Generation(text, ids, finished)


def _check_sampling(temperature: float, top_p: float, seed: int, batch_size: int) -> None:
    if not 0 < temperature < float("inf"):
        raise DrklError(
            f"sampling_temperature is {temperature}; expected a finite number above 0. For the most probable answer "
            "decode greedily instead."
        )
    if not 0 < top_p <= 1:
        raise DrklError(f"top_p is {top_p}; expected a number in (0, 1], where 1 is the whole vocabulary.")
    _check(batch_size=batch_size)
    _check(0, seed=seed)


def _check(least: int = 1, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise DrklError(f"{name} is {value}; expected a whole number, at least {least}.")


def _check_prompts(reader: Reader, names: Sequence[str], limits: Sequence[int], given: int) -> None:
    encoder_positions, positions = contexts_of(reader.model.config)
    encoder_decoder = is_encoder_decoder(reader.model)
    for name, prompt, limit in zip(names, reader.prompts, limits, strict=True):
        if not prompt:
            raise DrklError(f"Prompt {name!r} has no tokens; expected at least one.")
        if encoder_decoder and encoder_positions is not None and len(prompt) > encoder_positions:
            raise DrklError(
                f"Prompt {name!r} ({len(prompt)} tokens) passes the {encoder_positions} positions of the "
                f"{reader.name}'s encoder. Shorten it."
            )
        needed = given + limit if encoder_decoder else len(prompt) + limit
        if positions is not None and needed > positions:
            raise DrklError(
                f"max_new_tokens ({limit}) passes the {positions} positions of the {reader.name}'s decoder. Lower it."
                if encoder_decoder
                else f"A prompt of {len(prompt)} tokens and max_new_tokens ({limit}) pass the {reader.name}'s "
                f"{positions} positions. Shorten the prompt, or lower max_new_tokens."
            )
