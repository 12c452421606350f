"""A disk that is full, read-only or gone at every write of every command: one message, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.conftest import Injected
from tests.faults.disks import Disk
from tests.faults.forked import Ended, Runner
from tests.training import tiny_runs

CLOCK = re.compile(r"second|tim(e|ing)|minute|started|finished|_at$|checksum|files$|command$")
"""Names of what two runs differ in: times, and checksums of what has times in it."""
SMALL = {"max_steps": 4, "arguments": {"logging_steps": 1, "optim": "sgd"}}
LORA = {"r": 2, "export": "merged"}


@dataclass
class Work:
    """A command whose writes fail, and what it leaves.

    Args:
        words: of the command line.
        folder: everything below it is compared with what the command leaves where nothing fails.
        writes: the folders whose writes fail; default ``folder``.
        variables: of the environment.
        first: brings everything to where it was before.
    """

    words: Sequence[object]
    folder: Path
    writes: Sequence[Path] = ()
    variables: dict[str, str] = field(default_factory=dict)
    first: Callable[[], None] = lambda: None

    def result(self) -> dict[str, Any]:
        """What lies in the folder, without the clock; hidden files are nobody's."""
        found = {}
        for path in sorted(self.folder.rglob("*")) if self.folder.is_dir() else [self.folder]:
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() or any(part.startswith(".") for part in Path(name).parts) or "checkpoint-" in name:
                continue
            found[name] = _content(path)
        return found


class _Drawn:
    """A figure: its numbers may differ by what the solver of its layout leaves to chance, the last digits."""

    _NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")

    def __init__(self, text: str) -> None:
        self.words = self._NUMBER.split(text)
        self.numbers = np.array([float(number) for number in self._NUMBER.findall(text)])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Drawn)
            and self.words == other.words
            and bool(np.allclose(self.numbers, other.numbers, rtol=0, atol=1e-3))
        )

    __hash__ = None  # type: ignore[assignment]


def _content(path: Path) -> Any:
    if path.suffix == ".svg":
        return _Drawn(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix in (".html", ".csv", ".md"):
        return re.sub(r"[\d.]+ (s|seconds|min)\b|\d{4}-\d\d-\d\d[T ][\d:.+]+", "", path.read_text())
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not CLOCK.search(key)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def way_on(ended: Ended) -> list[str]:
    """The command that a message says goes on."""
    found = re.search(r"To go on: drkl (.+)", ended.err) or re.search(r"`drkl ([^`]+)`", ended.err)
    assert found, f"no command that goes on is named: {ended.err}"
    return shlex.split(found[1])


def check_said(ended: Ended, number: int) -> None:
    """A failed command said one thing: the system's cause, and a cure that is of this cause."""
    said = ended.err[ended.err.index("Error:") :] if "Error:" in ended.err else ended.err
    assert ended.code == 2, f"status {ended.code}: {ended.err[-800:]}"
    assert "Traceback" not in ended.err, ended.err[-800:]
    assert ended.err.count("Error:") == 1, ended.err
    lost = number == errno.EIO and "a write failed, and why is lost" in said  # by torch, of a disk that failed once
    assert os.strerror(number) in said or lost, said
    assert ("ake room" in said) == (number in (errno.ENOSPC, errno.EDQUOT)), said


def _first_difference(found: Any, expected: Any) -> str:
    if isinstance(expected, _Drawn):
        return "another figure"
    place = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    return f"at {place}, {found[max(place - 40, 0) : place + 40]!r} for {expected[max(place - 40, 0) : place + 40]!r}"


def every_write(
    work: Work,
    disk: Disk,
    runner: Runner,
    injected: Injected,
    number: int,
    *,
    step: int = 1,
    passes: bool = False,
    **how: Any,
) -> None:
    """Fail every ``step``-th write of a command in turn; what its message names goes on to the same end.

    With ``passes`` the command itself is to come to that end.
    """
    folders = [*(work.writes or [work.folder])]
    work.first()
    disk.watch(*folders, error=number)
    whole = runner.call(*work.words, variables=work.variables)
    assert whole.code == 0, whole.err
    count, expected = disk.count, work.result()
    disk.mend()
    assert count, "nothing was written"
    for write in range(1, count + 1, step):
        work.first()
        disk.fail(write, *folders, error=number, **how)
        ended = runner.call(*work.words, variables=work.variables)
        where = disk.where
        disk.mend()
        with injected(f"{errno.errorcode[number]} at write {write} of {count}, {where}"):
            assert not (passes and ended.code), ended.err
            if ended.code != 0:
                check_said(ended, number)
                again = runner.call(*way_on(ended), variables=work.variables)
                assert again.code == 0, f"going on after {ended.err}: {again.err[-800:]}"
            assert "Traceback" not in ended.err, ended.err[-800:]
            found = work.result()
            assert found.keys() == expected.keys()
            other = [name for name in expected if found[name] != expected[name]]
            assert not other, f"{other}: {_first_difference(found[other[0]], expected[other[0]])}"


def removed(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path, ignore_errors=True)


def training(root: Path, **sections: Any) -> Work:
    """A run that evaluates and saves every other step."""
    section = SMALL | sections.pop("training", {})
    values = tiny_runs.config(root, **{"training": section, **sections})
    config = tiny_runs.write_config(values, root / "run.yaml")
    run = root / "runs" / "r"
    return Work(["distill", config], run, first=removed(run))


RUNS: dict[str, dict[str, Any]] = {
    "one stage": {},
    "two stages": {"stages": [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 2}}]},
    "on-policy": {"rollouts": {"share": 1.0, "max_new_tokens": 4}},
    "LoRA, merged": {"peft": LORA},
}


