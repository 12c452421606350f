"""What a run's models read when it is evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import drkl
from drkl import DrklError
from drkl.run_models import evaluate_run, run_inputs
from drkl.training.run import distill
from tests.command_line import Cli
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny
from tests.training import tiny_runs

SQUARE = CHATML.replace("'<|im_start|>' + message['role'] + '\n'", "'[' + message['role'] + ']'").replace(
    "<|im_start|>assistant\n", "[assistant]"
)


@pytest.mark.slow
def test_each_model_is_measured_in_its_own_rendering_of_the_prompts(tmp_path: Path) -> None:
    values = tiny_runs.config(
        tmp_path,
        training={"max_steps": 1, "eval_every": 1, "save_every": 1},
        rollouts={"share": 1.0, "max_new_tokens": 4, "eval_prompts": 0},
        evaluation={"prompts": 0},
    )
    tokens = build(SQUARE, extra=[f"w{i}" for i in range(tiny.VOCAB - 30)])
    tiny.save(tiny.llama(1, layers=2), tmp_path / "own", tokens)
    values["student"] = {"init": "pretrained", "model": str(tmp_path / "own")}
    specs = tiny_runs.specs(values)
    run = distill(specs)
    found = drkl.evaluate_run(run.root)
    rows = run_inputs(specs).rows
    for name, folder in (("teacher", tmp_path / "teacher"), ("student", run.student_path)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        losses: list[float] = []
        for row in rows:
            asked = [{"role": "user", "content": row.example.prompt_text}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([*prompt, *row.response_ids])
            with torch.no_grad():
                logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-float(logp[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
        assert found.value(name, "nll") == pytest.approx(sum(losses) / len(losses), rel=1e-4), name
    assert rows[0].teacher_prompt_ids not in (None, rows[0].prompt_ids)


@pytest.mark.slow
def test_only_the_models_that_are_asked_for_are_measured(tmp_path: Path) -> None:
    stages = [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 1}}]
    training = {"max_steps": 1, "eval_every": 1, "save_every": 1}
    run = tiny_runs.train(tiny_runs.config(tmp_path, training=training, stages=stages, evaluation={"sweep": []}))
    every = evaluate_run(run.root)
    assert every.models == ["teacher", "before", "warmup", "student"]
    two = evaluate_run(run.root, models=("student", "teacher"))
    assert two.models == ["teacher", "student"] and {*two.timing} == {"teacher", "student", "total"}
    for key in ("rkl", "rouge_l"):
        assert two.value("student", key) == every.value("student", key)
    alone = evaluate_run(run.root, models=("student",))
    assert alone.models == ["student"] and alone.value("student", "rkl") is None
    assert alone.value("student", "nll") == every.value("student", "nll")


@pytest.mark.parametrize(
    ("models", "message"),
    [(("teacher", "studnt"), "models has 'studnt'; expected some of teacher, before, warmup, student. Did you mean"),
     (("teacher",), "models leaves the student out"), ((), "models leaves the student out")],
)  # fmt: skip
def test_models_that_there_are_not(tmp_path: Path, models: tuple[str, ...], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        evaluate_run(tmp_path, models=models)


def test_models_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    done = cli("evaluate", tmp_path, "--models", "teacher,befor")
    assert done.code == 2 and "--models has 'befor'" in done.err
    done = cli("evaluate", "--student", tmp_path, "--models", "student", "--data", "d", "--output", tmp_path / "o")
    assert done.code == 2 and "`--models` goes with RUN" in done.err
