from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import GenerationConfig, PreTrainedModel

from drkl.errors import DrklError
from drkl.models.decoding import way_of
from drkl.models.steps import Way
from drkl.rollouts.answers import Answer, Request
from drkl.rollouts.builtin import BuiltInWriter
from tests.evaluation import tiny as wide
from tests.models import tiny
from tests.rounding import rounding

PROMPTS = [[7, 9, 11], [5], [8, 8, 20, 31, 40, 12, 6], [13, 14], [50, 3, 22, 21, 9]]
TEACHER_PROMPTS = [[2, 7, 9, 11], [2, 5, 6, 7], [8, 20, 31], [2, 13, 14], [2, 50, 3, 22, 21, 9]]
STOPS = [60, 61, 62, 63]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with wide.one_thread():
        yield


def requests(limits: Sequence[int] = (6, 3, 8, 1, 5), passes: int = 1) -> list[Request]:
    """One of each prompt in each pass."""
    return [
        Request(f"row {i}", stream, tuple(prompt), tuple(TEACHER_PROMPTS[i]), limits[i])
        for stream in range(passes)
        for i, prompt in enumerate(PROMPTS)
    ]


def write(model: PreTrainedModel, asked: Sequence[Request], seed: int = 5, **settings: Any) -> list[Answer]:
    return BuiltInWriter(model, **{"stops": STOPS, **settings}).write(asked, seed=seed)


def probabilities(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], temperature: float, size: int
) -> np.ndarray:
    """Of the next token, from the logits of the whole sequence, without a cache, padding or a batch."""
    if model.config.is_encoder_decoder:
        read = {"input_ids": prompt, "decoder_input_ids": [model.config.decoder_start_token_id, *answer]}
    else:
        read = {"input_ids": [*prompt, *answer]}
    with torch.no_grad():
        logits = model(**{name: torch.tensor([list(ids)]) for name, ids in read.items()}).logits[0, -1]
    scaled = logits[:size].double().numpy() / temperature
    exponents = np.exp(scaled - scaled.max())
    return exponents / exponents.sum()


def nucleus(probs: np.ndarray, top_p: float) -> tuple[np.ndarray, float]:
    """The probabilities with zeros outside of the nucleus, and how far the nearest sum stayed from ``top_p``."""
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    kept = np.zeros_like(probs)
    for index, total in zip(order, sums, strict=True):
        kept[index] = probs[index]
        if total >= top_p:
            break
    return kept, float(np.abs(sums[:-1] - top_p).min())


def reference(
    readers: Sequence[tuple[PreTrainedModel, float]], request: Request, prompts: Sequence[Sequence[int]], seed: int,
    temperature: float, top_p: float, size: int, begin: Sequence[int],
) -> tuple[Answer, float]:  # fmt: skip
    """One answer, and how far the nearest random number stayed from what it was compared with."""
    words = [
        int.from_bytes(hashlib.sha256(request.key.encode()).digest()[i : i + 4], "little") for i in range(0, 32, 4)
    ]
    draws = np.random.default_rng([seed, request.stream, *words]).random((request.max_new_tokens, 24))
    ids, room = list(begin), 1.0
    for row in draws[: request.max_new_tokens - len(begin)]:
        probs = np.zeros(size)
        for (model, share), prompt in zip(readers, prompts, strict=True):
            probs += share * probabilities(model, prompt, ids, temperature, size)
        if top_p < 1:
            probs, distance = nucleus(probs, top_p)
            room = min(room, distance)
        low, width = 0, 2 ** int(np.ceil(np.log2(size)))
        for u in row[: int(np.log2(width))]:
            width //= 2
            left, both = probs[low : low + width].sum(), probs[low : low + 2 * width].sum()
            room = min(room, abs(u - left / both))
            low = low if u < left / both else low + width
        ids.append(low)
        if low in STOPS:
            return Answer(tuple(ids), True), room
    return Answer(tuple(ids), False), room


def assert_as_reference(
    student: PreTrainedModel, teacher: PreTrainedModel, source: str, temperature: float = 1.0, top_p: float = 1.0,
    size: int = 64, begin: Sequence[int] = (),
) -> None:  # fmt: skip
    """The answers of the first seed none of whose draws rounding decides."""
    asked = requests((6, 3, 5, 2, 4))
    shares = {"student": 0.0, "mixed": 0.4, "teacher": 1.0}[source]
    sides = [(student, 1 - shares, "prompt_ids"), (teacher, shares, "teacher_prompt_ids")]
    sides = [side for side in sides if side[1]]
    readers = [(model, share) for model, share, _ in sides]
    # Two layers and a head of 16 terms each, with logits of some tens; sums over the vocabulary.
    bound = rounding(8 * 16 + size, 30.0, student.dtype)
    for seed in itertools.count():
        expected = [
            reference(readers, r, [getattr(r, name) for _, _, name in sides], seed, temperature, top_p, size, begin)
            for r in asked
        ]
        if min(room for _, room in expected) > bound:
            break
    found = write(
        student, asked, seed, teacher=teacher, source=source, teacher_share=0.4, sampling_temperature=temperature,
        top_p=top_p, vocab_size=size, begin=begin, batch_size=3,
    )  # fmt: skip
    assert found == [answer for answer, _ in expected]