@pytest.mark.fault(
    group="Disk",
    fault="The disk is full from the n-th write of a small run on (some n; every n below)",
    does="Stops with the cause, the file and the command that goes on; that one gives the uninterrupted run's bytes.",
)
def test_a_full_disk_in_training(tmp_path: Path, disk: Disk, runner: Runner, injected: Injected) -> None:
    work = training(tmp_path, training={"max_steps": 2})
    every_write(work, disk, runner, injected, errno.ENOSPC, step=23)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk is full from the n-th write of a run on, for every n: one stage and two, answers written, LoRA",
    does="Stops with the cause, the file and the command that goes on; that one gives the uninterrupted run's bytes.",
)
@pytest.mark.parametrize("kind", RUNS)
def test_a_full_disk_at_every_write_of_a_run(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, kind: str
) -> None:
    every_write(training(tmp_path, **RUNS[kind]), disk, runner, injected, errno.ENOSPC)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk becomes read-only, fails once, forbids it, or goes away at the n-th write of a run",
    does="As for a full disk; the message never speaks of room.",
)
@pytest.mark.parametrize(
    ("number", "forever"),
    [(errno.EROFS, True), (errno.EIO, False), (errno.EACCES, False), (errno.ESTALE, True), (errno.EDQUOT, True)],
)
def test_another_fault_of_the_disk_in_a_run(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, number: int, forever: bool
) -> None:
    work = training(tmp_path, **RUNS["two stages"])
    every_write(work, disk, runner, injected, number, step=3, forever=forever)


@pytest.mark.fault(
    group="Disk",
    fault="Each library under drkl writes to a disk that is read-only",
    does="None passes the faults of this table by: they are real.",
)
def test_no_library_escapes(tmp_path: Path, disk: Disk, runner: Runner, injected: Injected) -> None:
    with injected("every way of writing"):
        disk.fail(3, tmp_path, error=errno.EROFS)  # the first two are what the others find
        where = "tests.faults.disks:write_in_every_way"
        ended = runner.call("--version", inject=where, given=[str(tmp_path)])
        assert ended.code == 0 and "was written" not in ended.out, ended
        assert disk.failed >= 10


def cache_of_rows(root: Path, runner: Runner) -> Work:
    """A run that is the first to read its rows, with a cache of its own."""
    work, cache = training(root), root / "own-cache"

    def first() -> None:
        shutil.rmtree(work.folder, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)

    return Work(work.words, work.folder, [cache], {"DRKL_CACHE": str(cache)}, first)


def teacher_cache(root: Path, runner: Runner, *more: object) -> Work:
    config = tiny_runs.write_config(tiny_runs.config(root), root / "run.yaml")
    cache = root / "teacher-cache"
    return Work(["cache", config, "--output", cache, *more], cache, first=removed(cache))


