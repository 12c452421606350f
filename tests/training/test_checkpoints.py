from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training.checkpoints import (
    MARKER,
    Reached,
    check_state,
    damage,
    find_checkpoint,
    has_checkpoints,
    mark_complete,
    plain_errors,
    reached_at,
    readable,
    wanted_checkpoint,
)

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make(folder: Path, *steps: int, files: tuple[str, ...] = FILES, processes: int = 1) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        for name in files:
            (path / name).write_text(f"{name} of step {step}")
        mark_complete(path, Reached(step, step * 10, loss_sums=(0.5,) * processes))


def passed_over(folder: Path) -> list[tuple[str, str]]:
    return find_checkpoint(folder, optimizer=True).passed_over


def test_the_newest_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "missing") == (None, [])
    make(tmp_path, 9, 100, 20)
    newest, passed = find_checkpoint(tmp_path, optimizer=True)
    assert newest == tmp_path / "checkpoint-100" and passed == [] and newest is not None
    reached = reached_at(newest)
    assert (reached.step, reached.num_tokens, reached.loss_sums) == (100, 1000, (0.5,))
    assert sorted(reached.files) == sorted(FILES)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def rewrite(**changes: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes)) and None


def of_before(path: Path) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({"step": values["step"], "num_tokens": 7, "loss_sums": [], "fed": values["fed"]}))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("scheduler.pt", cut, "scheduler.pt has 5 bytes in place of 23"),
        ("model.safetensors", flip, "model.safetensors has another content than was written"),
        (MARKER, Path.unlink, "complete.json is missing"),
        (MARKER, cut, "complete.json cannot be read (Unterminated"),
        (MARKER, lambda path: path.write_bytes(b"\xff\xfe"), "complete.json cannot be read ("),
        (MARKER, lambda path: path.write_text("[" * 100_000), "complete.json cannot be read ("),
        (MARKER, lambda path: path.write_text("[]"), "complete.json holds a list"),
        (MARKER, rewrite(num_tokens=301), "complete.json has another content than was written"),
        (MARKER, rewrite(step=31), "complete.json has another content than was written"),
        (MARKER, rewrite(files={}), "complete.json has another content than was written"),
        (MARKER, of_before, "an earlier drkl wrote it, without a list of its files"),
    ],
)
def test_a_damaged_one_is_passed_over_by_name(
    tmp_path: Path, name: str, change: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path, 20, 30)
    change(tmp_path / "checkpoint-30" / name)
    path, passed = find_checkpoint(tmp_path, optimizer=True)
    assert path == tmp_path / "checkpoint-20" and [one for one, _ in passed] == ["checkpoint-30"]
    assert passed[0][1].startswith(reason), passed
    with pytest.raises(DrklError, match=r"checkpoint-30' is not whole: .*Name another checkpoint"):
        wanted_checkpoint(RunFolder(tmp_path), tmp_path / "checkpoint-30", optimizer=True)


def test_many_reasons_are_not_all_told(tmp_path: Path) -> None:
    make(tmp_path, 30)
    for name in FILES:
        (tmp_path / "checkpoint-30" / name).unlink()
    assert str(damage(tmp_path / "checkpoint-30")).endswith("is missing; and 2 more")


def test_a_copy_under_the_name_of_another_step_is_none(tmp_path: Path) -> None:
    make(tmp_path, 30)
    for name in ("checkpoint-40", "checkpoint-030", "checkpoint-30-backup", "checkpoint-\u0663\u0660"):
        shutil.copytree(tmp_path / "checkpoint-30", tmp_path / name)
    path, passed = find_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoint-30" and passed == [("checkpoint-40", "complete.json is that of step 30")]


