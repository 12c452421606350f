"""Hostile yaml and json, names of runs, links in a run folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.faults import hostile
from tests.faults.conftest import Injected
from tests.faults.forked import Runner

LITTLE_MEMORY = {"inject": "tests.faults.hostile:limit_memory", "given": [2 * hostile.GIBI]}
TENS = "[" + ",".join("1" * 10) + "]"
DEEP = "[" * 10_000 + "]" * 10_000


def tenfold(first: str, rest: str, times: int = 9) -> str:
    """Lines, each of which has the one before ten times."""
    more = (f"x{i}: &x{i} {rest.replace('_', ','.join([f'*x{i - 1}'] * 10))}\n" for i in range(1, times + 1))
    return f"x0: &x0 {first}\n{''.join(more)}"


@pytest.mark.fault(
    group="Hostile input",
    fault="A yaml bomb as config: aliases that repeat aliases or hold themselves, 10,000 brackets in one another, "
    "numbers of 5,000 and a million digits, tags of Python objects, two keys of one name, a date of the 99th month",
    does="Stops with one message that names file and line, in little memory; nothing runs.",
)
def test_yaml(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    good = hostile.write_config(tmp_path).read_text()
    mark = tmp_path / "ran"
    bombs = {
        "lists": tenfold(TENS, "[_]"),
        "mappings": tenfold("{k: 1}", "{<<: [_]}", 8),
        "a list in itself": "a: &a [*a]\n",
        "a mapping in itself": "a: &a {b: *a}\n",
        "brackets": f"a: {DEEP}\n",
        "braces": f"a: {'{a: ' * 5_000}1{'}' * 5_000}\n",
        "5,000 digits": f"a: {'9' * 5_000}\n",
        "a million digits": f"a: {'9' * 1_000_000}\n",
        "base sixty": f"a: {'1:' * 100_000}1\n",
        "apply": f"a: !!python/object/apply:os.system ['touch {mark}']\n",
        "new": "a: !!python/object/new:os.system ['true']\n",
        "a name": "a: !!python/name:os.system\n",
        "a module": "a: !!python/module:os\n",
        "two keys": "run: {name: other}\n",
        "a date": "a: 9999-99-99\n",
        "a list as key": "? [a, b]\n: 1\n",
        "binary": "a: !!binary abc\n",
    }
    path = tmp_path / "bomb.yaml"
    for name, bomb in bombs.items():
        path.write_text(bomb + good)
        with injected(name):
            hostile.assert_refused(runner.call("distill", path, "--dry-run", until=120, **LITTLE_MEMORY), str(path))
            assert not mark.exists()
    for name, value in {"digits": "9" * 5_000, "brackets": DEEP, "itself": "&a [*a]"}.items():
        path.write_text(good)
        with injected(f"{name} in an override"):
            done = runner.call("distill", path, "--dry-run", f"data.max_rows={value}", until=120, **LITTLE_MEMORY)
            hostile.assert_refused(done, "override")
            assert len(done.err) < 2_000


@pytest.mark.fault(
    group="Hostile input",
    fault="A config or data file that is a device, a named pipe or a folder",
    does="Stops at once with one message that names it.",
)
def test_no_files(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    loop = tmp_path / "loop"
    (loop / "inner").mkdir(parents=True)
    (loop / "inner" / "again").symlink_to(loop)
    (loop / "rows.jsonl").symlink_to(loop / "rows.jsonl")
    for name in ("/dev/zero", "/dev/urandom", "/dev/tty", pipe, tmp_path, loop / "rows.jsonl"):
        with injected(f"{name} as config"):
            hostile.assert_refused(runner.call("distill", name, "--dry-run", until=120, **LITTLE_MEMORY), str(name))
    for key in ("path", "eval_path"):
        for name in ("/dev/zero", "/dev/urandom", pipe, loop / "rows.jsonl"):
            with injected(f"{name} as data.{key}"):
                done = runner.call("data", config, f"data.{key}={name}", until=120, **LITTLE_MEMORY)
                hostile.assert_refused(done, str(name))
    with injected("a folder that holds itself"):
        hostile.assert_refused(
            runner.call("data", config, "data.path=null", f"data.dataset={loop}", until=120), str(loop)
        )


@pytest.mark.fault(
    group="Hostile input",
    fault="Names of runs and stages that lead elsewhere: `..`, `a/../..`, `/etc`, `~`, a line break, NUL",
    does="Refused by the setting's name; nothing is made.",
)
def test_names(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = hostile.write_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("..", ".", "a/../..", "/etc", "~", "a\nb", "-x", "", "../x", "a\0b", "a\\b", "a" * 300 + "/b"):
        for what in (f"run.name={json.dumps(name)}", f"stages=[{{name: {json.dumps(name)}}}]"):
            with injected(what[:60]):
                hostile.assert_refused(runner.call("distill", config, what), "name")
                assert sorted(tmp_path.rglob("*")) == before


class Runs(NamedTuple):
    config: Path
    cut: Path
    """A run that was killed at step 5, with checkpoints."""
    done: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("links")
    config = hostile.write_config(root, training={"save_every": 2, "max_steps": 6, "eval_every": 2})
    done = runner.call("distill", config, "run.name=done")
    assert done.code == 0, done.err
    killed = runner.call(
        "distill", config, "run.name=cut", inject="tests.training.killed:kill_in_training", given=["log", "cut", 5]
    )
    assert killed.code < 0, killed.err
    yield Runs(config, root / "runs" / "cut", root / "runs" / "done")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="A run folder in which `student/`, `train.jsonl`, `.evaluation/`, `analysis/`, `stages/`, a checkpoint or "
    "`eval.json` is a link to something of the user's own, resumed, replaced, evaluated, analysed",
    does="What the link points to stays as it is: refused by name, or the link itself is replaced.",
)
def test_links_out_of_a_run(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    quick = ("--prompts", 2, "--samples", 1, "--max-new-tokens", 4)
    resume: Callable[[Path], tuple[object, ...]] = lambda run: ("distill", "--resume", run)  # noqa: E731
    replace: Callable[[Path], tuple[object, ...]] = lambda run: (  # noqa: E731
        "distill", runs.config, f"run.dir={run.parent}", f"run.name={run.name}", "--overwrite",
    )  # fmt: skip
    evaluate: Callable[[Path], tuple[object, ...]] = lambda run: ("evaluate", run, *quick)  # noqa: E731
    cases = [
        (runs.cut, resume, ("student", "train.jsonl", "rollouts.jsonl", "env.json", "checkpoints/checkpoint-1",
                            "checkpoints/checkpoint-6", ".student.writing", "checkpoints/.writing")),
        (runs.done, replace, ("student", "train.jsonl", "stages", "analysis", ".evaluation", "config.yaml")),
        (runs.done, evaluate, (".evaluation", "eval.json", "samples.jsonl", "heldout.jsonl")),
        (runs.done, lambda run: ("analyze", run), ("analysis", "analysis.json")),
        (runs.done, lambda run: ("report", run), ("report.html",)),
    ]  # fmt: skip
    for number, (source, command, names) in enumerate(cases):
        for name in names:
            root = tmp_path / f"{number}-{name.replace('/', '-')}"
            mine = root / "mine"
            shutil.copytree(runs.done / "student", mine)
            run = root / "run"
            shutil.copytree(source, run)
            link = run / name
            target: Path = mine
            if link.suffix or link.is_file():
                target = mine / link.name
                shutil.copy(link, target) if link.is_file() else target.write_text("")
                link.unlink(missing_ok=True)
            elif link.is_dir():
                shutil.rmtree(link)
            for figure in ("pushes.svg", "01-warmup"):
                (mine / figure).write_text("mine")
            link.symlink_to(target)
            before = contents(mine)
            with injected(f"{command(run)[0]}: {name}"):
                done = runner.call(*command(run), until=300)
                assert contents(mine) == before, f"changed: {done.out[-200:]} {done.err[-300:]}"
                assert "Traceback" not in done.err, done.err[-800:]
                assert done.code == 0 or str(link) in done.err or run.name in done.err, done.err


@pytest.mark.slow
@pytest.mark.fault(
    group="Hostile input",
    fault="Brackets 100,000 deep, numbers of 5,000 digits, other kinds of values in a run's `env.json`, `eval.json`, "
    "`train.jsonl`, `samples.jsonl` and in rows",
    does="One message that names file and line.",
)
def test_json(runs: Runs, runner: Runner, tmp_path: Path, injected: Injected) -> None:
    deep, digits = "[" * 100_000 + "]" * 100_000, "9" * 5_000
    texts = {"brackets": f'{{"a": {deep}}}', "digits": f'{{"a": {digits}}}', "a list": "[]", "a number": digits}
    run = tmp_path / "run"
    shutil.copytree(runs.done, run)
    assert runner.call("evaluate", run, "--prompts", 2, "--samples", 1, "--max-new-tokens", 4).code == 0
    for name in ("env.json", "eval.json", "train.jsonl", "samples.jsonl"):
        path = run / name
        before = path.read_bytes()
        for what, text in texts.items():
            path.write_text(f"{text}\n{text}\n" if path.suffix == ".jsonl" else text)
            with injected(f"{what} in {name}"):
                done = runner.call("report", run, until=120)
                assert "Traceback" not in done.err, done.err[-800:]
                assert done.code == 0 or name in done.err, done.err[-300:]
        path.write_bytes(before)
    config = hostile.write_config(tmp_path)
    rows = tmp_path / "data.jsonl"
    good = rows.read_text()
    for what, row in {
        "brackets": f'{{"prompt": "w1", "response": {deep}}}',
        "digits": f'{{"id": {digits}, "prompt": "w1", "response": "w2"}}',
        "two keys": '{"prompt": "w1", "prompt": "w2", "response": "w2"}',
        "half a character": '{"prompt": "w1\\ud800", "response": "w2"}',
        "deep text": json.dumps({"messages": DEEP * 10}),
    }.items():
        rows.write_text(good + row + "\n")
        with injected(f"{what} in a row"):
            hostile.assert_refused(runner.call("data", config, until=120), f"{rows}:41")


@pytest.mark.fault(
    group="Hostile input",
    fault="A config of a stranger's that replaces a folder that is no run",
    does="Refused: only what drkl wrote is removed.",
)
def test_replacing_what_is_no_run(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    config = hostile.write_config(tmp_path)
    for name in ("mine", "link"):
        if name == "link":
            (tmp_path / name).symlink_to(mine)
        with injected(name):
            done = runner.call("distill", config, f"run.dir={tmp_path}", f"run.name={name}", "--overwrite")
            hostile.assert_refused(done, name)
            assert (mine / "thesis.tex").read_text() == "mine"
    (mine / "config.yaml").write_text(yaml.safe_dump({"mine": 1}))
    with injected("with a config.yaml"):
        runner.call("distill", config, f"run.dir={tmp_path}", "run.name=mine", "--overwrite")
        assert (mine / "thesis.tex").read_text() == "mine"
