from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
import xxhash

from drkl.folders import check_files, checksum, describe_files, free_name, remove_empty, sync, sync_tree


def made(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"0123456789")
    (folder / "inner" / "empty").write_bytes(b"")
    return folder


def test_sizes_and_checksums_of_all_files(tmp_path: Path) -> None:
    files = describe_files(made(tmp_path / "a"))
    digest = xxhash.xxh3_128(b"0123456789").hexdigest()
    assert files == {
        "inner/empty": {"bytes": 0, "xxh3": xxhash.xxh3_128(b"").hexdigest()},
        "weights": {"bytes": 10, "xxh3": digest},
    }
    assert checksum(b"0123456789") == digest
    (tmp_path / "a" / "beside").write_text("x")
    assert check_files(tmp_path / "a", files) == []
    assert describe_files(tmp_path / "none") == {}


def test_what_differs_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = describe_files(folder)
    for content in (b"012345678", b"", b"01234567890"):
        (folder / "weights").write_bytes(content)
        assert check_files(folder, files) == [f"weights has {len(content)} bytes in place of 10"]
    for bit in range(8):
        (folder / "weights").write_bytes(bytes([ord("0") ^ 1 << bit]) + b"123456789")
        assert check_files(folder, files) == ["weights has another content than was written"]
    (folder / "weights").unlink()
    (folder / "inner" / "empty").unlink()
    (folder / "inner" / "empty").mkdir()
    assert check_files(folder, files) == ["inner/empty is missing", "weights is missing"]
    os.mkfifo(folder / "weights")  # which would be waited for
    assert "weights is missing" in check_files(folder, files)
    assert list(describe_files(folder)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = describe_files(folder)
    (folder / "weights").chmod(0)
    assert check_files(folder, files) == ["weights cannot be read (Permission denied)"]


@pytest.mark.parametrize(
    "files",
    [
        {"../a/weights": {"bytes": 10, "xxh3": ""}},
        {"/etc/passwd": {"bytes": 10, "xxh3": ""}},
        {"weights": {"bytes": "10", "xxh3": ""}},
        {"weights": [10, ""]},
        {"weights": {"bytes": 10}},
    ],
)
def test_a_list_of_files_that_makes_no_sense_is_refused(tmp_path: Path, files: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is described as"):
        check_files(made(tmp_path / "a"), files)


def test_files_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "a")
    (folder / "link").symlink_to("nowhere")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    sync_tree(folder)
    names = [Path(path).relative_to(tmp_path).as_posix() for path in synced]
    assert names == ["a/weights", "a", "a/inner/empty", "a/inner"]


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.ENOSPC, True), (errno.EIO, True)])
def test_a_disk_that_fails_is_no_disk_that_knows_no_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) if raised else contextlib.nullcontext():
        sync(tmp_path)


def test_a_name_that_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert free_name(path) == path
    path.symlink_to("nowhere")
    assert free_name(path).name == "a-2"
    (tmp_path / "a-2").touch()
    assert free_name(path).name == "a-3"


def test_empty_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r" / "stages").mkdir(parents=True)
    (tmp_path / "kept").touch()
    remove_empty(tmp_path / "runs" / "r" / "stages" / "01-warmup" / "checkpoints")  # of which some were not made
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
