"""Standard output and standard error that may go away: the work that prints is worth more than what it prints."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


class _Lasting(io.FileIO):
    """A file that takes whatever is written to it; once it fails, the rest is dropped."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            nothing = os.open(os.devnull, os.O_WRONLY)  # for libraries that write to the number of the file
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return memoryview(data).nbytes


class Outputs:
    """Makes the standard streams of a command last: a pipe that is closed, or a full disk, does not end its work."""

    def __init__(self) -> None:
        self._files: dict[str, _Lasting] = {}
        _fill()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by whoever started the command
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            elif stream is getattr(sys, f"__{name}__"):  # not one that a caller put there
                self._files[name] = file = _Lasting(stream.fileno())
                setattr(sys, name, _text(stream, file))

    def lost(self) -> OSError | None:
        """Write what is left, and return what befell standard output, other than a reader who had enough."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        failure = self._files["stdout"].failure if "stdout" in self._files else None
        return None if failure is None or failure.errno == errno.EPIPE else failure


def _fill() -> None:
    """Occupy the numbers 0 to 2: else the next file that is opened is what libraries print into."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _text(stream: Any, file: _Lasting) -> io.TextIOWrapper:
    stream.flush()
    buffered: Any = file if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(file)
    return io.TextIOWrapper(
        buffered,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
