"""Models over held-out rows, against one forward pass for each row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from drkl.data import Example
from drkl.data.classification import LabelledRow
from drkl.data.tokenize import tokenize_examples
from drkl.losses import LMHead
from drkl.models import readout
from drkl.models.forward import decoder_start, output_head
from drkl.models.readout import Readout, batches, chunks, logits_of, read, read_logits
from drkl.processes import Share
from tests.evaluation import tiny
from tests.groups import in_group
from tests.models import tiny as tiny_models
from tests.models import tiny_classifiers


def plain_logits(model: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row through the model's own forward."""
    parts, labels = [], []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            parts.append(model(ids).logits[0, len(row.prompt_ids) - 1 : -1])
        labels.append(ids[0, len(row.prompt_ids) :])
    return torch.cat(parts), torch.cat(labels)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_every_response_token_in_the_order_of_the_rows(tokens_per_batch: int) -> None:
    model, rows = tiny.gpt2(0), tiny.rows()
    seen: list[int] = []
    found = read(model, rows, pad_id=0, tokens_per_batch=tokens_per_batch, progress=seen.append)
    logits, labels = plain_logits(model, rows)
    assert sum(seen) == len(rows) and found.labels.tolist() == labels.tolist()
    assert found.row_index.tolist() == [i for i, row in enumerate(rows) for _ in row.response_ids]
    torch.testing.assert_close(found.logits(slice(None)), logits)
    torch.testing.assert_close(found.logits(torch.tensor([3, 1])), logits[[3, 1]])
    trimmed = read(model, rows, pad_id=0, vocab_size=20)
    assert trimmed.num_outputs == 20
    torch.testing.assert_close(trimmed.logits(slice(0, 5)), logits[:5, :20])


def test_ids_that_are_one_class() -> None:
    model, rows = tiny.gpt2(0), tiny.rows()
    logits, labels = plain_logits(model, rows)
    vocab = logits.shape[1]
    ids = (int(labels[0]), vocab - 1) if int(labels[0]) < vocab - 1 else (1, vocab - 1)
    found = read(model, rows, pad_id=0, merged_ids=ids)
    assert found.num_outputs == vocab - 1
    probabilities = logits.double().softmax(-1)
    chance = found.logits(slice(None)).double().softmax(-1)
    others = [token for token in range(vocab) if token not in ids]
    torch.testing.assert_close(chance[:, others], probabilities[:, others], atol=1e-6, rtol=0)
    torch.testing.assert_close(chance[:, ids[0]], probabilities[:, list(ids)].sum(-1), atol=1e-6, rtol=0)
    assert found.targets(slice(None)).tolist() == [ids[0] if token in ids else token for token in labels.tolist()]
    assert found.labels.tolist() == labels.tolist()
    again = Readout.from_tensors(found.to_tensors(), merged_ids=ids)
    assert torch.equal(again.logits(slice(0, 3)), found.logits(slice(0, 3)))


def test_chosen_positions() -> None:
    rows = tiny.rows()
    wanted = {4: [1], 0: [0, 1], 2: []}
    found = {
        row: (batch.labels[batch.keep[:line].sum() : batch.keep[: line + 1].sum()]).tolist()
        for batch in batches(rows, pad_id=0, positions=wanted, tokens_per_batch=10)
        for line, row in enumerate(batch.rows)
    }
    assert found == {row: [rows[row].trained_ids[i] for i in at] for row, at in wanted.items() if at}


