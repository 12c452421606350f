"""The answers to held-out prompts while training goes on, and the numbers and warnings that come of answers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.rollouts.answers import Answer, Request
from drkl.runs import RunFolder
from tests.models import tiny
from tests.training import tiny_runs
from tests.training.test_trainer import make_trainer, rows

NUMBERS = {"answers", "finished", "length", "ends_per_1000", "distinct2", "repeated4"}
VALUES = {"loss", "nll", "student_entropy", "teacher_entropy", "fkl", "rkl", "agreement"}


class Canned:
    """Writes what it was given, prompt by prompt, and notes what it was asked."""

    def __init__(self, *answers: tuple[int, ...]) -> None:
        self.answers, self.asked = answers, list[list[Request]]()

    def write(self, requests: Sequence[Request], *, seed: int, progress: Any = None) -> list[Answer]:
        self.asked.append(list(requests))
        return [Answer(ids, ids[-1] == 4) for ids in self.answers[: len(requests)]]


def trainer_with(tmp_path: Path, heldout: list[Row], **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "rollout_share": 1.0, "rollout_max_new_tokens": 6, "eval_strategy": "steps", "eval_steps": 1,
        "objective": "fkl",
    }  # fmt: skip
    return make_trainer(tmp_path, rows(6), heldout=heldout, **(settings | arguments))


def written_by(trainer: Any, writer: Canned) -> Canned:
    """Have the answers to the trainer's held-out prompts come from a writer."""
    trainer._measures.answers._asker._writer = writer
    return writer


def heldout_rows(count: int) -> list[Row]:
    return [replace(row, id=f"held-{row.id}") for row in rows(count)]


@pytest.mark.parametrize("kd_weight", [1.0, 0.6])
def test_the_loss_on_answers_is_that_of_a_loop(tmp_path: Path, kd_weight: float) -> None:
    """Forward KL at each token of the answers; no cross-entropy, whatever its weight in the loss."""
    trainer = trainer_with(tmp_path, heldout_rows(3), loss=LossConfig(kd_weight=kd_weight))
    written = [(7, 9, 4), (11, 12, 13, 14, 11, 12), (4,)]
    written_by(trainer, Canned(*written))
    found = trainer.evaluate()
    student, teacher = tiny.llama(1, layers=2).double(), tiny.llama(9).double()
    total, entropy = 0.0, 0.0
    for row, ids in zip(heldout_rows(3), written, strict=True):
        fed = torch.tensor([row.prompt_ids + ids])
        with torch.no_grad():
            q, p = (
                torch.softmax(model(input_ids=fed).logits[0, len(row.prompt_ids) - 1 : -1], -1).numpy()
                for model in (student, teacher)
            )
        for ours, theirs in zip(q, p, strict=True):
            total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(ours, theirs, strict=True))
            entropy -= sum(a * math.log(a) for a in ours)
    assert found["eval_rollout_loss"] == pytest.approx(kd_weight * total / 10, rel=1e-6)
    assert found["eval_rollout_fkl"] == pytest.approx(total / 10, rel=1e-6)
    assert found["eval_rollout_student_entropy"] == pytest.approx(entropy / 10, rel=1e-6)
    assert found["eval_rollout_finished"] == 2 / 3 and found["eval_rollout_length"] == 10 / 3
    expected = {f"eval_rollout_{name}" for name in NUMBERS | VALUES} | {f"eval_{name}" for name in VALUES}
    assert found.keys() - {"epoch"} == expected | {"eval_response_distinct2", "eval_response_repeated4"}
    kept = RunFolder(tmp_path).read_rollouts()
    assert [(line["step"], line["id"], line["finished"], line["num_tokens"]) for line in kept] == [
        (0, "held-row-0", True, 3),
        (0, "held-row-1", False, 6),
        (0, "held-row-2", True, 1),
    ]


def test_each_evaluation_asks_the_same(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, heldout_rows(9), rollout_eval_prompts=4, max_steps=2)
    writer = written_by(trainer, Canned(*[(7, 4)] * 4))
    trainer.train()
    assert len(writer.asked) == 3 and writer.asked[0] == writer.asked[1] == writer.asked[2]
    assert len({request.key for request in writer.asked[0]}) == 4
    other = trainer_with(tmp_path, heldout_rows(9)[::-1], rollout_eval_prompts=4)
    other_writer = written_by(other, Canned(*[(7, 4)] * 4))
    other.evaluate()
    chosen = {request.key for request in other_writer.asked[0]}
    assert chosen == {request.key for request in writer.asked[0]}, "by their ids, not by their places"


