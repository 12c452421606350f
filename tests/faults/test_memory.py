"""Memory that runs out: in a step of training, as models are loaded, read and measured, and as answers are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drkl.runs import RunFolder
from tests.faults.conftest import Injected
from tests.faults.forked import Runner
from tests.faults.test_numbers import TRAINING, assert_kept, assert_told
from tests.training import tiny_runs

INSIDE = "tests.faults.planting:memory"
ROOM = 70
"""Positions for which there is room: less than the largest micro-batches of a run have, and at least half of them."""


def config_of(root: Path, **sections: Any) -> Path:
    sections = {"training": TRAINING | {"precision": "fp32"}} | sections
    return tiny_runs.write_config(tiny_runs.config(root, **sections), root / "c.yaml")


def assert_same_student(run: RunFolder, whole: RunFolder) -> None:
    """Up to rounding: AdamW turns differences of rounding into steps no larger than its rate."""
    theirs = load_file(whole.student_path / "model.safetensors")
    for name, weight in load_file(run.student_path / "model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.fault(
    group="Memory",
    fault="A step of training runs out of a GPU's memory, or of a processor's",
    does="a GPU's step is done again in halves and gives the same student; else the message has this step's numbers",
)
def test_a_step(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert runner.call("distill", config, "run.name=whole").code == 0
    with injected("a GPU's"):
        done = runner.call("distill", config, "run.name=gpu", inject=INSIDE, given=["training", ROOM, "cuda"])
        assert done.code == 0, done.err[-500:]
        assert "again in halves" in done.err and "rows" in done.err
        assert_same_student(RunFolder(tmp_path / "runs" / "gpu"), RunFolder(tmp_path / "runs" / "whole"))
    for kind, room in (("cpu", ROOM), ("python", ROOM), ("cuda", 20)):
        with injected(f"{kind}, room for {room}"):
            given = ["training", room, kind]
            done = runner.call("distill", config, f"run.name={kind}-{room}", inject=INSIDE, given=given)
            words = [r"Step \d ran out of memory", r"\d rows, [\d,]+ positions", "longest row", "vocabulary 64"]
            assert_told(done, *words, "gradient_accumulation_steps=2", "data.max_tokens", "drkl distill --resume")
            assert_kept(done, RunFolder(tmp_path / "runs" / f"{kind}-{room}"))


@pytest.mark.slow
@pytest.mark.fault(
    group="Memory",
    fault="Memory runs out beside a step: as models are loaded, in the update, in the held-out loss, as answers are "
    "written, in `drkl cache`, `evaluate` and `analyze`",
    does="one message that says where, and which setting needs less there; a run is resumed",
)
def test_elsewhere(runner: Runner, injected: Injected, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert runner.call("distill", config, "run.name=whole").code == 0
    whole = tmp_path / "runs" / "whole"
    answers = ["rollouts.share=1", "rollouts.max_new_tokens=8", "rollouts.eval_prompts=0"]
    cases: list[tuple[str, list[Any], list[Any], str]] = [
        ("update", ["distill", config], ["update", 0], "optim=adafactor"),
        ("trials", ["distill", config], ["trials", 0], "smaller model or dtype"),
        ("ends of answers", ["distill", config], ["trials", 80], "data.max_tokens"),
        ("held-out loss", ["distill", config], ["eval", 40], "data.max_tokens"),
        ("answers", ["distill", config, *answers], ["eval", 30], "rollouts.batch_size"),
        ("loading", ["distill", config], ["loading", 0], "smaller model or dtype"),
        ("cache", ["cache", config, "--output", tmp_path / "cache"], ["eval", 80], "tokens_per_step"),
        ("evaluate", ["evaluate", whole], ["eval", 40], "max_tokens|batch_size"),
        ("analyze", ["analyze", whole], ["eval", 30], "max_tokens"),
    ]
    for what, command, given, cure in cases:
        for kind in ("cuda", "cpu", "python"):
            with injected(f"{what}, {kind}"):
                name = f"{what}-{kind}".replace(" ", "-")
                own = [f"run.name={name}"] if command[0] == "distill" else []
                done = runner.call(*command, *own, inject=INSIDE, given=[*given, kind])
                assert_told(done, "[Mm]emory", cure)
                assert not re.search("make room", done.err)
                if what in ("update", "held-out loss"):
                    again = runner.call("distill", "--resume", tmp_path / "runs" / name)
                    assert again.code == 0, again.err[-300:]
    with injected("a run that was cut off"):
        assert (whole / "student").is_dir() and not (whole / "eval.json").exists()
