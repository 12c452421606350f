"""Finished parts of an evaluation on disk, each under a hash of everything it depends on.

A part that is needed again, after a kill or for another student, is read instead of computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drkl._version import __version__
from drkl.disk import CannotWrite, writing
from drkl.errors import DrklError
from drkl.folders import checksum
from drkl.runs import read_jsonl, write_jsonl

_log = logging.getLogger("drkl")
CACHE_BYTES = 4 * 2**30
"""Size limit of the shared cache; the parts used longest ago are deleted first."""


def fingerprint(**facts: Any) -> str:
    """A hash of json-able facts and of the versions of drkl, torch and transformers."""
    import transformers

    facts |= {"versions": [__version__, torch.__version__, transformers.__version__]}
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_CHECKSUM = "xxh3"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum_of(lines: list[dict[str, Any]]) -> str:
    return checksum(json.dumps(lines).encode())


class Store:
    """A folder of parts, each of which is written whole or not at all."""

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        """``limit``: bytes to keep, the parts used last; None for all."""
        self.folder, self.limit = folder, limit
        self._is_good = True
        """Whether everything was kept so far."""

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under ``key``, or None."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                # Copied to aligned memory: what is added up in vectors has the last digits of a new tensor's then.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get(_CHECKSUM)
        except (SafetensorError, OSError):
            return None  # broken: it is made anew
        if said != _checksum(tensors):
            return None
        self._touch(path)
        return tensors

    def write_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under ``key``.

        Raises:
            CannotWrite: nothing can be kept, unless what is kept is limited: such a cache can be done without.
        """
        with self._kept():
            path = self.folder / f"{key}.safetensors"
            self._write(path, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def read_lines(self, key: str) -> list[dict[str, Any]] | None:
        """The lines kept under ``key``, or None."""
        path = self.folder / f"{key}.jsonl"
        if not path.is_file():
            return None
        try:
            first, *lines = read_jsonl(path)
        except (DrklError, ValueError):
            return None
        if first != {_CHECKSUM: _checksum_of(lines)}:
            return None
        self._touch(path)
        return lines

    def write_lines(self, key: str, lines: list[dict[str, Any]]) -> None:
        """Keep lines under ``key``; raises what `write_tensors` does."""
        with self._kept():
            write_jsonl(self.folder / f"{key}.jsonl", [{_CHECKSUM: _checksum_of(lines)}, *lines])
            self._trim()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except CannotWrite as error:
            if self.limit is None:
                raise
            if self._is_good:
                _log.warning("Warning: %s The evaluation goes on without this cache.", error)
            self._is_good = False

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".part-")
            os.close(handle)
            try:
                save_file(tensors, temporary, metadata={_CHECKSUM: _checksum(tensors)})
                os.chmod(temporary, 0o644)  # mkstemp's own is for its user alone; a cache may be shared
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        self._trim()

    def _touch(self, path: Path) -> None:
        if self.limit is not None:
            with contextlib.suppress(OSError):  # a cache that is read-only is still read
                path.touch()

    def _trim(self) -> None:
        if self.limit is not None:
            with contextlib.suppress(OSError):  # it is larger than it should be, then
                self._remove_beyond(self.limit)

    def _remove_beyond(self, limit: int) -> None:
        parts = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process trims too
            parts.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in parts)
        for _, size, path in sorted(parts)[:-1]:
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
