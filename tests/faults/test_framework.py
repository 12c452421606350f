"""The tests of faults find a loss, and run the drkl that they are to run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from scripts import faults_page
from scripts.write_faults import counted
from tests.faults.conftest import Injected
from tests.faults.forked import Runner


def test_a_failed_look_is_a_loss_and_the_next_injection_goes_on() -> None:
    injected = Injected()
    for number in range(3):
        with injected(f"write {number}"):
            assert number != 1, "half a file"
    assert injected.count == 3
    assert [loss.splitlines()[0] for loss in injected.losses] == ["write 1: half a file"]


@pytest.mark.fault(
    group="Ends from outside",
    fault="SIGKILL before a command has begun",
    does="Nothing is written; the next command starts as if there had been none.",
)
def test_a_command_is_killed_before_it_has_begun(runner: Runner, tmp_path: Path, injected: Injected) -> None:
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


def test_the_table_of_faults_is_that_of_the_tests(tmp_path: Path) -> None:
    table = faults_page.faults()
    assert {fault.group for fault in table} <= set(faults_page.GROUPS)
    assert len({fault.fault for fault in table}) == len(table), "two rows of one name"
    assert set(faults_page.read_rows()) <= {fault.test for fault in table}
    (tmp_path / "test_x.py").write_text(
        '@pytest.mark.fault(group="Disk", fault="It is full", does="")\ndef test_a(): ...\n'
    )
    with pytest.raises(ValueError, match="a mark has a group of Ends from outside"):
        faults_page.faults(tmp_path)


def test_the_counts_of_a_test_are_those_of_all_its_parameters(tmp_path: Path) -> None:
    for number, losses in enumerate(([], ["write 3: half a file"])):
        row = {"test": "tests/faults/test_x.py::test_a", "injections": 4, "losses": losses}
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    assert counted(tmp_path) == {"tests/faults/test_x.py::test_a": (8, 1)}
