"""Conversations of which every assistant turn is learnt: the same trained tokens as lists made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drkl.data import Example
from drkl.data.batching import bucket_by_length
from drkl.data.collate import IGNORE_INDEX, collate
from drkl.data.template import encode_prompt, encode_response, encode_turns
from drkl.data.tokenize import Row, tokenize_examples
from drkl.errors import DrklError
from drkl.losses import distillation_loss, fused_distillation_loss
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('No system here') }}{% endif %}{% endfor %}"
)
MESSAGES = (
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
)
CONVERSATION = Example("c", MESSAGES)


def llama3() -> Any:
    tokenizer = build(LLAMA3, eos="<|eot_id|>", pad="<|eot_id|>", extra=["\n\n"])
    words = ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer


# What is learnt stands in capitals' place: between the brackets of the marks » and «.
BY_HAND: dict[str, tuple[Any, str]] = {
    "chatml": (
        lambda: build(CHATML, pad="<|im_end|>"),
        "<|im_start|>·user·\n·hi· ·there·<|im_end|>·\n·<|im_start|>·assistant·\n·»·hello·<|im_end|>·«·\n·"
        "<|im_start|>·user·\n·a·<|im_end|>·\n·<|im_start|>·assistant·\n·»·b· ·c·<|im_end|>·«",
    ),
    "llama3": (
        llama3,
        "<s>·<|start_header_id|>·user·<|end_header_id|>·\n·\n·hi· ·there·<|eot_id|>·"
        "<|start_header_id|>·assistant·<|end_header_id|>·\n·\n·»·hello·<|eot_id|>·«·"
        "<|start_header_id|>·user·<|end_header_id|>·\n·\n·a·<|eot_id|>·"
        "<|start_header_id|>·assistant·<|end_header_id|>·\n·\n·»·b· ·c·<|eot_id|>·«",
    ),
    "zephyr": (
        lambda: build(ZEPHYR, eos="</s>", pad="</s>", extra=["<", ">", "|"]),
        "<·|·user·|·>·\n·hi· ·there·</s>·\n·<·|·assistant·|·>·\n·»·hello·</s>·«·\n·"
        "<·|·user·|·>·\n·a·</s>·\n·<·|·assistant·|·>·\n·»·b· ·c·</s>·«",
    ),
    "mistral": (
        lambda: build(MISTRAL, eos="</s>", pad="</s>"),
        "<s>·[·INST·]· ·hi· ·there· ·[·/·INST·]·»·hello·</s>·«·[·INST·]· ·a· ·[·/·INST·]·»·b· ·c·</s>·«",
    ),
}


def by_hand(marked: str) -> tuple[list[str], list[bool]]:
    tokens, trained, on = [], [], False
    for token in marked.split("·"):
        if token in "»«":
            on = token == "»"
        else:
            tokens.append(token)
            trained.append(on)
    return tokens, trained


def all_turns(example: Example, tokenizer: Any, max_tokens: int = 200, max_prompt_tokens: int = 60) -> Row:
    (row,), _ = tokenize_examples(
        [example], tokenizer, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, turns="all"
    )
    return row


@pytest.mark.parametrize("name", BY_HAND)
def test_the_trained_tokens_are_those_of_a_list_by_hand(name: str) -> None:
    make, marked = BY_HAND[name]
    tokenizer = make()
    tokens, trained = by_hand(marked)
    row = all_turns(CONVERSATION, tokenizer)
    assert tokenizer.convert_ids_to_tokens([*row.prompt_ids, *row.response_ids]) == tokens
    start = len(row.prompt_ids)
    assert row.trained == tuple(trained[start:]) and not any(trained[:start]) and trained[start]
    assert row.num_trained == sum(trained) == len(row.trained_ids)
    # eos is among them, also where it fills the batch.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert row.trained_ids.count(tokenizer.eos_token_id) == 2
    labels = collate([row, replace(row, response_ids=(1,) * 90, trained=None)], pad_id=tokenizer.pad_token_id)["labels"]
    expected = [i if t else IGNORE_INDEX for i, t in zip(row.prompt_ids + row.response_ids, trained, strict=True)]
    assert labels[0].tolist() == expected[1:] + [IGNORE_INDEX] * (labels.shape[1] - len(expected) + 1)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_turn_is_what_it_is_as_the_last_one(name: str) -> None:
    tokenizer = BY_HAND[name][0]()
    ids, spans, _ = encode_turns(tokenizer, MESSAGES)
    for turn, (start, end) in zip((1, 3), spans, strict=True):
        assert ids[:start] == encode_prompt(tokenizer, MESSAGES[:turn])
        assert ids[start:end] == encode_response(tokenizer, MESSAGES[: turn + 1])
    last = all_turns(CONVERSATION, tokenizer)
    assert list(last.sampling_ids) == encode_prompt(tokenizer, MESSAGES[:3])
    assert last.example == CONVERSATION


@given(
    texts=st.lists(st.text("abc. #\n", max_size=6), min_size=4, max_size=4),
    template=st.sampled_from([CHATML, MISTRAL]),
)
def test_turns_that_would_merge_are_still_those_of_the_last_one(texts: list[str], template: str) -> None:
    tokenizer = build(template, eos="</s>" if template == MISTRAL else "<|im_end|>")
    messages = [{**m, "content": f"a{text}b"[i % 2 :]} for i, (m, text) in enumerate(zip(MESSAGES, texts, strict=True))]
    ids, spans, _ = encode_turns(tokenizer, messages)
    for turn, (start, end) in zip((1, 3), spans, strict=True):
        assert ids[start:end] == encode_response(tokenizer, messages[: turn + 1])


def test_one_turn_is_the_same_row_either_way() -> None:
    example = Example("x", MESSAGES[:2])
    for tokenizer in (build(CHATML), build(None, eos="</s>")):
        (last,), _ = tokenize_examples([example], tokenizer, max_prompt_tokens=100, max_tokens=200)
        assert all_turns(example, tokenizer, max_prompt_tokens=100) == last


def test_without_a_chat_template_turns_follow_as_instructions() -> None:
    tokenizer = build(None, eos="</s>", extra="Below is an instruction that describes task Write response".split())
    ids, spans, _ = encode_turns(tokenizer, MESSAGES, "alpaca")
    text = ["".join(tokenizer.convert_ids_to_tokens(ids[a:b])) for a, b in spans]
    assert text == ["hello</s>", "b c</s>"]
    between = "".join(tokenizer.convert_ids_to_tokens(ids[spans[0][1] : spans[1][0]]))
    assert between == "\n\n### Instruction:\na\n\n### Response:\n"


def test_a_template_that_ends_no_turn_gets_eos_after_each() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    row = all_turns(CONVERSATION, tokenizer := build(template, eos="</s>"))
    tokens = tokenizer.convert_ids_to_tokens([*row.prompt_ids, *row.response_ids])
    assert "".join(tokens) == "user:hi there\nassistant:hello</s>\nuser:a\nassistant:b c</s>"
    assert tokenizer.convert_ids_to_tokens(row.trained_ids) == ["hello", "</s>", "b", " ", "c", "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or loop.index0 % 2 == 0 else '')"
    )
    with pytest.raises(DrklError, match=r"Row 'c': The chat template writes the assistant's earlier turns differently"):
        all_turns(CONVERSATION, build(forgetful))


def test_a_long_conversation_is_cut_at_its_end_and_sampling_answers_the_last_whole_turn() -> None:
    tokenizer = build(CHATML)
    whole = all_turns(CONVERSATION, tokenizer)
    start, second = len(whole.prompt_ids), len(whole.sampling_ids)
    cut = all_turns(CONVERSATION, tokenizer, max_tokens=second + 2, max_prompt_tokens=start)
    assert cut.response_ids == whole.response_ids[: second + 2 - start] and cut.num_trained == 4
    assert cut.sampling_ids == cut.prompt_ids and cut.example.messages == MESSAGES[:2]
    # Nothing of a user's turn is left at the end.
    for limit in range(start + 2, second + 1):
        row = all_turns(CONVERSATION, tokenizer, max_tokens=limit, max_prompt_tokens=start)
        assert row.trained == (True, True) and row.response_ids == whole.response_ids[:2]
    one = all_turns(CONVERSATION, tokenizer, max_tokens=start + 1, max_prompt_tokens=start)
    assert (one.num_trained, one.sampling_ids, one.example.messages) == (1, whole.prompt_ids, MESSAGES[:2])


def test_an_empty_reply_anywhere_drops_the_row() -> None:
    messages = (MESSAGES[0], {"role": "assistant", "content": " "}, *MESSAGES[2:])
    examples = [Example("a", messages), Example("b", MESSAGES)]
    words = {"max_prompt_tokens": 60, "max_tokens": 200}
    rows, report = tokenize_examples(examples, build(), turns="all", **words)  # type: ignore[arg-type]
    assert [row.id for row in rows] == ["b"] and report.dropped == {"empty_response": 1}
    assert len(tokenize_examples(examples, build(), **words)[0]) == 2  # type: ignore[arg-type]


VOCAB = 9


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
        pairs = draw(st.lists(st.tuples(st.integers(0, VOCAB - 1), st.booleans()), min_size=1, max_size=5))
        ids, trained = zip(*pairs, strict=True)
        rows.append(Row(str(number), tuple(prompt), ids, CONVERSATION, trained if draw(st.booleans()) else None))
    return rows


def value_and_grad(kind: str, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    if kind == "dense":
        loss = distillation_loss(leaf, teacher, labels, kd_weight=0.7)
    else:
        head = torch.eye(VOCAB)
        loss = fused_distillation_loss(leaf, head, teacher, head, labels, kd_weight=0.7)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("kind", ["dense", "fused"])
@settings(max_examples=25)
@given(rows=batches(), anything=st.sampled_from([0.0, 50.0, -1e4, 1e30]), seed=st.integers(0, 99))
def test_logits_of_masked_tokens_move_neither_loss_nor_gradient(
    kind: str, rows: list[Row], anything: float, seed: int
) -> None:
    labels = collate(rows, pad_id=0)["labels"]
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*labels.shape, VOCAB, generator=generator) for _ in range(2))
    loss, grad = value_and_grad(kind, student, teacher, labels)
    masked = labels == IGNORE_INDEX
    assert int((~masked).sum()) == sum(row.num_trained for row in rows)
    noise = anything * torch.randn(int(masked.sum()), VOCAB, generator=generator)
    student[masked], teacher[masked] = noise, -noise
    again, other = value_and_grad(kind, student, teacher, labels)
    assert torch.equal(loss, again) and torch.equal(grad, other)
    assert not grad[masked].any()


def copying_nll(labels: Tensor, ids: Tensor) -> float:
    """Of a model that knows the sequence by heart: its logits at ``t`` are sure of token ``t + 1``."""
    following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
    logits = 50.0 * torch.nn.functional.one_hot(following, 64).float()
    return float(distillation_loss(logits, None, labels, objective="ce"))


def test_a_shift_by_one_is_seen() -> None:
    tokenizer = build(CHATML)
    row = all_turns(CONVERSATION, tokenizer)
    batch = collate([row], pad_id=0)
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    assert batch["input_ids"].tolist() == ids[:, :-1].tolist()
    labels = torch.cat([batch["labels"], torch.tensor([[IGNORE_INDEX]])], dim=1)
    assert copying_nll(labels, ids) == 0.0
    assert copying_nll(labels.roll(1, dims=1), ids) > 10 and copying_nll(labels.roll(-1, dims=1), ids) > 10


def loss_of(model: Any, batches: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
    """The mean over all trained tokens of all batches, and its gradient."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        total = total + distillation_loss(
            model(**inputs, use_cache=False).logits, None, batch["labels"], objective="ce", reduction="sum"
        )
    loss = total / sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    width = batch["labels"].shape[1]
    moved = {
        k: torch.stack([r.roll(width - n) for r, n in zip(batch[k], lengths, strict=True)])
        for k in batch
        if k != "row_ids"
    }
    moved["position_ids"] = (moved["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return moved


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_padding_side_batches_and_buckets_leave_loss_and_gradient(make: Any) -> None:
    tokenizer = build(CHATML)
    texts = ["hi", "a b", "a b c d a b c", "hello there a"]
    examples = [
        Example(str(i), tuple({**m, "content": texts[(i + j) % 4]} for j, m in enumerate(MESSAGES))) for i in range(4)
    ]
    rows, _ = tokenize_examples(examples, tokenizer, max_prompt_tokens=60, max_tokens=90, turns="all")
    model = make(layers=2).double().eval()  # batches of other shapes are summed in another order
    together = [collate(rows, pad_id=0)]
    buckets = [[rows[i] for i in b] for b in bucket_by_length([row.length for row in rows], 70)]
    assert len(buckets) > 1
    expected, gradients = loss_of(model, together)
    for other in (
        [collate(rows, pad_id=7)],
        [collate([row], pad_id=0) for row in rows[::-1]],
        [collate(bucket, pad_id=0) for bucket in buckets],
        [collate(bucket[::-1], pad_id=0) for bucket in buckets[::-1]],
        [padded_left(together[0])],
    ):
        loss, found = loss_of(model, other)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for one, two in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
