"""A signal ends training after its step, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from drkl.runs import RunFolder
from drkl.signals import Stopped
from drkl.training.checkpoints import MARKER
from drkl.training.heldout import HeldOut
from drkl.training.placing import drop_extras, rotate
from drkl.training.run import Listener
from tests.training import tiny_runs
from tests.training.test_resume import comparable, reference


def end(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


def ends_at(step: int, signum: int = signal.SIGTERM) -> Listener:
    """Sends a signal when a step has been taken, before what is logged, measured and saved after it."""
    sent: list[int] = []

    def on_progress(now: int, of: int, newest: dict[str, float]) -> None:
        if now == step and not sent:
            sent.append(now)
            end(signum)

    return Listener(on_progress=on_progress)


def stopped(values: dict[str, Any], mode: Any, listener: Listener | None = None) -> RunFolder:
    with pytest.raises(Stopped) as ended:
        tiny_runs.train(values, mode, listener)
    assert ended.value.code == 143
    return RunFolder(Path(values["run"]["dir"]) / values["run"]["name"])


def checkpoints(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints_path.iterdir())


def check_same(run: RunFolder, whole: RunFolder) -> None:
    assert tiny_runs.weights(run) == tiny_runs.weights(whole)
    assert comparable(run) == comparable(whole)
    assert checkpoints(run) == checkpoints(whole)


@pytest.mark.slow
def test_a_run_that_is_ended_after_a_step_and_in_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, whole = reference(tmp_path, training={"arguments": {"logging_steps": 3}})
    run = stopped(values, "new", ends_at(1))
    assert checkpoints(run) == ["checkpoint-1"]
    assert json.loads((run.checkpoints_path / "checkpoint-1" / MARKER).read_text())["extra"]
    assert "Ended from outside (SIGTERM). Step 1 was finished, and is saved in " in caplog.text
    sums_of = HeldOut._sums_of

    def ended(self: HeldOut, *args: Any) -> Any:
        end()
        return sums_of(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("drkl.training.heldout.SHORT_TOKENS_PER_BATCH", 24)  # several batches
        patch.setattr(HeldOut, "_sums_of", ended)
        stopped(values, "resume")
        assert checkpoints(run) == ["checkpoint-2"]
        assert not any("eval_loss" in line for line in run.read_train_log())
        stopped(values, "resume")  # in the same evaluation, which comes first
    check_same(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_a_run_that_is_ended_before_its_evaluation(tmp_path: Path) -> None:
    """The evaluation is left to the resumed run, that of the last step too."""
    values, whole = reference(tmp_path, training={"max_steps": 3, "eval_every": 1, "save_every": 1})
    for step in (1, 3):
        run = stopped(values, "new" if step == 1 else "resume", ends_at(step))
        marker = json.loads((run.checkpoints_path / f"checkpoint-{step}" / MARKER).read_text())
        assert marker["extra"] and marker["evaluation_due"] and marker["save_due"]
    check_same(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_answers_that_are_being_written_are_given_up(tmp_path: Path) -> None:
    rollouts = {"share": 1.0, "max_new_tokens": 4, "refresh_every": 2, "eval_prompts": 2, "batch_size": 2}
    values, whole = reference(tmp_path, rollouts=rollouts)

    def in_writing(now: int, of: int, newest: dict[str, float]) -> None:
        if now == 2 and "to_write" in newest:
            end()

    run = stopped(values, "new", Listener(on_progress=in_writing))
    assert checkpoints(run) == ["checkpoint-2"]
    check_same(tiny_runs.train(values, "resume"), whole)


def test_ctrl_c_in_a_program_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_runs.train(tiny_runs.config(tmp_path), listener=ends_at(1, signal.SIGINT))
    assert checkpoints(RunFolder(tmp_path / "runs" / "r")) == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_checkpoints_beside_those_that_were_asked_for_push_none_out(tmp_path: Path) -> None:
    def make(step: int, extra: bool = False) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / MARKER).write_text(json.dumps({"step": step, "extra": extra, "files": {}}))

    def steps() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    for step in (2, 4, 6):
        make(step)
    make(7, extra=True)
    rotate(tmp_path, 2, 2, 7)
    assert steps() == [2, 6, 7]  # the best, the newest that was asked for, and the one to go on from
    make(8)
    rotate(tmp_path, 2, 2, 8)
    assert steps() == [2, 8]
    make(9, extra=True)
    drop_extras(tmp_path)
    assert steps() == [2, 8]
