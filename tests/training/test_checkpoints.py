from __future__ import annotations

from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training import checkpoints
from drkl.training.checkpoints import (
    MARKER,
    Reached,
    check_checkpoint,
    discard,
    mark_complete,
    newest_checkpoint,
    reached_at,
    rotate,
    wanted_checkpoint,
)


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        (path / "model.safetensors").write_text("x")
        mark_complete(path, Reached(step, step * 10))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    make(tmp_path, 9, 100, 20)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-100" and newest is not None
    assert reached_at(newest) == Reached(100, 1000)


def test_a_half_written_one_does_not_count_and_goes(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / MARKER).unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, 10, [10, 40]), (2, 40, [30, 40]), (2, None, [30, 40]), (3, 10, [10, 30, 40]), (9, 20, [10, 20, 30, 40])],
)
def test_the_best_and_the_newest_stay(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40)
    rotate(tmp_path, keep, None if best is None else Path(f"elsewhere/checkpoint-{best}"))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_a_removal_that_is_cut_off_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10, 20)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda *a, **k: None)
        discard(tmp_path / "checkpoint-20")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_copy_under_another_name_is_the_users_own(tmp_path: Path) -> None:
    make(tmp_path, 10)
    for name in ("checkpoint-best", "checkpoint-10-copy"):
        (tmp_path / name).mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-10"
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-10-copy", "checkpoint-best"]
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    with pytest.raises(DrklError, match=r"checkpoint-best' is no checkpoint; expected a folder checkpoints/checkpoint"):
        wanted_checkpoint(RunFolder(tmp_path), tmp_path / "checkpoint-best")


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": 3}', '{"step": 3, "loss_sums": 1}'])
def test_a_mark_that_does_not_say_how_far_is_named(tmp_path: Path, text: str) -> None:
    make(tmp_path, 10)
    (tmp_path / "checkpoint-10" / MARKER).write_text(text)
    with pytest.raises(DrklError, match=r"complete\.json' does not say how far the run had come .*Remove that checkp"):
        reached_at(tmp_path / "checkpoint-10")


def test_losses_since_the_last_line_of_the_log_in_each_process() -> None:
    reached = Reached(4, 10, 3, (1.0, 4.0))
    assert [reached.loss_sum(process, 2) for process in (0, 1)] == [1.0, 4.0]
    assert reached.loss_sum(0, 1) == 2.5
    assert Reached(4).loss_sum(0, 1) == 0


def test_without_the_optimiser_s_state_no_run_goes_on(tmp_path: Path) -> None:
    make(tmp_path, 10)
    path = tmp_path / "checkpoint-10"
    with pytest.raises(DrklError, match=r"has no optimizer\.pt and no scheduler\.pt \(saved with save_only_model"):
        check_checkpoint(path, optimizer=True)
    for text in ("{", '{"who": 1}', "[]"):
        (path / "trainer_state.json").write_text(text)
        with pytest.raises(DrklError, match=r"The state of '.*checkpoint-10' cannot be used: .*Remove that checkpoint"):
            check_checkpoint(path, optimizer=False)
    (path / "trainer_state.json").write_text("{}")
    check_checkpoint(path, optimizer=False)
