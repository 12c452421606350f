"""Runs on prompts without responses, and on prompts that student and teacher read in two renderings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import drkl
from drkl.analysis.config import AnalysisConfig
from drkl.analysis.watch import GradientWatch
from drkl.data.template import encode_prompt
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.forward import hidden_states, lm_head
from drkl.run_models import evaluate_run
from drkl.training.estimate import estimate
from drkl.training.run import Listener
from drkl.training.spec import teacher_tokenizer, tokenizer_name
from tests.data.test_seq2seq import translator
from tests.data.test_views import OTHER
from tests.models import tiny
from tests.training import tiny_runs

PROMPTS = [{"prompt": f"w{i} w{i % 5}"} for i in range(20)]
ROLLOUTS = {"share": 1, "max_new_tokens": 5, "eval_prompts": 2}


def config_of(root: Path, **sections: Any) -> dict[str, Any]:
    """A config whose data are prompts alone."""
    values = tiny_runs.config(root, training={"max_steps": 2}, rollouts=ROLLOUTS, **sections)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return values


def trainer_of(root: Path, data: Any, **changes: Any) -> drkl.DistillationTrainer:
    fields = {"rollout_share": 1, "rollout_max_new_tokens": 5, "max_steps": 2, "tokens_per_step": 60} | changes
    parts = {
        name: fields.pop(name)
        for name in ("model", "teacher_model", "eval_dataset", "processing_class")
        if name in fields
    }
    args = drkl.DistillationConfig(
        output_dir=str(root / "x"), use_cpu=True, precision="fp32", disable_tqdm=True, logging_steps=1, eval_steps=2,
        max_tokens=64, **fields,
    )  # fmt: skip
    given = {"model": tiny.llama(1, layers=2), "teacher_model": tiny.llama(9), "processing_class": tiny.tokenizer()}
    return drkl.DistillationTrainer(args=args, train_dataset=data, **(given | parts))


def test_prompts_alone_are_not_watched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, PROMPTS[:8], eval_dataset=PROMPTS[8:])
    assert GradientWatch.for_trainer(trainer, AnalysisConfig(watch_every=1)) is None
    assert "analysis.watch_every has no effect: it watches the responses of the held-out rows" in caplog.text


@pytest.mark.slow
def test_a_config_takes_prompts_alone(tmp_path: Path) -> None:
    values = config_of(tmp_path)
    said: list[str] = []
    run = tiny_runs.train(values, listener=Listener(on_message=said.append))
    assert any("19 of 19 rows kept, 19 of them without a response." in line for line in said)
    assert run.is_finished() and tiny_runs.steps(run) == [1, 2]
    with pytest.raises(DrklError, match=r"are prompts alone: .* Name a suite, which has responses"):
        evaluate_run(run.root)
    (stage,) = estimate(tiny_runs.specs(values))["stages"]
    assert stage["tokens_per_step"]["trained"] * stage["steps"] == 5 * 11  # the rows of two steps, 5 tokens each
    assert stage["answers_per_step"] == {"written": 5.5, "tokens": 27.5, "longest": 5, "estimated_minutes": 0.0}


@pytest.mark.slow
def test_python_takes_prompts_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, PROMPTS, eval_dataset=[{"messages": [{"role": "user", "content": "w3"}]}])
    trainer.train()
    assert trainer.num_tokens_seen > 0 and trainer.state.global_step == 2
    assert [row.response_ids for row in trainer.eval_rows] == [()]


def test_an_encoder_decoder_takes_prompts_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, PROMPTS, model=tiny.t5(1, layers=2), teacher_model=tiny.t5(9))
    trainer.train()
    assert trainer.num_tokens_seen > 0 and trainer.pair.max_new_tokens == 5


@pytest.mark.parametrize("share", [0, 0.5, {"from": 0, "to": 1, "steps": 5}])
def test_where_some_responses_are_learnt_they_are_needed(share: Any, tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"train_dataset, row 1: .* A prompt alone is enough only .* rollouts.share: 1"):
        trainer_of(tmp_path, PROMPTS, rollout_share=share)
    values = config_of(tmp_path)
    with pytest.raises(DrklError, match=r"data.jsonl:1: .* A prompt alone is enough only .* rollouts.share: 1"):
        tiny_runs.train(values | {"rollouts": {"share": share}})


@pytest.mark.slow
def test_a_stage_that_needs_responses_is_named(tmp_path: Path) -> None:
    values = config_of(tmp_path, stages=[{"name": "warmup", "training": {"max_steps": 1}}])
    with pytest.raises(
        DrklError, match=r"The stage '01-warmup' learns from the data's responses.* Give it data of its"
    ):
        tiny_runs.train(values)
    tiny_runs.write_rows(tmp_path / "whole.jsonl")
    values["stages"][0]["data"] = {"path": str(tmp_path / "whole.jsonl")}
    assert tiny_runs.train(values).is_finished()


def test_an_answer_has_to_fit_the_models(tmp_path: Path) -> None:
    message = (
        r"rollout_max_new_tokens \(60\) after a prompt of data.max_prompt_tokens \(40\) passes the models' context"
    )
    with pytest.raises(DrklError, match=message):
        trainer_of(tmp_path, PROMPTS, rollout_max_new_tokens=60, max_prompt_tokens=40)
    with pytest.raises(DrklError, match=message):
        tiny_runs.train(config_of(tmp_path) | {"rollouts": {"share": 1, "max_new_tokens": 60}})
    trainer = trainer_of(tmp_path, PROMPTS, rollout_max_new_tokens=80)
    assert trainer.pair.lengths.max_prompt_tokens == 16 and trainer.pair.max_new_tokens == 80


@pytest.mark.parametrize("limits", [{"rollout_max_new_tokens": 1}, {"max_prompt_tokens": 63}])
def test_an_answer_has_room_for_more_than_what_is_given(tmp_path: Path, limits: dict[str, Any]) -> None:
    student, teacher = tiny.bart(1, layers=1), tiny.bart(9, layers=1)
    student.generation_config.forced_bos_token_id = 1
    message = r"max_new_tokens is 1, and the first 1 token\(s\) of every answer .* Set it to at least 2\."
    fields = {"rollout_max_new_tokens": None} | limits
    with pytest.raises(DrklError, match=message):
        trainer_of(tmp_path, PROMPTS, model=student, teacher_model=teacher, **fields)
    assert trainer_of(tmp_path, PROMPTS, model=tiny.bart(1, layers=1), teacher_model=teacher, **fields)


def two_folders(root: Path) -> tuple[str, str, Any]:
    """A student and a teacher with a chat template each, and the teacher's tokenizer."""
    student = tiny.save(tiny.llama(1, layers=2), root / "small")
    other = tiny.tokenizer()
    other.chat_template = OTHER
    return str(student), str(tiny.save(tiny.llama(9), root / "large", other)), other


