"""Two runs in one folder: the second is refused, a crashed one leaves nothing behind, and readers go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults import moments
from tests.faults.conftest import Injected
from tests.faults.forked import Child, Runner
from tests.training import tiny_runs


def held_at(step: int, note: str) -> None:
    """Injected: training stands still after a step, which it notes in a file, until it is ended from outside."""
    from transformers.trainer_callback import CallbackHandler

    call_event = CallbackHandler.call_event

    def watched(self: Any, event: str, args: Any, state: Any, control: Any, **words: Any) -> Any:
        if event == "on_step_begin" and state.global_step == step:
            Path(note).touch()
            while True:
                time.sleep(0.01)
        return call_event(self, event, args, state, control, **words)

    CallbackHandler.call_event = watched


@contextmanager
def standing(runner: Runner, folder: Path, *words: object) -> Iterator[Child]:
    """A run that stands still after its second step."""
    note = folder.parent / "stands"
    note.unlink(missing_ok=True)
    child = runner.start("distill", *words, inject="tests.faults.test_locks:held_at", given=[2, str(note)])
    while not note.exists():
        assert child.poll() is None, child.err
        time.sleep(0.01)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_runs.write_config(tiny_runs.config(tmp_path, training={"max_steps": 4}), tmp_path / "c.yaml")


@pytest.mark.slow
@pytest.mark.fault(
    group="Two runs in one folder",
    fault="A second start, resume, replacement, evaluation or analysis in the folder of a run that trains",
    does="It is refused; the message names the command, the process and the host that work there, and what to do. "
    "The first one goes on unharmed.",
)
def test_a_second_run_in_the_folder(runner: Runner, config: Path, tmp_path: Path, injected: Injected) -> None:
    root = tmp_path / "runs" / "r"
    others: list[list[object]] = [
        ["distill", config],
        ["distill", "--overwrite", config],
        ["distill", "--auto-resume", config],
        ["distill", "--resume", root],
        ["evaluate", root],
        ["analyze", root],
    ]
    with standing(runner, root, config) as first:
        before = moments.files_of(root)
        for words in others:
            with injected(" ".join(map(str, words))):
                second = runner.call(*words, until=600)
                assert second.code == 2, f"status {second.code}"
                assert second.err.startswith("Error: ") and second.err.count("\n") == 1, second.err
                if words[0] == "distill":
                    assert "is in use" in second.err and f"process {first.pid} on " in second.err, second.err
                assert moments.files_of(root) == before
        with injected("readers"):
            for reader in (["report", root, "--output", tmp_path / "page.html"], ["data", config]):
                assert runner.call(*reader, until=600).code == 0


@pytest.mark.slow
@pytest.mark.fault(
    group="Two runs in one folder",
    fault="Whoever works in the folder is killed",
    does="The folder is free at once: no lock has to be removed by hand.",
)
def test_a_killed_run_leaves_no_lock(runner: Runner, config: Path, tmp_path: Path, injected: Injected) -> None:
    root = tmp_path / "runs" / "r"
    for number, words in enumerate((["--resume", root], ["--overwrite", config], ["--auto-resume", config])):
        with injected(" ".join(map(str, words))):
            with standing(runner, root, "--overwrite", config) as first:
                first.kill(signal.SIGKILL)
                first.wait()
            done = runner.call("distill", *words, until=600)
            assert done.code == 0, f"{number}: {done.err[-300:]}"
            assert not (root / ".lock").exists()


@pytest.mark.slow
@pytest.mark.fault(
    group="Two runs in one folder",
    fault="A run, an evaluation and an analysis are started twice at the same moment",
    does="One of the two does it; the other is refused, or comes after it.",
)
def test_two_at_the_same_moment(runner: Runner, config: Path, tmp_path: Path, injected: Injected) -> None:
    root = tmp_path / "runs" / "r"
    for words in (["distill", config], ["distill", "--overwrite", config], ["evaluate", root], ["analyze", root]):
        for _ in range(3 if words[0] != "distill" or len(words) > 2 else 1):
            with injected(" ".join(map(str, words))):
                both = [runner.start(*words) for _ in range(2)]
                done = [child.wait(600) for child in both]
                assert 0 in [one.code for one in done], done[0].err
                for one in done:
                    assert one.code == 0 or "is in use" in one.err or "exists" in one.err, one.err
                log = (root / "train.jsonl").read_text()
                assert log.count('"loss"') == 4
                assert not [path.name for path in root.iterdir() if path.name.endswith("lock")]


@pytest.mark.slow
@pytest.mark.fault(
    group="Two runs in one folder",
    fault="A process is killed while helpers of it read rows",
    does="The helpers end too, within a second or two, and hold no folder.",
)
def test_no_helper_is_left(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    values = tiny_runs.config(tmp_path, training={"max_steps": 400, "arguments": {"dataloader_num_workers": 2}})
    config = tiny_runs.write_config(values, tmp_path / "c.yaml")
    root = tmp_path / "runs" / "r"
    with injected("SIGKILL"):
        with standing(runner, root, config) as first:
            helpers = children_of(first.pid)
            assert helpers
            first.kill(signal.SIGKILL)
            first.wait()
        done = runner.call("distill", "--resume", root, "--help")
        assert done.code == 0
        until = time.monotonic() + 20
        while any(is_alive(pid) for pid in helpers):
            assert time.monotonic() < until, "helpers are left"
            time.sleep(0.1)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[1]) == pid:
                found.append(int(path.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
