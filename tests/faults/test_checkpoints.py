"""Checkpoints: other people's files beside them, the best one gone, and runs killed or copied as they are written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file

from drkl.runs import RunFolder
from tests.faults.checkpointed import LOSSES
from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner
from tests.training import tiny_runs
from tests.training.test_resume import comparable

INSIDE = "tests.faults.checkpointed:"
TRAINING = {"max_steps": 8, "eval_every": 2, "save_every": 2, "arguments": {"logging_steps": 1, "save_total_limit": 9}}


class Runs(NamedTuple):
    """Runs of one config, to be copied."""

    config: Path
    whole: RunFolder
    """Uninterrupted."""
    cut: RunFolder
    """Killed at step 7, with the checkpoints of steps 2, 4 and 6."""
    weights: dict[int, dict[str, bytes]]
    """By step."""


def tensors(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(path).items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("checkpoints")
    config = tiny_runs.write_config(tiny_runs.config(root, training=TRAINING), root / "c.yaml")
    done = runner.call("distill", config, "run.name=whole", inject=f"{INSIDE}plant_losses")
    assert done.code == 0, done.err
    assert runner.call("distill", config, "run.name=cut", inject=f"{INSIDE}killed", given=["on_log", 7]).code < 0
    cut = RunFolder(root / "runs" / "cut")
    last = RunFolder(shutil.copytree(cut.root, root / "last"))
    assert runner.call("distill", "--resume", last.root, inject=f"{INSIDE}killed", given=["on_save", 8]).code < 0
    paths = {step: last.checkpoints_path / f"checkpoint-{step}" / "model.safetensors" for step in LOSSES}
    weights = {step: tensors(path) for step, path in paths.items()}
    assert len({tuple(sorted(values.items())) for values in weights.values()}) == 4
    yield Runs(config, RunFolder(root / "runs" / "whole"), cut, weights)


def copied(run: RunFolder, root: Path) -> RunFolder:
    return RunFolder(shutil.copytree(run.root, root, symlinks=True))


def resumed(runner: Runner, run: RunFolder, what: str = "plant_losses", *given: Any) -> Ended:
    return runner.call("distill", "--resume", run.root, inject=INSIDE + what, given=given)


def assert_like(run: RunFolder, whole: RunFolder) -> None:
    """A run is the uninterrupted one, bit for bit."""
    assert run.is_finished(), "not finished"
    assert tiny_runs.weights(run) == tiny_runs.weights(whole), "other weights"
    assert comparable(run) == comparable(whole), "another log"
    for name in ("steps", "best_step", "best_heldout_loss"):
        assert run.read_env()[name] == whole.read_env()[name], name


def assert_honest(run: RunFolder, runs: Runs, done: Ended) -> int:
    """Record and card speak of the weights that are saved; returns their step."""
    assert done.code == 0, done.err
    env = run.read_env()
    step = env.get("student_step", env["best_step"])
    are_those = tensors(run.student_path / "model.safetensors") == runs.weights[step]
    assert are_those, f"the weights are not those of step {step}"
    assert env["best_step"] == step and env["best_heldout_loss"] == LOSSES[step]
    assert f"| {LOSSES[step]:.4f} nats per token |" in (run.student_path / "README.md").read_text()
    assert "Traceback" not in done.err
    return int(step)


OTHERS: dict[str, Callable[[Path], Any]] = {
    "notes.txt": lambda path: path.write_text("mine"),
    "checkpoint-notes": lambda path: filled(path),
    "checkpoints/checkpoint-notes": lambda path: filled(path),
    "checkpoints/checkpoint-4-backup": lambda path: shutil.copytree(path.parent / "checkpoint-4", path),
    "checkpoints/checkpoint-40": lambda path: shutil.copytree(path.parent / "checkpoint-4", path),
    "checkpoints/checkpoint-1": lambda path: filled(path),
    "checkpoints/checkpoint-3": lambda path: path.symlink_to("../../elsewhere"),
    "checkpoints/checkpoint-998": lambda path: path.symlink_to("checkpoint-4"),
    "checkpoints/checkpoint-997": lambda path: path.symlink_to("nowhere"),
    "checkpoints/checkpoint-999": lambda path: path.write_text("mine"),
    "checkpoints/checkpoint-": lambda path: filled(path),
    "checkpoints/checkpoint-05": lambda path: filled(path),
    "checkpoints/.mine": lambda path: filled(path),
    "stages/notes": lambda path: filled(path),
    "elsewhere": lambda path: filled(path),
}


def filled(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "a.txt").write_text("mine")


def state_of(root: Path) -> dict[str, Any]:
    """What lies under each of the names above."""
    return {
        name: str(path.readlink())
        if path.is_symlink()
        else tiny_runs.tree(path)
        if path.is_dir()
        else path.read_bytes()
        for name in OTHERS
        for path in [root / name]
        if path.is_symlink() or path.exists()
    }


def look(injected: Injected, when: str, run: RunFolder, whole: RunFolder, before: dict[str, Any], done: Ended) -> None:
    """The run went on as if nothing were there, and all that was there is as it was."""
    with injected(f"all of them together, {when}"):
        assert done.code == 0, done.err
        assert_like(run, whole)
    after = state_of(run.root)
    for name in OTHERS:
        with injected(f"{name}, {when}"):
            assert after.get(name) == before[name], "changed"


@pytest.mark.fault(
    group="Other people's files",
    fault="Files, folders, copies and links of other people in a run folder and among its checkpoints: before "
    "`--resume`, while the run trains, and with `--overwrite`",
    does="Only what drkl wrote is read or removed; theirs stay as they are.",
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_other_people_s_files(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected, when: str) -> None:
    run = copied(runs.cut, tmp_path / "r")
    theirs = copied(runs.cut, tmp_path / "theirs").root if when == "meanwhile" else run.root
    for name, make in OTHERS.items():
        make(theirs / name)
    before = state_of(theirs)
    if when == "before":
        done = resumed(runner, run)
    else:
        for path in theirs.iterdir():  # the run has its own
            if path.is_file() and path.name != "notes.txt":
                path.unlink()
        for step in (2, 4, 6):
            shutil.rmtree(theirs / "checkpoints" / f"checkpoint-{step}")
        done = resumed(runner, run, "given", "on_log", 7, str(theirs), str(run.root))
    look(injected, f"{when} it trains", run, runs.whole, before, done)
    config = tiny_runs.write_config(
        run.read_config() | {"run": run.read_config()["run"] | {"name": "r"}}, tmp_path / "c"
    )
    done = runner.call("distill", config, f"run.dir={tmp_path}", "--overwrite", inject=f"{INSIDE}plant_losses")
    look(injected, "--overwrite", run, runs.whole, before, done)


def drop(folder: Path) -> None:
    shutil.rmtree(folder)


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_marker(folder: Path) -> None:
    (folder / "complete.json").unlink()


def flip_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 64
    (folder / "model.safetensors").write_bytes(bytes(data))


def link_away(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


@pytest.mark.fault(
    group="The best checkpoint",
    fault="The best checkpoint is removed, or its weights or its list of files are removed or changed, before the run "
    "is resumed",
    does="It is said; the best of those that are there takes its place, and `student/`, `env.json` and the card speak "
    "of it.",
)
@pytest.mark.parametrize(
    "damage",
    [
        drop,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (drop_weights, drop_marker, flip_weights, link_away)),
    ],
)
def test_the_best_is_gone_before_a_resume(
    runs: Runs, runner: Runner, tmp_path: Path, injected: Injected, damage: Callable[[Path], None]
) -> None:
    run = copied(runs.cut, tmp_path / "r")
    with injected(damage.__name__):
        damage(run.checkpoints_path / "checkpoint-4")
        done = resumed(runner, run)
        assert assert_honest(run, runs, done) == 6
        assert "checkpoint-4" in done.err
        assert comparable(run) == comparable(runs.whole)


@pytest.mark.fault(
    group="The best checkpoint",
    fault="The best checkpoint is removed while the run trains, or before its last step ends",
    does="It is said; the best of those that are there, or else the last weights, become the student, and `env.json` "
    "and the card speak of them.",
)
@pytest.mark.parametrize(
    ("event", "step"), [("on_log", 8), *(pytest.param("on_log", s, marks=pytest.mark.slow) for s in (5, 6, 7))]
)
def test_the_best_is_gone_as_it_trains(
    runs: Runs, runner: Runner, tmp_path: Path, injected: Injected, event: str, step: int
) -> None:
    name = f"best-{event}-{step}"
    run = RunFolder(runs.whole.root.with_name(name))
    gone = str(run.checkpoints_path / "checkpoint-4")
    with injected(f"{event} {step}"):
        inside: dict[str, Any] = {"inject": f"{INSIDE}removed", "given": [event, step, gone]}
        done = runner.call("distill", runs.config, f"run.name={name}", **inside)
        assert assert_honest(run, runs, done) == 6
        assert "checkpoint-4" in done.err


def changes(runs: Runs, runner: Runner, root: Path) -> int:
    """How many changes there are to the files of a run from its last checkpoint on."""
    run = copied(runs.cut, root / "counted")
    assert resumed(runner, run, "counted", str(run.root), str(root / "count")).code == 0
    return int((root / "count").read_text())


def kill_and_resume(runs: Runs, runner: Runner, root: Path, number: int) -> None:
    run = copied(runs.cut, root / str(number))
    assert resumed(runner, run, "killed_at_change", str(run.root), number).code < 0
    finished = run.is_finished()
    done = resumed(runner, run)
    assert done.code == (2 if finished else 0), done.err
    assert_like(run, runs.whole)
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["checkpoint-4"]
    shutil.rmtree(run.root)


@pytest.mark.fault(
    group="Ends from outside",
    fault="SIGKILL at some of the changes to files from the last checkpoint to the end",
    does="`--resume` goes on from the newest whole checkpoint; the run is the uninterrupted one, bit for bit.",
)
def test_killed_at_some_changes(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    count = changes(runs, runner, tmp_path)
    for number in sorted(random.Random(0).sample(range(count), 2)):
        with injected(f"change {number}"):
            kill_and_resume(runs, runner, tmp_path, number)


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="SIGKILL at every change to files from the last checkpoint to the end: saving, rotating, finishing",
    does="`--resume` goes on from the newest whole checkpoint; the run is the uninterrupted one, bit for bit.",
)
def test_killed_at_every_change(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    for number in range(changes(runs, runner, tmp_path)):
        with injected(f"change {number}"):
            kill_and_resume(runs, runner, tmp_path, number)


@pytest.mark.slow
@pytest.mark.fault(
    group="Ends from outside",
    fault="A run folder is copied as a checkpoint is written, and the copy is resumed",
    does="The copy goes on from its newest whole checkpoint, and becomes the uninterrupted run, bit for bit.",
)
def test_copied_as_it_trains(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    run = copied(runs.cut, tmp_path / "r")
    numbers = list(range(0, 40, 2))
    assert resumed(runner, run, "copied_at_changes", str(run.root), numbers, str(tmp_path / "copies")).code == 0
    for path in sorted((tmp_path / "copies").iterdir()):
        copy = RunFolder(path)
        if not copy.is_finished():
            with injected(f"change {path.name}"):
                done = resumed(runner, copy)
                assert done.code == 0, done.err
                assert_like(copy, runs.whole)


@pytest.mark.slow
@pytest.mark.fault(
    group="Other people's files",
    fault="The folders `checkpoints/` and `student/` are links to another disk",
    does="The run writes through them, and they stay links.",
)
def test_folders_that_are_links(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    run = copied(runs.cut, tmp_path / "r")
    for name in ("checkpoints", "student"):
        (tmp_path / "other" / name).mkdir(parents=True)
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    run.checkpoints_path.rename(tmp_path / "other" / "checkpoints")
    for path in (run.checkpoints_path, run.student_path):
        path.symlink_to(tmp_path / "other" / path.name)
    done = resumed(runner, run)
    for path in (run.checkpoints_path, run.student_path):
        with injected(f"{path.name}/ is a link"):
            assert done.code == 0, done.err
            assert_like(run, runs.whole)
            assert path.is_symlink()
            assert json.loads((run.checkpoints_path / "checkpoint-4" / "complete.json").read_text())["step"] == 4
