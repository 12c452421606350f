"""Ends from outside, at random moments of every command: what was finished stays, and going on gives the same bytes."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults import moments
from tests.faults.conftest import Injected
from tests.faults.forked import Runner
from tests.training import tiny_runs

TIMES = ("seconds", "tokens_per_second")
GROUP = "Ends from outside"
ON_POLICY = {"share": 0.7, "refresh_every": 3, "replay": 0.3, "max_new_tokens": 6, "eval_prompts": 2}
SIGNALS = [
    pytest.param(signal.SIGKILL, 0.0, id="SIGKILL"),
    pytest.param(signal.SIGTERM, 0.0, id="SIGTERM"),
    pytest.param(signal.SIGINT, 0.0, id="SIGINT"),
    pytest.param(signal.SIGINT, 1.2, id="SIGINT-twice"),
]


def trained(root: Path) -> dict[str, Any]:
    """What a run ends with, but for times and paths."""
    found: dict[str, Any] = {"student": moments.files_of(root / "student")}
    found["checkpoints"] = sorted(path.name for path in (root / "checkpoints").iterdir())
    for name in ("train.jsonl", "rollouts.jsonl"):
        for path in sorted(root.rglob(name)):
            found[str(path.relative_to(root))] = moments.log_of(path, *TIMES)
    env = json.loads((root / "env.json").read_text())
    return found | {name: env[name] for name in ("steps", "best_step", "best_heldout_loss")}


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == value, f"{name} is another: {str(found[name])[:300]}, and not {str(value)[:300]}"


def check_distill(
    runner: Runner, folder: Path, injected: Injected, values: dict[str, Any], signum: int, again: float, count: int = 10
) -> None:
    """End a run at random moments of its life, and go on with it as the message says."""
    config = tiny_runs.write_config(values, folder / "c.yaml")
    work = moments.work_of(runner, folder, "distill", config)
    wanted = trained(Path(values["run"]["dir"]) / "r")
    draw = random.Random(f"{signum} {again}")
    for number in range(count):
        seconds = draw.uniform(0, work)
        with injected(f"{signal.Signals(signum).name} after {seconds:.2f} of {work:.2f} s"):
            root = folder / str(number) / "r"
            begin = ["distill", str(config), f"run.dir={root.parent}"]
            done = moments.stop(runner, seconds, signum, *begin, again=again)
            if done.code:
                otherwise = ["distill", "--resume", str(root)] if (root / "config.yaml").is_file() else begin
                resumed = runner.call(*moments.way_on(done, otherwise), until=120)
                finished = "is finished; there is nothing to resume" in resumed.err
                assert resumed.code == 0 or finished, f"going on: {resumed.err[-500:]}"
            check_same(trained(root), wanted)


@pytest.mark.slow
@pytest.mark.fault(
    group=GROUP,
    fault="A run of two stages is ended at any moment of its life",
    does="SIGTERM, SIGINT and SIGHUP: the step is finished and saved, one line names the checkpoint and the command "
    "that goes on, status 143, 130 or 129. A second signal, or SIGKILL, leaves the last checkpoint. The resumed run is "
    "the uninterrupted one, byte for byte.",
)
@pytest.mark.parametrize(("signum", "again"), SIGNALS)
def test_a_run_is_ended(runner: Runner, tmp_path: Path, injected: Injected, signum: int, again: float) -> None:
    training = {"max_steps": 40, "eval_every": 4, "save_every": 8, "arguments": {"logging_steps": 3}}
    stages = [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 20}}]
    values = tiny_runs.config(tmp_path, training=training, stages=stages)
    check_distill(runner, tmp_path, injected, values, signum, again)


@pytest.mark.slow
@pytest.mark.fault(
    group=GROUP,
    fault="A run that trains on sampled answers is ended at any moment of its life",
    does="As any run; answers that are being written are given up, and written again.",
)
@pytest.mark.parametrize(("signum", "again"), SIGNALS)
def test_an_on_policy_run_is_ended(
    runner: Runner, tmp_path: Path, injected: Injected, signum: int, again: float
) -> None:
    training = {"max_steps": 16, "eval_every": 4, "save_every": 8, "arguments": {"logging_steps": 3}}
    values = tiny_runs.config(tmp_path, training=training, rollouts=ON_POLICY)
    check_distill(runner, tmp_path, injected, values, signum, again)
