"""Ends from outside, at random moments of every command: what was finished stays, and going on gives the same bytes."""

from __future__ import annotations

import json
import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.faults import moments
from tests.faults.conftest import Injected
from tests.faults.forked import Child, Runner
from tests.training import tiny_runs

TIMES = ("seconds", "tokens_per_second")
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
                resumed = runner.call(*moments.way_on(done, otherwise), until=600)
                finished = "is finished; there is nothing to resume" in resumed.err
                assert resumed.code == 0 or finished, f"going on: {resumed.err[-500:]}"
            check_same(trained(root), wanted)


@pytest.mark.fault(
    group="Ends from outside",
    fault="SIGTERM before the first step, in a step, after one, while it is logged and while it is saved",
    does="The step is finished and saved, and nothing before the first one; the resumed run is the uninterrupted one.",
)
def test_sigterm_at_chosen_moments(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    values = tiny_runs.config(tmp_path)
    config = tiny_runs.write_config(values, tmp_path / "c.yaml")
    assert runner.call("distill", config).code == 0
    wanted = trained(tmp_path / "runs" / "r")
    for event, step in (("train_begin", 0), ("pre_optimizer_step", 2), ("step_end", 4), ("log", 5), ("save", 2)):
        with injected(f"{event}, step {step}"):
            root = tmp_path / event / "r"
            given = [f"on_{event}", step, int(signal.SIGTERM)]
            words = ["distill", config, f"run.dir={root.parent}"]
            done = runner.call(*words, inject="tests.faults.moments:send_at", given=given)
            moments.look(done, signal.SIGTERM)
            resumed = runner.call(*moments.way_on(done, []))
            assert resumed.code == 0, resumed.err
            check_same(trained(root), wanted)


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
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
    group="Ends from outside",
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


@pytest.fixture(scope="module")
def finished(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config, and the finished run of it."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_runs.write_config(tiny_runs.config(folder, training={"max_steps": 2}), folder / "c.yaml")
    done = runner.call("distill", config)
    assert done.code == 0, done.err
    return config, folder / "runs" / "r"


def results(folder: Path) -> dict[str, Any]:
    """What an evaluation or an analysis wrote, but for times and the command."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name in ("eval.json", "analysis.json"):
            values = json.loads(path.read_text())
            values.pop("timing", None)
            values.pop("checksum", None)
            values.get("settings", {}).pop("command", None)
            values.pop("name", None)
            found[path.name] = values
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def check_results(
    runner: Runner, folder: Path, injected: Injected, signum: int, again: float, *words: object, count: int = 10
) -> None:
    """End a command at random moments, and call it again."""
    variables = {"DRKL_CACHE": str(folder / "cache")}
    whole = runner.call(*words, "--output", folder / "whole", variables=variables)
    assert whole.code == 0, whole.err
    work = moments.work_of(runner, folder, *words, "--output", folder / "measured")
    wanted = results(folder / "whole")
    draw = random.Random(f"{signum} {again}")
    for number in range(count):
        seconds = draw.uniform(0, work)
        with injected(f"{signal.Signals(signum).name} after {seconds:.2f} of {work:.2f} s"):
            output = folder / str(number)
            line = [*map(str, words), "--output", str(output)]
            done = moments.stop(runner, seconds, signum, *line, again=again)
            if done.code:
                resumed = runner.call(*moments.way_on(done, line), until=600)
                assert resumed.code == 0, f"going on: {resumed.err[-500:]}"
            check_same(results(output), wanted)


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="An evaluation is ended at any moment",
    does="It says so in one line; the same command uses the parts that were finished, and writes the same eval.json.",
)
@pytest.mark.parametrize(("signum", "again"), SIGNALS)
def test_an_evaluation_is_ended(
    runner: Runner, finished: tuple[Path, Path], tmp_path: Path, injected: Injected, signum: int, again: float
) -> None:
    check_results(runner, tmp_path, injected, signum, again, "evaluate", finished[1])


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="An analysis is ended at any moment",
    does="It says so in one line; the same command does it again, and writes the same analysis.json.",
)
@pytest.mark.parametrize(("signum", "again"), SIGNALS)
def test_an_analysis_is_ended(
    runner: Runner, finished: tuple[Path, Path], tmp_path: Path, injected: Injected, signum: int, again: float
) -> None:
    check_results(runner, tmp_path, injected, signum, again, "analyze", finished[1], "--positions", 16)


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="A teacher's pass for a cache is ended at any moment",
    does="It says so in one line; the same command goes on after the files that were finished, to the same cache.",
)
@pytest.mark.parametrize(("signum", "again"), SIGNALS)
def test_a_cache_is_ended(
    runner: Runner, finished: tuple[Path, Path], tmp_path: Path, injected: Injected, signum: int, again: float
) -> None:
    check_results(runner, tmp_path, injected, signum, again, "cache", finished[0])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_two(runner: Runner, *words: object, which: int, seconds: float = 0.0, signum: int = 0) -> list[Child]:
    """Two processes of one run, as a launcher starts them; one of them sends itself a signal."""
    port = free_port()
    children = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        injection = {"inject": "tests.faults.moments:send_after", "given": [seconds, int(signum)]}
        ends = injection if signum and rank == which else {}
        children.append(runner.start(*words, variables=variables, **ends))
    return children


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="One process of two is killed, or asked to end, at any moment of training",
    does="SIGKILL: the other one says that it lost a process, and ends within seconds. SIGTERM: both finish the same "
    "step and save it. The resumed run is the uninterrupted one.",
)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_one_of_two_is_ended(runner: Runner, tmp_path: Path, injected: Injected, signum: int) -> None:
    training = {"max_steps": 30, "eval_every": 4, "save_every": 8, "arguments": {"logging_steps": 3}}
    config = tiny_runs.write_config(tiny_runs.config(tmp_path, training=training), tmp_path / "c.yaml")
    assert [child.wait(600).code for child in start_two(runner, "distill", config, which=0)] == [0, 0]
    wanted = trained(tmp_path / "runs" / "r")
    draw = random.Random(int(signum))
    for number in range(10):
        which, seconds = number % 2, draw.uniform(0.3, 2.0)
        with injected(f"{signal.Signals(signum).name} to process {which} after {seconds:.2f} s"):
            root = tmp_path / str(number) / "r"
            begin = ["distill", str(config), f"run.dir={root.parent}"]
            children = start_two(runner, *begin, which=which, seconds=seconds, signum=signum)
            done = [child.wait(600) for child in children]
            if done[which].code:
                assert done[which].code == moments.KILLED[signal.Signals(signum)], done[which].err[-500:]
                assert done[1 - which].code != 0
                assert all("Traceback" not in one.err for one in done), done[0].err[-1000:] + done[1].err[-1000:]
                assert "To go on" in done[0].err or which == 0, done[0].err[-500:]
                otherwise = ["distill", "--resume", str(root)] if (root / "config.yaml").is_file() else begin
                resumed = [child.wait(600) for child in start_two(runner, *otherwise, which=0)]
                codes = [one.code for one in resumed]
                assert codes == [0, 0] or "nothing to resume" in resumed[0].err, resumed[0].err[-500:]
            check_same(trained(root), wanted)
