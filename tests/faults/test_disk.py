"""A disk that is full, read-only or gone at every write of every command: one message, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Injected
from tests.faults.disks import Disk
from tests.faults.forked import Ended, Runner
from tests.training import tiny_runs

CLOCK = re.compile(r"second|time|started|finished|_at$")
"""Names of what two runs differ in."""
SMALL = {"max_steps": 4, "arguments": {"logging_steps": 1, "optim": "sgd"}}
LORA = {"r": 2, "export": "merged"}


@dataclass
class Work:
    """A command whose writes fail, and what it leaves.

    Args:
        words: of the command line.
        folder: everything below it is compared with what the command leaves where nothing fails.
        writes: the folders whose writes fail; default ``folder``.
        variables: of the environment.
        first: brings everything to where it was before.
    """

    words: Sequence[object]
    folder: Path
    writes: Sequence[Path] = ()
    variables: dict[str, str] = field(default_factory=dict)
    first: Callable[[], None] = lambda: None

    def result(self) -> dict[str, Any]:
        """What lies in the folder, without the clock; hidden files are nobody's."""
        found = {}
        for path in sorted(self.folder.rglob("*")) if self.folder.is_dir() else [self.folder]:
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() or any(part.startswith(".") for part in Path(name).parts) or "checkpoint-" in name:
                continue
            found[name] = _content(path)
        return found


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix in (".html", ".csv", ".md", ".svg"):
        return re.sub(r"[\d.]+ (s|seconds|min)\b|\d{4}-\d\d-\d\d[T ][\d:.+]+", "", path.read_text())
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not CLOCK.search(key) and key != "command"}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def way_on(ended: Ended) -> list[str]:
    """The command that a message says goes on."""
    found = re.search(r"To go on: drkl (.+)", ended.err) or re.search(r"`drkl ([^`]+)`", ended.err)
    assert found, f"no command that goes on is named: {ended.err}"
    return shlex.split(found[1])


def check_said(ended: Ended, number: int) -> None:
    """A failed command said one thing: the system's cause, and a cure that is of this cause."""
    said = ended.err[ended.err.index("Error:") :] if "Error:" in ended.err else ended.err
    assert ended.code == 2, f"status {ended.code}: {ended.err[-800:]}"
    assert "Traceback" not in ended.err, ended.err[-800:]
    assert ended.err.count("Error:") == 1, ended.err
    assert os.strerror(number) in said, said
    assert ("ake room" in said) == (number in (errno.ENOSPC, errno.EDQUOT)), said


def every_write(
    work: Work, disk: Disk, runner: Runner, injected: Injected, number: int, *, step: int = 1, **how: Any
) -> None:
    """Fail every ``step``-th write of a command in turn; what its message names goes on to the same end."""
    folders = [*(work.writes or [work.folder])]
    work.first()
    disk.watch(*folders, error=number)
    whole = runner.call(*work.words, variables=work.variables)
    assert whole.code == 0, whole.err
    count, expected = disk.count, work.result()
    disk.mend()
    assert count, "nothing was written"
    for write in range(1, count + 1, step):
        work.first()
        disk.fail(write, *folders, error=number, **how)
        ended = runner.call(*work.words, variables=work.variables)
        where = disk.where
        disk.mend()
        with injected(f"{errno.errorcode[number]} at write {write} of {count}, {where}"):
            if ended.code != 0:
                check_said(ended, number)
                again = runner.call(*way_on(ended), variables=work.variables)
                assert again.code == 0, f"going on after {ended.err}: {again.err[-800:]}"
            assert "Traceback" not in ended.err, ended.err[-800:]
            found = work.result()
            assert found.keys() == expected.keys()
            assert [name for name in expected if found[name] != expected[name]] == []


def removed(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path, ignore_errors=True)


def training(root: Path, **sections: Any) -> Work:
    """A run that evaluates and saves every other step."""
    section = SMALL | sections.pop("training", {})
    values = tiny_runs.config(root, **{"training": section, **sections})
    config = tiny_runs.write_config(values, root / "run.yaml")
    run = root / "runs" / "r"
    return Work(["distill", config], run, first=removed(run))


RUNS: dict[str, dict[str, Any]] = {
    "one stage": {},
    "two stages": {"stages": [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 2}}]},
    "on-policy": {"rollouts": {"share": 1.0, "max_new_tokens": 4}},
    "LoRA, merged": {"peft": LORA, "student": {"init": "teacher"}},
}


@pytest.mark.fault(
    group="Disk",
    fault="The disk is full from the n-th write of a small run on (some n; every n below)",
    does="Stops with the cause, the file and the command that goes on; that one gives the uninterrupted run's bytes.",
)
def test_a_full_disk_in_training(tmp_path: Path, disk: Disk, runner: Runner, injected: Injected) -> None:
    work = training(tmp_path, training={"max_steps": 2})
    every_write(work, disk, runner, injected, errno.ENOSPC, step=19)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk is full from the n-th write of a run on, for every n: one stage and two, answers written, LoRA",
    does="Stops with the cause, the file and the command that goes on; that one gives the uninterrupted run's bytes.",
)
@pytest.mark.parametrize("kind", RUNS)
def test_a_full_disk_at_every_write_of_a_run(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, kind: str
) -> None:
    every_write(training(tmp_path, **RUNS[kind]), disk, runner, injected, errno.ENOSPC)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk becomes read-only, fails once, forbids it, or goes away at the n-th write of a run",
    does="As for a full disk; the message never speaks of room.",
)
@pytest.mark.parametrize(
    ("number", "forever"),
    [(errno.EROFS, True), (errno.EIO, False), (errno.EACCES, False), (errno.ESTALE, True), (errno.EDQUOT, True)],
)
def test_another_fault_of_the_disk_in_a_run(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, number: int, forever: bool
) -> None:
    work = training(tmp_path, **RUNS["two stages"])
    every_write(work, disk, runner, injected, number, step=3, forever=forever)


@pytest.mark.fault(
    group="Disk",
    fault="Each library under drkl writes to a disk that is full",
    does="None passes the faults of this table by: they are real.",
)
def test_no_library_escapes(tmp_path: Path, disk: Disk, runner: Runner, injected: Injected) -> None:
    with injected("every way of writing"):
        disk.fail(3, tmp_path)  # the first two are what the others find
        where = "tests.faults.disks:write_in_every_way"
        ended = runner.call("--version", inject=where, given=[str(tmp_path)])
        assert ended.code == 0 and "was written" not in ended.out, ended
        assert disk.failed >= 10
