from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from tests.models import tiny
from tests.models.test_forward import Shifted

ROWS = [Row("a", (5, 6, 7), (8, 9, 4), None), Row("b", (10,), (11, 4), None)]  # type: ignore[arg-type]


def test_its_head_of_its_hidden_states_is_its_logits(tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    teacher = LiveTeacher.load(TeacherConfig(model=str(tmp_path), dtype="fp32"), torch.device("cpu"))
    batch = collate(ROWS, pad_id=0)
    hidden = teacher.hidden(batch)
    theirs = tiny.llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep = batch["labels"] != -100
    torch.testing.assert_close(teacher.head.logits(hidden)[keep], theirs[keep])


def test_a_model_in_memory_is_read_without_gradients_and_left_as_it_was() -> None:
    model = tiny.gpt2().train()
    model.transformer.h[1].eval()
    model.transformer.wpe.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    teacher = LiveTeacher(model)
    hidden = teacher.hidden(collate(ROWS, pad_id=0))
    assert not hidden.requires_grad and not teacher.head.weight.requires_grad
    # Without dropout, though GPT-2 has it.
    assert torch.equal(hidden, teacher.hidden(collate(ROWS, pad_id=0)))
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert teacher.head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


def test_a_model_in_memory_is_left_as_it_was_after_a_failed_call() -> None:
    model = tiny.gpt2().train()
    with pytest.raises(IndexError):
        LiveTeacher(model).hidden({"input_ids": torch.tensor([[9999]]), "attention_mask": torch.ones(1, 1)})
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
)
def test_its_precision_is_its_own(dtype: str | torch.dtype, expected: torch.dtype, tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    teacher = LiveTeacher.load(TeacherConfig(model=str(tmp_path), dtype=dtype), torch.device("cpu"))
    assert teacher.hidden(collate(ROWS, pad_id=0)).dtype == expected


def test_a_model_with_other_logits_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(DrklError, match=r"Use a model of another family"):
        LiveTeacher(Shifted(tiny.llama().config))


def test_states_at_the_positions_that_count() -> None:
    teacher, batch = LiveTeacher(tiny.llama()), collate(ROWS, pad_id=0)
    keep = batch["labels"] != -100
    assert torch.equal(teacher.hidden_at(batch, keep), teacher.hidden(batch)[keep])
    nothing = collate([], pad_id=0)
    assert teacher.hidden_at(nothing, nothing["labels"] != -100).shape == (0, 16)


def test_remembered_states_are_the_same_bits_and_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = LiveTeacher(tiny.llama(), remember_mb=1)
    batches = [collate(rows, pad_id=0) for rows in (ROWS, ROWS[:1], ROWS[1:])]
    first = [teacher.hidden_at(batch, batch["labels"] != -100) for batch in batches]
    monkeypatch.setattr(LiveTeacher, "hidden", lambda *a: pytest.fail("ran the teacher again"))
    again = [teacher.hidden_at(batch, batch["labels"] != -100) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_differs_in_one_token_or_position_is_another_batch() -> None:
    teacher, batch = LiveTeacher(tiny.llama(), remember_mb=1), collate(ROWS, pad_id=0)
    keep = batch["labels"] != -100
    plain = teacher.hidden_at(batch, keep)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 0] = 20
    assert not torch.equal(teacher.hidden_at(other, keep), plain)
    fewer = keep.clone()
    fewer[0] = False
    assert teacher.hidden_at(batch, fewer).shape[0] < plain.shape[0]


def test_memory_that_is_full_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = LiveTeacher(tiny.llama(), remember_mb=1)
    teacher._bytes_left = 5 * 16 * 4  # the five states of ROWS in fp32
    batches = [collate(rows, pad_id=0) for rows in (ROWS, ROWS[:1])]
    states = [teacher.hidden_at(batch, batch["labels"] != -100) for batch in batches]
    assert len(teacher._memory) == 1
    assert torch.equal(teacher.hidden_at(batches[1], batches[1]["labels"] != -100), states[1])
