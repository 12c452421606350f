"""Two machines, simulated by two agents of torchrun with folders of their own for all but the run."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from drkl.runs import RunFolder
from tests.training import tiny_runs
from tests.training.test_launchers import launch

pytestmark = pytest.mark.slow


@contextmanager
def agent(folder: Path, port: int, *words: object, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """One machine's torchrun; what it says is in ``folder/said``."""
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    environment = tiny_runs.environment() | {"HF_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    # Else a machine that comes back looks for the address of the process that was killed.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--max-restarts={restarts}",
    ]
    run += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=job", "-m", "drkl"]
    with (folder / "said").open("ab") as said:
        process = subprocess.Popen([*run, *map(str, words)], env=environment, cwd=folder, stdout=said, stderr=said)
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill an agent and the process that it has started, as a machine that goes down does."""
    if process.poll() is None:
        agent = psutil.Process(process.pid)
        for one in [agent, *agent.children(recursive=True)]:  # a worker is in a session of its own
            one.kill()
    process.wait()


def wait_for(ready: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def test_a_machine_that_is_lost_and_comes_back(tmp_path: Path) -> None:
    """Killed after a checkpoint and started again, with the same command: bit for bit the run that went through."""
    values = tiny_runs.config(tmp_path, training={"max_steps": 1500, "save_every": 100, "eval_every": 100})
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    done = launch("-m", "drkl", "distill", path, "run.name=whole")
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / "r")
    words = ("distill", path, "--auto-resume")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ExitStack() as machines:
        first = machines.enter_context(agent(tmp_path / "one", port, *words, restarts=5))
        time.sleep(2)  # it holds the rendezvous
        second = machines.enter_context(agent(tmp_path / "two", port, *words, restarts=5))
        wait_for((run.checkpoints_path / "checkpoint-100" / "complete.json").is_file)
        kill(second)
        assert not run.is_finished()
        again = machines.enter_context(agent(tmp_path / "two", port, *words, restarts=5))
        wait_for(lambda: first.poll() is not None and again.poll() is not None)
        said = (tmp_path / "one" / "said").read_text() + (tmp_path / "two" / "said").read_text()
        assert (first.returncode, again.returncode) == (0, 0), said
    assert said.count("Going on from checkpoint-") == 1 and said.count("The student is in") == 1, said
    whole = RunFolder(tmp_path / "runs" / "whole")
    assert tiny_runs.weights(run) == tiny_runs.weights(whole)
    assert tiny_runs.steps(run) == tiny_runs.steps(whole)


def test_machines_without_a_folder_in_common(tmp_path: Path) -> None:
    """A relative run.dir is another folder in each working directory."""
    values = tiny_runs.config(tmp_path)
    values["run"] |= {"dir": "runs"}
    path = tiny_runs.write_config(values, tmp_path / "c.yaml")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ExitStack() as machines:
        both = [machines.enter_context(agent(tmp_path / name, port, "distill", path)) for name in ("one", "two")]
        wait_for(lambda: any(process.poll() is not None for process in both))
        said = "".join((tmp_path / name / "said").read_text() for name in ("one", "two"))
    assert "was made by the first process, and this one does not see it" in said, said
    assert "set run.dir to its absolute path" in said
