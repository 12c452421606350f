"""What somebody else may have written: files, servers, and the looks after them. `inject` names some functions here."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml

from tests.faults.forked import Ended
from tests.training import tiny_runs

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, or what reorders the text around it."""
SEQUENCES = "\x1b[31m\x1b]52;c;aGk=\x07\x1b]0;T\x07\x9b31m\u202eEVIL\u2066[link=http:e.x][bold red]x[/bold red]\r\x08"
"""Colours, the clipboard, the title, an override of the direction, markup of rich, and steps back."""
GIBI = 1 << 30


class Payload:
    """Pickled, it makes a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def saved(mark: Path, path: Path) -> None:
    """The same as torch saves it."""
    torch.save({"state": Payload(mark)}, path)


def with_checksums(checkpoint: Path) -> None:
    """Let a checkpoint's list of files, where it has one, agree with them: a stranger can do that."""
    path = checkpoint / "complete.json"
    values = json.loads(path.read_text())
    if "files" not in values:
        return
    values.pop("xxh3", None)
    for name in values["files"]:
        data = (checkpoint / name).read_bytes()
        values["files"][name] = {"bytes": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
    own = xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"xxh3": own}))


def limit_memory(size: int) -> None:
    """Let this process have so much more memory than it has, so that a machine outlives a test that fails."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def assert_refused(done: Ended, *words: str) -> None:
    """It ended with one message that has some words, and without a traceback."""
    assert done.code == 2, f"status {done.code}: {done.err[-500:] or done.out[-300:]}"
    assert "Traceback" not in done.err + done.out, done.err[-1000:]
    assert len(re.findall("^Error", done.err, re.M)) == 1, done.err[-500:]
    for word in words:
        assert word in done.err, f"{word!r} is not in {done.err[-500:]}"


def assert_plain(done: Ended) -> None:
    """Nothing of what it printed is obeyed by a terminal."""
    assert "Traceback" not in done.err + done.out, done.err[-1000:]
    found = CONTROL.search(done.out + done.err)
    assert found is None, (
        f"{found.group()!r} in {(done.out + done.err)[max(0, found.start() - 60) : found.end() + 60]!r}"
    )


def write_config(root: Path, name: str = "c.yaml", **sections: Any) -> Path:
    """A config of a run that takes a second; a value of None removes what a section has."""
    values = tiny_runs.config(root, **sections)
    path = root / name
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    return path


def model_like(teacher: Path, folder: Path, edit: Callable[[Path], Any]) -> Path:
    """A copy of a model, with something changed in it."""
    shutil.copytree(teacher, folder)
    edit(folder)
    return folder


def settings(name: str, **changes: Any) -> Callable[[Path], Any]:
    """An edit: fields of a json file; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        values |= changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that gives each connection to a function; its address."""
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the other side has gone
            answer(connection)

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        over.set()
        server.close()
