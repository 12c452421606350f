from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from drkl.models import check, decoding
from drkl.models.decoding import WAYS, WITHOUT_CACHE, decode, plain_decoding, way_of
from drkl.models.generate import sample_texts
from drkl.models.steps import Way, read_prompts
from tests.models import tiny
from tests.models.cache_families import EOS, FAMILIES

PROMPTS = [[20, 21, 22, 23, 24, 25, 26], [31], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [33, 34]]
NEW = 5
QUICK = ("mamba", "jamba", "gemma3n", "recurrent gemma", "rwkv", "roberta", "switch", "bert to bert")


def kept_quick(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def most_probable(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Token by token, from the logits of the whole sequence without padding or cache."""
    both = model.config.is_encoder_decoder
    ids = [model.config.decoder_start_token_id] if both else list(prompt)
    given = len(ids)
    model.config.use_cache = False
    with torch.no_grad():
        while len(ids) - given < NEW and ids[-1:] != [EOS] * (len(ids) > given):
            read = {"input_ids": prompt, "decoder_input_ids": ids} if both else {"input_ids": ids}
            logits = model(**{name: torch.tensor([value]) for name, value in read.items()}).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[given:]


@pytest.mark.parametrize("name", kept_quick(FAMILIES))
def test_four_answers_are_those_of_a_loop_without_a_cache(name: str) -> None:
    model = FAMILIES[name]()
    answers = sample_texts(
        model, tiny.tokenizer(), PROMPTS, samples_per_prompt=4, max_new_tokens=NEW, greedy=True, stop_ids=[EOS]
    )
    for prompt, own in zip(PROMPTS, answers, strict=True):
        assert [list(answer.token_ids) for answer in own] == [most_probable(model, prompt)] * 4


@pytest.mark.parametrize("name", kept_quick(FAMILIES))
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    model = FAMILIES[name]()
    settings: dict[str, Any] = {"samples_per_prompt": 2, "max_new_tokens": NEW, "seed": 3, "stop_ids": [EOS]}
    drawn = [sample_texts(model, tiny.tokenizer(), PROMPTS, batch_size=size, **settings) for size in (1, 2, 64)]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llama", Way()),
        ("gemma3n", Way()),
        ("jamba", Way()),  # states and keys in one cache
        ("mamba", Way(share=False)),  # a cache without a length cannot be gone on with
        ("gpt", Way(share=False)),  # keeps none
        ("rwkv", WITHOUT_CACHE),  # its state is lost on the way through generate
        ("roberta", WITHOUT_CACHE),  # generate counts its positions from 0
    ],
)
def test_the_fastest_right_way_is_taken(name: str, way: Way) -> None:
    assert way_of(FAMILIES[name](), 2, NEW) == way


class LeavesPadding(LlamaForCausalLM):
    """Reads padding as it reads tokens."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class Forgets(LlamaForCausalLM):
    """Loses what its cache holds."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        out.past_key_values = past_key_values
        return out


@pytest.mark.parametrize(("family", "way"), [(LeavesPadding, Way(pad=False)), (Forgets, WITHOUT_CACHE)])
def test_a_way_that_changes_the_logits_is_not_taken(
    family: type[Any], way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    model = family(tiny.llama().config).eval()
    model.load_state_dict(tiny.llama().state_dict())
    with caplog.at_level(logging.WARNING, logger="drkl"):
        answers = sample_texts(
            model, tiny.tokenizer(), PROMPTS, samples_per_prompt=2, max_new_tokens=NEW, greedy=True, stop_ids=[EOS]
        )
    assert way_of(model, 1, NEW) == way
    assert [list(own[1].token_ids) for own in answers] == [most_probable(model, prompt) for prompt in PROMPTS]
    said = "Forgets gives other logits with transformers' cache than without. It answers without"
    assert caplog.text.count(said) == (not way.cache)


def test_a_model_whose_context_is_too_short_for_a_trial_is_used_as_it_is() -> None:
    assert way_of(tiny.llama(max_position_embeddings=3), 1, 2) == Way()


def test_experts_that_drop_tokens_over_their_capacity_read_the_whole_again() -> None:
    model = FAMILIES["switch"]()
    assert way_of(model, 2, 7).cache
    assert way_of(model, 2, 8) == WITHOUT_CACHE


@pytest.mark.parametrize("way", [Way(), WITHOUT_CACHE])
def test_decoding_ends_when_every_row_has(way: Way) -> None:
    def pick(logits: Sequence[torch.Tensor], rows: Sequence[int], step: int) -> torch.Tensor:
        """The first row ends with its second token, the other with its third."""
        assert len(logits[0]) == len(rows) == (1 if step > 1 else 2)
        return torch.tensor([EOS if step > row else 9 for row in rows])

    model = tiny.llama()
    with plain_decoding(model):
        batch = read_prompts(model, [[5, 6], [7]], [1, 1], way, max_new_tokens=9, pad_id=0)
        new = decode([batch], pick, stops=[EOS], limits=[9, 9], drop=way.drop)
    assert new == [[9, EOS], [9, 9, EOS]]


def test_plain_decoding_leaves_the_model_as_it_was() -> None:
    model = tiny.llama().train()
    own = model.generation_config
    with plain_decoding(model):
        assert not model.training and not torch.is_grad_enabled() and model.generation_config is not own
    assert model.training and torch.is_grad_enabled() and model.generation_config is own


def test_prompts_of_unlike_length_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding that is not read is worth a call; a prompt of one token has nothing to be read beforehand."""
    model = tiny.llama()
    lengths = [50, 3, 1, 4, 45]
    with plain_decoding(model):
        way_of(model, 1, 2)
        read: list[tuple[int, ...]] = []
        forward = type(model.model).forward

        def watched(self: Any, input_ids: Any = None, **words: Any) -> Any:
            read.append(tuple(input_ids.shape))
            return forward(self, input_ids=input_ids, **words)

        monkeypatch.setattr(type(model.model), "forward", watched)
        read_prompts(model, [[5] * n for n in lengths], [1, 2, 1, 1, 1], Way(), max_new_tokens=2, pad_id=0)
    assert read == [(3, 3), (2, 49), (6, 1)]


def test_autocast_does_not_change_the_way_of_fp32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its rounding, in another order with padding than without, is no reason to write answers one length at a time.
    own, model, seen = decoding.own_logits, tiny.llama(), []

    def rounded(*given: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        logits = own(*given, **more)
        return logits + 0.1 * logits.abs().max() if seen[-1] else logits  # what a sharp attention made of it once

    monkeypatch.setattr(decoding, "own_logits", rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert way_of(model, 2, 8) == WAYS[0]
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)


def test_what_bf16_rounds_away_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # A model whose logits move by a twentieth of the largest with every other order of its sums, as a pruned one's did.
    model = tiny.llama().bfloat16()
    own = decoding.own_logits

    def moved(*given: Any, **more: Any) -> Any:
        logits = own(*given, **more)
        return logits + 0.05 * logits.abs().max()

    monkeypatch.setattr(decoding, "own_logits", moved)
    monkeypatch.setattr(decoding, "rounding_of", lambda *_: 0.0)
    assert way_of(model, 2, 8) == WITHOUT_CACHE
    decoding._CHOSEN.clear()
    with torch.no_grad():
        largest = max(float(own(model, check.plain_ids(model, count)).abs().max()) for count in (2, 9, 49))
    monkeypatch.setattr(decoding, "rounding_of", lambda *_: 0.1 * largest)
    assert way_of(model, 2, 8) == WAYS[0]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_rounding_is_none_in_fp32_and_bounded_in_bf16(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    rows = [check.plain_ids(model, count) for count in (9, 49, 2)]
    with torch.no_grad():
        assert check.rounding_of(model, rows) == 0
        low = model.bfloat16()
        assert 0 <= check.rounding_of(low, rows) < 0.1 * float(check.own_logits(low, rows[1]).abs().max())
        own = check.own_logits
        monkeypatch.setattr(check, "own_logits", lambda *given: own(*given) + 100)
        largest = max(float(check.own_logits(low, row).float().abs().max()) for row in rows)
        assert check.rounding_of(low, rows) == pytest.approx(0.25 * largest)