@pytest.mark.parametrize("source", ["student", "mixed", "teacher"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_answers_are_those_of_a_plain_loop(source: str, temperature: float, top_p: float) -> None:
    assert_as_reference(wide.llama(), wide.gpt2(1), source, temperature, top_p)


def test_two_vocabularies_are_cut_to_what_they_share() -> None:
    assert_as_reference(wide.llama(vocab=70), wide.gpt2(1), "mixed", size=51)


@pytest.mark.parametrize("source", ["student", "mixed", "teacher"])
def test_an_encoder_decoder_answers_as_a_plain_loop_does(source: str) -> None:
    assert_as_reference(tiny.t5(layers=1).double(), tiny.t5(1, layers=2).double(), source)


def test_the_given_tokens_of_an_encoder_decoder_stand_first_and_count() -> None:
    assert_as_reference(tiny.bart(layers=1).double(), tiny.bart(1, layers=1).double(), "mixed", begin=[1])
    assert [len(a.token_ids) for a in write(tiny.bart(layers=1), requests([2] * 5), begin=[1])] == [2] * 5
    with pytest.raises(DrklError, match=r"max_new_tokens is 1; expected .*, at least 2: every answer begins"):
        write(tiny.bart(layers=1), requests([1] * 5), begin=[1])


@pytest.mark.parametrize("source", ["student", "mixed"])
def test_neither_batch_nor_order_decides_an_answer(source: str) -> None:
    student, teacher = tiny.llama(layers=2), tiny.gpt2(1, layers=2)
    asked = requests([12] * 5, passes=3)
    shuffled = random.Random(0).sample(asked, len(asked))
    first, *others = [
        dict(zip(order, write(student, order, source=source, teacher=teacher, batch_size=size), strict=True))
        for order, size in ((asked, 1), (asked, 3), (asked, 64), (shuffled, 64), (shuffled, 4))
    ]
    assert all(other == first for other in others)
    assert write(student, asked[7:9], source=source, teacher=teacher) == [first[r] for r in asked[7:9]]
    assert len({answer.token_ids for answer in first.values()}) > 12


def test_a_shorter_answer_is_the_beginning_of_a_longer_one() -> None:
    model = tiny.llama(layers=2)
    for short, long in zip(write(model, requests([4] * 5)), write(model, requests([9] * 5)), strict=True):
        assert short.token_ids == long.token_ids[:4]
        assert short.finished == (short.token_ids[-1] in STOPS)
        assert long.finished or len(long.token_ids) == 9


def test_tokens_come_as_often_as_the_mixture_says() -> None:
    student, teacher = wide.llama(), wide.gpt2(1)
    asked = [replace(requests()[0], stream=i, max_new_tokens=1) for i in range(4000)]
    answers = write(student, asked, source="mixed", teacher=teacher, teacher_share=0.3, top_p=0.9, batch_size=2000)
    p = probabilities(teacher, TEACHER_PROMPTS[0], [], 1.0, 64)
    q = probabilities(student, PROMPTS[0], [], 1.0, 64)
    probs, _ = nucleus(0.3 * p + 0.7 * q, 0.9)
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=64)
    assert counts[probs == 0].sum() == 0
    expected = 4000 * probs / probs.sum()
    common = expected >= 5
    seen, wanted = counts[common], expected[common]
    if (~common & (probs > 0)).any():
        seen, wanted = np.append(seen, counts[~common].sum()), np.append(wanted, expected[~common].sum())
    assert scipy.stats.chisquare(seen, wanted).pvalue > 1e-3


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(layers=2)
    way_of(model, 1, 2)
    read: list[int] = []
    forward = type(model).forward

    def watched(self: Any, input_ids: Any = None, **words: Any) -> Any:
        read.append(len(input_ids))
        return forward(self, input_ids=input_ids, **words)

    monkeypatch.setattr(type(model), "forward", watched)
    write(model, requests([6, 3, 8, 1, 5]), stops=[])
    assert read == [5, 4, 4, 3, 3, 2, 1, 1]


def test_a_prompt_is_read_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(layers=2)
    way_of(model, 2, 2)
    read: list[tuple[int, ...]] = []
    forward = type(model.model).forward

    def watched(self: Any, input_ids: Any = None, **words: Any) -> Any:
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **words)

    monkeypatch.setattr(type(model.model), "forward", watched)
    write(model, [replace(requests()[2], stream=i) for i in range(4)], stops=[])
    assert read[:2] == [(1, 6), (4, 1)]


