from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from drkl.errors import DrklError
from drkl.models import generate, steps
from drkl.models.generate import sample_texts
from tests.evaluation import tiny
from tests.rounding import rounding

PROMPTS = [[7, 9, 11], [5], [8, 8, 20, 31, 40, 12, 6], [13, 14], [50, 3, 22, 21, 9]]
RARE = [63]  # a stop token that few of the samples below reach
FAMILIES = [tiny.llama, tiny.gpt2, tiny.mistral, tiny.bloom]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def sample(model: PreTrainedModel, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: object) -> list[list[tuple]]:
    arguments = {"samples_per_prompt": 3, "max_new_tokens": 8, "seed": 5, "stop_ids": RARE, **changes}
    answers = sample_texts(model, tiny.tokenizer(), prompts, **arguments)  # type: ignore[arg-type]
    return [[answer.token_ids for answer in pool] for pool in answers]


def uniforms(prompt: Sequence[int], sample: int, count: int, seed: int = 5) -> np.ndarray:
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    return np.random.default_rng([seed, sample, *words]).random((count, 24))


def reference(
    model: PreTrainedModel, prompt: Sequence[int], draws: np.ndarray, temperature: float = 1.0
) -> tuple[tuple[int, ...], float]:
    """One prompt: no cache, padding or batch; a range of ids is halved, left where u < the left half's share.

    Also how far the nearest draw stayed from a share, or the second best token from the best where draws are NaN
    (greedy): nearer than what rounding moves a share, another kernel may take another token.
    """
    ids, room = list(prompt), 1.0
    for row in draws:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
        probs = np.exp(logits - logits.max())
        low, high = 0, len(probs)
        if np.isnan(row[0]):
            low = int(logits.argmax())
            room = min(room, logits[low] - np.delete(logits, low).max())
            row = row[:0]
        for u in row[: int(np.log2(len(probs)))]:
            middle = (low + high) // 2
            left, both = probs[low:middle].sum(), probs[low:high].sum()
            room = min(room, abs(u - left / both))
            low, high = (low, middle) if u < left / both else (middle, high)
        ids.append(low)
        if ids[-1] in RARE:
            break
    return tuple(ids[len(prompt) :]), room


def seed_with_room(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int, count: int, temperature: float = 1.0
) -> tuple[int, list[list[tuple[int, ...]]]]:
    """The first seed none of whose draws rounding decides, and its samples."""
    # Two layers and a head of 16 terms each, with logits of some tens.
    bound = rounding(8 * 16, 30.0, model.dtype)
    for seed in itertools.count(5):
        pools = [
            [reference(model, p, uniforms(p, s, count, seed), temperature) for s in range(samples)] for p in prompts
        ]
        if min(room for pool in pools for _, room in pool) > bound:
            return seed, [[ids for ids, _ in pool] for pool in pools]
    raise AssertionError("never")


@pytest.mark.parametrize(("family", "temperature"), [*((f, 1.0) for f in FAMILIES), (tiny.llama, 0.6)])
def test_samples_are_those_of_a_plain_loop(family: Callable[[], PreTrainedModel], temperature: float) -> None:
    model, prompts = family(), PROMPTS[:3]
    seed, expected = seed_with_room(model, prompts, 2, 6, temperature)
    words = {"sampling_temperature": temperature, "samples_per_prompt": 2, "max_new_tokens": 6, "seed": seed}
    assert sample(model, prompts, **words) == expected
    assert len({ids for pool in expected for ids in pool}) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_changes_no_sample(family: Callable[[], PreTrainedModel]) -> None:
    model = family()
    seed, expected = seed_with_room(model, PROMPTS, 3, 6)
    for batch_size in (96, 1, 2, 7):
        assert sample(model, batch_size=batch_size, max_new_tokens=6, seed=seed) == expected


def test_order_of_prompts_changes_no_sample() -> None:
    model = tiny.llama()
    order = [3, 0, 4, 2, 1]
    shuffled = sample(model, [PROMPTS[i] for i in order])
    assert shuffled == [sample(model)[i] for i in order]


def test_samples_are_prefixes_of_longer_ones_and_lead_a_larger_pool() -> None:
    model = tiny.llama()
    longer = sample(model, max_new_tokens=12, samples_per_prompt=5)
    assert sample(model) == [[ids[:8] for ids in pool[:3]] for pool in longer]


def test_seeds_and_keys_choose_the_samples() -> None:
    model = tiny.llama()
    twice = [PROMPTS[0], PROMPTS[0]]
    first, second = sample(model, twice)
    assert first == second
    first, second = sample(model, twice, keys=["a", "b"])
    assert first != second
    assert sample(model, [PROMPTS[0]], keys=["b"])[0] == second
    assert sample(model, [PROMPTS[0]], seed=6)[0] != sample(model, [PROMPTS[0]])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family: Callable[..., PreTrainedModel]) -> None:
    greedy = np.full((8, 1), np.nan)

    def has_room(model: PreTrainedModel) -> bool:
        return min(reference(model, p, greedy)[1] for p in PROMPTS) > rounding(8 * 16, 30.0, model.dtype)

    model = next(filter(has_room, map(family, itertools.count())))
    for prompt, (first, second) in zip(PROMPTS, sample(model, greedy=True, samples_per_prompt=2), strict=True):
        config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=RARE)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert first == second == tuple(expected[0, len(prompt) :].tolist())


