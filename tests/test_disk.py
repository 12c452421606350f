from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from drkl import disk
from drkl.disk import CannotWrite, cannot_write, explained, is_failed_write, writing
from drkl.errors import DrklError


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"No space left on device\. Make room on its disk, then go on\."),
        (errno.EROFS, r"Read-only file system\. Mount its disk for writing .*, then go on\."),
        (errno.EDQUOT, r"Disk quota exceeded\. Make room within the quota, or have it raised, then go on\."),
        (errno.EIO, r"Input/output error\. Check its disk; the system's log says more, then go on\."),
        (errno.EACCES, r"Permission denied\. Give this user the right to it, then go on\."),
        (errno.ESTALE, r"Stale file handle\. Bring its disk back, then go on\."),
        (errno.EBUSY, r"Device or resource busy\. Mend that, then go on\."),
    ],
)
def test_each_cause_has_its_own_cure(tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "log"
    with pytest.raises(CannotWrite, match=f"^Cannot write '{path}': {words}$") as raised, writing(path, then="go on"):
        raise OSError(number, os.strerror(number))
    assert raised.value.path == path and raised.value.number == number


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        Exception('Error while serializing: I/O error: No space left on device (os error 28) at path "/x"'),
        RuntimeError(
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: No space left on device"
        ),
        RuntimeError("write(): fd 3 failed with No space left on device"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
    ],
)
def test_the_cause_is_read_where_it_is_only_text(error: Exception) -> None:
    assert is_failed_write(error)
    assert "No space left on device. Make room" in str(cannot_write("x", error, what="the student"))


@pytest.mark.parametrize(
    "text", ["basic_ios::clear: iostream error", "unexpected pos 576 vs 534", "9 requested and 0 written"]
)
def test_the_disk_is_tried_where_the_cause_is_lost(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gone" / "optimizer.pt"
    assert f"a write failed, and why is lost ({text}). Check its disk" in str(cannot_write(path, RuntimeError(text)))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left on device"), writing(path):
        raise RuntimeError(text)


def test_what_is_gone_or_in_the_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "x"
    gone = OSError(errno.ENOENT, "none")
    assert f"the folder '{tmp_path / 'run'}' is gone. Bring it back" in str(cannot_write(path, gone))
    (tmp_path / "run").touch()
    for number in (errno.ENOTDIR, errno.EEXIST):
        message = str(cannot_write(path, OSError(number, "")))
        assert f"'{tmp_path / 'run'}' is a file where a folder is expected. Move it away" in message
    assert "a folder of that name is there" in str(cannot_write(tmp_path, OSError(errno.EISDIR, "")))
    none = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert "set TMPDIR to another folder" in str(cannot_write("/tmp/rows", none))


def test_what_is_not_the_disks_stays_what_it_is() -> None:
    for error in (ValueError("a bug"), RuntimeError("Connection closed by peer"), DrklError("expected a number")):
        assert not is_failed_write(error)
        with pytest.raises(type(error), match=str(error)), writing("x"):
            raise error
    first = cannot_write("inner", OSError(errno.ENOSPC, ""))
    with pytest.raises(CannotWrite, match="'inner'"), writing("outer"):
        raise first


def test_errors_that_nobody_expected_are_explained() -> None:
    full = explained(OSError(errno.ENOSPC, "", "/tmp/x"))
    assert str(full) == "Cannot write '/tmp/x': No space left on device. Make room on its disk."
    broken = explained(OSError(errno.EIO, "", "/tmp/x"))
    assert str(broken).startswith("Cannot read or write '/tmp/x': Input/output error. Check its disk")
    for error in (FileNotFoundError(errno.ENOENT, ""), ConnectionError(errno.EIO, ""), KeyError("a bug")):
        assert explained(error) is error