def filled_cache(root: Path, runner: Runner) -> Work:
    """A run that adds rows to the cache of its teacher."""
    few, cache, kept = root / "few.jsonl", root / "teacher-cache", root / "kept-cache"
    values = tiny_runs.config(root, training=SMALL)
    few.write_text("".join((root / "data.jsonl").read_text().splitlines(keepends=True)[:20]))
    some = tiny_runs.write_config(tiny_runs.config(root, data={"path": str(few)}), root / "few.yaml")
    made = runner.call("cache", some, "--output", kept)
    assert made.code == 0, made.err
    values["teacher"] |= {"cache": str(cache), "fill_cache": True}
    config, run = tiny_runs.write_config(values, root / "run.yaml"), root / "runs" / "r"

    def first() -> None:
        for path in (run, cache):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, cache)

    return Work(["distill", config], cache, first=first)


def trained(root: Path, runner: Runner) -> Path:
    """A run that has ended."""
    work = training(root)
    done = runner.call(*work.words)
    assert done.code == 0, done.err
    return work.folder


def evaluated(root: Path, runner: Runner) -> Path:
    run = trained(root, runner)
    done = runner.call("evaluate", run)
    assert done.code == 0, done.err
    return run


def evaluation(root: Path, runner: Runner) -> Work:
    run = trained(root, runner)
    suite = tiny_runs.write_rows(root / "suite.jsonl", 6)

    def first() -> None:
        for path in run.iterdir():
            if path.name in (".evaluation", "eval.json", "samples.jsonl", "heldout.jsonl", "predictions.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    words = ["evaluate", run, "--suite", f"dolly={suite}", "--prompts", 2, "--samples", 2, "--sweep", "0.5"]
    return Work(words, run, variables={"DRKL_CACHE": str(root / "own-cache")}, first=first)


def evaluation_cache(root: Path, runner: Runner) -> Work:
    work, cache = evaluation(root, runner), root / "own-cache"

    def first() -> None:
        work.first()
        shutil.rmtree(cache / "evaluation", ignore_errors=True)

    return Work(work.words, work.folder, [cache], work.variables, first)


def evaluated_again(root: Path, runner: Runner) -> Work:
    """An evaluation over an older one."""
    run = evaluated(root, runner)
    kept = root / "kept"
    shutil.copytree(run, kept)

    def first() -> None:
        shutil.rmtree(run)
        shutil.copytree(kept, run)

    return Work(["evaluate", run, "--seeds", "7"], run, first=first)


def analysis(root: Path, runner: Runner) -> Work:
    run = trained(root, runner)

    def first() -> None:
        shutil.rmtree(run / "analysis", ignore_errors=True)
        (run / "analysis.json").unlink(missing_ok=True)

    return Work(["analyze", run, "--positions", 8], run, first=first)


def page(root: Path, runner: Runner, *more: object) -> Work:
    run, out = evaluated(root, runner), root / "out"
    words = ["report", run, "--output", out / "page.html", "--picture", out / "picture.svg", *more]
    return Work(words, out, first=removed(out))


def table(root: Path, runner: Runner) -> Work:
    work = page(root, runner)
    out = root / "out"
    run = work.words[1]
    return Work(["report", run, "--output", out / "table.csv", "--picture", out / "picture.png"], out, first=work.first)


def comparison(root: Path, runner: Runner) -> Work:
    run, out = evaluated(root, runner), root / "out"
    return Work(["compare", run, run, "--format", "csv", "--output", out / "c.csv"], out, first=removed(out))


def toy(root: Path, runner: Runner) -> Work:
    out = root / "toy"
    words = ["toy", "--quick", "--objectives", "fkl,rkl", "--setting", "free", "--jobs", 1, "--output", out]
    return Work(words, out, first=removed(out))


WORKS: dict[str, Callable[..., Work]] = {
    "cache": teacher_cache,
    "cache of the largest logits": lambda root, runner: teacher_cache(root, runner, "--kind", "topk", "--k", 4),
    "filling a cache": filled_cache,
    "evaluate": evaluation,
    "evaluate again": evaluated_again,
    "analyze": analysis,
    "report": page,
    "report, csv": table,
    "compare": comparison,
    "toy": toy,
}
CACHES = {"rows": cache_of_rows, "evaluations": evaluation_cache}


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk is full from the n-th write on, for every n, of cache, evaluate, analyze, report, compare and toy",
    does="Stops with the cause, the file and the command that goes on; that one gives what was wanted at first.",
)
@pytest.mark.parametrize("kind", WORKS)
def test_a_full_disk_at_every_write_of_a_command(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, kind: str
) -> None:
    every_write(WORKS[kind](tmp_path, runner), disk, runner, injected, errno.ENOSPC)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The disk becomes read-only at the n-th write of cache, evaluate, analyze, report, compare and toy",
    does="As for a full disk; the message never speaks of room.",
)
@pytest.mark.parametrize("kind", WORKS)
def test_a_read_only_disk_in_a_command(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, kind: str
) -> None:
    every_write(WORKS[kind](tmp_path, runner), disk, runner, injected, errno.EROFS, step=3)


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="drkl's own cache (of rows, of evaluations) is on a disk that is full, or fails once, at every write",
    does="Says so and goes on without it: what is kept there can be made again.",
)
@pytest.mark.parametrize(("number", "forever"), [(errno.ENOSPC, True), (errno.EIO, False)])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, disk: Disk, runner: Runner, injected: Injected, kind: str, number: int, forever: bool
) -> None:
    every_write(CACHES[kind](tmp_path, runner), disk, runner, injected, number, forever=forever, passes=True)


