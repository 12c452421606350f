"""Running a study: what is begun, what failures and signals leave, and who runs which cell."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from drkl import DrklError
from drkl.cli import _StudyWords
from drkl.evaluation.result import Evaluation
from drkl.locks import STUDY, holding
from drkl.run_models import evaluate_run
from drkl.runs import RunFolder, locked
from drkl.signals import Stopped
from drkl.studies import running
from drkl.studies.cells import State
from drkl.studies.commands import Commands, own_cores, visible_gpus
from drkl.studies.folder import read_environment, settle
from drkl.studies.plan import Plan, load_study
from drkl.studies.pricing import price
from drkl.studies.records import Record, began_at, cell_record
from drkl.studies.running import Listener, Now, Outcome, part_of, run_study
from drkl.studies.starts import cache_for, start_for
from tests.command_line import Cli
from tests.studies import tiny_studies
from tests.studies.tiny_studies import Ended, in_this_process, plan_of, pretending, ready
from tests.training import tiny_runs

WORDS = _StudyWords()
NAMES = ["rkl-seed0", "drkl-seed0", "rkl-seed1", "drkl-seed1"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No pauses, and digests that are made up where commands pretend."""
    monkeypatch.setattr(running, "TICK", 0.0)
    if request.node.get_closest_marker("slow") is None and "whole" not in request.fixturenames:
        monkeypatch.setattr(running, "weights_of", lambda start: f"weights of {start.key}")


def begun(plan: Plan, commands: Commands, **words: Any) -> Outcome:
    settle(plan, ["drkl", "study"])
    return run_study(plan, WORDS, commands=commands, **words)


def states_of(plan: Plan) -> dict[str, tuple[State, str | None]]:
    return {planned.cell.name: cell_record(planned.folder.root).state() for planned in plan.cells}


def states(plan: Plan) -> dict[str, str]:
    return {name: state for name, (state, _) in states_of(plan).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, list[str], list[Now]]:
    """A study of two objectives and two seeds, trained and evaluated."""
    root = tmp_path_factory.mktemp("study")
    plan = plan_of(root, tiny_studies.SHORT, predictions=["drkl is better calibrated."])
    said: list[str] = []
    seen: list[Now] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "TICK", 0.0)
        done = begun(plan, Commands(launch=in_this_process), listener=Listener(said.append, seen.append))
    assert (done.done, done.failed, done.elsewhere) == (4, {}, [])
    return root, plan, said, seen


@pytest.mark.slow
def test_a_cell_is_the_run_that_its_config_alone_would_be(whole: Any) -> None:
    """The shared start changes nothing: the weights are those of the base with the cell's settings, to the bit."""
    root, plan, *_ = whole
    values = yaml.safe_load((root / "base.yaml").read_text())
    values["run"] |= {"dir": str(root / "plain"), "seed": 1}
    values["objective"] = {"name": "rkl"}
    wanted = tiny_runs.weights(tiny_runs.train(values))
    assert tiny_runs.weights(RunFolder(plan.folder / "cells" / "rkl-seed1")) == wanted
    assert tiny_runs.weights(RunFolder(plan.folder / "cells" / "rkl-seed0")) != wanted


@pytest.mark.slow
def test_the_cells_of_a_seed_begin_with_the_weights_of_their_start(whole: Any) -> None:
    _, plan, *_ = whole
    digests = collections.defaultdict(set)
    for planned in plan.cells:
        known = cell_record(planned.folder.root).read()
        env = planned.folder.read_env()
        assert env["inputs"]["student"]["weights"] == known["start"]
        start = start_for(plan, planned)
        assert start is not None and start.record.read()["digest"] == known["start"]
        digests[planned.seed].add(known["start"])
    assert {seed: len(found) for seed, found in digests.items()} == {0: 1, 1: 1}
    assert digests[0] != digests[1]
    assert sorted(path.name for path in (plan.shared / "starts").iterdir()) == sorted(
        {start.key for planned in plan.cells if (start := start_for(plan, planned))}
    )


@pytest.mark.slow
def test_what_is_noted_of_a_cell(whole: Any) -> None:
    _, plan, said, seen = whole
    known = cell_record(plan.folder / "cells" / "drkl-seed1").read()
    assert known["axes"] == {"objective.name": "drkl", "run.seed": 1}
    assert [(one["status"], one["message"]) for one in known["tries"]] == [(0, None)]
    assert known["seconds"].keys() == {"start", "train", "evaluate"}
    assert said[-1] == "drkl-seed1 is done (4 of 4)." and [now.done for now in seen] == sorted(now.done for now in seen)
    assert {what for now in seen for _, what, _, _ in now.running} <= {"start", "train", "evaluate"}
    evaluation = Evaluation.load(plan.folder / "cells" / "drkl-seed1")
    assert evaluation.models == ["teacher", "student"]
    assert "The student is in" in (plan.folder / "cells" / "drkl-seed1" / "log.txt").read_text()