@torch.no_grad()
def reference_loss(student: PreTrainedModel, teacher: PreTrainedModel, made: list[Row]) -> float:
    """Forward KL, row by row without padding, each model after its own rendering of the prompt."""
    total, count = 0.0, 0
    for row in made:
        logps = []
        for model, prompt in ((student, row.prompt_ids), (teacher, row.teacher_prompt_ids or row.prompt_ids)):
            ids = torch.tensor([[*prompt, *row.response_ids]])
            logits = lm_head(model).logits(hidden_states(model, {"input_ids": ids}))[0, len(prompt) - 1 : -1]
            logps.append(torch.log_softmax(logits.double(), -1))
        total += float((logps[1].exp() * (logps[1] - logps[0])).sum())
        count += len(row.response_ids)
    return total / count


@pytest.mark.slow
def test_each_model_reads_the_prompts_in_its_own_rendering(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large, other = two_folders(tmp_path)
    data = [PROMPTS[0], *({**row, "response": "w1 w2"} for row in PROMPTS[1:6])]
    with caplog.at_level(logging.WARNING, "drkl"):
        trainer = trainer_of(
            tmp_path, data, model=small, teacher_model=large, processing_class=None, objective="fkl",
            learning_rate=1e-30, tokens_per_step=4000, teacher_model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
    assert sum("in their own rendering. In row 'row-1'" in record.getMessage() for record in caplog.records) == 1
    for row, words in zip(trainer.rows, data, strict=True):
        assert isinstance(row, Row)
        ask = [{"role": "user", "content": words["prompt"]}]
        assert row.prompt_ids == tuple(encode_prompt(tiny.tokenizer(), ask))
        assert row.teacher_prompt_ids == tuple(encode_prompt(other, ask)) != row.prompt_ids
    assert trainer._on_policy is not None and trainer.teacher is not None
    made: list[Row] = []
    step_rows = trainer._on_policy._answered.rows_of
    trainer._on_policy._answered.rows_of = lambda step: made.extend(step_rows(step)) or made[-6:]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert len(made) == 12 and all(row.sampled and row.teacher_prompt_ids for row in made)
    expected = reference_loss(trainer.pair.student, trainer.teacher.model, made[:6])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-5)
    assert expected != pytest.approx(
        reference_loss(trainer.pair.student, trainer.teacher.model, [dataclass_without(row) for row in made[:6]]),
        rel=1e-3,
    )


def dataclass_without(row: Row) -> Row:
    return Row(row.id, row.prompt_ids, row.response_ids, row.example)


def test_a_teacher_reads_a_translation_in_the_languages_that_were_set(tmp_path: Path) -> None:
    """Its folder's tokenizer has others."""
    words = translator("mbart-50", src_lang="en_XX", tgt_lang="ro_RO")
    sizes: dict[str, Any] = {"layers": 1, "vocab_size": len(words), "eos_token_id": 2, "decoder_start_token_id": 2}
    large = str(tiny.save(tiny.bart(9, **sizes), tmp_path / "large", words))
    given = translator("mbart-50", src_lang="de_DE", tgt_lang="fr_XX")
    trainer = trainer_of(
        tmp_path, [{"prompt": "a b"}], model=tiny.bart(1, **sizes), teacher_model=large, processing_class=given
    )
    (row,) = trainer.rows
    assert isinstance(row, Row) and row.prompt_ids[0] == given.convert_tokens_to_ids("de_DE")
    assert row.teacher_prompt_ids is None
    trainer.train()


@pytest.mark.slow
def test_a_config_gives_each_model_its_own_rendering(tmp_path: Path) -> None:
    small, large, _ = two_folders(tmp_path)
    values = config_of(
        tmp_path, teacher={"model": large}, student={"init": "pretrained", "model": small, "layers": None}
    )
    specs = tiny_runs.specs(values)
    assert tokenizer_name(specs) == small
    assert teacher_tokenizer(specs, small).chat_template == OTHER
    said: list[str] = []
    run = tiny_runs.train(values, listener=Listener(on_message=said.append))
    assert sum(line.count("in their own rendering. In row") for line in said) == 1
    saved = AutoTokenizer.from_pretrained(run.student_path)
    assert saved.chat_template == tiny.tokenizer().chat_template
    for changes in ({"rollouts": {"share": 0}}, {"data": values["data"] | {"template": "alpaca"}}):
        assert tokenizer_name(tiny_runs.specs(values | changes)) == large
    tiny.tokenizer().save_pretrained(large)
    assert tokenizer_name(specs) == large and teacher_tokenizer(specs, large) is None
