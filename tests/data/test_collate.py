from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drkl.data import Example
from drkl.data.collate import IGNORE_INDEX, collate, collate_prompts, each_row, is_packed, teacher_inputs
from drkl.data.tokenize import Row, tokenize_examples
from tests.data.tiny_tokenizers import build

EXAMPLE = Example("a", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}))
N = IGNORE_INDEX


def row(row_id: str, prompt: list[int], response: list[int]) -> Row:
    return Row(row_id, tuple(prompt), tuple(response), EXAMPLE)


def test_labels_are_what_the_logits_predict() -> None:
    batch = collate([row("x", [11, 12, 13], [21, 22, 2]), row("y", [14], [23, 2])], pad_id=0)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22], [14, 23, 0, 0, 0]]
    assert batch["labels"].tolist() == [[N, N, 21, 22, 2], [23, 2, N, N, N]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert "position_ids" not in batch  # RoBERTa's do not count from 0
    assert batch["row_ids"] == ["x", "y"]
    assert all(batch[name].dtype == torch.int64 for name in batch if name != "row_ids")


def test_eos_is_learnt_where_it_is_the_padding_token() -> None:
    batch = collate([row("x", [11], [21, 2]), row("y", [11, 2, 12], [2])], pad_id=2)
    assert batch["labels"].tolist() == [[21, 2, N], [N, N, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_eos_is_learnt_from_text_to_labels() -> None:
    tokenizer = build(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows, _ = tokenize_examples([EXAMPLE], tokenizer, max_prompt_tokens=50, max_tokens=90)
    labels = collate(rows, pad_id=tokenizer.pad_token_id)["labels"]
    assert tokenizer.convert_ids_to_tokens(labels[labels != N].tolist()) == ["a", " ", "b", "<|im_end|>"]


def test_no_rows_give_one_ignored_position() -> None:
    batch = collate([], pad_id=7)
    values = {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
    assert values == {"input_ids": [[7]], "attention_mask": [[1]], "labels": [[N]]}
    assert batch["row_ids"] == []


IDS = st.lists(st.integers(0, 30), min_size=1, max_size=9)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), st.integers(0, 30))
def test_every_label_is_the_next_token_of_its_response(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> None:
    batch = collate([row(str(i), *pair) for i, pair in enumerate(pairs)], pad_id=pad_id)
    assert batch["input_ids"].shape == batch["labels"].shape
    for b, (prompt, response) in enumerate(pairs):
        sequence = prompt + response
        for t, label in enumerate(batch["labels"][b].tolist()):
            is_response = len(prompt) <= t + 1 < len(sequence)
            assert label == (sequence[t + 1] if is_response else N)
        fed = int(batch["attention_mask"][b].sum())
        assert batch["input_ids"][b, :fed].tolist() == sequence[:-1]
        assert (batch["input_ids"][b, fed:] == pad_id).all()


def test_packed_rows_lie_one_after_the_other() -> None:
    batch = collate([row("x", [11, 12], [21, 2]), row("y", [14], [2]), row("z", [15], [23, 2])], pad_id=0, packed=True)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 14, 15, 23]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[N, 21, 2, 2, 23, 2]]
    assert batch["row_ids"] == ["x", "y", "z"] and batch.keys() == {"input_ids", "position_ids", "labels", "row_ids"}
    empty = collate([], pad_id=7, packed=True)
    assert [empty[name].tolist() for name in ("input_ids", "position_ids", "labels")] == [[[7]], [[0]], [[N]]]


@settings(max_examples=20)
@given(st.lists(st.tuples(IDS, IDS, st.none() | IDS), min_size=1, max_size=5))
def test_a_packed_batch_has_what_a_padded_one_has_in_the_same_order(
    made: list[tuple[list[int], list[int], list[int] | None]],
) -> None:
    rows = [
        replace(row(str(i), prompt, response), teacher_prompt_ids=None if theirs is None else tuple(theirs))
        for i, (prompt, response, theirs) in enumerate(made)
    ]
    both = [collate(rows, pad_id=0, packed=packed) for packed in (False, True)]
    keeps = [batch["labels"] != N for batch in both]
    apart = []
    for batch, keep in zip(both, keeps, strict=True):
        teacher, teacher_keep = teacher_inputs(dict(batch))
        assert is_packed(batch) == is_packed(teacher) == (batch is both[1])
        assert batch["labels"][keep].tolist() == both[0]["labels"][keeps[0]].tolist()
        parts = [*each_row(batch, keep), *each_row(teacher, teacher_keep)]
        apart.append([([ids.tolist() for ids in own], kept.nonzero().tolist()) for own, kept in parts])
    assert apart[0] == apart[1]
    wanted = [(*prompt, *response[:-1]) for prompt, response, _ in made]
    assert [tuple(ids) for (ids,), _ in apart[1][: len(made)]] == wanted


def test_prompts_are_padded_on_the_left() -> None:
    batch = collate_prompts([[5, 6, 7], [8], (9, 1)], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8], [1, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_prompts_must_have_tokens(prompts: list[list[int]]) -> None:
    with pytest.raises(AssertionError, match="none empty"):
        collate_prompts(prompts, pad_id=0)


def two_renderings(encoder_decoder: bool = False) -> list[Row]:
    """Rows whose teacher reads a longer prompt, the same one and a shorter one; some tokens are not learnt."""
    prompts: list[tuple[list[int], list[int] | None]] = [
        ([11, 12], [31, 32, 33, 34]),
        ([13], None),
        ([14, 15, 16], [35]),
    ]
    responses = [[21, 22, 2], [23, 2], [24, 25, 26, 2]]
    rows = []
    for number, ((prompt, teacher), response) in enumerate(zip(prompts, responses, strict=True)):
        trained = None if encoder_decoder or number < 2 else (True, False, True, True)
        own = None if teacher is None else tuple(teacher)
        rows.append(
            Row(str(number), tuple(prompt), tuple(response), EXAMPLE, trained, None, encoder_decoder, own, sampled=True)
        )
    return rows


def test_the_teacher_reads_its_own_rendering_and_predicts_the_same_tokens() -> None:
    rows = two_renderings()
    batch = collate(rows, pad_id=0)
    labels = batch["labels"]
    inputs, keep = teacher_inputs(batch)
    assert not {name for name in batch if name.startswith("teacher_")}
    assert inputs["input_ids"].tolist() == [
        [31, 32, 33, 34, 21, 22],
        [13, 23, 0, 0, 0, 0],
        [35, 24, 25, 26, 0, 0],
    ]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    kept = labels[labels != N].tolist()
    assert kept == [21, 22, 2, 23, 2, 24, 26, 2]
    predicted = []
    for line, row in enumerate(rows):
        whole = [*(row.teacher_prompt_ids or row.prompt_ids), *row.response_ids]
        predicted += [whole[place + 1] for place in keep[line].nonzero().squeeze(1).tolist()]
    assert predicted == kept
    assert collate(rows[1:2], pad_id=0).keys() == {"input_ids", "attention_mask", "labels", "row_ids"}


def test_the_teachers_encoder_reads_its_own_rendering() -> None:
    batch = collate(two_renderings(encoder_decoder=True), pad_id=0, decoder_start=9)
    labels, sources = batch["labels"], batch["input_ids"]
    inputs, keep = teacher_inputs(batch)
    assert sources.tolist() == [[11, 12, 0], [13, 0, 0], [14, 15, 16]]
    assert inputs["input_ids"].tolist() == [[31, 32, 33, 34], [13, 0, 0, 0], [35, 0, 0, 0]]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 1, 1]
    assert inputs["decoder_input_ids"].tolist() == [[9, 21, 22, 0], [9, 23, 0, 0], [9, 24, 25, 26]]
    assert torch.equal(keep, labels != N)


def test_one_rendering_is_read_by_both() -> None:
    batch = collate([row("x", [11, 12], [21, 2])], pad_id=0)
    inputs, keep = teacher_inputs(batch)
    assert inputs.keys() == {"input_ids", "attention_mask"} and inputs["input_ids"] is batch["input_ids"]
    assert torch.equal(keep, batch["labels"] != N)