@pytest.mark.slow
def test_what_is_noted_of_the_study(whole: Any) -> None:
    _, plan, *_ = whole
    env = read_environment(plan.folder)
    assert env["command"] == ["drkl", "study"] and env["began"] and env["changes"] == []
    assert yaml.safe_load((plan.folder / "study.yaml").read_text())["axes"] == tiny_studies.AXES
    found = price(plan, plan.cells)
    assert found.lines()[-1] == "The study is whole: nothing is left to run."


@pytest.mark.slow
def test_a_study_that_is_whole_runs_nothing(whole: Any) -> None:
    _, plan, *_ = whole
    commands, pretended = pretending()
    assert begun(plan, commands).done == 4 and not pretended.called


@pytest.mark.slow
def test_another_study_takes_its_cells(whole: Any, tmp_path: Path) -> None:
    """An axis whose value is the base's own makes an equal cell, whatever it is called; it stays where it is."""
    root, plan, *_ = whole
    axes = {"objective.name": ["rkl"], "training.learning_rate": [1e-2, 1e-3], "run.seed": [0]}
    fields = tiny_studies.definition(
        tmp_path, base=str(root / "base.yaml"), axes=axes, baseline={"training.learning_rate": 1e-2},
        shared={"cells": [str(plan.folder)]},
    )  # fmt: skip
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(fields))
    other = load_study(tmp_path / "other.yaml")
    taken = f"rkl-learning_rate0.01-seed0   done: in {plan.folder / 'cells' / 'rkl-seed0'}"
    assert taken in price(other, other.cells).lines()
    commands, pretended = pretending()
    assert begun(other, commands).done == 2
    assert [name for _, name in pretended.called] == ["rkl-learning_rate0.001-seed0"] * 2
    known = cell_record(other.folder / "cells" / "rkl-learning_rate0.01-seed0").read()
    assert (other.folder / known["run"]).resolve() == (plan.folder / "cells" / "rkl-seed0").resolve()
    fresh = cell_record(other.folder / "cells" / "rkl-learning_rate0.001-seed0").read()
    assert fresh["start"] == known["start"] and not other.shared.exists()  # the start is used where it lies


# Order, failures, tries ---------------------------------------------------------------------------------------------


def test_cells_run_seed_by_seed_each_trained_and_evaluated(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    assert set(states(plan).values()) == {"missing"}
    commands, pretended = pretending()
    assert begun(plan, commands).done == 4
    assert pretended.called == [(word, name) for name in NAMES for word in ("distill", "evaluate")]
    assert set(states(plan).values()) == {"done"}


def test_a_cell_that_fails_is_said_and_tried_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, pretended = pretending(fails={("distill", "drkl-seed0"): 2, ("evaluate", "rkl-seed1"): -9})
    said: list[str] = []
    done = begun(plan, commands, listener=Listener(said.append))
    assert done.done == 2
    assert done.failed == {
        "drkl-seed0": "Error: drkl-seed0 is broken.",
        "rkl-seed1": "It was killed (SIGKILL), often for want of memory. Error: rkl-seed1 is broken.",
    }
    assert "drkl-seed0 has failed: Error: drkl-seed0 is broken." in said
    assert states(plan) == dict(zip(NAMES, ("done", "failed", "failed", "done"), strict=True))
    known = cell_record(plan.folder / "cells" / "rkl-seed1").read()
    assert (known["tries"][0]["status"], known["finished"]) == (137, None)
    pretended.fails.clear()
    pretended.called.clear()
    assert begun(plan, commands).done == 4
    # What was trained is not trained again.
    assert pretended.called == [("distill", "drkl-seed0"), ("evaluate", "drkl-seed0"), ("evaluate", "rkl-seed1")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_start_that_cannot_be_made_fails_its_cells_alone(tmp_path: Path, jobs: int) -> None:
    plan = plan_of(tmp_path)
    starts = [start for planned in plan.cells[::2] if (start := start_for(plan, planned)) is not None]
    fails = {("distill", starts[0].key): 2, ("distill", starts[1].key): 2}
    commands, pretended = pretending(jobs, fails=fails, looks=3)
    done = begun(plan, commands)
    assert [word for word in pretended.called] == [("distill", start.key) for start in starts]  # each once
    assert sorted(done.failed) == sorted(NAMES)
    wanted = f"Its start {starts[0].key} could not be made: Error: {starts[0].key} is broken."
    assert done.failed["rkl-seed0"] == done.failed["drkl-seed0"] == wanted
    assert states_of(plan)["drkl-seed0"] == ("failed", wanted)
    # No cell was run with these settings, so they may be others now.
    plan = plan_of(tmp_path, SHORTER)
    assert settle(plan, None) == []
    pretended.fails.clear()
    assert begun(plan, commands).done == 4
    known = cell_record(plan.folder / "cells" / "drkl-seed0").read()
    assert [one["status"] for one in known["tries"]] == [0] and known["not_begun"] is None


SHORTER = {"stages": [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 3}}]}


