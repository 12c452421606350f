"""A model from nothing but text, then a student of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from drkl.config import load_config
from drkl.data.config import TokenizerConfig
from drkl.data.tokenizer import END_OF_TEXT, learn_tokenizer
from drkl.errors import DrklError
from tests.training import tiny_runs

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def scratch(root: Path, **student: Any) -> dict[str, Any]:
    text = root / "book.txt"
    text.write_text("\n\n".join(f"Alice saw {i} rabbits, and the rabbits saw Alice." for i in range(60)))
    values = tiny_runs.config(
        root,
        student={"init": "random", "layers": None, "config": GPT2} | student,
        tokenizer={"train": "bpe", "vocab_size": 300},
        objective={"name": "ce"},
        data={"path": str(text), "format": "text", "max_prompt_tokens": 8, "max_tokens": 32},
    )
    values["teacher"] = None
    del values["objective"]["gamma"]
    return values


@pytest.mark.slow
def test_a_teacher_from_scratch_and_its_student(tmp_path: Path, drkl: Callable[..., str]) -> None:
    values = scratch(tmp_path)
    made = tiny_runs.train(values)
    model = AutoModelForCausalLM.from_pretrained(made.student_path)
    tokenizer = AutoTokenizer.from_pretrained(made.student_path)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0] <= 300
    assert {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token} == {END_OF_TEXT}
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    log = [row for row in made.read_train_log() if "eval_loss" in row]
    assert log[-1]["eval_loss"] < log[0]["eval_loss"] - 0.01  # every text is the same but for a number
    assert made.read_env()["data"]["train_rows"] > 5
    assert "random of `gpt2`" in (made.student_path / "README.md").read_text()

    again = tiny_runs.train({**values, "run": values["run"] | {"name": "again"}})
    assert tiny_runs.weights(again) == tiny_runs.weights(made)

    distilled = {k: v for k, v in values.items() if k != "tokenizer"} | {
        "run": values["run"] | {"name": "student"},
        "teacher": {"model": str(made.student_path), "dtype": "fp32"},
        "student": {"init": "random", "config": GPT2 | {"n_layer": 1}},
        "objective": {"name": "drkl", "gamma": 0.5},
    }
    run = tiny_runs.train(distilled)
    drkl("evaluate", run.root)
    table = json.loads(run.eval_path.read_text())
    assert table["teacher"]["fkl"] == 0 and table["student"]["fkl"] > 0 and table["student"]["num_tokens"] > 10
    drkl("generate", run.root, "--prompt", "Alice saw", "--max-new-tokens", 4)
    drkl("evaluate", made.root)


def test_a_dry_run_counts_the_model(tmp_path: Path, drkl: Callable[..., str]) -> None:
    path = tiny_runs.write_config(scratch(tmp_path), tmp_path / "c.yaml")
    out = drkl("distill", path, "--dry-run")
    assert "student:" in out and not (tmp_path / "runs").exists()


def test_a_tokenizer_knows_every_text_and_is_the_same_again() -> None:
    texts = ["the cat and the hat", "the bat"] * 20
    tokenizer = learn_tokenizer(TokenizerConfig(vocab_size=270), texts)
    assert len(tokenizer) == 270 and tokenizer.is_fast
    for text in ("the cat", "Grüße, 世界 \n\t  x", " a b "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    again = learn_tokenizer(TokenizerConfig(vocab_size=270), iter(texts))
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DrklError, match="no text to learn a tokenizer from"):
        learn_tokenizer(TokenizerConfig(), [""])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": {"config": {"model_type": "gtp2"}}},
            "model_type 'gtp2', which transformers does not know.*'gpt2'",
        ),
        ({"student": {"config": GPT2 | {"n_emb": 4}}}, "has 'n_emb', which GPT2Config does not. Did you mean 'n_embd'"),
        ({"student": {"config": GPT2 | {"vocab_size": 4}}}, "vocab_size, which is the tokenizer's"),
        ({"student": {"config": GPT2 | {"n_head": 3}}}, "student.config makes no gpt2: .*divisible"),
    ],
)
def test_architectures_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = scratch(tmp_path, **changes["student"])
    with pytest.raises(DrklError, match=message):
        tiny_runs.train(values)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "nothing brings a tokenizer; set tokenizer"),
        ({"teacher": {"model": "x"}}, "tokenizer learns a new one, which fits no model that is there"),
        ({"student": {"init": "random", "model": "x", "config": GPT2}}, "config has a model_type.*model has no place"),
        ({"student": {"init": "random", "layers": 2, "config": GPT2}}, "config has a model_type.*layers has no place"),
        ({"student": {"init": "pretrained", "model": "x"}}, "tokenizer learns a new one"),
        ({"tokenizer": {"vocab_size": 100}}, "tokenizer.vocab_size: .*257"),
    ],
)
def test_configs_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        load_config(scratch(tmp_path) | changes)


@pytest.mark.slow
def test_an_encoder_decoder_from_scratch_and_its_student(tmp_path: Path, drkl: Callable[..., str]) -> None:
    t5 = {"model_type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    values = scratch(tmp_path, config=t5)
    path = tmp_path / "turns.jsonl"
    roles = ("user", "assistant", "user", "assistant")
    talks = [[{"role": role, "content": f"{role} {i}"} for role in roles] for i in range(20)]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    values["data"] = {"path": str(path), "turns": "all", "max_prompt_tokens": 40, "max_tokens": 60}
    made = tiny_runs.train(values)
    assert AutoModelForSeq2SeqLM.from_pretrained(made.student_path).config.decoder_start_token_id == 0

    distilled = {k: v for k, v in values.items() if k != "tokenizer"} | {
        "run": values["run"] | {"name": "student"},
        "teacher": {"model": str(made.student_path), "dtype": "fp32"},
        "student": {"init": "random", "config": t5 | {"num_layers": 1}},
        "objective": {"name": "drkl", "gamma": 0.5},
    }
    run = tiny_runs.train(distilled)
    drkl("evaluate", run.root)
    assert json.loads(run.eval_path.read_text())["student"]["fkl"] > 0
    with pytest.raises(
        DrklError, match=r"student 'gpt2' is a decoder-only model and the teacher .* an encoder-decoder"
    ):
        tiny_runs.train(
            distilled | {"run": values["run"] | {"name": "x"}, "student": {"init": "random", "config": GPT2}}
        )
