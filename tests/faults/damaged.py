"""Damages of files, the runs that they are done to, and what a command may do afterwards."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner
from tests.models import tiny
from tests.training import tiny_runs

FOLDER = b"<a folder>"
"""Stands for a folder in place of the file."""
FLIPS = 3
PAGE = "page"
"""What `report` writes."""
TIMES = (
    "seconds",
    "seconds_generating",
    "seconds_learning",
    "tokens_per_second",
    "timing",
    "command",
    "started",
    "finished",
    "memory",
    "checksum",
    "files",
)
"""Keys that another run of the same has other values of."""


def damages(path: Path, name: str, other: Path | None = None) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file, None for gone, each with its name; ``other`` is the same file of another run."""
    data = path.read_bytes()
    yield "half", data[: len(data) // 2]
    yield "one byte less", data[:-1]
    yield "empty", b""
    yield "missing", None
    yield "a folder", FOLDER
    yield "zeros", bytes(len(data))
    yield "16 bytes more", data + bytes(range(0xF0, 0x100))
    for number in range(FLIPS if data else 0):
        yield f"bit {number} flipped", _flipped(data, name, number)
    if other is not None and other.is_file() and other.read_bytes() != data:
        yield "another run's", other.read_bytes()


def _flipped(data: bytes, name: str, number: int) -> bytes:
    place, bit = random.Random(_hash(name, number)).randrange(len(data)), number % 7
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def _hash(*words: object) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:8])


def damage(path: Path, content: bytes | None) -> None:
    """Do it."""
    path.unlink()
    if content is FOLDER:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


class Command(NamedTuple):
    """A command that may read the damaged file, and what it makes."""

    words: Sequence[object]
    made: Callable[[Path, Ended], Any]


class Bench:
    """A folder that commands run in; what they may change is renewed before each injection.

    Args:
        runner: runs them.
        root: the folder.
        parts: what is renewed, folders or files in it.
    """

    def __init__(self, runner: Runner, root: Path, parts: Sequence[str]) -> None:
        self.runner, self.root, self.parts = runner, root, parts
        self._whole = root.with_name(f"{root.name}-whole")
        self._expected: dict[str, Any] = {}
        for part in parts:
            _copy(root / part, self._whole / part)

    def renew(self) -> None:
        """Make the folder what it was."""
        for part in self.parts:
            _copy(self._whole / part, self.root / part)

    def files(self, folder: str, *, besides: Sequence[str] = ()) -> list[str]:
        """The files below a folder, from the root, where nothing is damaged; commands may have removed some since."""
        paths = sorted(path for path in (self._whole / folder).rglob("*") if path.is_file())
        names = [str(path.relative_to(self._whole)) for path in paths]
        return [name for name in names if not name.endswith(tuple(besides))]

    def call(self, words: Sequence[object]) -> Ended:
        """Run a command."""
        cache = {"DRKL_CACHE": str(self.root / "drkl-cache")}
        return self.runner.call(*words, cwd=self.root, variables=cache)

    def expected(self, command: Command) -> Any:
        """What the command makes where nothing is damaged."""
        key = str(command.words)
        if key not in self._expected:
            self.renew()
            done = self.call(command.words)
            self._expected[key] = (done.code, command.made(self.root, done))
        return self._expected[key]

    def inject(
        self,
        injected: Injected,
        names: Iterable[str],
        commands: Sequence[Command],
        *,
        other: str | None = None,
        instead: str = "",
        every: int = 1,
        only: Sequence[str] = (),
    ) -> None:
        """Damage each of some files in every way, and run the commands after each.

        Args:
            injected: counts.
            names: of the files, from the root.
            commands: that are run.
            other: the same file of another run has this in place of ``instead`` in its name.
            instead: see ``other``.
            every: one of the commands is run after each damage, in turn, and of the others every so many, by a hash;
                1 for all of them, 0 for none.
            only: the damages, by the beginnings of their names; empty for all.
        """
        number = 0
        for name in names:
            foreign = None if other is None else self._whole / name.replace(instead, other, 1)
            for what, content in damages(self._whole / name, name, foreign):
                if only and not what.startswith(tuple(only)):
                    continue
                number += 1
                for place, command in enumerate(commands):
                    if place != number % len(commands) and not (every and _hash(name, what, place) % every == 0):
                        continue
                    expected = self.expected(command)
                    with injected(f"{name}: {what}, {' '.join(map(str, command.words[:3]))}"):
                        self.renew()
                        damage(self.root / name, content)
                        page = self.root / PAGE
                        page.unlink(missing_ok=True)
                        done = self.call(command.words)
                        if page.is_file():  # a report says there what it could not compare
                            done = done._replace(out=done.out + page.read_text())
                        check(done, self.root / name, command.made(self.root, done), expected)