def test_an_error_in_making_a_start_fails_its_cells_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(start: Any) -> str:
        if start.key.startswith("seed0"):
            raise RuntimeError("not enough memory")
        return "weights"

    monkeypatch.setattr(running, "weights_of", weights)
    done = begun(plan_of(tmp_path, {"student": {"init": "prune", "layers": 2}}), pretending()[0])
    assert done.done == 2
    assert done.failed.keys() == {"rkl-seed0", "drkl-seed0"}
    assert "could not be made: RuntimeError: not enough memory" in done.failed["drkl-seed0"]


def test_several_cells_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, pretended = pretending(jobs=2, looks=3)
    most = 0

    def count(now: Now) -> None:
        nonlocal most
        most = max(most, len(commands.running))

    assert begun(plan, commands, listener=Listener(on_progress=count)).done == 4
    assert most == 2 and len(pretended.called) == len(set(pretended.called)) == 8
    assert commands._variables()["OMP_NUM_THREADS"] == str(max(1, own_cores() // 2))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert commands._variables()["OMP_NUM_THREADS"] == "3"
    monkeypatch.delattr("os.sched_getaffinity")
    assert own_cores() == (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert commands._variables()["OMP_NUM_THREADS"] == "3"


def test_commands_that_run_at_once_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    given: list[str] = []

    def launched(words: Sequence[str], log: Path, variables: Mapping[str, str]) -> Ended:
        given.append(variables["CUDA_VISIBLE_DEVICES"])
        return Ended(0, looks=1)

    def begin(commands: Commands, name: str) -> Any:
        record = cell_record(tmp_path / name)
        record.begin({})
        work = commands.run(record, "train", ["distill"])
        next(work)
        return work

    commands = Commands(3, launch=launched)
    running_now = [begin(commands, name) for name in "abc"]
    assert given == ["3", "5", "3"]
    assert list(running_now[1]) == []
    begin(commands, "d")
    assert given[3] == "5"
    begin(Commands(1, launch=launched), "e")
    assert given[4] == "3, 5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]


def test_a_cell_takes_its_share_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))
    plan = plan_of(tmp_path, ready(tmp_path), shared={"teacher_cache": "hidden"})
    begun(plan, pretending()[0])
    (cache,) = (plan.shared / "teacher").glob("*/cache.json")
    took = json.loads(cache.read_text())["seconds"]["train"]
    assert took >= 10
    for planned in plan.cells:
        assert cell_record(planned.folder.root).read()["seconds"]["cache"] == took / 4


def test_a_damaged_record_fails_its_cell_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, _ = pretending()
    begun(plan, commands)
    path = plan.folder / "cells" / "rkl-seed0" / "cell.json"
    path.write_text(path.read_text().replace('"finished": "2', '"finished": "1'))
    assert "rkl-seed0   failed: " in price(plan, plan.cells).lines()[0]
    done = begun(plan, commands)
    assert done.done == 3 and "is damaged, or was edited" in done.failed["rkl-seed0"]


def test_a_finished_cell_whose_results_are_gone_is_evaluated_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, pretended = pretending()
    begun(plan, commands)
    (plan.folder / "cells" / "rkl-seed0" / "eval.json").unlink()
    state, why = states_of(plan)["rkl-seed0"]
    assert state == "failed" and why is not None and "It was finished, and" in why and "eval.json' is gone" in why
    assert "1 of 4 cells are left" in "\n".join(price(plan, plan.cells).lines())
    pretended.called.clear()
    assert begun(plan, commands).done == 4 and pretended.called == [("evaluate", "rkl-seed0")]


def test_what_was_finished_once_counts_for_its_start(tmp_path: Path) -> None:
    """A trained start is not made anew because the results of its cells are gone; and none is needed to evaluate."""
    plan = plan_of(tmp_path, axes={"objective.name": ["rkl"], "run.seed": [0]}, shared={"teacher_cache": "hidden"})
    commands, pretended = pretending()
    assert begun(plan, commands).done == 1
    start, cell = start_for(plan, plan.cells[0]), plan.cells[0].folder
    assert start is not None
    shutil.rmtree(start.record.folder.parent)
    shutil.rmtree(plan.shared / "teacher")
    cell.eval_path.unlink()
    pretended.called.clear()
    pretended.fails["evaluate", "rkl-seed0"] = 1
    assert begun(plan, commands).failed and pretended.called == [("evaluate", "rkl-seed0")]
    more = {"objective.name": ["rkl", "drkl"], "run.seed": [0]}
    plan = plan_of(tmp_path, axes=more, shared={"teacher_cache": "hidden"})
    pretended.fails.clear()
    done = begun(plan, commands)
    assert done.done == 1 and "is gone, and 1 finished cell (" in done.failed["drkl-seed0"]


def test_a_damaged_record_of_a_start_fails_its_cells(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    start = start_for(plan, plan.cells[0])
    assert start is not None
    start.record.folder.mkdir(parents=True)
    start.record.path.write_text("{")
    assert "4 of 4 cells are left" in "\n".join(price(plan, plan.cells).lines())
    done = begun(plan, pretending()[0])
    assert done.done == 2 and "start.json is not valid json" in done.failed["rkl-seed0"]
    assert states_of(plan)["rkl-seed0"] == ("failed", done.failed["rkl-seed0"])


def test_a_cell_of_another_study_whose_results_are_gone_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    begun(plan, pretending()[0])
    fields = tiny_studies.definition(tmp_path, name="other", shared={"cells": [str(plan.folder)]})
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(fields))
    other = load_study(tmp_path / "other.yaml")
    commands, pretended = pretending()
    assert begun(other, commands).done == 4 and not pretended.called
    (plan.folder / "cells" / "rkl-seed1").rename(tmp_path / "away")
    done = begun(other, commands)
    assert done.done == 3 and not pretended.called
    assert "It is a cell of another study: bring it back" in done.failed["rkl-seed1"]
    (tmp_path / "away").rename(plan.folder / "cells" / "rkl-seed1")
    assert begun(other, commands).done == 4


def test_a_study_that_is_to_lend_its_cells_and_is_not_there_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path), shared={"cells": [str(tmp_path / "no")]})
    assert plan.notes == [f"shared.cells: no study has begun in {str(tmp_path / 'no')!r}, so nothing of it is used."]


