"""With which tokens two models stop, and what is read of a teacher where finished rows end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drkl
from drkl.data import Example
from drkl.data.tokenize import Row, tokenize_examples
from drkl.errors import DrklError
from drkl.losses.topk import TopK
from drkl.models.load import load_model
from drkl.teachers.live import LiveTeacher
from drkl.teachers.stops import ROWS, read_stops, student_stops
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny
from tests.models.chains import chain

EOS, IM_END = 2, 4


def rows(count: int, turns: int = 1) -> list[Row]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": ("hi", "hello")[i % 2]} for i in range(2 * turns)]
    examples = [Example(str(i), tuple(messages)) for i in range(count)]
    return tokenize_examples(examples, build(CHATML), max_prompt_tokens=40, max_tokens=60, turns="all")[0]


def test_a_few_rows_are_read_at_the_end_of_every_learnt_turn() -> None:
    tokenizer = build(CHATML)
    teacher = chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"})
    cut = Row("cut", (1, 7), (8, 9), rows(1)[0].example)
    stops = read_stops(None, LiveTeacher(teacher), [cut, *rows(ROWS + 5, turns=2)], tokenizer, [], pad_id=0)
    assert stops.num_rows == ROWS and stops.labels.tolist() == [IM_END] * 2 * ROWS
    hello = tokenizer.convert_tokens_to_ids("hello")
    with torch.no_grad():
        expected = teacher(torch.tensor([[hello]])).logits[0, 0].log_softmax(-1)
    torch.testing.assert_close(stops.logp, expected.expand(2 * ROWS, -1))


def test_memory_that_runs_out_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    tokenizer = build(CHATML)
    teacher = LiveTeacher(chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"}))
    monkeypatch.setattr(LiveTeacher, "states", fail)
    with pytest.raises(DrklError, match=r"ran out as the teacher reads 1 row.*data\.max_tokens"):
        read_stops(None, teacher, rows(1), tokenizer, [], pad_id=0)


def test_a_special_token_that_the_teacher_is_sure_of_is_a_stop_token_unless_its_head_has_none() -> None:
    tokenizer = build(None, eos="</s>")
    teacher = chain(tokenizer, {"hello": "<|im_end|>"})
    assert read_stops(None, LiveTeacher(teacher), rows(1), tokenizer, [IM_END], pad_id=0).teacher == [EOS, IM_END]
    teacher.generation_config.eos_token_id = len(tokenizer)
    tokenizer.add_tokens(["<late>"], special_tokens=True)
    assert read_stops(None, LiveTeacher(teacher), rows(1), tokenizer, [IM_END], pad_id=0).teacher == [EOS, IM_END]
    assert read_stops(None, LiveTeacher(teacher), [], tokenizer, [], pad_id=0).teacher == [EOS, len(tokenizer) - 1]


def test_a_tokenizer_of_another_vocabulary_is_not_asked(tmp_path: Path) -> None:
    model, run = chain(build(), {}, eos_token_id=EOS), build(None, eos="</s>", extra=["x", "y"])
    folder = tiny.save(model, tmp_path / "x", build(CHATML))
    assert student_stops(load_model(folder, "fp32"), run) == [IM_END, EOS]  # it has the first of them
    build(CHATML, extra=["y", "x"]).save_pretrained(folder)
    assert student_stops(load_model(folder, "fp32"), run) == [EOS]


def test_a_trainer_reads_the_ends_once(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    teacher, student = (chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"}) for _ in range(2))
    calls: list[Any] = []
    teacher.get_decoder().register_forward_hook(lambda *given: calls.append(given[2]))
    args = drkl.DistillationConfig(
        output_dir=str(tmp_path), use_cpu=True, precision="fp32", eval_strategy="no", tokens_per_step=200,
        max_tokens=64, max_steps=1, rollout_share=0.5, rollout_max_new_tokens=8,
    )  # fmt: skip
    data = [{"prompt": "hi", "response": "hello"}] * 8
    trainer = drkl.DistillationTrainer(student, LiveTeacher(teacher), args, data, processing_class=tokenizer)
    assert len([out for out in calls if len(out[0]) == 8]) == 1
    assert trainer.pair.ends is not None and not trainer.pair.ends.differ
    (note,) = [note for note in trainer.pair.notes if note.startswith("The student stops with")]
    assert f"a probability of {trainer.pair.ends.taught_probability:.2g}." in note


def test_of_a_few_logits_the_ends_are_those_that_are_known(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    teacher = LiveTeacher(chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"}))
    whole = read_stops(None, teacher, rows(3), tokenizer, [], pad_id=0)
    labels = torch.full((3,), IM_END)

    class Known:
        model, head, k = teacher.model, None, 1

        def states(self, batch: Any) -> TopK:
            """Its most probable token is another one, and the label is known beside it."""
            logits = whole.logp.index_fill(1, torch.tensor([7]), 5.0)
            return TopK.of_logits(logits, 1, labels=labels)

    stops = read_stops(None, Known(), rows(3), tokenizer, [], pad_id=0)  # type: ignore[arg-type]
    expected = whole.logp.index_fill(1, torch.tensor([7]), 5.0).log_softmax(-1)
    others = torch.ones(whole.logp.shape[1], dtype=torch.bool)
    others[[7, IM_END]] = False
    torch.testing.assert_close(stops.logp[:, ~others], expected[:, ~others])
    assert bool((stops.logp[:, others] == -torch.inf).all()) and stops.teacher == whole.teacher
