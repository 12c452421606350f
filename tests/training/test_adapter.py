"""Whole runs of LoRA students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from drkl.cli import app
from drkl.errors import DrklError
from tests.models import tiny
from tests.training import tiny_runs

PEFT: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def values_of(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    values = tiny_runs.config(tmp_path, **({"peft": PEFT} | sections))
    tiny.save(tiny.llama(5, layers=2), tmp_path / "other")
    if "student" not in sections:
        values["student"] = {"init": "pretrained", "model": str(tmp_path / "other")}
    return values


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("export", ["adapter", "merged"])
@pytest.mark.slow
def test_a_run_trains_the_adapter_and_exports_it(tmp_path: Path, export: str) -> None:
    values = values_of(tmp_path, peft=PEFT | {"export": export}, training={"gradient_checkpointing": True})
    run = tiny_runs.train(values)
    assert (run.student_path / "adapter_model.safetensors").is_file() is (export == "adapter")
    assert (run.student_path / "model.safetensors").is_file() is (export == "merged")
    counts = run.read_env()["parameters"]
    assert counts["adapter"] == 2 * (2 * (16 + 16) + 2 * (16 + 8))  # two layers, queries and the one key-value head
    assert counts["student"] == sum(p.numel() for p in tiny.llama(layers=2).parameters())
    before, after = tiny.llama(5, layers=2), AutoModelForCausalLM.from_pretrained(run.student_path)
    assert not torch.allclose(tiny.logits(after), tiny.logits(before))
    assert torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)
    done = CliRunner().invoke(app, ["evaluate", str(run.root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    evaluation = json.loads(run.eval_path.read_text())
    # What was trained is what is evaluated.
    losses = {row["step"]: row["eval_rkl"] for row in run.read_train_log() if "eval_rkl" in row}
    assert evaluation["student"]["rkl"] == pytest.approx(losses[run.read_env()["best_step"]], rel=1e-4)


@pytest.mark.slow
def test_a_pruned_student_in_two_stages_ends_as_an_ordinary_model(tmp_path: Path) -> None:
    values = values_of(tmp_path, student={"init": "prune", "layers": 2}, stages=tiny_runs.STAGES)
    run = tiny_runs.train(values)
    warm = run.root / "stages" / "01-warmup" / "student"
    assert not torch.equal(*(tiny.logits(AutoModelForCausalLM.from_pretrained(p)) for p in (warm, run.student_path)))


def test_an_adapter_of_weights_that_lie_nowhere_is_refused(tmp_path: Path) -> None:
    values = values_of(tmp_path, student={"init": "prune"}, peft=PEFT | {"export": "adapter"})
    with pytest.raises(DrklError, match=r"peft\.export is 'adapter', but student\.init is 'prune'"):
        tiny_runs.specs(values)


def test_an_unknown_field_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"peft: peft\.LoraConfig has no field 'rank'"):
        tiny_runs.specs(values_of(tmp_path, peft={"rank": 2}))
