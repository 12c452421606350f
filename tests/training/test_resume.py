"""A run that was cut off, anywhere, and resumed gives bit for bit the student of one that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from drkl.errors import DrklError
from drkl.runs import RunFolder, append_jsonl, lines_up_to
from drkl.training import record as record_module
from drkl.training.checkpoints import MARKER, find_checkpoint, mark_complete, reached_at
from drkl.training.run import Listener
from tests.models import tiny
from tests.training import tiny_runs


class Killed(BaseException):
    """Stands for SIGKILL where the process has to live on; no handler in the code catches it."""


def kill_at_step(stage: str, step: int) -> Listener:
    current = []

    def on_progress(now: int, of: int, newest: dict[str, float]) -> None:
        if current[-1] == stage and now == step:
            raise Killed

    return Listener(on_stage=lambda spec, number, of: current.append(spec.folder.name), on_progress=on_progress)


def kill_between_stages(spec: Any, number: int, of: int) -> None:
    if number == 2:
        raise Killed


def reference(root: Path, **sections: Any) -> tuple[dict[str, Any], RunFolder]:
    """The uninterrupted run, and the config of one beside it that is to be cut off."""
    values = tiny_runs.config(root, **sections)
    whole = tiny_runs.train({**values, "run": {**values["run"], "name": "whole"}})
    return values, whole


def cut_off(values: dict[str, Any], listener: Listener) -> RunFolder:
    with pytest.raises(Killed):
        tiny_runs.train(values, listener=listener)
    return RunFolder(Path(values["run"]["dir"]) / values["run"]["name"])


def comparable(run: RunFolder) -> list[dict[str, Any]]:
    """The log without the clock."""
    clock = ("seconds", "tokens_per_second", "seconds_generating", "seconds_learning")
    return [{k: v for k, v in row.items() if k not in clock} for row in run.read_train_log()]


def assert_equal(resumed: RunFolder, whole: RunFolder) -> None:
    assert resumed.is_finished()
    for ours, theirs in zip([*resumed.stages(), resumed], [*whole.stages(), whole], strict=True):
        assert tiny_runs.weights(ours) == tiny_runs.weights(theirs)
        assert comparable(ours) == comparable(theirs)
        env, expected = ours.read_env(), theirs.read_env()
        for key in ("steps", "best_step", "best_heldout_loss", "data", "parameters"):
            assert env[key] == expected[key], key
        names = [{path.name for path in run.checkpoints_path.iterdir()} for run in (ours, theirs)]
        assert names[0] == names[1]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 5])
def test_cut_off_in_mid_training(tmp_path: Path, step: int) -> None:
    values, whole = reference(tmp_path)
    cut_off(values, kill_at_step("r", step))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_cut_off_before_the_first_checkpoint(tmp_path: Path) -> None:
    values, whole = reference(tmp_path)
    cut_off(values, kill_at_step("r", 1))
    messages: list[str] = []
    assert_equal(tiny_runs.train(values, "resume", Listener(on_message=messages.append)), whole)
    assert "There is no checkpoint, so the run begins at its first step." in messages


@pytest.mark.slow
def test_an_evaluation_on_start_comes_once(tmp_path: Path) -> None:
    values, whole = reference(tmp_path, training={"arguments": {"logging_steps": 3, "eval_on_start": True}})
    cut_off(values, kill_at_step("r", 5))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    tiny_runs.config(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    tiny.save(tiny.gpt2(), tmp_path / "teacher")
    values, whole = reference(tmp_path, training={"arguments": {"logging_steps": 1, "gradient_accumulation_steps": 3}})
    cut_off(values, kill_at_step("r", 5))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("01-warmup", 3), ("r", 1), ("r", 5)])
def test_cut_off_in_either_of_two_stages(tmp_path: Path, stage: str, step: int) -> None:
    values, whole = reference(tmp_path, stages=tiny_runs.STAGES)
    cut_off(values, kill_at_step(stage, step))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_a_teacher_that_remembers_is_resumed_too(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    teacher, student = {"model": values["teacher"]["model"], "remember_mb": 8}, {"freeze_embeddings": True}
    values, whole = reference(tmp_path, stages=tiny_runs.STAGES, teacher=teacher, student=student)
    cut_off(values, kill_at_step("r", 3))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_cut_off_between_stages(tmp_path: Path) -> None:
    values, whole = reference(tmp_path, stages=tiny_runs.STAGES)
    run = cut_off(values, Listener(on_stage=kill_between_stages))
    first = tiny_runs.tree(run.root / "stages")
    assert_equal(tiny_runs.train(values, "resume"), whole)
    assert tiny_runs.tree(run.root / "stages") == first


@pytest.mark.slow
def test_cut_off_twice(tmp_path: Path) -> None:
    values, whole = reference(tmp_path)
    run = cut_off(values, kill_at_step("r", 3))
    with pytest.raises(Killed):
        tiny_runs.train(values, "resume", kill_at_step("r", 5))
    # The line that made the run is what repeats it, also after a resume.
    assert run.read_env()["command"] == ["drkl", "distill", "new"]
    assert_equal(tiny_runs.train(values, "resume"), whole)
    assert run.read_env()["command"] == ["drkl", "distill", "new"]


@pytest.mark.slow
def test_a_half_written_newer_checkpoint_does_not_count(tmp_path: Path) -> None:
    values, whole = reference(tmp_path)
    run = cut_off(values, kill_at_step("r", 5))
    half = run.checkpoints_path / "checkpoint-6"
    shutil.copytree(run.checkpoints_path / "checkpoint-4", half)
    (half / MARKER).unlink()
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    messages: list[str] = []
    run = tiny_runs.train(values, "resume", Listener(on_message=messages.append))
    assert "Going on from checkpoint-4." in messages
    aside = run.checkpoints_path / "checkpoint-6-aside"  # nothing says that drkl wrote it
    assert weights.name in {path.name for path in aside.iterdir()}
    shutil.rmtree(aside)
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_cut_off_in_writing_a_checkpoint(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = reference(tmp_path)
    write = getattr(Trainer, part)

    def killed(self: Trainer, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, part, killed)
        run = cut_off(values, Listener())
    assert (run.checkpoints_path / ".writing" / "checkpoint-4").is_dir()
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_cut_off_in_removing_an_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = reference(tmp_path)

    remove = shutil.rmtree

    def killed(path: Path, *args: Any, **kwargs: Any) -> None:
        if ".removed" not in Path(path).name:
            return remove(path, *args, **kwargs)
        (Path(path) / "optimizer.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("drkl.training.placing.shutil.rmtree", killed)
        run = cut_off(values, Listener())
    left = {path.name for path in run.checkpoints_path.iterdir()}
    assert len(left) == 3 and ".removed-checkpoint-2" in left
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.parametrize(
    "moment",
    [pytest.param("model_card", marks=pytest.mark.slow), pytest.param("now", marks=pytest.mark.slow), "write_text"],
)
@pytest.mark.slow
def test_cut_off_in_writing_the_student(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = reference(tmp_path)

    def killed(*args: Any, **words: Any) -> Any:
        if moment == "now" and not (tmp_path / "runs" / "r" / "student").exists():
            return original(*args, **words)
        raise Killed

    original: Callable[..., Any] = getattr(record_module, moment)
    with monkeypatch.context() as patch:
        patch.setattr(record_module, moment, killed)
        run = cut_off(values, Listener())
    assert not run.is_finished()
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.parametrize("patience", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_early_stop_counts_on(tmp_path: Path, patience: int, rising: None) -> None:
    values, whole = reference(tmp_path, training={"max_steps": 30, "early_stop_patience": patience})
    assert whole.read_env()["steps"] == 2 + 2 * patience
    cut_off(values, kill_at_step("r", 2 + 2 * patience - 1))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("best", [True, False])
def test_early_stop_that_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: None, best: bool
) -> None:
    """The resumed run takes no step more, whichever weights it ends with."""
    arguments = {"logging_steps": 1, "load_best_model_at_end": best}
    training = {"max_steps": 30, "early_stop_patience": 2, "arguments": arguments}
    values, whole = reference(tmp_path, training=training)
    with monkeypatch.context() as patch:
        patch.setattr(record_module.RunRecord, "save_student", lambda *a: (_ for _ in ()).throw(Killed))
        cut_off(values, Listener())
    run = tiny_runs.train(values, "resume")
    assert_equal(run, whole)
    assert run.read_env()["best_step"] == 2 and run.read_env()["steps"] == 6


@pytest.mark.slow
def test_a_run_folder_that_was_moved(tmp_path: Path, rising: None) -> None:
    values, whole = reference(tmp_path, stages=tiny_runs.STAGES)
    assert whole.read_env()["best_step"] == 2  # the best one is not the newest: it has to be found again
    run = cut_off(values, kill_at_step("r", 5))
    run.root.rename(tmp_path / "moved")
    values["run"] |= {"dir": str(tmp_path), "name": "moved"}
    moved = tiny_runs.train(values, "resume")
    assert_equal(moved, whole)
    assert moved.read_config()["run"]["name"] == "moved"
    assert not run.root.exists()


@pytest.mark.slow
def test_resumed_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rising: None) -> None:
    values, whole = reference(tmp_path)
    monkeypatch.chdir(tmp_path)
    values["run"]["dir"] = "runs"
    cut_off(values, kill_at_step("r", 5))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    values["run"]["dir"] = "../runs"
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_the_record_tells_of_both_parts(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, stages=tiny_runs.STAGES)
    run = cut_off(values, kill_at_step("01-warmup", 3))
    recorded = run.read_env()
    assert recorded["finished"] is None
    recorded["command"] = ["drkl", "distill", "my.yaml"]
    (run.env_path).write_text(json.dumps(recorded))
    stage = run.stages()[0]
    started = stage.read_env()["started"]
    log = stage.train_log_path
    log.write_text(re.sub(r'("seconds": )([\d.]+)', lambda at: f"{at[1]}{1000 + float(at[2])}", log.read_text()))
    tiny_runs.train(values, "resume")
    assert run.read_env()["command"] == stage.read_env()["command"] == ["drkl", "distill", "my.yaml"]
    assert stage.read_env()["started"] == started
    assert stage.read_env()["seconds"] >= 1000
    seconds = [row["seconds"] for row in stage.read_train_log()]
    assert seconds == sorted(seconds)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 2})
    tiny_runs.train(values)
    before = tiny_runs.tree(tmp_path)
    with pytest.raises(DrklError, match=r"is finished; there is nothing to resume"):
        tiny_runs.train(values, "resume")
    assert tiny_runs.tree(tmp_path) == before


def killed_by_signal(values: dict[str, Any], path: Path, moment: str, step: int) -> None:
    done = tiny_runs.call_killed(moment, step, "distill", tiny_runs.write_config(values, path))
    assert done.returncode == -signal.SIGKILL, done.stderr


LONG: dict[str, Any] = {"max_steps": 20, "eval_every": 5, "save_every": 5}


@pytest.mark.slow
def test_sigkill_and_resume(tmp_path: Path) -> None:
    values, whole = reference(tmp_path, training=LONG)
    run = RunFolder(tmp_path / "runs" / "r")
    killed_by_signal(values, tmp_path / "c.yaml", "log r/checkpoints", 12)
    assert (
        run.checkpoints_path / "checkpoint-10" / MARKER
    ).is_file() and '"step": 12' in run.train_log_path.read_text()
    assert not run.is_finished() and not run.student_path.exists()
    newest = find_checkpoint(run.checkpoints_path).path
    assert newest is not None
    half = run.checkpoints_path / "checkpoint-999"
    shutil.copytree(newest, half)
    (half / MARKER).unlink()
    (half / "optimizer.pt").write_bytes(b"half of it")
    done = tiny_runs.call("distill", "--resume", run.root)
    assert done.returncode == 0, done.stderr
    assert "Going on from checkpoint-" in done.stdout
    assert "Warning: checkpoint-999 is passed over: complete.json is missing." in done.stderr
    shutil.rmtree(half)  # which is not drkl's to remove
    assert_equal(run, whole)
    assert tiny_runs.steps(run) == list(range(1, 21))
    assert run.read_env()["command"] == ["drkl", "distill", str(tmp_path / "c.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step", "moved"),
    [
        ("log 01-warmup", 12, False),
        ("begin r/checkpoints", 0, False),
        ("log r/checkpoints", 12, False),
        ("checkpoint r/checkpoints", 10, False),
        ("log r/checkpoints", 12, True),
    ],
    ids=["first stage", "between", "last stage", "while a checkpoint is written", "moved"],
)
def test_sigkill_anywhere(tmp_path: Path, moment: str, step: int, moved: bool) -> None:
    stages = [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 15}}]
    values, whole = reference(tmp_path, training=LONG, stages=stages)
    run = RunFolder(tmp_path / "runs" / "r")
    killed_by_signal(values, tmp_path / "c.yaml", moment, step)
    assert RunFolder(run.root / "stages" / "01-warmup").is_finished() is (moment != "log 01-warmup")
    if moved:
        run = RunFolder(run.root.rename(tmp_path / "moved"))
    done = tiny_runs.call("distill", "--resume", run.root)
    assert done.returncode == 0, done.stderr
    assert_equal(run, whole)


@pytest.mark.slow
def test_the_trainers_own_files_are_read_as_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_runs.config(tmp_path)
    cut_off(values, kill_at_step("r", 5))
    load = torch.load
    read: dict[str, Any] = {}

    def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
        read[Path(path).name] = kwargs.get("weights_only", True)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    tiny_runs.train(values, "resume")
    assert read == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what"), [("optimizer.pt", "optimiser's state"), ("scheduler.pt", "optimis"), ("rng_state.pth", "random")]
)
def test_a_file_of_a_checkpoint_that_torch_cannot_read_is_named(tmp_path: Path, name: str, what: str) -> None:
    """Though it is what was written."""
    values = tiny_runs.config(tmp_path)
    run = cut_off(values, kill_at_step("r", 5))
    checkpoint = run.checkpoints_path / "checkpoint-4"
    for content in ((checkpoint / name).read_bytes()[:100], b"x"):
        (checkpoint / name).write_bytes(content)
        mark_complete(checkpoint, reached_at(checkpoint))
        with pytest.raises(DrklError, match=rf"The {what}.*checkpoint-4' cannot be used: .*Remove that checkpoint"):
            tiny_runs.train(values, "resume")


FOREIGN = ['{"a": 1}', "[1]", '{"step": "x"}', '{"step": null}']


def test_a_foreign_line_in_a_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for line in FOREIGN:
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(DrklError, match=r"train\.jsonl, entry 2: .* is no line of a run: .*Remove the line"):
            lines_up_to(path, 2)
    path.write_text('{"step": 1, "seconds": "x"}\n{"step": 3}\n')
    assert lines_up_to(path, 2) == [{"step": 1, "seconds": "x"}]
    assert lines_up_to(tmp_path / "none.jsonl", 2) == []


def test_a_record_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text("[]")
    with pytest.raises(
        DrklError,
        match=r"env\.json holds a list; expected an object\. It says whether the run has ended.*Bring it back",
    ):
        RunFolder(tmp_path).is_finished()


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"Cannot write '.*train\.jsonl': .*then resume the run"):
        append_jsonl(tmp_path / "none" / "train.jsonl", [{"step": 1}])
