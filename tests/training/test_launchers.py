"""`python -m drkl distill` under torchrun and accelerate: who speaks, who writes, and what happens when one fails."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drkl.runs import RunFolder
from tests.training import tiny_runs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # With `--cpu --num_processes 2` accelerate starts one process.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}


def launch(*words: object, launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
    environment = tiny_runs.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    run = [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, words)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """A config, and the run of it that two processes made."""
    root = tmp_path_factory.mktemp("launched")
    path = tiny_runs.write_config(tiny_runs.config(root), root / "c.yaml")
    done = launch("-m", "drkl", "distill", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading the teacher") == done.stdout.count("The student is in") == 1
    assert done.stdout.count("held-out loss") == 3 and "Warning" not in done.stderr
    return path, RunFolder(root / "runs" / "r")


def failing(path: Path, way: str, process: int, *words: str) -> subprocess.CompletedProcess[str]:
    return launch(ROOT / "tests" / "training" / "failing.py", way, process, "distill", path, *words)


def test_accelerate_starts_the_same_run(trained: tuple[Path, RunFolder]) -> None:
    path, run = trained
    done = launch("-m", "drkl", "distill", path, "run.name=accelerated", launcher="accelerate")
    assert done.returncode == 0, done.stderr
    other = RunFolder(run.root.parent / "accelerated")
    assert tiny_runs.weights(other) == tiny_runs.weights(run)
    assert any(line.get("idle_share", 0) > 0 for line in other.read_train_log())


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_comes_late(trained: tuple[Path, RunFolder], late: int) -> None:
    """The first process alone removes the old run and writes the new one."""
    path, run = trained
    expected = tiny_runs.weights(run)
    done = failing(path, "late", late, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert tiny_runs.weights(run) == expected
    assert [line["step"] for line in run.read_train_log() if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"Error: The run folder '.*/r' exists. `--overwrite` replaces it"),
        (("objective.name=none",), "Error: objective: There is no objective 'none'"),
        (("--overwritten",), "No such option: --overwritten"),
    ],
)
def test_an_error_of_all_processes_is_said_once(
    trained: tuple[Path, RunFolder], words: tuple[str, ...], message: str
) -> None:
    path, run = trained
    before = tiny_runs.tree(run.root)
    done = launch("-m", "drkl", "distill", path, *words)
    assert done.returncode == 1
    said = done.stderr.split("torch/distributed")[0]
    assert re.search(message, said), done.stderr
    assert said.count("Error: " if words != ("--overwritten",) else "No such option") == 1, done.stderr
    assert "process 1" not in done.stderr
    assert tiny_runs.tree(run.root) == before


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("way", "message"),
    [("error", "The disk of this process is full."), ("bug", "KeyError: 'a bug'"), ("kill", "Signal 9 (SIGKILL)")],
)
def test_a_process_that_fails_ends_the_other(tmp_path: Path, way: str, message: str, process: int) -> None:
    path = tiny_runs.write_config(tiny_runs.config(tmp_path), tmp_path / "c.yaml")
    done = failing(path, way, process)
    assert time.monotonic() - float((tmp_path / "failed").read_text()) < 60
    assert done.returncode == 1
    assert message in done.stderr, done.stderr
    assert "Connection closed" not in done.stderr
    who = "Error: " if process == 0 else "Error in process 1 of 2, counted from 0: "
    assert done.stderr.lstrip().startswith(who) or way == "kill"
    resumed = launch("-m", "drkl", "distill", "--resume", tmp_path / "runs" / "r")
    assert resumed.returncode == 0, resumed.stderr
