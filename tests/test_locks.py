"""Who works in a folder: one process alone, and no one after it has ended."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.locks import ANALYSIS, EVALUATION, HELD, TRAINING, InUse, check_free, first_holding, holding
from drkl.runs import locked
from drkl.signals import KEPT


def test_a_folder_is_held_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs" / "r"
    monkeypatch.setattr(KEPT, "again", ["drkl", "distill", "a b.yaml"])
    with holding(root, TRAINING):
        about = json.loads((root / TRAINING).read_text())
        assert about["process"] == os.getpid() and about["host"] and about["since"]
        message = rf"in use: `drkl distill 'a b.yaml'` \(process {os.getpid()} on .*\) trains in it. Wait until"
        with pytest.raises(InUse, match=message), holding(root, TRAINING):
            pass
        with pytest.raises(InUse, match=message), holding(root, EVALUATION, TRAINING):
            pass
        with pytest.raises(InUse, match=message):
            check_free(root, TRAINING)
        with holding(root, ANALYSIS):  # of another kind
            pass
        assert [path.name for path in root.iterdir()] == [TRAINING]
    assert list(tmp_path.iterdir()) == [] and not HELD


def test_what_is_written_stays_when_a_folder_is_let_go(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="wrong"), first_holding(tmp_path / "r", TRAINING):
        (tmp_path / "r" / "config.yaml").write_text("")
        raise DrklError("wrong")
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["config.yaml"]


def test_a_lock_file_that_was_left_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / TRAINING).write_text('{"process": 1')
    check_free(tmp_path, TRAINING)
    with holding(tmp_path, TRAINING):
        assert json.loads((tmp_path / TRAINING).read_text())["process"] == os.getpid()
        (tmp_path / TRAINING).write_text("half")
        with pytest.raises(InUse, match="in use: Another process trains in it"), holding(tmp_path, TRAINING):
            pass


def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A helper that outlives its parent for a moment keeps nobody out."""
    read, write = os.pipe()
    with holding(tmp_path, TRAINING):
        if (child := os.fork()) == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with holding(tmp_path, TRAINING):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING, "drkl"), holding(tmp_path, TRAINING), holding(tmp_path, TRAINING):
        pass
    assert "this file system has no locks (No locks available)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "drkl"), locked(tmp_path / "a"), locked(tmp_path / "b", wait=True):
        pass
    assert "this file system has no locks" in caplog.text and not {"a", "b"} & {
        path.name for path in tmp_path.iterdir()
    }


def test_a_folder_that_cannot_be_made_is_told_of_by_what_writes_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with holding(tmp_path / "file" / "r", TRAINING):
        pass
    with holding(tmp_path / "file", TRAINING):
        pass
    assert (tmp_path / "file").read_text() == ""
