from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drkl.outputs import Outputs


@pytest.fixture
def into(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """The standard streams are files of the system, as in a program."""
    opened: list[Any] = []

    def put(handle: int) -> None:
        for name in ("stdout", "stderr"):
            opened.append(os.fdopen(os.dup(handle), "w"))
            monkeypatch.setattr(sys, name, opened[-1])
            monkeypatch.setattr(sys, f"__{name}__", opened[-1])
        os.close(handle)

    yield put
    for stream in opened:
        stream.close()


def test_what_is_printed_arrives(tmp_path: Path, into: Callable[[int], None]) -> None:
    into(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT))
    outputs = Outputs()
    print("a line with an ümlaut")
    assert outputs.lost() is None
    assert (tmp_path / "out").read_text() == "a line with an ümlaut\n"


@pytest.mark.parametrize("how", ["full", "pipe"])
def test_what_nobody_takes_is_dropped(how: str, into: Callable[[int], None]) -> None:
    if how == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, handle = os.pipe()
        os.close(reader)
    into(handle)
    outputs = Outputs()
    for _ in range(3):
        print("a line", flush=True)
        print("another", file=sys.stderr, flush=True)
    failure = outputs.lost()
    assert (failure and failure.errno) == (errno.ENOSPC if how == "full" else None)
    os.write(sys.stdout.fileno(), b"of a library")  # goes nowhere, either


def test_a_closed_stream_and_one_of_a_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = sys.stdout
    monkeypatch.setattr(sys, "stderr", None)
    Outputs()
    print("kept")
    print("dropped", file=sys.stderr)
    sys.stderr.close()
    assert sys.stdout is own
    assert capsys.readouterr().out == "kept\n"