def test_an_encoder_decoder() -> None:
    model = tiny_models.t5().eval()
    turns = [({"role": "user", "content": f"w{i} w3"}, {"role": "assistant", "content": "w1 w2"}) for i in range(4)]
    examples = [Example(f"r{i}", messages) for i, messages in enumerate(turns)]
    lengths = {"max_prompt_tokens": 20, "max_tokens": 40}
    rows, _ = tokenize_examples(examples, tiny_models.tokenizer(), encoder_decoder=True, **lengths)
    found = read(model, rows, pad_id=0)
    parts = []
    for row in rows:
        decoder_ids = torch.tensor([[decoder_start(model), *row.response_ids[:-1]]])
        with torch.no_grad():
            parts.append(model(input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=decoder_ids).logits[0])
    torch.testing.assert_close(found.logits(slice(None)), torch.cat(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("encoder_decoder", "packed"), [(False, False), (False, True), (True, False)])
def test_a_teacher_reads_its_own_rendering_of_a_prompt(encoder_decoder: bool, packed: bool) -> None:
    """Against one row at a time, unpadded, through the whole model."""
    teacher = (tiny_models.t5() if encoder_decoder else tiny_models.llama()).eval()
    start = decoder_start(teacher)
    rows = [
        replace(row, teacher_prompt_ids=own, encoder_decoder=encoder_decoder)
        for row, own in zip(tiny.rows()[:3], [(9, 8, 7, 6, 5, 40), None, (33,)], strict=True)
    ]
    expected, labels = [], []
    for row in rows:
        prompt = row.teacher_prompt_ids or row.prompt_ids
        with torch.no_grad():
            if encoder_decoder:
                decoder_ids = torch.tensor([[start, *row.response_ids[:-1]]])
                logits = teacher(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
            else:
                logits = teacher(torch.tensor([[*prompt, *row.response_ids]])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits)
        labels.append(list(row.response_ids))
    head = output_head(teacher)
    chosen = {0: [1], 1: [0, 1], 2: [0]}
    for batch in batches(rows, pad_id=0, decoder_start=start, positions=chosen, packed=packed):
        own = batch.for_teacher
        wanted = [(number, place) for number in batch.rows for place in chosen[number]]
        assert own.labels.tolist() == batch.labels.tolist() == [labels[number][place] for number, place in wanted]
        found = logits_of(own.states(teacher), head)
        torch.testing.assert_close(
            found, torch.stack([expected[number][place] for number, place in wanted]), rtol=1e-4, atol=1e-4
        )
        assert batch.keep.sum() == own.keep.sum() == len(wanted)


def test_a_classifier_has_a_position_for_each_text_and_keeps_its_config() -> None:
    model = tiny_classifiers.make("llama", 2)
    model.config.pad_token_id = None
    rows = [LabelledRow(f"r{i}", (1, *range(6, 7 + i % 5), 2), i % 3, "") for i in range(9)]
    found = read(model, rows, pad_id=0)
    assert found.head is None and found.hidden.shape == (9, 3) and found.labels.tolist() == [i % 3 for i in range(9)]
    for row, logits in zip(rows, found.logits(slice(None)), strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([row.ids])).logits[0]
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id is None


def test_padding_changes_nothing() -> None:
    model, rows = tiny.llama(), tiny.rows()
    first, second = (read(model, rows, pad_id=pad) for pad in (0, 7))
    torch.testing.assert_close(first.hidden, second.hidden)


def test_two_models_chunk_by_chunk() -> None:
    rows = tiny.rows()
    student, teacher = (read(model, rows, pad_id=0) for model in (tiny.gpt2(), tiny.llama()))
    seen = 0
    for part, ours, theirs, labels in read_logits(student, teacher, 7):
        torch.testing.assert_close(ours, student.logits(part))
        assert theirs is not None and labels.tolist() == student.labels[part].tolist()
        torch.testing.assert_close(theirs, teacher.logits(part))
        seen += len(labels)
    assert seen == len(student.labels)
    assert all(theirs is ours for _, ours, theirs, _ in read_logits(student, student))
    assert [theirs for _, _, theirs, _ in read_logits(student, None)] == [None]
    assert list(chunks(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    hidden = torch.ones(2, 3)
    assert logits_of(hidden, None) is hidden
    assert logits_of(hidden, LMHead(torch.ones(5, 3)), 4).shape == (2, 4)


def test_the_model_must_be_in_eval_mode() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        read(tiny.llama().train(), tiny.rows(), pad_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_readout_survives_a_file(dtype: torch.dtype) -> None:
    hidden, labels, rows = torch.randn(5, 3).to(dtype), torch.arange(5), torch.tensor([0, 0, 1, 1, 2])
    weight = torch.randn(9, 3).to(dtype).requires_grad_()
    heads = (LMHead(weight), LMHead(weight, torch.randn(9).to(dtype), 0.25, 30.0).trimmed(7))
    for head in heads:
        readout = Readout(hidden, labels, rows, head)
        again = Readout.from_tensors(load(save(readout.to_tensors())))
        assert torch.equal(again.logits(slice(None)), readout.logits(slice(None)))
        assert torch.equal(again.labels, labels) and torch.equal(again.row_index, rows)
        few = {name: tensor for name, tensor in readout.to_tensors().items() if not name.startswith("head.")}
        assert Readout.from_tensors(few, head).head is head
    classes = Readout(hidden, labels, rows, None)
    assert Readout.from_tensors(load(save(classes.to_tensors()))).head is None


@pytest.mark.parametrize("count", [2, 6])
def test_processes_compare_whole_chunks_and_have_all_positions_together(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also more processes than chunks: some have no positions then."""
    monkeypatch.setattr(readout, "CHUNK", 4)
    rows, whole = tiny.rows(), read(tiny.gpt2(0), tiny.rows(), pad_id=0, tokens_per_batch=40)
    models = [tiny.gpt2(0) for _ in range(count)]
    wanted = torch.tensor([1, 2, 5, 11])

    def work(share: Share) -> list[Any]:
        model = models[share.place.number]
        own = read(model, rows, pad_id=0, tokens_per_batch=40, share=share)
        every = read(model, rows, pad_id=0, tokens_per_batch=40, share=share, whole=True)
        return [own, every, whole.own(share), own.at(wanted, share), own.in_first(share)]

    found = in_group(count, work)
    places = [own.positions.tolist() for own, *_ in found]
    total = len(whole.labels)
    assert places == [[i for i in range(total) if i // 4 % count == number] for number in range(count)]
    for own, every, cut, some, in_first in found:
        assert_same(own, whole, own.positions)
        assert_same(cut, whole, own.positions)
        assert_same(every, whole, torch.arange(total))
        assert_same(some, whole, wanted)
        assert every.positions is None and cut.positions.tolist() == own.positions.tolist()
        assert in_first is None or found[0][4] is in_first
    assert_same(found[0][4], whole, torch.arange(total))


def assert_same(part: Readout, whole: Readout, places: torch.Tensor) -> None:
    for name in ("hidden", "labels", "row_index"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[places]), name


def test_the_first_process_has_long_texts_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "CHUNK", 1)
    states = torch.arange(100.0)[:, None]
    whole = Readout(states, torch.arange(100), torch.arange(100) // 9, None)
    first, second = in_group(2, lambda share: whole.own(share).in_first(share))
    assert second is None and first.positions is None
    assert_same(first, whole, torch.arange(100))