def test_what_an_earlier_study_left_running_is_waited_for(tmp_path: Path) -> None:
    """The command of a cell, a stage of its start, and the part of a cache that is written."""
    folder = tmp_path / "c"
    (folder / "cache").mkdir(parents=True)
    stage = folder / "stages" / "01-warmup"
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text("{}")

    def is_busy() -> bool:
        return any(running.is_held(place, *names) for place, names in running._locks_of(folder))

    assert not is_busy()
    for place, name in ((folder, ".lock"), (folder, ".evaluation.lock"), (stage, ".lock")):
        with holding(place, name):
            assert is_busy()
    with locked(folder / "cache" / ".part-0-of-1.lock"):
        assert is_busy()
    assert not is_busy()


def test_a_cache_that_an_earlier_study_still_writes_is_waited_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path), shared={"teacher_cache": "hidden"})
    cache = cache_for(plan, plan.cells[0])
    assert cache is not None
    cache.folder.mkdir(parents=True)
    commands, pretended = pretending()
    said: list[str] = []
    with contextlib.ExitStack() as writes:
        writes.enter_context(locked(cache.folder / ".part-0-of-1.lock"))

        def hear(text: str) -> None:
            said.append(text)
            if "another process still works in" in text:
                assert not pretended.called
                writes.close()

        assert begun(plan, commands, listener=Listener(hear)).done == 4
    assert f"{cache.key}: another process still works in {cache.record.folder}; waiting for it." in said
    assert pretended.called[0] == ("cache", cache.key)


# Who runs what ------------------------------------------------------------------------------------------------------


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, pretended = pretending()
    with holding(plan.folder / "cells" / "drkl-seed0", STUDY):
        done = begun(plan, commands)
        assert states(plan)["drkl-seed0"] == "running"
    assert (done.done, done.elsewhere, done.failed) == (3, ["drkl-seed0"], {})
    assert "drkl-seed0" not in {name for _, name in pretended.called}


