"""Lengths that are not given fit the models, in every command and in Python; given ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import drkl
from drkl import DistillationConfig, DistillationTrainer
from drkl.errors import DrklError
from drkl.runs import RunFolder
from tests.command_line import Cli
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs

CONTEXT = 32


def write_rows(path: Path, prompts: range, count: int = 40) -> Path:
    """Rows whose prompts have so many words, one after the other and again; responses of three."""
    words = [prompts[i % len(prompts)] for i in range(count)]
    rows = [{"id": f"r{i}", "prompt": " ".join(["w1"] * n), "response": "w2 w3 w4"} for i, n in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(root: Path, prompts: range = range(1, 21), **data: Any) -> dict[str, Any]:
    values = tiny_runs.config(root, training={"max_steps": 2}, evaluation={"sweep": []})
    tiny.save(tiny.llama(max_position_embeddings=CONTEXT), root / "teacher")
    path = write_rows(root / "data.jsonl", prompts)
    values["data"] = {"path": str(path), "eval_path": str(path), **data}
    del values["evaluation"]["max_new_tokens"]
    return values


def lengths(folder: Path) -> tuple[int, int]:
    data = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    return data["max_prompt_tokens"], data["max_tokens"]


@pytest.mark.slow
def test_every_command_fits_the_models_by_one_rule(cli: Cli, tmp_path: Path) -> None:
    path = tiny_runs.write_config(config(tmp_path), tmp_path / "c.yaml")
    shown = cli("data", path)
    assert shown.code == 0, shown.err
    done = cli("distill", path)
    assert done.code == 0, done.err
    run = RunFolder(tmp_path / "runs" / "r")
    assert lengths(run.root) == (CONTEXT - 1, CONTEXT)
    counts = run.read_env()["data"]
    kept, cut = counts["train_rows"], counts["responses_cut"]
    assert 0 < kept < 40 and cut > 0 and counts["dropped"] == {"prompt_too_long": 40 - kept}
    assert f"{kept} of 40 rows kept, {40 - kept} dropped (prompt longer than max_prompt_tokens), {cut} resp" in done.out
    facts = [line.split() for line in shown.out.splitlines()]
    assert facts.count(["rows", "kept", str(kept), "of", "40"]) == facts.count(["responses", "cut", str(cut)]) == 2
    # The same rows again: in the run's evaluation, and in that of its student and teacher as a pair.
    assert cli("evaluate", run.root).code == 0
    pair = ("--student", run.student_path, "--teacher", tmp_path / "teacher", "--data", tmp_path / "data.jsonl")
    done = cli("evaluate", *pair, "--output", tmp_path / "e", "--prompts", 2, "--sweep", "none")
    assert done.code == 0, done.err
    found = [json.loads((folder / "eval.json").read_text())["settings"] for folder in (run.root, tmp_path / "e")]
    for settings in found:
        assert settings["data"]["heldout_rows"] == kept and settings["data"]["responses_cut"] == cut
        assert settings["data"]["no_room_for_an_answer"] > 0 and settings["max_new_tokens"] == CONTEXT // 2
    assert found[0]["data"]["digest"] == found[1]["data"]["digest"]
    assert "prompts leave no room for an answer in the models' context" in done.out.replace("\n", " ")
    # Answers to a prompt that is typed.
    assert cli("generate", run.root, "--prompt", "w1 w2").code == 0
    done = cli("generate", run.root, "--prompt", "w1", "--max-new-tokens", 30)
    assert done.code == 2 and "--max-new-tokens: 30 tokens after a prompt of " in done.err
    done = cli("generate", run.root, "--prompt", " ".join(["w1"] * 20))
    assert done.code == 2 and "is too long for the models' context of 32 tokens. Shorten it" in done.err
    done = cli("evaluate", run.root, "--max-new-tokens", 30)
    assert done.code == 2 and "pass the models' context of 32 tokens. Set it to at most" in done.err


@pytest.mark.parametrize(
    ("data", "prompts", "message"),
    [
        (
            {"max_tokens": 80},
            range(1, 21),
            "the student's context 32. Set data.max_tokens to at most 32, and data.max_pro",
        ),
        (
            {"max_prompt_tokens": 70, "max_tokens": 80},
            range(18, 30),
            "so no row fits: shorten the prompts, or choose models with a longer",
        ),
        ({"max_prompt_tokens": 40}, range(1, 9), "Set data.max_prompt_tokens to at most 31, or leave it out"),
        ({}, range(18, 30), "and the models' context is 32: no row fits. Shorten the prompts, or choose models with a"),
        (
            {"max_prompt_tokens": 10},
            range(5, 6),
            "and the models' context is 32; raise data.max_prompt_tokens (10) to at",
        ),
    ],
)
def test_what_was_given_and_does_not_fit_is_refused(
    cli: Cli, tmp_path: Path, data: dict[str, int], prompts: range, message: str
) -> None:
    path = tiny_runs.write_config(config(tmp_path, prompts, **data), tmp_path / "c.yaml")
    before = tiny_runs.tree(tmp_path)
    for command in (["distill"], ["distill", "--dry-run"], ["data"]):
        done = cli(*command, path)
        assert done.code == 2 and message in done.err, command
    assert tiny_runs.tree(tmp_path) == before


@pytest.mark.slow
def test_a_stage_has_lengths_of_its_own(tmp_path: Path) -> None:
    values = config(tmp_path) | {"stages": [{**tiny_runs.STAGES[0], "data": {"max_tokens": 24}}]}
    run = tiny_runs.train(values)
    first = run.root / "stages" / "01-warmup"
    assert (lengths(first), lengths(run.root)) == ((12, 24), (31, 32))
    written = yaml.safe_load(run.config_path.read_text())
    assert written["stages"][0]["data"] == {"max_prompt_tokens": 12, "max_tokens": 24}
    again = [(spec.data.max_prompt_tokens, spec.data.max_tokens) for spec in tiny_runs.specs(written)]
    assert again == [(12, 24), (31, 32)], "the run is repeatable"


@pytest.mark.slow
def test_models_in_memory(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", range(1, 21))
    teacher = tiny.llama(max_position_embeddings=CONTEXT)
    student = tiny.llama(1, layers=2, max_position_embeddings=64)
    arguments: dict[str, Any] = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True}
    models: dict[str, Any] = {"model": student, "teacher_model": teacher, "processing_class": tiny.tokenizer()}
    args = DistillationConfig(**arguments)
    trainer = DistillationTrainer(**models, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert lengths(tmp_path / "run") == (CONTEXT - 1, CONTEXT)
    assert max(row.length for row in trainer.pair.rows) == CONTEXT - 1
    assert (args.max_prompt_tokens, args.max_tokens) == (None, None), "the next pair may have another context"
    result = drkl.evaluate(student, teacher, rows, tiny.tokenizer(), prompts=2, samples_per_prompt=1, sweep=())
    assert result.settings["data"]["heldout_rows"] == len(trainer.pair.rows)
    assert result.settings["max_new_tokens"] == CONTEXT // 2
    analysis = drkl.analyze(student, teacher, rows, tiny.tokenizer(), objectives=["rkl"], positions=4)
    assert analysis.tables["settings"]["data"]["digest"] == result.settings["data"]["digest"]
    with pytest.raises(DrklError, match=r"the teacher's context 32\. Set data\.max_tokens to at most 32"):
        args = DistillationConfig(**arguments, max_tokens=100)
        DistillationTrainer(**models, args=args, train_dataset=rows)
    with pytest.raises(
        DrklError, match=r"max_new_tokens: 30 tokens after a prompt of .* Set it to at most \d+, or leave"
    ):
        drkl.evaluate(student, teacher, rows, tiny.tokenizer(), max_prompt_tokens=20, max_new_tokens=30, sweep=())


@pytest.mark.slow
def test_encoder_and_decoder_each_have_a_context(tmp_path: Path) -> None:
    from transformers import LEDConfig, LEDForConditionalGeneration

    sizes = {name: getattr(tiny.bart().config, name) for name in (
        "vocab_size", "d_model", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim",
        "decoder_ffn_dim", "init_std", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    )}  # fmt: skip
    model = LEDForConditionalGeneration(
        LEDConfig(
            **sizes, encoder_layers=1, decoder_layers=1, attention_window=8, max_encoder_position_embeddings=16,
            max_decoder_position_embeddings=6,
        )
    )  # fmt: skip
    rows = [{"prompt": " ".join(["w1"] * n), "response": " ".join(["w2"] * n)} for n in range(1, 13)]
    result = drkl.evaluate(model, model, rows, tiny.tokenizer(), prompts=2, samples_per_prompt=1, sweep=())
    # n words are 2 n - 1 tokens; a target has its end too.
    assert result.settings["data"]["dropped"] == {"prompt_too_long": 4}
    assert result.settings["data"]["responses_cut"] == 5 and result.settings["max_new_tokens"] == 6
    with pytest.raises(
        DrklError, match=r"a prompt of 23 tokens and the student's encoder a context of 16\. Set data\.ma"
    ):
        drkl.evaluate(model, model, rows, tiny.tokenizer(), max_prompt_tokens=40, max_tokens=80)


@pytest.mark.slow
def test_texts_of_a_classifier_fit_it(tmp_path: Path) -> None:
    model, tokenizer = tiny_classifiers.make(max_position_embeddings=12), tiny_classifiers.tokenizer()
    rows = [{"text": " ".join(["w1"] * (1 + i)), "label": i % 3} for i in range(20)]
    result = drkl.evaluate(model, model, rows, tokenizer)
    assert result.settings["data"]["responses_cut"] > 0
    with pytest.raises(DrklError, match=r"the student's context 12\. Set data\.max_tokens to at most 12\.$"):
        drkl.evaluate(model, model, rows, tokenizer, max_tokens=100)
