"""A clock that jumps, files of another time, thousands of other people's files, a slow machine."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tiny_run
from tests.faults.conftest import Injected
from tests.faults.forked import Runner
from tests.faults.test_places import cut_off

DAY = 86400.0


def jump(seed: int) -> None:
    """Let the clock go ahead and back by up to a day at every look at it; called in the child."""
    import random

    draw, real, real_ns = random.Random(seed), time.time, time.time_ns
    time.time = lambda: real() + draw.uniform(-DAY, DAY)  # type: ignore[assignment]
    time.time_ns = lambda: real_ns() + int(draw.uniform(-DAY, DAY) * 1e9)  # type: ignore[assignment]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def check_durations(run: Path, numbers: int) -> None:
    lines = log_of(run)
    assert sum("loss" in line for line in lines) == numbers, "lines of the log are missing"
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and min(seconds) >= 0, seconds
    for line in lines:
        for name, value in line.items():
            if "second" in name:
                assert math.isfinite(value) and value >= 0, (name, value)
    assert json.loads((run / "env.json").read_text())["seconds"] >= 0


@pytest.mark.fault(
    group="Surroundings",
    fault="The clock jumps ahead and back by up to a day, at every look at it",
    does="The same weights and the same log; no duration is negative, no rate infinite.",
)
@pytest.mark.parametrize("count", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_the_clock_jumps(count: int, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    arguments = {"logging_steps": 1, "include_num_input_tokens_seen": "all"}
    config = tiny_run.write(tmp_path, training={"arguments": arguments})
    runs = tmp_path / "runs"
    tiny_run.check_done(runner.call("distill", config))
    for seed in range(count):
        with injected(f"seed {seed}"):
            words = {"inject": "tests.faults.test_environment:jump", "given": [seed]}
            tiny_run.check_done(runner.call("distill", config, f"run.name=j{seed}", **words))
            there, here = runs / "r", runs / f"j{seed}"
            weights = [(run / "student" / "model.safetensors").read_bytes() for run in (there, here)]
            assert weights[0] == weights[1], "other weights"
            check_durations(here, 3)
            if count > 1:
                cut_off(here)
                tiny_run.check_done(runner.call("distill", "--resume", here, **words))
                check_durations(here, 3)
                for command in ("evaluate", "analyze", "report"):
                    tiny_run.check_done(runner.call(command, here, **words))


@pytest.mark.slow
@pytest.mark.fault(
    group="Surroundings",
    fault="Every file of a run and of the caches is from 1970, or from 2100",
    does="What is there is read as it is; a run goes on to the same weights.",
)
def test_files_of_another_time(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config, run = tiny_run.write(tmp_path), tmp_path / "runs" / "r"
    variables = {"DRKL_CACHE": str(tmp_path / "cache")}
    for year in (0.0, 4102444800.0):
        with injected(year):
            tiny_run.check_done(runner.call("distill", config, "--overwrite", variables=variables))
            tiny_run.check_done(runner.call("evaluate", run, variables=variables))
            weights = (run / "student" / "model.safetensors").read_bytes()
            evaluated = json.loads((run / "eval.json").read_text())
            cut_off(run)
            for path in [*tmp_path.rglob("*")]:
                os.utime(path, (year, year))
            tiny_run.check_done(runner.call("distill", "--resume", run, variables=variables))
            assert (run / "student" / "model.safetensors").read_bytes() == weights
            tiny_run.check_done(runner.call("evaluate", run, variables=variables))
            again = json.loads((run / "eval.json").read_text())
            for name in ("student", "teacher"):
                assert again[name] == evaluated[name], "other numbers"


@pytest.mark.slow
@pytest.mark.fault(
    group="Surroundings",
    fault="10,000 other files and folders beside a run, in it, in its checkpoints and in the caches",
    does="None is removed or read, and no command takes ten times as long.",
)
def test_thousands_of_other_files(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config, run, cache = tiny_run.write(tmp_path), tmp_path / "runs" / "r", tmp_path / "cache"
    variables = {"DRKL_CACHE": str(cache)}

    def all_commands() -> float:
        started = time.monotonic()
        tiny_run.check_done(runner.call("distill", "--resume", run, variables=variables))
        for command in ("evaluate", "report"):
            tiny_run.check_done(runner.call(command, run, variables=variables))
        return time.monotonic() - started

    tiny_run.check_done(runner.call("distill", config, variables=variables))
    cut_off(run)
    before = all_commands()
    folders = [run, run / "checkpoints", tmp_path / "runs", cache, *(path for path in cache.iterdir() if path.is_dir())]
    names = ("notes-{}.txt", "checkpoint-{}-backup", ".{}", "x{}.json")
    added = [folder / name.format(number) for folder in folders for name, number in
             zip(itertools.cycle(names), range(10_000), strict=False)]  # fmt: skip
    for number, path in enumerate(added):
        if number % 50 == 0:
            path.mkdir()
        else:
            path.write_text("mine")
    cut_off(run)
    with injected("10,000 in each folder"):
        after = all_commands()
        missing = [path for path in added if not path.exists()]
        assert not missing, f"{len(missing)} are gone, first {missing[0]}"
        assert after < 10 * before + 20, f"{after:.1f} s for {before:.1f} s"