@pytest.mark.parametrize(
    ("seeds", "parts", "wanted"),
    [
        (4, 2, [[0, 2], [1, 3]]),
        (3, 2, [[0, 2], [1]]),
        (2, 2, [[0], [1]]),
    ],
)
def test_parts_are_whole_seeds(tmp_path: Path, seeds: int, parts: int, wanted: list[list[int]]) -> None:
    axes = {"objective.name": ["rkl", "fkl", "drkl"], "run.seed": [*range(seeds)]}
    plan = plan_of(tmp_path, ready(tmp_path), axes=axes)
    found = [part_of(plan, number, parts) for number in range(1, parts + 1)]
    assert [list(dict.fromkeys(planned.seed for planned in part)) for part in found] == wanted
    assert all(len(part) == 3 * len(own) for part, own in zip(found, wanted, strict=True))


@pytest.mark.parametrize("parts", [3, 4, 5, 6, 7, 9])
def test_more_parts_than_seeds_divide_the_seeds(tmp_path: Path, parts: int) -> None:
    axes = {"objective.name": ["rkl", "fkl", "drkl"], "run.seed": [0, 1]}
    plan = plan_of(tmp_path, ready(tmp_path), axes=axes)
    found = [[planned.cell.name for planned in part_of(plan, number, parts)] for number in range(1, parts + 1)]
    assert sorted(name for part in found for name in part) == sorted(planned.cell.name for planned in plan.cells)
    assert all(len({name[-5:] for name in part}) <= 1 for part in found)