def check(done: Ended, path: Path, made: Any, expected: tuple[int, Any]) -> None:
    """Raise AssertionError unless a command went on rightly, or stopped with one message that names the file."""
    said = f"{done.out}\n{done.err}"
    assert "Traceback" not in said, f"a traceback: {_last(done.err)}"
    assert done.code in (0, 2), f"status {done.code}: {_last(said)}"
    folder = path.parent.name
    # What changed in a config or a record is named by its settings.
    named = (
        path.name in said or "began with other inputs" in said or (folder.startswith("checkpoint-") and folder in said)
    )
    if done.code == 0 or done.code == expected[0]:
        same = made == expected[1] and done.code == expected[0]
        assert same or named, "another result in silence"
        return
    lines = [line for line in done.err.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1 and re.match(r"Error: ", lines[0]), f"not one message: {done.err[-800:]}"
    assert named, f"the message names no file: {done.err}"


def _last(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])


def _copy(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def without(value: Any, names: Sequence[str] = TIMES) -> Any:
    """Json without some keys."""
    if isinstance(value, Mapping):
        return {key: without(entry, names) for key, entry in value.items() if key not in names}
    return [without(entry, names) for entry in value] if isinstance(value, list) else value


def json_of(path: Path) -> Any:
    return _parsed(path.read_bytes()) if path.is_file() else None


def lines_of(path: Path) -> Any:
    return [_parsed(line) for line in path.read_bytes().splitlines()] if path.is_file() else None


def _parsed(data: bytes) -> Any:
    try:
        return without(json.loads(data))
    except ValueError:
        return data.decode(errors="replace")


def digest(*paths: Path) -> list[str | None]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths]


# commands ---------------------------------------------------------------------------------------------------------


def evaluate(run: str, *more: str) -> Command:
    def made(root: Path, done: Ended) -> Any:
        folder = root / run
        lines = [folder / f"{name}.jsonl" for name in ("samples", "heldout", "predictions")]
        return json_of(folder / "eval.json"), digest(*lines)

    return Command(("evaluate", run, *more), made)


def analyze(run: str) -> Command:
    def made(root: Path, done: Ended) -> Any:
        return json_of(root / run / "analysis.json"), digest(root / run / "analysis" / "positions.csv")

    return Command(("analyze", run, "--positions", "4", "--objectives", "rkl,drkl"), made)


def report(*runs: str, form: str = "md") -> Command:
    return Command(("report", *runs, "--format", form, "--output", PAGE), lambda root, done: digest(root / PAGE))


def compare(*runs: str) -> Command:
    return Command(("compare", *runs), lambda root, done: done.out)


def generate(run: str) -> Command:
    return Command(("generate", run, "--prompt", "w1 w2 w3"), lambda root, done: done.out)


def distill(*words: str, run: str) -> Command:
    """``drkl distill WORDS``, which makes or finishes a run."""

    def made(root: Path, done: Ended) -> Any:
        folder = root / run
        weights = [*sorted((folder / "student").glob("*.safetensors"))]
        env = json_of(folder / "env.json")
        best = env.get("best_step") if isinstance(env, dict) else env
        return digest(*weights), lines_of(folder / "train.jsonl"), lines_of(folder / "rollouts.jsonl"), best

    return Command(("distill", *words), made)


def verify(cache: str) -> Command:
    return Command(("cache", "--verify", cache), lambda root, done: done.out)


# runs -------------------------------------------------------------------------------------------------------------


def config(root: Path, name: str, **sections: Any) -> str:
    """Write ``NAME.yaml`` of a run that takes a second, and return its name."""
    values = tiny_runs.config(root, **sections)
    values["run"] |= {"name": name, "dir": "runs"}
    values["teacher"] = values["teacher"] and values["teacher"] | {"model": "teacher"}
    values["data"] |= {"path": "data.jsonl"}
    tiny_runs.write_config(values, root / f"{name}.yaml")
    return f"{name}.yaml"


def make(runner: Runner, root: Path, *commands: Sequence[object], **words: Any) -> None:
    """Run commands that have to succeed."""
    for command in commands:
        variables = {"DRKL_CACHE": str(root / "drkl-cache")}
        done = runner.call(*command, cwd=root, variables=variables, **words)
        assert done.code == 0, done.err


def interrupted(runner: Runner, root: Path, run: str, config_name: str, step: int) -> None:
    """A run that was killed once the line of this step was in its log."""
    given = ["log", f"{run}/checkpoints", step]
    cache = {"DRKL_CACHE": str(root / "drkl-cache")}
    done = runner.call(
        "distill", config_name, cwd=root, variables=cache, inject="tests.training.killed:kill_in_training", given=given
    )
    assert done.code == -9, done


def lora_start(root: Path) -> None:
    tiny.save(tiny.llama(5, layers=2), root / "other")
