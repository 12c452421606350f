"""Signals end a command with one line, and training after its step."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drkl import signals
from drkl.signals import KEPT, CutShort, Stopped, cut_short, deferred, handled, line_of, may_be_cut_short, wait
from tests.training import tiny_runs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Nothing of a test's handling is left to the next."""
    handlers = {signum: signal.getsignal(signum) for signum in signals.SIGNALS}
    yield
    if signals._handling is not None:
        signals._handling.end()
        signals._handling = None
    assert {signum: signal.getsignal(signum) for signum in signals.SIGNALS} == handlers


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0)  # handlers run between two lines of Python


@pytest.mark.parametrize(
    ("signum", "code", "words"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")]
)
def test_a_command_ends_with_one_line(capfd: pytest.CaptureFixture[str], signum: int, code: int, words: str) -> None:
    with pytest.raises(Stopped) as stopped, handled(["drkl", "evaluate", "a run"]):
        signals.keep("The parts are kept.")
        send(signum)
    assert stopped.value.code == code and stopped.value.signum == signum
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and signal.Signals(signum).name in said and words in said
    assert said.endswith("The parts are kept. To go on: drkl evaluate 'a run'\n")


def test_an_error_that_a_signal_became_is_told_as_the_signal(capfd: pytest.CaptureFixture[str]) -> None:
    """Python makes another error of what is raised while a class is made."""
    with pytest.raises(Stopped), handled(["drkl"]):
        try:
            send(signal.SIGTERM)
        except Stopped as stopped:
            raise RuntimeError("Error calling __set_name__") from stopped
    assert capfd.readouterr().err.startswith("Ended from outside (SIGTERM). Nothing was begun.")


def test_a_run_that_was_begun_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    with handled(["drkl", "distill", "c.yaml"]):
        KEPT.prepared = ["drkl", "distill", "--resume", "runs/r"]
        assert line_of(signal.SIGTERM).endswith("To go on: drkl distill c.yaml")
        KEPT.begun("checkpoint-3 is kept.")
        assert line_of(signal.SIGTERM).endswith("checkpoint-3 is kept. To go on: drkl distill --resume runs/r")
        KEPT.resume = ["drkl", "distill", "--resume", "runs/a\x1b[2K\u202eb"]
        assert line_of(signal.SIGTERM).endswith(r"--resume $'runs/a\x1b[2K\xe2\x80\xaeb'")
        monkeypatch.setattr(KEPT, "launcher", True)
        assert "To go on, under the same launcher: drkl" in line_of(signal.SIGTERM)


def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handled():
            send(signal.SIGHUP)
            with deferred() as training:
                send(signal.SIGHUP)
                assert not training.signum
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_training_waits_for_the_end_of_its_step() -> None:
    with pytest.raises(Stopped), deferred() as training:
        training.begin()
        send(signal.SIGTERM)
        assert training.signum == signal.SIGTERM and not training.is_told
        with pytest.raises(CutShort):
            cut_short()
        with pytest.raises(CutShort), may_be_cut_short():
            raise AssertionError("not reached")
        training.end()


def test_a_wait_is_cut_short() -> None:
    with deferred() as training:
        training.begin()
        with pytest.raises(CutShort) as cut, may_be_cut_short():
            send(signal.SIGTERM)
        assert pickle.loads(pickle.dumps(cut.value)).signum == signal.SIGTERM
    cut_short()  # no training: nothing is cut


def test_ctrl_c_in_a_program_of_ones_own_is_what_it_always_is() -> None:
    with pytest.raises(KeyboardInterrupt), deferred() as training:
        training.begin()
        send(signal.SIGINT)
        training.end()
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with deferred() as training:
            training.begin()
            send(signal.SIGTERM)  # somebody else's
            assert not training.signum
    finally:
        signal.signal(signal.SIGTERM, own)


def test_another_error_is_told_before_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), handled():
        signal.setitimer(signal.ITIMER_REAL, 1e9)
        signals._handling.ends = True  # type: ignore[union-attr]
        send(signal.SIGTERM)
        wait(1e9)  # does not wait
        raise ValueError
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert capfd.readouterr().err == ""


def test_a_forked_child_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    for defers, code in ((False, -signal.SIGINT), (True, 7)):
        with handled(), deferred() as training:
            if defers:
                training.begin()
            if (child := os.fork()) == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert capfd.readouterr().err == ""


HANGS = """
import os, signal, sys, time
from drkl import signals
signals.PATIENCE, signals.ONE = {patience}, 0.0
with signals.handled(["drkl", "distill"]), signals.deferred() as training:
    signals.keep("checkpoint-3 is kept.")
    training.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    if {twice}:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
"""


@pytest.mark.parametrize(("patience", "twice"), [(1000.0, True), (0.01, False)])
def test_what_does_not_end_is_ended(patience: float, twice: bool) -> None:
    """By a second signal, or after some seconds."""
    words = [sys.executable, "-c", HANGS.format(patience=patience, twice=twice)]
    done = subprocess.run(words, env=tiny_runs.environment(), capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == "Ended from outside (SIGTERM). checkpoint-3 is kept. To go on: drkl distill\n"


SWALLOWS = """
import os, signal, time
from drkl import signals

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

with signals.handled(["drkl"]):
    Lost()
    time.sleep(1000)
"""


def test_an_end_that_a_destructor_swallows_comes_again() -> None:
    words = [sys.executable, "-c", SWALLOWS]
    done = subprocess.run(words, env=tiny_runs.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (143, 1), done.stderr


def test_a_signal_while_the_command_line_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    variables = tiny_runs.environment()
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    words = [sys.executable, "-m", "drkl", "recipes"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "Interrupted (Ctrl-C, SIGINT). Nothing was begun. To go on: drkl recipes\n"
