"""Caches when things go wrong: the command is killed, the disk is full, two write at once, or a file is broken."""

from __future__ import annotations

import copy
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drkl.cli import main
from drkl.config import load_config
from drkl.runs import write_yaml
from drkl.teachers import cached, shards
from drkl.training.run import cache_states
from tests.command_line import Cli
from tests.models import tiny
from tests.teachers.test_shards import damage
from tests.training import tiny_runs
from tests.training.test_filling import contents

pytestmark = pytest.mark.slow


def command(moment: str, wait: str, words: Sequence[str], err: Path, limit: int | None) -> None:
    """The command line with shards of a few rows; it kills itself at a moment, or waits there."""
    cached.SHARD_BYTES = 1000

    def watched(function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if moment and name_of(*arguments) == moment:
                if not wait:
                    os.kill(os.getpid(), signal.SIGKILL)
                Path(wait).touch()
                while Path(wait).exists():
                    time.sleep(0.01)
            return function(*arguments, **options)

        return call

    os.replace = watched(os.replace, lambda source, target: Path(target).name)
    write: Any = shards._write_manifest
    shards._write_manifest = watched(write, lambda folder, facts: "manifest" if facts["finished"] else "")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with err.open("w") as sys.stderr, Path(os.devnull).open("w") as sys.stdout:
        sys.argv = ["drkl", *words]
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
    os._exit(code)


def start(folder: Path, moment: str, *words: object, wait: object = "", limit: int | None = None) -> Any:
    """Begin `command` in a process of its own, and write what it says to a file of the folder."""
    arguments = (moment, str(wait), [*map(str, words)], folder / "err", limit)
    process = multiprocessing.get_context("fork").Process(target=command, args=arguments)
    process.start()
    return process


def run(folder: Path, moment: str, *words: object, limit: int | None = None) -> tuple[int, str]:
    process = start(folder, moment, *words, limit=limit)
    process.join()
    return process.exitcode, (folder / "err").read_text()


def config(root: Path) -> tuple[dict[str, Any], Path]:
    student = tiny.save(tiny.llama(1, layers=2), root / "student")
    values = tiny_runs.config(
        root, student={"init": "pretrained", "model": str(student), "layers": None}, training={"max_steps": 1}
    )
    return values, tiny_runs.write_config(values, root / "c.yaml")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, and the cache that an undisturbed pass makes of it."""
    root = tmp_path_factory.mktemp("made")
    _, path = config(root)
    code, err = run(root, "", "cache", path, "--output", root / "whole")
    assert code == 0, err
    assert len([*(root / "whole").glob("values-*")]) > 4
    return root


@pytest.mark.parametrize("moment", ["values-00000.safetensors", "rows-00003.safetensors", "manifest"])
def test_a_pass_that_was_killed_goes_on(made: Path, tmp_path: Path, moment: str) -> None:
    words = ("cache", made / "c.yaml", "--output", tmp_path / "cache")
    assert run(tmp_path, moment, *words)[0] == -9
    code, err = run(tmp_path, "", "cache", "--verify", tmp_path / "cache")
    assert code == 2 and "is not finished" in err
    code, err = run(tmp_path, "", *words)
    assert code == 0, err
    assert contents(tmp_path / "cache") == contents(made / "whole")


def part_of(made: Path, folder: Path) -> None:
    """The cache of some of the rows."""
    code, err = run(folder.parent, "", "cache", made / "c.yaml", "data.max_rows=15", "--output", folder)
    assert code == 0, err


@pytest.mark.parametrize("moment", ["first", "middle", "manifest"])
def test_a_fill_that_was_killed_goes_on(made: Path, tmp_path: Path, moment: str) -> None:
    part_of(made, tmp_path / "whole")
    part_of(made, tmp_path / "cut")
    before = contents(tmp_path / "cut")
    words = ("distill", made / "c.yaml", "teacher.fill_cache=true", f"run.dir={tmp_path}")
    code, err = run(tmp_path, "", *words, f"teacher.cache={tmp_path / 'whole'}", "run.name=whole-run")
    assert code == 0, err
    number = len([*(tmp_path / "cut").glob("values-*")])
    names = {"first": f"values-{number:05d}.safetensors", "middle": f"rows-{number + 1:05d}.safetensors"}
    cut = (*words, f"teacher.cache={tmp_path / 'cut'}", "run.name=cut-run")
    assert run(tmp_path, names.get(moment, moment), *cut)[0] == -9
    left = contents(tmp_path / "cut")
    assert all(left[name] == data for name, data in before.items())
    assert run(tmp_path, "", "cache", "--verify", tmp_path / "cut")[0] == 0  # it is what it was
    code, err = run(tmp_path, "", *cut)
    assert code == 0, err
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_writers_of_one_part(made: Path, tmp_path: Path) -> None:
    words = ("cache", made / "c.yaml", "--output", tmp_path / "cache")
    (tmp_path / "first").mkdir()
    first = start(tmp_path / "first", "rows-00002.safetensors", *words, wait=tmp_path / "waits")
    while not (tmp_path / "waits").exists():
        assert first.is_alive()
        time.sleep(0.01)
    code, err = run(tmp_path, "", *words)
    assert code == 2 and "Another process is writing part 1 of 1 of the cache" in err
    (tmp_path / "waits").unlink()
    first.join()
    assert first.exitcode == 0
    assert contents(tmp_path / "cache") == contents(made / "whole")


def test_a_disk_that_is_full(made: Path, tmp_path: Path) -> None:
    """A limit on the size of a file takes its place."""
    words = ("cache", made / "c.yaml", "--output", tmp_path / "cache")

    code, err = run(tmp_path, "", *words, limit=1800)
    assert code == 2 and "Cannot write '" in err and "go on with the same command" in err, err
    assert "Traceback" not in err and not [*(tmp_path / "cache").glob(".part-values*")]
    code, err = run(tmp_path, "", *words)
    assert code == 0, err
    assert contents(tmp_path / "cache") == contents(made / "whole")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained from a cache."""
    root = tmp_path_factory.mktemp("trained")
    values, _ = config(root)
    cache_states(tiny_runs.specs(values), root / "cache")
    values["teacher"]["cache"] = str(root / "cache")
    tiny_runs.write_config(values, root / "c.yaml")
    tiny_runs.train(values)
    return root


def named(name: str, how: str) -> Callable[[str], bool]:
    """Whether a message names a broken file and what is wrong with it."""
    if name == "manifest.json":
        return {
            "gone": lambda text: "is no teacher cache: it has no manifest.json" in text,
            "cut": lambda text: "manifest.json is not valid json" in text,
            "flipped": lambda text: "manifest.json is not valid json" in text,
        }[how]
    says = {"gone": f"misses its file '{name}'", "cut": "bytes", "flipped": "has a wrong checksum"}
    return lambda text: name in text and says[how] in text


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize(
    "name",
    ["rows-00000.safetensors", "values-00000.safetensors", "head.safetensors", "tokenizer.json",
     "tokenizer_config.json", "config.json", "generation_config.json", "manifest.json"],
)  # fmt: skip
def test_a_broken_file_is_named(trained: Path, tmp_path: Path, name: str, how: str, cli: Cli) -> None:
    path = trained / "cache" / name
    whole = path.read_bytes()
    is_named = named(name, how)
    commands: tuple[tuple[object, ...], ...] = (
        ("distill", trained / "c.yaml", f"run.dir={tmp_path}"),
        ("distill", trained / "c.yaml", f"run.dir={tmp_path}", "teacher.fill_cache=true", "run.name=f"),
        ("cache", "--verify", trained / "cache"),
        ("evaluate", trained / "runs" / "r", "--sweep", "none", "--output", tmp_path / "eval"),
        ("analyze", trained / "runs" / "r", "--output", tmp_path / "analysis"),
    )
    try:
        damage(path, how)
        for command in commands:
            done = cli(*command)
            assert done.code == 2 and is_named(" ".join(done.err.split())), (command, done.err)
    finally:
        path.write_bytes(whole)


def test_a_cache_in_the_folder_of_its_run(tmp_path: Path, cli: Cli) -> None:
    """It would be removed with the run."""
    values, path = config(tmp_path)
    run_folder = tmp_path / "runs" / "r"
    for inside in (run_folder, run_folder / "cache"):
        done = cli("cache", path, "--output", inside)
        assert done.code == 2 and "lies in the run folder" in done.err and not run_folder.exists()
    cache_states(tiny_runs.specs(values), tmp_path / "cache")
    tiny_runs.train(values)
    (tmp_path / "cache").rename(run_folder / "cache")
    done = cli("distill", path, "--overwrite", f"teacher.cache={run_folder / 'cache'}")
    assert done.code == 2 and "lies in the run folder" in done.err
    assert (run_folder / "cache" / "manifest.json").is_file()


def test_a_cache_in_the_place_of_a_run(tmp_path: Path, cli: Cli) -> None:
    values, path = config(tmp_path)
    tiny_runs.train(values)
    other = copy.deepcopy(values)
    other["run"]["name"] = "other"
    write_yaml(tmp_path / "other.yaml", load_config(other)[0].model_dump(mode="json", exclude_unset=True))
    done = cli("cache", tmp_path / "other.yaml", "--output", tmp_path / "runs" / "r")
    assert done.code == 2 and "and no manifest.json; expected an empty folder or a cache" in done.err
    assert (tmp_path / "runs" / "r" / "config.yaml").is_file() and path.is_file()
