"""Seeded sampling whose samples depend on the prompt and the seed, and not on the batch.

Each token is drawn by walking down a binary tree over the vocabulary: at every node a uniform random number decides
between the probabilities of the left and the right half. The numbers are a function of (seed, prompt, sample, step).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from drkl.data.examples import hash_of_id
from drkl.errors import DrklError
from drkl.models.context import contexts_of
from drkl.models.decoding import decode, plain_decoding, way_of
from drkl.models.ends import answer_start, stops_of
from drkl.models.forward import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Progress = Callable[[int], None]

DEPTH = 24
"""Random numbers per token: enough for a vocabulary of 2**24 tokens, and the same for every vocabulary."""


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
    _check(samples_per_prompt, sampling_temperature, max_new_tokens, seed, batch_size)
    names = [",".join(map(str, prompt)) for prompt in prompts] if keys is None else list(keys)
    assert len(names) == len(prompts), "one key per prompt"
    begin = answer_start(model, tokenizer)
    _check_prompts(model, prompts, names, max_new_tokens, len(begin))
    stops = stops_of(model, tokenizer, template) if stop_ids is None else list(stop_ids)
    lengths = [len(prompt) for prompt in prompts]
    way = way_of(model, min(lengths, default=1), max_new_tokens)
    answers: list[list[Generation]] = [[] for _ in prompts]
    with plain_decoding(model):
        for group, samples in sampling_batches(lengths, samples_per_prompt, batch_size, mixed=way.pad):
            watch = _Watch(len(group) * len(samples), max_new_tokens, progress)
            processors: list[LogitsProcessor] = [watch]
            if not greedy:
                draws = [_uniforms(seed, names[i], first_sample + s, max_new_tokens) for i in group for s in samples]
                processors.append(_Descent(np.stack(draws), sampling_temperature))
            new = decode(
                model,
                [prompts[i] for i in group],
                len(samples),
                way,
                stops=stops,
                max_new_tokens=max_new_tokens,
                processors=processors,
                pad_id=_pad_id(tokenizer, stops),
                begin=begin,
            )
            for row, ids in enumerate(new.tolist()):
                answers[group[row // len(samples)]].append(_finish(tokenizer, ids, stops))
            watch.finish()
    return answers


class _Descent(LogitsProcessor):
    """Samples a token by descending a binary tree over the vocabulary, and makes it the only possible one.

    At each node a fresh uniform number is compared with the left half's share of the probability. One number compared
    with the cumulative sum would be simpler, but its 50,000 boundaries lie so close together that rounding inside the
    model, which depends on the batch, changed one token in a thousand.
    """

    def __init__(self, uniforms: np.ndarray, temperature: float) -> None:
        """``uniforms``: `[rows, steps, DEPTH]` in [0, 1)."""
        self.uniforms = torch.from_numpy(uniforms)
        self.temperature = temperature
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # float64, so that sums over the vocabulary add nothing to the model's own rounding; mps has none.
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        logits = scores.to(wide)
        levels = [((logits - logits.amax(-1, keepdim=True)) / self.temperature).exp_()]
        while levels[-1].shape[-1] > 1:
            if levels[-1].shape[-1] % 2:
                levels[-1] = torch.nn.functional.pad(levels[-1], (0, 1))
            levels.append(levels[-1].unflatten(-1, (-1, 2)).sum(-1))
        draws = self.uniforms[:, self.step].to(logits)
        node = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
        for depth, level in enumerate(reversed(levels[:-1])):
            left, right = level.gather(-1, 2 * node), level.gather(-1, 2 * node + 1)
            # right > 0: a draw rounded up to 1 must not lead where there is nothing.
            node = 2 * node + ((draws[:, depth, None] * (left + right) >= left) & (right > 0))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, node, 0.0)


class _Watch(LogitsProcessor):
    """Refuses logits that are not finite, and reports the token slots of a batch step by step.

    The slots that are left when every row has stopped early are reported at the end.
    """

    def __init__(self, num_rows: int, num_steps: int, report: Progress | None) -> None:
        self.num_rows, self.left, self.report = num_rows, num_rows * num_steps, report
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # NaN would go unnoticed: every comparison with it is false, and the answer a row of token 0.
        if not torch.isfinite(scores.amax(-1)).all():
            raise DrklError(
                "The model's logits are not finite numbers: its weights are broken, or overflow their dtype."
            )
        # Called before each token: the step that is done is the one before.
        if self.started:
            self._done(self.num_rows)
        self.started = True
        return scores

    def finish(self) -> None:
        self._done(self.left)

    def _done(self, slots: int) -> None:
        self.left -= slots
        if self.report is not None and slots:
            self.report(slots)


def sampling_batches(
    lengths: Sequence[int], num_samples: int, batch_size: int, *, mixed: bool = True
) -> Iterator[tuple[list[int], range]]:
    """Yield prompts of similar length and the samples to draw for each, at most ``batch_size`` sequences at a time.

    Prompts of different lengths go together where ``mixed``.
    """
    together = min(num_samples, batch_size)
    width = batch_size // together
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, alike in itertools.groupby(order, key=lambda i: 0 if mixed else lengths[i]):
        group = list(alike)
        for start in range(0, len(group), width):
            for first in range(0, num_samples, together):
                yield group[start : start + width], range(first, min(first + together, num_samples))


def _uniforms(seed: int, key: str, sample: int, count: int) -> np.ndarray:
    words = np.frombuffer(hash_of_id(key), dtype="<u4")
    return np.random.default_rng([seed, sample, *words.tolist()]).random((count, DEPTH))


def _finish(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> Generation:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    answer = ids if end is None else ids[:end]
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Generation(text, tuple(ids if end is None else ids[: end + 1]), end is not None)


def _pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    return stops[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _check(samples_per_prompt: int, temperature: float, max_new_tokens: int, seed: int, batch_size: int) -> None:
    if not 0 < temperature < float("inf"):
        raise DrklError(
            f"sampling_temperature is {temperature}; expected a finite number above 0. For the most probable answer "
            "decode greedily instead."
        )
    for name, value, least in (
        ("samples_per_prompt", samples_per_prompt, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DrklError(f"{name} is {value}; expected a whole number, at least {least}.")


def _check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], names: list[str], max_new_tokens: int, given: int
) -> None:
    encoder_positions, positions = contexts_of(model.config)
    encoder_decoder = is_encoder_decoder(model)
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise DrklError(f"Prompt {name!r} has no tokens; expected at least one.")
        if encoder_decoder and encoder_positions is not None and len(prompt) > encoder_positions:
            raise DrklError(
                f"Prompt {name!r} ({len(prompt)} tokens) passes the {encoder_positions} positions of the model's "
                "encoder. Shorten it."
            )
        needed = given + max_new_tokens if encoder_decoder else len(prompt) + max_new_tokens
        if positions is not None and needed > positions:
            raise DrklError(
                f"max_new_tokens ({max_new_tokens}) passes the {positions} positions of the model's decoder. Lower it."
                if encoder_decoder
                else f"A prompt of {len(prompt)} tokens and max_new_tokens ({max_new_tokens}) pass the model's "
                f"{positions} positions. Shorten the prompt, or lower max_new_tokens."
            )
