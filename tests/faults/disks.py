"""A disk that fails at a chosen write: the control of `disk.c`, which a process that is preloaded with it reads."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DATA, _MAKE, _RENAME, _SYNC, _REMOVE, _MARK, _OPEN = (1 << bit for bit in range(7))
_WRITES = _DATA | _MAKE | _RENAME | _SYNC
_ALL = _WRITES | _REMOVE | _MARK | _OPEN
KINDS = {
    # What counts as a write, and what fails from then on: on a full disk files can still be removed and renamed.
    errno.ENOSPC: (_WRITES, _DATA | _MAKE),
    errno.EDQUOT: (_WRITES, _DATA | _MAKE),
    errno.EROFS: (_WRITES | _REMOVE, _ALL),
    errno.EACCES: (_MAKE | _RENAME | _REMOVE | _OPEN, _MAKE | _RENAME | _REMOVE | _OPEN),
    errno.EIO: (_WRITES, _WRITES),
    errno.ESTALE: (_WRITES, _ALL),
}
"""For each error."""
_PATHS, _LENGTH = 8, 1024


def compiler() -> str | None:
    """The C compiler, if there is one and the system loads its libraries so."""
    return shutil.which("cc") if sys.platform == "linux" else None


class _Control(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("armed", "error", "forever", "counted", "later", "half")),
        *((name, ctypes.c_int64) for name in ("nth", "count", "failed")),
        ("call", ctypes.c_char * 32),
        ("path", ctypes.c_char * _LENGTH),
        ("under", ctypes.c_char * _LENGTH * _PATHS),
        ("beside", ctypes.c_char * _LENGTH * _PATHS),
    )


class Disk:
    """A disk that fails when it is told to, for processes with `variables` in their environment.

    Args:
        folder: for the library and its control.
    """

    def __init__(self, folder: Path) -> None:
        library, control = folder / "disk.so", folder / "control"
        source = Path(__file__).with_name("disk.c")
        subprocess.run([str(compiler()), "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        control.write_bytes(bytes(ctypes.sizeof(_Control)))
        with control.open("r+b") as file:
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self.variables = {"LD_PRELOAD": str(library), "DISK_FAULT": str(control)}

    def watch(self, *under: Path, beside: Sequence[Path] = (), error: int = errno.ENOSPC) -> None:
        """Count from now on what would fail with ``error`` below some folders, but not below those ``beside``."""
        self._set(under, beside, 0, error, forever=False)

    def fail(
        self,
        number: int,
        *under: Path,
        beside: Sequence[Path] = (),
        error: int = errno.ENOSPC,
        forever: bool = True,
        half: bool = False,
    ) -> None:
        """Fail the write of this number from now on, and all later ones unless it is to be that one alone.

        Args:
            number: from 1.
            under: folders.
            beside: folders below those that do not fail.
            error: the system's.
            forever: whether it fails from then on.
            half: whether half of the bytes of the first one arrive.
        """
        self._set(under, beside, number, error, forever=forever)
        self._control.half = half

    def _set(self, under: Sequence[Path], beside: Sequence[Path], number: int, error: int, *, forever: bool) -> None:
        control = self._control
        control.armed = control.count = control.failed = control.half = 0
        control.nth, control.error, control.forever = number, error, forever
        control.counted, control.later = KINDS[error]
        control.call = control.path = b""
        for place, folders in ((control.under, under), (control.beside, beside)):
            for index in range(_PATHS):
                place[index].value = os.fsencode(folders[index]) if index < len(folders) else b""
        control.armed = 1

    def mend(self) -> None:
        """Let all writes pass."""
        self._control.armed = 0

    @property
    def count(self) -> int:
        """The writes since `watch` or `fail`."""
        return int(self._control.count)

    @property
    def failed(self) -> int:
        """Those that failed."""
        return int(self._control.failed)

    @property
    def where(self) -> str:
        """The first that failed: its call and its path."""
        return f"{self._control.call.decode()} {os.fsdecode(self._control.path)}"


def write_in_every_way(folder: str) -> None:
    """Write files as the libraries under drkl do; the name of each way whose error is lost is printed."""
    import numpy as np
    import pyarrow as pa
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    root, tensors = Path(folder), {"x": torch.zeros(20_000)}
    (root / "there").write_text("from before")

    def append() -> None:
        with (root / "there").open("a") as file:
            file.write("x")

    def arrow() -> None:
        batch = pa.record_batch([pa.array(range(9_000))], names=["a"])
        with pa.OSFile(str(root / "arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)

    ways = {
        "open": lambda: (root / "open").write_text("x" * 9_000),
        "append": append,
        "rename": lambda: os.replace(root / "there", root / "moved"),
        "mkdir": lambda: (root / "mkdir").mkdir(),
        "symlink": lambda: (root / "symlink").symlink_to("there"),
        "copy": lambda: shutil.copyfile(__file__, root / "copy"),
        "safetensors": lambda: save_file(tensors, root / "safetensors"),
        "torch": lambda: torch.save(tensors, root / "torch"),
        "numpy": lambda: np.save(root / "numpy.npy", tensors["x"].numpy()),
        "tokenizers": lambda: Tokenizer(models.BPE()).save(str(root / "tokenizers")),
        "arrow": arrow,
    }
    for name, way in ways.items():
        try:
            way()
        except Exception:
            continue
        print(f"{name} was written")


def lose_output(how: str) -> None:
    """Have nobody take what this process prints: a ``pipe`` without a reader, a ``full`` disk, or ``closed`` files."""
    if how == "closed":
        os.close(1)
        os.close(2)
        return
    if how == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, handle = os.pipe()
        os.close(reader)
    os.dup2(handle, 1)
    os.close(handle)