def test_training_is_not_disturbed() -> None:
    """Neither modes, settings nor random numbers change, and what training sets has no part in the answers."""
    model, teacher = tiny.llama(layers=2, attention_dropout=0.5), tiny.gpt2(1, layers=2)
    settings: dict[str, Any] = {"teacher": teacher, "source": "mixed"}
    expected = write(model, requests(), **settings)
    model.train()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config = own = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, max_length=2, min_length=9
    )
    model.lm_head.weight.requires_grad = False
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for precision in ("fp32", "bf16"):
        answers = write(model, requests(), precision=precision, **settings)
        assert precision == "bf16" or answers == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not teacher.training and model.model.gradient_checkpointing and not model.config.use_cache
    assert model.generation_config is own
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert "forward" not in model.__dict__
    loss = model(torch.tensor([PROMPTS[0]])).logits.sum()
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_gradients_pass_through_weights_that_an_outer_autocast_met_first_in_sampling() -> None:
    model = tiny.llama(layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        write(model, requests(), precision="bf16")
        loss = model(torch.tensor([PROMPTS[0]])).logits.sum()
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_bf16_takes_the_fastest_way_and_keeps_most_tokens() -> None:
    model = tiny.llama(layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert way_of(model, 1, 4) == Way()
    plain, rounded = (write(model, requests([1] * 5, passes=20), precision=name) for name in ("fp32", "bf16"))
    assert sum(a == b for a, b in zip(plain, rounded, strict=True)) >= 90


def test_an_adapter_s_layers_are_read() -> None:
    model = tiny.llama(layers=2)
    without = write(model, requests())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model)
    assert write(model, requests()) != without


def test_progress_counts_answers() -> None:
    seen: list[int] = []
    BuiltInWriter(tiny.llama(layers=2), stops=STOPS, batch_size=2).write(requests(), seed=0, progress=seen.append)
    assert sum(seen) == 5 and min(seen) > 0


def test_no_requests_no_answers() -> None:
    assert write(tiny.llama(layers=1), []) == []


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"prompt_ids": (5,) * 92},
            {},
            r"A prompt of 92 tokens and max_new_tokens \(6\) pass the student's 96",
        ),
        (
            {"teacher_prompt_ids": (5,) * 92},
            {},
            r"A prompt of 92 tokens and max_new_tokens \(6\) pass the teacher's 96",
        ),
        ({"prompt_ids": ()}, {}, r"Prompt 'row 0' has no tokens; expected at least one\."),
        ({"max_new_tokens": 0}, {}, r"max_new_tokens is 0; expected a whole number, at least 1\."),
        ({}, {"top_p": 0.0}, r"top_p is 0\.0; expected a number in \(0, 1\], where 1 is the whole vocabulary\."),
        ({}, {"sampling_temperature": 0.0}, r"sampling_temperature is 0\.0; expected a finite number above 0"),
    ],
)
def test_bad_input(changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    asked = [replace(requests()[0], **changes)]
    with pytest.raises(DrklError, match=message):
        write(tiny.llama(layers=1), asked, teacher=tiny.llama(1, layers=1), source="mixed", **settings)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_logits_that_are_no_numbers_are_refused(which: str) -> None:
    models = {"student": tiny.llama(layers=1), "teacher": tiny.llama(1, layers=1)}
    models[which].model.norm.weight.data[0] = float("nan")
    with pytest.raises(DrklError, match="logits are not finite numbers: its weights are broken, or overflow"):
        write(models["student"], requests(), teacher=models["teacher"], source="mixed")


def test_a_short_answer_after_a_long_prompt_stays_within_the_positions() -> None:
    """Its row has no position left when it ends, and the others of its batch go on."""
    model = tiny.gpt2(1)
    context = model.config.max_position_embeddings
    asked = [Request("long", 0, (5,) * (context - 2), (), 2)]
    asked += [Request(str(i), 0, (5, 6 + i), (), 30) for i in range(20)]
    assert [len(answer.token_ids) for answer in write(model, asked, stops=[])] == [2, *[30] * 20]
