"""Where a saved student stops in plain transformers, and what is said where its teacher stops elsewhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

import drkl
from drkl.data import Example
from drkl.data.tokenize import tokenize_examples
from drkl.models.ends import listed_ends
from drkl.models.load import load_model
from drkl.teachers.live import LiveTeacher
from drkl.teachers.stops import read_stops
from drkl.training.ends import Ends, compare_ends
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny
from tests.models.chains import chain
from tests.training import tiny_runs

PHI3 = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}</s>{% else %}")
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]
ROWS = [{"prompt": "hi" if i % 2 else "a b", "response": "hello"} for i in range(8)]
# transformers says so of a generate without any argument, which is what is tested here.
NO_LENGTH = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
QUIET_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")


def glm() -> Any:
    tokenizer = build(GLM, eos="</s>")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    return tokenizer


def teacher_of(tokenizer: Any, end: str, **changes: Any) -> PreTrainedModel:
    """It answers hello, ends that with ``end``, and goes on with a next turn."""
    asked = "<|assistant|>" if "<|assistant|>" in tokenizer.get_vocab() else "\n"
    return chain(tokenizer, {asked: "hello", "hello": end, end: asked}, **changes)


def blank(tokenizer: Any, **changes: Any) -> PreTrainedModel:
    return chain(tokenizer, {}, **changes)


def train(folder: Path, student: Any, teacher: Any, tokenizer: Any, **changes: Any) -> drkl.DistillationTrainer:
    fields = {"learning_rate": 0.5, "max_steps": 12, "save_steps": 12} | changes.pop("fields", {})
    args = drkl.DistillationConfig(
        output_dir=str(folder), use_cpu=True, precision="fp32", disable_tqdm=True, tokens_per_step=200, max_tokens=64,
        eval_strategy="no", objective="fkl", lr_scheduler_type="constant", **fields,
    )  # fmt: skip
    trainer = drkl.DistillationTrainer(
        student, teacher, args, changes.pop("rows", ROWS), processing_class=tokenizer, **changes
    )
    trainer.train()
    trainer.save_model()
    return trainer


def answer(folder: Path, tokens: Path | None = None) -> list[str]:
    """What plain ``generate`` writes, with no word on where to stop."""
    tokenizer = AutoTokenizer.from_pretrained(tokens or folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs)
    found: list[str] = tokenizer.convert_ids_to_tokens(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.slow
@NO_LENGTH
def test_a_base_student_of_an_instruct_teacher_stops_in_plain_transformers(tmp_path: Path) -> None:
    instruct, base = build(CHATML), build(None, eos="</s>")
    tiny.save(teacher_of(instruct, "<|im_end|>"), tmp_path / "teacher", instruct)
    tiny.save(blank(base), tmp_path / "base", base)
    train(tmp_path / "run", str(tmp_path / "base"), str(tmp_path / "teacher"), None)  # the teacher's has the template
    student, newest = tmp_path / "run" / "student", tmp_path / "run" / "checkpoints" / "checkpoint-12"
    assert answer(student) == answer(newest, student) == ["hello", "<|im_end|>"]
    write = pipeline("text-generation", str(student))
    assert write(HI, do_sample=False)[0]["generated_text"][-1]["content"] == "hello"
    # The file that vLLM reads, and the one that others do.
    for name in ("generation_config.json", "config.json"):
        assert json.loads((student / name).read_text())["eos_token_id"] == [4, 2]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(student)
    assert listed_ends(model, tokenizer) == [2]  # what it was before


@NO_LENGTH
@pytest.mark.parametrize("kind", ["phi 3", "glm"])
@pytest.mark.parametrize("turns", [pytest.param("last", marks=pytest.mark.slow), "all"])
def test_ends_that_are_not_eos_are_taught_and_kept(tmp_path: Path, kind: str, turns: str) -> None:
    tokenizer, end = (build(PHI3, eos="</s>"), "<|im_end|>") if kind == "phi 3" else (glm(), "<|user|>")
    teacher = teacher_of(tokenizer, end)
    number = tokenizer.convert_tokens_to_ids(end)
    if kind == "glm":  # as its generation_config has it
        teacher.generation_config.eos_token_id = [2, number]
    rows = [{"messages": [*HI, {"role": "assistant", "content": "hello"}] * 2} for _ in range(8)]
    trainer = train(tmp_path, blank(tokenizer), teacher, tokenizer, rows=rows, fields={"turns": turns})
    assert {row.trained_ids[-1] for row in trainer.rows} == {number}
    assert answer(tmp_path / "student") == ["hello", end]
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [2, number]


@QUIET_PEFT
@pytest.mark.parametrize("export", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_lora_student_keeps_its_ends(tmp_path: Path, export: str) -> None:
    tokenizer = build(CHATML)
    base = tmp_path / "base"
    values = tiny_runs.config(
        tmp_path, training={"max_steps": 1}, peft={"r": 2, "target_modules": ["q_proj"], "export": export}
    )
    values["student"] = {"init": "pretrained", "model": str(base)}
    tiny.save(tiny.llama(5, layers=1, eos_token_id=2), base)
    run = tiny_runs.train(values)
    assert GenerationConfig.from_pretrained(run.student_path).eos_token_id == [4, 2]
    assert listed_ends(load_model(run.student_path, "fp32"), tokenizer) == [4, 2]
    assert listed_ends(run.student_path, tokenizer) == [4, 2]


STUDENTS: dict[str, dict[str, Any]] = {
    "prune": {"init": "prune", "layers": 2},
    "random": {"init": "random", "layers": 1},
    "own config": {"init": "random", "config": {
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 96,
    }},
}  # fmt: skip


@pytest.mark.parametrize("student", [pytest.param("prune", marks=pytest.mark.slow), "random", "own config"])
def test_the_teachers_ends_are_all_kept(tmp_path: Path, student: str) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 1})
    values["student"] = STUDENTS[student]
    teacher = tiny.llama()
    teacher.generation_config.eos_token_id = [4, 2, 3]
    tiny.save(teacher, tmp_path / "teacher")
    run = tiny_runs.train(values)
    saved = AutoModelForCausalLM.from_pretrained(run.student_path)
    assert saved.generation_config.eos_token_id == [4, 2, 3]
    assert saved.generation_config.pad_token_id == 0


def test_an_encoder_decoder_keeps_its_ends(tmp_path: Path) -> None:
    teacher, tokenizer = tiny.bart(layers=2, vocab_size=64), tiny.tokenizer()
    teacher.generation_config.eos_token_id = [4, 2]
    trainer = train(tmp_path, tiny.bart(3, layers=1), teacher, tokenizer, fields={"max_steps": 1})
    assert trainer.pair.ends is not None and trainer.pair.ends.taught == "<|im_end|>"
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    assert saved.generation_config.eos_token_id == [4, 2] and saved.config.eos_token_id == 4


def test_rows_that_are_tokenised_say_where_a_turn_ends(tmp_path: Path) -> None:
    tokenizer = build(None, eos="</s>")
    ids = tokenizer.convert_tokens_to_ids(["hi", "\n", "hello", "<|im_end|>"])
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for _ in range(8)]
    teacher = teacher_of(tokenizer, "<|im_end|>")
    train(tmp_path, blank(tokenizer), teacher, tokenizer, rows=rows, fields={"max_steps": 1})
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [2, 4]


def test_a_processor_brings_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    processor = SimpleNamespace(tokenizer=tokenizer, decode=tokenizer.decode, save_pretrained=tokenizer.save_pretrained)
    ids = tokenizer.convert_tokens_to_ids(["hi", "\n", "hello", "<|im_end|>"])
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for _ in range(8)]
    teacher = teacher_of(tokenizer, "<|im_end|>")
    trainer = train(tmp_path, blank(tokenizer), teacher, processor, rows=rows, fields={"max_steps": 1})
    assert trainer.pair.ends is not None and trainer.pair.ends.taught == "<|im_end|>"
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == 4


def test_settings_that_cannot_be_saved_do_not_stop_a_run(tmp_path: Path) -> None:
    student = tiny.llama(1, layers=1, eos_token_id=2)
    student.generation_config = GenerationConfig(eos_token_id=2, temperature=0.6, top_p=0.9)
    trainer = train(tmp_path, student, tiny.llama(2, layers=1), tiny.tokenizer(), fields={"max_steps": 1})
    assert any("generation_config has temperature, top_p" in note for note in trainer.pair.notes)
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [4, 2]


# A teacher that means another end ----------------------------------------------------------------------------------


def test_a_teacher_with_another_end_is_named_with_both_probabilities(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = build(None, eos="</s>")
    teacher = chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>"})
    with caplog.at_level(logging.WARNING, "drkl"):
        train(tmp_path, blank(tokenizer), teacher, tokenizer, fields={"max_steps": 1, "template": "plain"})
    (record,) = [record for record in caplog.records if record.name == "drkl"]
    # One logit of 12 among zeros.
    rest = 1 / (torch.tensor(12.0).exp().item() + len(tokenizer) - 1)
    assert f"it gives '</s>' a mean probability of {rest:.2g} and '<|im_end|>' 1" in record.getMessage()
    assert "data.template: chat" in record.getMessage()
    found = json.loads((tmp_path / "env.json").read_text())["ends"]
    assert (found["taught"], found["own"], found["num_ends"], found["differ"]) == ("</s>", "<|im_end|>", 8, True)
    assert found["taught_probability"] == pytest.approx(rest, rel=1e-4)
    # The student learns the teacher's end, so it stops there.
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [2, 4]
    assert found["own_probability"] == pytest.approx(1 - (len(tokenizer) - 1) * rest, rel=1e-4)


@pytest.mark.parametrize("kind", ["random", "goes on", "two turns"])
def test_a_teacher_of_the_same_end_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    tokenizer = build(PHI3, eos="</s>")
    teacher = teacher_of(tokenizer, "<|im_end|>")
    if kind == "random":
        teacher = tiny.llama(3, layers=2, vocab=len(tokenizer))
    if kind == "goes on":
        teacher = chain(tokenizer, {"\n": "hello", "hello": "there"})
    rows = [{"messages": [*HI, {"role": "assistant", "content": "hello"}] * 2}] * 8 if kind == "two turns" else ROWS
    with caplog.at_level(logging.WARNING, "drkl"):
        train(tmp_path, blank(tokenizer), teacher, tokenizer, rows=rows, fields={"max_steps": 1, "turns": "all"})
    assert not [record for record in caplog.records if record.name == "drkl"]
    found = json.loads((tmp_path / "env.json").read_text())["ends"]
    assert found["taught"] == "<|im_end|>" and found["num_ends"] == 8 * (1 + (kind == "two turns"))


def compare(teacher: PreTrainedModel, rows: Any, tokenizer: Any) -> Ends | None:
    return compare_ends(read_stops(None, LiveTeacher(teacher), rows, tokenizer, [], pad_id=0), tokenizer)


def test_the_probabilities_are_those_of_a_plain_loop() -> None:
    tokenizer = tiny.tokenizer()
    teacher = tiny.llama(4)
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"w{i} w{i + 3}"} for i in range(4)]
    examples = [Example(str(i), tuple(messages[: 2 + 2 * (i % 2)])) for i in range(5)]
    rows, _ = tokenize_examples(examples, tokenizer, max_prompt_tokens=60, max_tokens=90, turns="all")
    teacher.generation_config.eos_token_id = list(range(6))
    found = compare(teacher, rows, tokenizer)
    at_ends = []
    for row in rows:
        ids = list(row.all_ids)
        with torch.no_grad():
            probs = teacher(torch.tensor([ids])).logits[0].softmax(-1)
        marks = [False] * len(row.prompt_ids) + list(row.trained or [True] * len(row.response_ids))
        at_ends += [probs[i - 1] for i, token in enumerate(ids) if marks[i] and token == 4]
    mean = torch.stack(at_ends).mean(0)
    assert found is not None and found.num_ends == len(at_ends) == 7 and found.taught == "<|im_end|>"
    assert found.taught_probability == pytest.approx(float(mean[4]), rel=1e-4)
    assert found.own_probability == pytest.approx(float(mean[[0, 1, 2, 3, 5]].max()), rel=1e-4)


def test_a_special_token_that_nothing_calls_an_end_has_to_be_sure(tmp_path: Path) -> None:
    tokenizer = build(None, eos="</s>")
    example = Example("x", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}))
    rows, _ = tokenize_examples([example], tokenizer, max_prompt_tokens=20, max_tokens=40, template="plain")
    teacher = chain(tokenizer, {"hello": "<|im_end|>"})
    found = compare(teacher, rows, tokenizer)
    assert found is not None and found.own == "<|im_end|>" and found.differ
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.25)  # exp(3) among 30: 0.4
    found = compare(teacher, rows, tokenizer)
    assert found is not None and found.own is None and not found.differ
    teacher.generation_config.eos_token_id = [2, 4]
    found = compare(teacher, rows, tokenizer)
    assert found is not None and found.own == "<|im_end|>" and found.differ


@pytest.mark.slow
def test_nothing_is_read_where_there_is_nothing_to_compare(tmp_path: Path) -> None:
    tokenizer = build(CHATML)
    teacher = teacher_of(tokenizer, "</s>")
    fields = {"max_steps": 1, "kd_weight": 0.0}
    assert train(tmp_path / "a", blank(tokenizer), teacher, tokenizer, fields=fields).pair.ends is None
    cut = [{"prompt": "hi", "response": "hello " * 80}] * 4
    assert (
        train(tmp_path / "b", blank(tokenizer), teacher, tokenizer, rows=cut, fields={"max_steps": 1}).pair.ends is None
    )
