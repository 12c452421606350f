"""The tests of faults find a loss, and run the drkl that they are to run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Injected
from tests.faults.forked import Runner


def test_a_failed_look_is_a_loss_and_the_next_injection_goes_on() -> None:
    injected = Injected()
    for number in range(3):
        with injected(f"write {number}"):
            assert number != 1, "half a file"
    assert injected.count == 3
    assert [loss.splitlines()[0] for loss in injected.losses] == ["write 1: half a file"]


@pytest.mark.fault(group="Ends from outside", fault="A command is killed before it has begun", does="Nothing is there.")
def test_a_child_is_a_command_of_its_own(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    with injected("SIGKILL"):
        child = runner.start("recipes", inject="time:sleep", given=[600])
        assert child.kill()
        assert child.wait().code == -signal.SIGKILL
    done = runner.call("--version")
    assert done.code == 0
    assert done.out.startswith("drkl ")
    failed = runner.call("evaluate", tmp_path / "none")
    assert failed.code == 2
    assert failed.err.startswith("Error: There is no run folder")
    assert child.pid != os.getpid()
