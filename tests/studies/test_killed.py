"""Ends of a study from outside, and several processes in one: nothing is run twice, and the weights are the same."""

from __future__ import annotations

import random
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drkl.runs import read_sealed
from tests.faults.forked import Child, Ended, Runner
from tests.studies import tiny_studies

pytestmark = pytest.mark.slow
INJECT = {"inject": "tests.studies.forking:fork_commands"}
BASE = tiny_studies.SHORT | {
    "training": {"max_steps": 12, "eval_every": 3, "save_every": 3},
    "stages": [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 6}}],
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("commands"))
    yield runner
    runner.close()


def study(root: Path) -> Path:
    return tiny_studies.write(root, BASE)


def weights(root: Path) -> dict[str, bytes]:
    cells = root / "studies" / "s" / "cells"
    return {path.name: (path / "student" / "model.safetensors").read_bytes() for path in sorted(cells.iterdir())}


@pytest.fixture(scope="module")
def reference(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The weights of a study that nothing interrupts, and the seconds that it takes."""
    root = tmp_path_factory.mktemp("reference")
    began = time.monotonic()
    check_whole(runner.call("study", study(root), until=600, **INJECT))
    return weights(root), time.monotonic() - began


def check_whole(done: Ended) -> None:
    assert done.code == 0, f"status {done.code}: {done.err[-800:]}"
    assert "The study is whole." in done.out, done.out


def tries(root: Path) -> dict[str, list[Any]]:
    """The status of each try of everything that the study made."""
    found = {}
    for path in sorted((root / "studies" / "s").rglob("*.json")):
        if path.name in ("cell.json", "start.json"):
            found[path.parent.name] = [one["status"] for one in read_sealed(path)["tries"]]
    return found


@pytest.mark.parametrize("group", [True, False], ids=["all", "the study alone"])
def test_killed_at_any_moment_it_goes_on_to_the_same_weights(
    runner: Runner, tmp_path: Path, reference: Any, group: bool
) -> None:
    """Killed alone, the study leaves a command behind; the next one waits for it."""
    wanted, seconds = reference
    draw = random.Random(f"{group}")
    for number in range(5):
        root = tmp_path / str(number)
        path = study(root)
        for moment in [draw.uniform(0, seconds) for _ in range(2)]:
            child = runner.start("study", path, **INJECT)
            time.sleep(moment)
            child.kill(signal.SIGKILL, group=group)
            child.wait(60)
        check_whole(runner.call("study", path, until=600, **INJECT))
        assert weights(root) == wanted
        assert all(found[-1] == 0 for found in tries(root).values())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_save(runner: Runner, tmp_path: Path, reference: Any, signum: int) -> None:
    wanted, seconds = reference
    draw = random.Random(int(signum))
    ended = 0
    for number in range(4):
        root = tmp_path / str(number)
        child = runner.start("study", study(root), **INJECT)
        time.sleep(draw.uniform(0.1, 0.8) * seconds)
        child.kill(signum)
        done = child.wait(120)
        if done.code == 0:
            continue
        ended += 1
        assert done.code == 128 + signum, done.err
        (line,) = done.err.strip().splitlines()
        assert signal.Signals(signum).name in line and "The cells that were finished are kept" in line
        words = shlex.split(line.rpartition("To go on: drkl ")[2])
        assert words[0] == "study"
        assert not any(status == 1 for found in tries(root).values() for status in found)  # interrupted, not failed
        check_whole(runner.call(*words, until=600, **INJECT))
        assert weights(root) == wanted
    assert ended


@pytest.mark.parametrize("words", [[["--part", "1/2"], ["--part", "2/2"]], [[], []], [[], [], ["--jobs", "2"]]])
def test_several_at_once_run_no_cell_twice(
    runner: Runner, tmp_path: Path, reference: Any, words: list[list[str]]
) -> None:
    path = study(tmp_path)
    children: list[Child] = [runner.start("study", path, *own, **INJECT) for own in words]
    for done in [child.wait(600) for child in children]:
        assert done.code == 0, done.err
    assert weights(tmp_path) == reference[0]
    assert set(map(tuple, tries(tmp_path).values())) == {(0,)} and len(tries(tmp_path)) == 6
    for log in (tmp_path / "studies" / "s").rglob("log.txt"):
        assert log.read_text().count("The student is in") == 1, log
    check_whole(runner.call("study", path, until=600, **INJECT))