def test_weights_that_did_not_change_write_the_same(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, heldout_rows(5), learning_rate=1e-30, max_steps=2, rollout_keep_texts=3)
    trainer.train()
    lines = RunFolder(tmp_path).read_rollouts()
    assert [line["step"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    texts = [[line["text"] for line in lines if line["step"] == step] for step in (0, 1, 2)]
    assert texts[0] == texts[1] == texts[2]
    log = [row for row in RunFolder(tmp_path).read_train_log() if "eval_rollout_loss" in row]
    assert [row["step"] for row in log] == [0, 1, 2]
    assert "eval_loss" not in log[0] and "eval_loss" in log[1]
    assert log[1]["eval_rollout_nll"] == log[2]["eval_rollout_nll"]


def test_prompts_alone_have_the_loss_on_answers(tmp_path: Path) -> None:
    bare = [replace(row, response_ids=()) for row in heldout_rows(4)]
    trainer = trainer_with(tmp_path, bare)
    found = trainer.evaluate()
    assert found["eval_loss"] == found["eval_rollout_loss"]
    assert "eval_nll" not in found and "eval_response_distinct2" not in found
    found = trainer.evaluate(eval_dataset=heldout_rows(2))
    assert found["eval_loss"] != found["eval_rollout_loss"]
    assert len(RunFolder(tmp_path).read_rollouts()) == 4, "of the trainer's own rows alone"
    own, other = RunFolder(tmp_path).read_train_log()
    assert own["eval_rollout_answers"] == 4 and other["other_eval_rollout_answers"] == 2
    assert not any(key.startswith("eval_") for key in other), "the warnings compare answers to the same prompts"
    with pytest.raises(DrklError, match="The held-out rows have no responses and rollout_eval_prompts is 0, so there"):
        trainer_with(tmp_path, bare, rollout_eval_prompts=0)


@pytest.mark.parametrize("off", [{"rollout_eval_prompts": 0}, {"rollout_share": 0.0}, {"eval_strategy": "no"}])
def test_nothing_is_answered_where_nothing_is_asked(tmp_path: Path, off: dict[str, Any]) -> None:
    trainer = trainer_with(tmp_path, heldout_rows(2), **off)
    trainer.train()
    assert not RunFolder(tmp_path).rollouts_path.exists()
    assert not [row for row in RunFolder(tmp_path).read_train_log() if "eval_rollout_loss" in row]


def test_a_run_without_held_out_rows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(4), rollout_share=1.0, rollout_max_new_tokens=4)
    trainer.train()
    assert not RunFolder(tmp_path).rollouts_path.exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_the_texts_of_the_steps_it_keeps(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, rollouts={"share": 1.0, "max_new_tokens": 5})
    run = tiny_runs.train(values)
    expected = run.rollouts_path.read_text()
    trainer_lines = [{"step": 99, "id": "x", "prompt": "", "text": "", "finished": True, "num_tokens": 1}]
    with run.rollouts_path.open("a") as file:
        file.write(json.dumps(trainer_lines[0]) + "\n{")
    env = run.read_env() | {"finished": None}
    run.env_path.write_text(json.dumps(env))
    tiny_runs.train(values, "resume")
    assert run.rollouts_path.read_text() == expected
    tiny_runs.train(values, "overwrite")
    assert run.rollouts_path.read_text() == expected, "an old run's texts are gone"


@pytest.mark.slow
def test_a_run_that_starts_again_in_its_folder_has_each_line_once(tmp_path: Path) -> None:
    for _ in range(2):
        trainer_with(tmp_path, heldout_rows(2), max_steps=1).train()
        assert [line["step"] for line in RunFolder(tmp_path).read_rollouts()] == [0, 0, 1, 1]
        steps = [row["step"] for row in RunFolder(tmp_path).read_train_log() if "eval_rollout_loss" in row]
        assert steps == [0, 1]


def endless(step: int) -> dict[str, float]:
    numbers = {"answers": 16, "finished": float(step < 4), "length": 20.0}
    return {f"eval_rollout_{name}": value for name, value in numbers.items()}


class Planted(TrainerCallback):
    """Puts numbers into the lines of the log, before what reads them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= endless(state.global_step)


class StopAt(TrainerCallback):
    """Ends a run after a step, as a machine that is taken away."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.slow
def test_the_warning_comes_once_and_not_again_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = rows(6)

    def run_to(steps: int, resume: bool) -> list[str]:
        caplog.clear()
        trainer = make_trainer(
            tmp_path, data, rollout_share=1.0, rollout_max_new_tokens=2, max_steps=12, save_strategy="steps",
            save_steps=1,
        )  # fmt: skip
        trainer.add_callback(StopAt(steps))
        trainer.callback_handler.callbacks.insert(0, Planted())
        with caplog.at_level(logging.WARNING, logger="drkl"):
            trainer.train(resume_from_checkpoint=resume or None)
        return [record.message for record in caplog.records if "max_new_tokens" in record.message]

    [text] = run_to(8, resume=False)
    assert text.startswith(
        "Warning: Step 4: 100\N{NO-BREAK SPACE}% of the newest 16 answers to held-out prompts were cut"
    )
    assert run_to(12, resume=True) == []