def test_a_stop_token_ends_the_answer_and_stays_out_of_the_text() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    whole = sample_texts(model, tokenizer, PROMPTS, samples_per_prompt=3, max_new_tokens=8, seed=5, stop_ids=RARE)
    assert [answer.finished for pool in whole for answer in pool].count(True) < 15
    stop = next(answer.token_ids[3] for answer in whole[1] if not answer.finished)
    answers = sample_texts(
        model, tokenizer, PROMPTS, samples_per_prompt=3, max_new_tokens=8, seed=5, stop_ids=[*RARE, stop]
    )
    for before, after in zip(chain(*whole), chain(*answers), strict=True):
        if stop in before.token_ids:
            end = before.token_ids.index(stop) + 1
            assert after.token_ids == before.token_ids[:end]
            assert (after.finished, after.num_tokens) == (True, end)
            assert after.text == tokenizer.decode(before.token_ids[: end - 1], skip_special_tokens=True)
        else:
            assert after == before
    assert answers != whole


def test_stop_tokens_come_from_the_tokenizer_by_default() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    head = model.get_output_embeddings()
    head.weight.data[tokenizer.eos_token_id] = 0.0  # a logit of 0 among wide ones: reached now and then
    pool = sample_texts(model, tokenizer, [[7, 9]], samples_per_prompt=40, max_new_tokens=20)[0]
    ended = [answer for answer in pool if answer.finished]
    assert ended and all(answer.token_ids.index(tokenizer.eos_token_id) == answer.num_tokens - 1 for answer in ended)
    assert all(tokenizer.eos_token_id not in answer.token_ids for answer in pool if not answer.finished)


def test_the_models_own_generation_config_plays_no_part_and_is_left_alone() -> None:
    model = tiny.llama()
    expected = sample(model), sample(model, greedy=True)
    own = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0, no_repeat_ngram_size=1,
        min_length=99, max_length=3, bad_words_ids=[[5]], suppress_tokens=[6], forced_eos_token_id=4,
        eos_token_id=list(range(30)),
    )  # fmt: skip
    model.generation_config = own
    described = own.to_dict()
    model.train()
    assert (sample(model), sample(model, greedy=True)) == expected
    assert model.generation_config is own and own.to_dict() == described
    assert model.training


def test_the_model_can_be_trained_afterwards() -> None:
    model = tiny.llama()
    sample(model)
    model.train()
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    sample(tiny.llama())
    sample(tiny.gpt2(), greedy=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", [2, 96])
@pytest.mark.parametrize("stop_ids", [RARE, list(range(64))])
def test_progress_adds_up(batch_size: int, stop_ids: list[int]) -> None:
    seen: list[int] = []
    sample(tiny.llama(), batch_size=batch_size, stop_ids=stop_ids, progress=seen.append)
    assert sum(seen) == 5 * 3 * 8 and min(seen) > 0


def test_no_prompts_no_answers() -> None:
    assert sample(tiny.llama(), []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_temperature": 0.0}, r"sampling_temperature is 0\.0; expected a finite number above 0\..*greedily"),
        ({"sampling_temperature": float("nan")}, r"sampling_temperature is nan; expected a finite"),
        ({"samples_per_prompt": 0}, r"samples_per_prompt is 0; expected a whole number, at least 1\."),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; expected a whole number, at least 1\."),
        ({"batch_size": 0}, r"batch_size is 0; expected a whole number, at least 1\."),
        ({"seed": -1}, r"seed is -1; expected a whole number, at least 0\."),
        ({"prompts": [[5], []], "keys": ["a", "b"]}, r"Prompt 'b' has no tokens; expected at least one\."),
        ({"max_new_tokens": 90}, r"A prompt of 7 tokens and max_new_tokens \(90\) pass the model's 96 positions\."),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        sample(tiny.llama(), **changes)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(greedy: bool, value: float) -> None:
    model = tiny.llama()
    model.model.norm.weight.data[0] = value
    with pytest.raises(DrklError, match="logits are not finite numbers: its weights are broken, or overflow"):
        sample(model, greedy=greedy)
    assert isinstance(model.generation_config, GenerationConfig)


def test_the_cache_of_one_batch_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[weakref.ref[Any]] = []
    others = []

    def read_prompts(*args: Any, **words: Any) -> Any:
        others.append(sum(batch() is not None for batch in there))
        read = steps.read_prompts(*args, **words)
        there.append(weakref.ref(read))
        return read

    monkeypatch.setattr(generate, "read_prompts", read_prompts)
    prompts = [[5, 6, number] for number in range(7, 13)]
    sample(tiny.llama(1), prompts, samples_per_prompt=1, batch_size=2)
    assert others == [0, 0, 0]