def test_two_parts_make_the_whole(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    for number in (1, 2):
        commands, pretended = pretending()
        assert begun(plan, commands, part=(number, 2)).done == 2
        assert {name for _, name in pretended.called} == {f"rkl-seed{number - 1}", f"drkl-seed{number - 1}"}
    assert set(states(plan).values()) == {"done"}


# Ends from outside --------------------------------------------------------------------------------------------------


def test_a_signal_is_handed_on_and_the_cell_is_interrupted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, pretended = pretending(looks=10**6)
    handed: list[int] = []

    def end(now: Now) -> None:
        if commands.running and not handed:
            handed.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        begun(plan, commands, listener=Listener(on_progress=end))
    assert pretended.called == [("distill", "rkl-seed0")]
    assert states(plan) == dict(zip(NAMES, ("interrupted", "missing", "missing", "missing"), strict=True))
    commands, _ = pretending()
    assert begun(plan, commands).done == 4
    tries = cell_record(plan.folder / "cells" / "rkl-seed0").read()["tries"]
    assert [one["status"] for one in tries] == [143, 0]


def test_a_try_that_was_killed_is_closed_with_its_last_sign(tmp_path: Path) -> None:
    record = Record(tmp_path / "c", "cell")
    record.begin({"run": {}}, axes={})
    record.log_path.write_text("a line\n")
    began = os.stat(record.log_path).st_mtime
    os.utime(record.log_path, (began + 30, began + 30))
    assert record.state() == ("interrupted", None)
    record.begin({"run": {}})
    known = record.read()
    assert [one["message"] for one in known["tries"]] == ["It was killed.", None]
    assert known["seconds"]["train"] == pytest.approx(30, abs=2)
    assert (record.state()[0], known["axes"]) == ("interrupted", {})


def test_an_error_of_the_study_itself_ends_what_runs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    commands, _ = pretending(looks=10**6)

    def fail(now: Now) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        begun(plan, commands, listener=Listener(on_progress=fail))
    assert commands.ended_by == signal.SIGTERM and not commands.running
    assert not cell_record(plan.folder / "cells" / "rkl-seed0").is_finished


# What changes, and what must not ------------------------------------------------------------------------------------


def test_cells_may_be_added_and_reports_may_ask_otherwise(tmp_path: Path) -> None:
    commands, pretended = pretending()
    begun(plan_of(tmp_path, ready(tmp_path)), commands)
    pretended.called.clear()
    axes = {"objective.name": ["rkl", "drkl", "fkl"], "run.seed": [0, 1, 2]}
    primary = [{"metric": "rkl", "cell": {"objective.name": "drkl"}, "against": {"objective.name": "rkl"}}]
    plan = plan_of(tmp_path, ready(tmp_path), axes=axes, primary=primary, predictions=["More."])
    notes = settle(plan, None)
    assert notes == [
        "axes.objective.name has also fkl", "axes.run.seed has also 2", "predictions is another", "primary is another",
    ]  # fmt: skip
    assert [one["what"] for one in read_environment(plan.folder)["changes"]] == [notes]
    assert run_study(plan, WORDS, commands=commands).done == 9
    assert {name for _, name in pretended.called} == {"fkl-seed0", "fkl-seed1", "rkl-seed2", "drkl-seed2", "fkl-seed2"}


def test_what_no_cell_has_begun_of_may_be_another_and_is_said(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"axes": {"run.seed": [0, 1, 2]}, "baseline": {"variant": "a"}}
    commands, _ = pretending()
    variants: dict[str, Any] = {"a": {}, "b": {"objective.gamma": 0.1}, "c": {"objective.gamma": 0.3}}
    plan = plan_of(tmp_path, ready(tmp_path), variants=variants, **fields)
    settle(plan, None)
    run_study(plan, WORDS, commands=commands, part=(1, 9))  # a-seed0
    variants = {"a": {}, "b": {"objective.gamma": 0.2}}
    plan = plan_of(tmp_path, ready(tmp_path), variants=variants, **fields | {"axes": {"run.seed": [0, 2]}})
    assert settle(plan, None) == [
        "axes.run.seed has no longer 1", "variants has no longer c",
        "variants.b: objective.gamma 0.1 then, objective.gamma 0.2 now",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pretended_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study whose cells are done, as commands pretend."""
    root = tmp_path_factory.mktemp("pretended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "TICK", 0.0)
        patch.setattr(running, "weights_of", lambda start: "weights")
        begun(plan_of(root, ready(root)), pretending()[0])
    return root


@pytest.mark.parametrize(
    ("base", "fields", "words"),
    [
        ({"training": {"learning_rate": 1e-3}}, {}, "the base's training.learning_rate: 0.01 then, 0.001 now"),
        ({}, {"settings": {"evaluation.prompts": 3}}, "the base's evaluation.prompts: 2 then, 3 now"),
        ({}, {"shared": {"start": False}}, "shared.start: True then, False now"),
        ({}, {"shared": {"teacher_cache": "hidden"}}, "shared.teacher_cache: None then, hidden now"),
        ({}, {"axes": {"objective.name": ["rkl"], "run.seed": [0, 1]}}, "the cell drkl-seed0 is none of the study's"),
        ({}, {"variants": {"a": {"objective.gamma": 0.1}}, "axes": {"objective.name": ["drkl"], "run.seed": [0]},
              "baseline": {"variant": "a"}}, "the cell drkl-seed0 is none of the study's"),
    ],
)  # fmt: skip
def test_what_moves_the_numbers_of_cells_that_are_there_is_refused(
    pretended_study: Path, base: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    root = pretended_study
    before = tiny_runs.tree(root / "studies")
    plan = plan_of(root, ready(root) | base, **fields)
    with pytest.raises(DrklError, match="began with something else than") as error:
        settle(plan, None)
    assert words in str(error.value)
    assert {name: text for name, text in tiny_runs.tree(root / "studies").items() if "settle" not in name} == before


def test_a_variant_that_is_another_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"axes": {"run.seed": [0, 1]}, "baseline": {"variant": "a"}}
    commands, _ = pretending()
    begun(plan_of(tmp_path, ready(tmp_path), variants={"a": {}, "b": {"objective.gamma": 0.1}}, **fields), commands)
    plan = plan_of(tmp_path, ready(tmp_path), variants={"a": {}, "b": {"objective.gamma": 0.2}}, **fields)
    with pytest.raises(DrklError) as error:
        settle(plan, None)
    assert "variants.b: objective.gamma 0.1 then, objective.gamma 0.2 now" in str(error.value)


WARM = {"stages": [{"name": "warmup", "objective": {"name": "fkl"}}]}


def test_a_trained_start_that_is_gone_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights might be others on another machine, and the cells of a seed would not be paired."""
    monkeypatch.setattr(running, "weights_of", lambda start: "some weights")
    base = {"student": {"init": "prune", "layers": 2}, **WARM}
    commands, _ = pretending()
    plan = plan_of(tmp_path, base, axes={"objective.name": ["rkl"], "run.seed": [0]})
    assert begun(plan, commands).done == 1
    start = start_for(plan, plan.cells[0])
    assert start is not None and start.runs and start.has_weights and start.record.is_finished
    (start.student / "model.safetensors").rename(tmp_path / "away")
    plan = plan_of(tmp_path, base, axes={"objective.name": ["rkl", "drkl"], "run.seed": [0]})
    done = begun(plan, commands)
    assert "is gone, and 1 finished cell (" in done.failed["drkl-seed0"]
    assert "Trained anew on another machine it may differ" in done.failed["drkl-seed0"]
    (tmp_path / "away").rename(start.student / "model.safetensors")
    assert begun(plan, commands).done == 2


@pytest.mark.parametrize("same", [True, False])
def test_initial_weights_that_are_gone_are_made_anew_and_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    base = {"student": {"init": "prune", "layers": 2}}
    commands, pretended = pretending()
    plan = plan_of(tmp_path, base, axes={"objective.name": ["rkl"], "run.seed": [0]}, keep_students=False)
    assert begun(plan, commands).done == 1
    start = start_for(plan, plan.cells[0])
    assert start is not None and not start.runs and not start.has_weights
    first = start.record.read()["digest"]
    plan = plan_of(tmp_path, base, axes={"objective.name": ["rkl", "drkl"], "run.seed": [0]}, keep_students=False)
    if not same:
        with monkeypatch.context() as patch:
            patch.setattr(running, "weights_of", lambda start: "others")
            done = begun(plan, commands)
        assert "made anew here it is another one than that which 1 finished cell (" in done.failed["drkl-seed0"]
        assert ("distill", "drkl-seed0") not in pretended.called and not start.has_weights
    assert begun(plan, commands).done == 2
    assert start.record.read()["digest"] == first


# Students that are not kept -----------------------------------------------------------------------------------------


def test_students_that_are_not_kept(tmp_path: Path) -> None:
    """They go once they are evaluated, and the start with the last cell of its seed; reading the run says so."""
    base = {"student": {"init": "prune", "layers": 2}}
    plan = plan_of(tmp_path, base, axes={"objective.name": ["rkl", "drkl"], "run.seed": [0]}, keep_students=False)
    commands, pretended = pretending()
    start = start_for(plan, plan.cells[0])
    assert start is not None
    seen = []
    pretended.at = lambda word, name: seen.append((word, name, start.has_weights))
    assert begun(plan, commands).done == 2
    assert all(has for _, _, has in seen) and not start.has_weights and start.record.is_finished
    shared = tmp_path / "shared"
    other = plan_of(tmp_path / "b", base, keep_students=False, shared={"dir": str(shared)})
    assert begun(other, commands).done == 4
    assert len([*shared.glob("starts/*/student/*.safetensors")]) == 2  # other studies may begin from them
    run = plan.cells[0].folder
    assert run.is_finished() and run.eval_path.is_file() and not run.student_path.exists()
    with pytest.raises(DrklError, match="was not kept: its study removed it once it was evaluated"):
        evaluate_run(run.root)
    assert begun(plan, commands).done == 2  # and they are not run again


# Price --------------------------------------------------------------------------------------------------------------


def test_the_price_is_that_of_the_finished_cells(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    before = price(plan, plan.cells)
    assert before.total is None and "No cell has finished yet: run one first" in before.lines()[-1]
    for name, seconds in (("rkl-seed0", 100.0), ("drkl-seed0", 300.0)):
        record = cell_record(plan.folder / "cells" / name)
        record.begin({}, seconds={"start": 5.0, "train": seconds, "evaluate": 50.0})
        record.end(0)
        RunFolder(record.folder).eval_path.write_text("{}")
    found = price(plan, plan.cells)
    assert dict(found.seconds) == {"rkl-seed1": 150.0, "drkl-seed1": 350.0} and found.total == 500.0
    assert price(plan, plan.cells, jobs=2).total == 250.0
    assert price(plan, part_of(plan, 1, 2)).total == 0
    assert price(plan, part_of(plan, 1, 2)).lines()[-1] == "All 2 cells of this part are done: nothing is left to run."
    assert price(plan, part_of(plan, 1, 4)).lines()[-1].startswith("The only cell of this part is done")
    assert price(plan, []).lines() == ["No cell is in this part: nothing is left to run."]
    assert found.lines()[:2] == ["rkl-seed0   done", "drkl-seed0  done"]
    assert "2 of 4 cells are left" in "\n".join(found.lines()) and "That is 8 min, at the pace" in "\n".join(
        found.lines()
    )


def test_starts_and_caches_are_counted_once(tmp_path: Path) -> None:
    axes = {"objective.name": ["rkl", "drkl"], "rollouts.share": [0.0, 1.0], "run.seed": [0, 1]}
    plan = plan_of(tmp_path, axes=axes, shared={"teacher_cache": "hidden"})
    found = price(plan, plan.cells)
    assert len(found.shared) == 3 and sum(name.startswith("the cache") for name in found.shared) == 1
    text = "\n".join(found.lines())
    assert "8 of 8 cells are left, and of what they share 2 starts and 1 cache." in text
    assert "it trains on sampled answers, which are new at every step" in text
    assert set(found.live) == {planned.cell.name for planned in plan.cells if "share1" in planned.cell.name}


# The command --------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    study = tiny_studies.write(tmp_path, ready(tmp_path), axes={"objective.name": ["rkl", "drkl"]})
    before = tiny_runs.tree(tmp_path)
    done = cli("study", study, "--dry-run")
    assert done.code == 0 and "rkl   missing\ndrkl  missing\n" in done.out
    assert "there is one replicate of each cell, and nothing can be decided" in done.out
    assert tiny_runs.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--part", "3/2"), "--part is '3/2'; expected I/N"),
        (("--report", "--dry-run"), "`--report` runs nothing"),
        (("--report",), "has not begun: there is nothing to report"),
    ],
)
def test_what_the_command_refuses(cli: Cli, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = cli("study", tiny_studies.write(tmp_path, ready(tmp_path)), *words)
    assert done.code == 2 and message in done.err and not (tmp_path / "studies").exists()


def test_the_command_ends_with_1_where_a_cell_failed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_studies.write(tmp_path, ready(tmp_path))
    commands, pretended = pretending(fails={("distill", "drkl-seed0"): 1})
    monkeypatch.setattr("drkl.studies.commands.Commands", lambda jobs: commands)
    done = cli("study", study)
    assert done.code == 1
    assert done.err.splitlines() == [
        "1 cells have failed; the same command tries them again:", "  drkl-seed0: Error: drkl-seed0 is broken.",
    ]  # fmt: skip
    pretended.fails.clear()
    done = cli("study", study, "--part", "1/2")
    assert (done.code, done.err) == (0, "") and "Part 1 of 2 is whole. Next: drkl study" in done.out


def test_predictions_are_dated_by_their_commit(tmp_path: Path) -> None:
    study = tiny_studies.write(tmp_path, ready(tmp_path), predictions=["It is better."])

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    plan = load_study(study)
    commands, _ = pretending()
    begun(plan, commands)
    env = read_environment(plan.folder)
    assert env["predicted"] == {"commit": None, "date": None, "is_changed": True}
    git("add", "study.yaml")
    git("commit", "-qm", "Predictions")
    settle(plan, None)
    now = read_environment(plan.folder)["predicted_now"]
    assert now == {"commit": git("rev-parse", "HEAD"), "date": git("log", "-1", "--format=%cI"), "is_changed": False}
    study.write_text(study.read_text().replace("It is better.", "It is worse."))
    assert settle(load_study(study), None) == ["predictions is another"]
    env = read_environment(plan.folder)
    assert env["predicted_now"]["is_changed"] and env["predicted"]["commit"] is None
    assert json.loads((plan.folder / "env.json").read_text())["changes"][0]["what"] == ["predictions is another"]


def test_predictions_may_be_written_until_a_cell_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a first call that came no further than a start."""
    stamps = iter([{"commit": "a"}, {"commit": "b"}, {"commit": "c"}])
    monkeypatch.setattr("drkl.studies.folder.predicted", lambda path: next(stamps))
    plan = plan_of(tmp_path)
    start = start_for(plan, plan.cells[0])
    assert start is not None
    commands, pretended = pretending(fails={("distill", start.key): 2})
    settle(plan, None)
    run_study(plan, WORDS, commands=commands, part=(1, 2))
    pretended.fails.clear()
    plan = plan_of(tmp_path, predictions=["It is better."])
    begun(plan, commands)
    assert settle(plan_of(tmp_path, predictions=["It is worse."]), None) == ["predictions is another"]
    env = read_environment(plan.folder)
    assert (env["predicted"], env["predicted_now"]) == ({"commit": "b"}, {"commit": "c"})
    known = [cell_record(planned.folder.root).read() for planned in plan.cells]
    assert all(len(one["tries"]) == 1 and began_at(one) >= env["began"] for one in known)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: folder.write_text("a file"), "The study's folder '.*' cannot be made: "),
        (lambda folder: _write(folder / "study.yaml", "name: s"), "study.yaml: base: is missing"),
    ],
)
def test_a_study_whose_folder_is_no_study_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    if message.startswith("study.yaml"):
        begun(plan, pretending()[0])
    plan.folder.parent.mkdir(exist_ok=True)
    break_it(plan.folder)
    with pytest.raises(DrklError, match=message):
        settle(plan, None)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_a_number_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"A setting is infinite or not a number \(\.inf or \.nan\)"):
        plan_of(tmp_path, settings={"training.arguments.adam_epsilon": float("inf")})


def test_a_study_outside_of_git_has_no_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    from drkl.studies.folder import predicted

    assert predicted(tiny_studies.write(tmp_path, ready(tmp_path))) is None
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert predicted(tmp_path / "study.yaml") is None
