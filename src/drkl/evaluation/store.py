"""Finished parts of an evaluation on disk, each under a hash of everything it depends on.

A part that is needed again, after a kill or for another student, is read instead of computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drkl._version import __version__
from drkl.disk import writing
from drkl.errors import DrklError
from drkl.runs import read_jsonl, write_jsonl

CACHE_BYTES = 4 * 2**30
"""Size limit of the shared cache; the parts used longest ago are deleted first."""


def fingerprint(**facts: Any) -> str:
    """A hash of json-able facts and of the versions of drkl, torch and transformers."""
    import transformers

    facts |= {"versions": [__version__, torch.__version__, transformers.__version__]}
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """A folder of parts, each of which is written whole or not at all."""

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        """``limit``: bytes to keep, the parts used last; None for all."""
        self.folder, self.limit = folder, limit

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under ``key``, or None."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None  # broken: it is made anew
        self._touch(path)
        return tensors

    def write_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under ``key``."""
        path = self.folder / f"{key}.safetensors"
        self._write(path, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def read_lines(self, key: str) -> list[dict[str, Any]] | None:
        """The lines kept under ``key``, or None."""
        path = self.folder / f"{key}.jsonl"
        if not path.is_file():
            return None
        try:
            lines = read_jsonl(path)
        except DrklError:
            return None
        self._touch(path)
        return lines

    def write_lines(self, key: str, lines: list[dict[str, Any]]) -> None:
        """Keep lines under ``key``."""
        write_jsonl(self.folder / f"{key}.jsonl", lines)
        self._trim()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".part-")
            os.close(handle)
            try:
                save_file(tensors, temporary)
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
        if self.limit is None:
            return
        parts = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process trims too
            parts.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in parts)
        for _, size, path in sorted(parts)[:-1]:
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
