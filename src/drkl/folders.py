"""Folders that are whole or do not count: the sizes and checksums of their files, and their way onto the disk."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

_BLOCK = 1 << 22
"""Bytes read at once."""


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``xxh3`` (a checksum of 128 bits, in hexadecimal) of each file below a folder.

    Args:
        folder: its sub-folders count too.

    Returns:
        A dictionary by the files' paths from the folder, with ``/`` between their parts, sorted.

    Raises:
        OSError: a file cannot be read.
    """
    paths = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in paths if path.is_file()}


def checksum(data: bytes) -> str:
    """Return the checksum of some bytes, as `describe_files` gives that of a file."""
    import xxhash

    return xxhash.xxh3_128(data).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return what `describe_files` says of one file.

    Raises:
        OSError: it cannot be read.
    """
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_BLOCK):
            digest.update(data)
            size += len(data)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def check_files(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Return what differs between a folder and the files that it had, a few words each; other files beside are fine.

    Args:
        folder: where they should be.
        files: what `describe_files` returned.

    Raises:
        ValueError: ``files`` is nothing that `describe_files` returns.
    """
    for name, said in files.items():
        inside = PurePosixPath(name)
        known = isinstance(said, Mapping) and {*said} == {"bytes", "xxh3"} and type(said["bytes"]) is int
        if not known or inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"{name!r} is described as {said!r}")
    reasons = (_difference(folder / name, name, said) for name, said in files.items())
    return [reason for reason in reasons if reason is not None]


def _difference(path: Path, name: str, said: Mapping[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != said["bytes"]:
            return f"{name} has {size:,} bytes in place of {said['bytes']:,}"
        return None if describe_file(path) == said else f"{name} has another content than was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def sync_tree(folder: Path) -> None:
    """Return once all files below a folder, and their names, are on the disk.

    Raises:
        OSError: they cannot be written there.
    """
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(root))


def sync(path: Path) -> None:
    """Return once a file's content, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be written there.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that knows no such thing
            raise
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """The path itself, or with the first number behind it under which nothing is there."""
    numbers = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbers) if not os.path.lexists(name))


def remove_empty(path: Path) -> None:
    """Remove a folder and those around it, from the innermost that is there, as long as they are empty."""
    for folder in (path, *path.parents):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # there is something in it, or it cannot be removed
            return
