from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from drkl.training import placing
from drkl.training.checkpoints import Reached, find_checkpoint, mark_complete
from drkl.training.placing import discard, keep_only, place, rotate, set_aside_later, staging, tidy
from tests.training.test_checkpoints import make


class CutOff(BaseException):
    """Stands for SIGKILL."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, step: int) -> Path:
    """A checkpoint that is written and does not count yet."""
    staging(folder).mkdir(exist_ok=True)
    make(staging(folder), step)
    return staging(folder) / f"checkpoint-{step}"


def test_one_counts_once_it_is_in_its_place(tmp_path: Path) -> None:
    make(tmp_path, 10)
    written = write(tmp_path, 20)
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint-10"
    place(written)
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoint-20", [])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]


def test_it_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(placing, "sync_tree", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(placing, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(f"rename to {to.name}"), rename(self, to))[1])
    place(write(tmp_path, 20))
    assert done == ["sync checkpoint-20", "rename to checkpoint-20", f"sync {tmp_path.name}"]


def test_a_damaged_one_of_that_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 20)
    (tmp_path / "checkpoint-20" / "optimizer.pt").unlink()
    place(write(tmp_path, 20))
    assert find_checkpoint(tmp_path, optimizer=True) == (tmp_path / "checkpoint-20", [])
    assert names(tmp_path) == ["checkpoint-20"]


def test_what_others_put_under_its_name_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("first", "second"):
        (tmp_path / "checkpoint-20").write_text(content)
        place(write(tmp_path, 20))
        assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint-20"
        shutil.rmtree(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20").symlink_to("nowhere")
    place(write(tmp_path, 20))
    assert (tmp_path / "checkpoint-20-aside").read_text() == "first"
    assert (tmp_path / "checkpoint-20-aside-2").read_text() == "second"
    assert (tmp_path / "checkpoint-20-aside-3").is_symlink()
    assert caplog.messages[0] == (
        "Warning: checkpoint-20 is no checkpoint of this run, and its name is wanted. It is now called "
        "checkpoint-20-aside."
    )


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, 10, [10, 40]), (2, 40, [30, 40]), (2, None, [30, 40]), (3, 10, [10, 30, 40]), (9, 20, [10, 20, 30, 40])],
)
def test_the_best_and_the_newest_stay(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40)
    rotate(tmp_path, keep, best, 40)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_the_newest_is_the_one_that_was_just_written(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30, 99)
    rotate(tmp_path, 2, 10, 30)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30", "checkpoint-99"]


def test_later_ones_are_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 10, 20, 30)
    set_aside_later(tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-30-aside"]
    assert "checkpoint-30 is later than step 20, from which the run goes on. It is now called" in caplog.text


@contextmanager
def cut_off(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Inside, one of the moves or removals is the last that happens."""
    count = 0

    def counted(work: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **words: object) -> object:
            nonlocal count
            if count == number:
                raise CutOff
            count += 1
            return work(*args, **words)

        return call

    with monkeypatch.context() as patch:
        for where, name in ((Path, "rename"), (Path, "unlink"), (placing.shutil, "rmtree"), (placing, "sync_tree")):
            patch.setattr(where, name, counted(getattr(where, name)))
        yield


@pytest.mark.parametrize("work", ["place", "place again", "rotate", "finish"])
def test_wherever_it_is_cut_off_whole_ones_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    for number in range(99):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder, 10, 20, *((30,) if work != "place" else ()))
        written = write(folder, 30)
        done = False
        try:
            with cut_off(monkeypatch, number):
                if work.startswith("place"):
                    place(written)
                elif work == "rotate":
                    rotate(folder, 2, 10, 30)
                else:
                    keep_only(folder, 10)
                done = True
        except CutOff:
            pass
        path, passed = find_checkpoint(folder, optimizer=True)
        assert path is not None and passed == []
        assert path.name == "checkpoint-30" or work != "rotate"
        tidy(folder)
        assert {name for name in names(folder)} <= {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
        if done:
            break
    assert 2 <= number < 20


def test_what_others_put_into_one_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 10)
    inside = tmp_path / "checkpoint-10" / "mine"
    inside.mkdir()
    (inside / "notes.txt").write_text("keep")
    (tmp_path / "checkpoint-10" / ".hidden").touch()
    discard(tmp_path / "checkpoint-10")
    assert names(tmp_path) == ["checkpoint-10-others"]
    assert (tmp_path / "checkpoint-10-others" / "mine" / "notes.txt").read_text() == "keep"
    assert "checkpoint-10 goes; what drkl did not write into it is now in checkpoint-10-others" in caplog.text


def test_what_drkl_did_not_write_is_never_removed(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    for name in ("checkpoint-best", "checkpoint-30", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-10-backup")
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-999").touch()
    (tmp_path / "checkpoint-7").symlink_to("checkpoint-10")
    others = {*names(tmp_path)} - {"checkpoint-10", "checkpoint-20"}
    tidy(tmp_path)
    rotate(tmp_path, 1, None, 20)
    assert {*names(tmp_path)} == others | {"checkpoint-20"}
    mark_complete(tmp_path / "checkpoint-30", Reached(30))  # it is drkl's by this alone
    keep_only(tmp_path, 20)
    assert {*names(tmp_path)} == (others | {"checkpoint-20"}) - {"checkpoint-30"}


@pytest.mark.parametrize("best", [None, 30])
def test_without_the_best_none_is_removed(tmp_path: Path, best: int | None) -> None:
    make(tmp_path, 10, 20)
    write(tmp_path, 30)
    keep_only(tmp_path, best)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]
