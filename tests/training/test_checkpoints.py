from __future__ import annotations

from pathlib import Path

import pytest

from drkl.training import checkpoints
from drkl.training.checkpoints import MARKER, discard, mark_complete, newest_checkpoint, rotate, tokens_seen


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        (path / "model.safetensors").write_text("x")
        mark_complete(path, step, step * 10)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    make(tmp_path, 9, 100, 20)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-100" and newest is not None
    assert tokens_seen(newest) == 1000


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