def lose_output_of(runner: Runner, how: str, *words: object) -> Ended:
    return runner.call(*words, inject="tests.faults.disks:lose_output", given=[how])


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="Nobody takes what a command prints: a closed pipe, a full disk, a closed file",
    does="The work goes on to its end; where the print is the work, a full disk is status 2 and a closed pipe 0.",
)
@pytest.mark.parametrize("how", ["pipe", "full", "closed"])
def test_the_output_goes(tmp_path: Path, runner: Runner, injected: Injected, how: str) -> None:
    work = training(tmp_path)
    whole = runner.call(*work.words)
    assert whole.code == 0, whole.err
    expected = work.result()
    work.first()
    with injected(f"distill, {how}"):
        ended = lose_output_of(runner, how, *work.words)
        assert ended.code == 0 and "Traceback" not in ended.err, ended
        assert work.result() == expected
    for words in (["evaluate", work.folder], ["report", work.folder], ["analyze", work.folder]):
        with injected(f"{words[0]}, {how}"):
            ended = lose_output_of(runner, how, *words)
            assert ended.code == (2 if (words[0], how) == ("report", "full") else 0), ended
            assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended.err
    for words in (["recipes"], ["compare", work.folder, work.folder], ["evaluate", tmp_path / "none"]):
        with injected(f"{words[0]}, {how}"):
            ended = lose_output_of(runner, how, *words)
            assert ended.code == (2 if how == "full" or words[0] == "evaluate" else 0), ended
            assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended.err


def in_the_midst(work: Work, runner: Runner, change: Callable[[], None]) -> Ended:
    """Run a training, and change something once its first checkpoint is there."""
    child = runner.start(*work.words)
    while not (work.folder / "checkpoints" / "checkpoint-4").exists() and child.poll() is None:
        time.sleep(0.01)
    change()
    return child.wait()


@pytest.mark.slow
@pytest.mark.fault(
    group="Disk",
    fault="The folder of a run, or its checkpoints, are moved away or become a file as it trains",
    does="Says what is gone or in the way, and stops; brought back, `--resume` gives the uninterrupted run's bytes.",
)
def test_a_folder_goes_while_it_trains(tmp_path: Path, runner: Runner, injected: Injected) -> None:
    steps = {"max_steps": 40, "save_every": 4, "eval_every": 4}
    work, aside = training(tmp_path, training=steps), tmp_path / "aside"
    assert runner.call(*work.words).code == 0
    expected, checkpoints = work.result(), work.folder / "checkpoints"

    def away(path: Path, *, file: bool) -> Callable[[], None]:
        def change() -> None:
            path.rename(aside)
            if file:
                path.touch()

        return change

    for path, file in ((work.folder, False), (work.folder, True), (checkpoints, True)):
        work.first()
        with injected(f"{path.name} goes, a file in its place: {file}"):
            ended = in_the_midst(work, runner, away(path, file=file))
            assert ended.code == 2 and ended.err.count("Error:") == 1 and "Traceback" not in ended.err, ended
            assert ("is a file where a folder is expected" if file else "is gone. Bring it back") in ended.err
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            aside.rename(path)
            again = runner.call("distill", "--resume", work.folder)
            assert again.code == 0, again.err
            assert work.result() == expected
        shutil.rmtree(aside, ignore_errors=True)
    work.first()
    with injected("the run is removed"):
        ended = in_the_midst(work, runner, away(work.folder, file=False))
        assert ended.code == 2 and "Traceback" not in ended.err, ended
        again = runner.call(*way_on(ended))
        assert again.code == 0 and work.result() == expected, again.err