def test_what_drkl_did_not_write_is_not_read(tmp_path: Path) -> None:
    make(tmp_path, 30)
    (tmp_path / "checkpoint-999").write_text("a file")
    (tmp_path / "checkpoint-998").symlink_to("checkpoint-30")
    (tmp_path / "checkpoint-997").symlink_to("nowhere")
    (tmp_path / "checkpoint-996").mkdir()
    assert passed_over(tmp_path) == [
        ("checkpoint-999", "it is no folder"),
        ("checkpoint-998", "it is a link"),
        ("checkpoint-997", "it is a link"),
        ("checkpoint-996", "complete.json is missing"),
    ]
    assert has_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-30")
    assert not has_checkpoints(tmp_path)
    (tmp_path / "checkpoint-996" / "trainer_state.json").touch()
    assert has_checkpoints(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    assert not has_checkpoints(tmp_path / "none")
    (tmp_path / "file").touch()
    assert not has_checkpoints(tmp_path / "file")
    monkeypatch.setattr("drkl.training.checkpoints.os.listdir", refuse)
    with pytest.raises(DrklError, match=r"Cannot read '.*': Permission denied\."):
        has_checkpoints(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_state_that_was_never_saved_is_missing_too(tmp_path: Path, processes: int) -> None:
    alone = {1: ("rng_state.pth",), 2: ("rng_state_0.pth", "rng_state_1.pth")}[processes]
    whole = ("optimizer.pt", "scheduler.pt", "trainer_state.json", *alone)
    for number, left_out in enumerate(("optimizer.pt", "scheduler.pt", alone[-1])):
        make(tmp_path, number, files=tuple(name for name in whole if name != left_out), processes=processes)
        path = tmp_path / f"checkpoint-{number}"
        assert damage(path, optimizer=True) == f"it was saved without {left_out}, as with save_only_model"
        assert damage(path) is None
    make(tmp_path, 9, files=whole, processes=processes)
    assert damage(tmp_path / "checkpoint-9", optimizer=True) is None


def test_without_a_whole_one_every_reason_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.checkpoints_path.mkdir()
    with pytest.raises(DrklError, match=r"There is no whole checkpoint in '.*checkpoints' to resume from\.$"):
        wanted_checkpoint(run, True)
    make(run.checkpoints_path, 10, 20)
    (run.checkpoints_path / "checkpoint-20" / "optimizer.pt").unlink()
    assert wanted_checkpoint(run, True) == run.checkpoints_path / "checkpoint-10"
    assert caplog.messages == ["Warning: checkpoint-20 is passed over: optimizer.pt is missing."]
    cut(run.checkpoints_path / "checkpoint-10" / "model.safetensors")
    wanted = (
        r"checkpoint-20: optimizer\.pt is missing; checkpoint-10: model\.safetensors has 5 bytes in place of 28\. Put "
        "back what they lack; or move them out"
    )
    with pytest.raises(DrklError, match=wanted):
        wanted_checkpoint(run, True)
    assert wanted_checkpoint(run, None) is None and wanted_checkpoint(run, False) is None


def test_a_checkpoint_that_is_named_has_its_name(tmp_path: Path) -> None:
    make(tmp_path, 10)
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-best")
    for name in ("checkpoint-best", "checkpoint-11"):
        with pytest.raises(DrklError, match=rf"{name}' is no checkpoint; expected a folder checkpoints/checkpoint"):
            wanted_checkpoint(RunFolder(tmp_path), tmp_path / name)
    assert wanted_checkpoint(RunFolder(tmp_path), str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"


def test_a_marker_of_another_drkl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10)
    monkeypatch.setattr("drkl.training.checkpoints.Reached", lambda step, num_tokens: None)
    with pytest.raises(DrklError, match=r"checkpoint-10' is not whole: complete\.json is that of another drkl"):
        reached_at(tmp_path / "checkpoint-10")


def test_losses_since_the_last_line_of_the_log_in_each_process() -> None:
    reached = Reached(4, 10, 3, (1.0, 4.0))
    assert [reached.loss_sum(process, 2) for process in (0, 1)] == [1.0, 4.0]
    assert reached.loss_sum(0, 1) == 2.5
    assert Reached(4).loss_sum(0, 1) == 0


def test_a_state_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-10"
    path.mkdir()
    for text in ("{", '{"who": 1}', "[]"):
        (path / "trainer_state.json").write_text(text)
        with pytest.raises(DrklError, match=r"The state of '.*checkpoint-10' cannot be used: .*Remove that checkpoint"):
            check_state(path)
    (path / "trainer_state.json").write_text("{}")
    check_state(path)


def test_what_torch_s_distributed_checkpoints_wrap_is_raised_as_it_was(tmp_path: Path) -> None:
    failures: Any = {1: (OSError(28, "No space left on device"), None)}
    with pytest.raises(OSError, match="No space left"), plain_errors():
        raise CheckpointException("save", failures)
    with pytest.raises(DrklError, match=r"weights of 'c' cannot be used: .*No space left"), readable("c", "weights"):
        raise CheckpointException("load", failures)
