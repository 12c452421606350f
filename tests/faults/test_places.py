"""Odd places: whatever a path may hold, every command reads it, and what it prints can be pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults import tiny_run
from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner

MIXED = "a b ü\n'\"%s {x} [bold]*[x]? $HOME `ls`;&#"
NAMES = {
    "blanks": "a  b ", "umlauts": "äöü-ß-é", "decomposed": "u\u0308", "emoji": "\U0001f389 run", "newline": "a\nb",
    "tab": "a\tb", "quote": "it's", "quotes": 'a "b"', "percent": "100%s %(x)s %d", "braces": "{x} {{y}} {0}",
    "markup": "[bold]x[/bold] [x]", "glob": "[ab]*?.x", "dollar": "$HOME `ls` $(ls)", "html": "<b>&amp;<script>",
    "yaml": "key: [a, #b", "comma": "a,b;c=d", "dash": "-rf", "dots": "...", "backslash": "a\\nb\\", "hash": "#x",
    "tilde": "~", "long": "x" * 255, "rtl": "\u202eabc", "escape": "a\x1b[31mb", "bytes": "a\udcffb", "mixed": MIXED,
}  # fmt: skip


def next_command(done: Ended) -> Sequence[str]:
    """The words of the command that a message ends with, as a shell reads them."""
    found = re.search(r"Next: (drkl .*)\Z", done.out.strip(), re.DOTALL)
    assert found, done.out[-300:]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {found[1]}"], capture_output=True, check=True).stdout
    return [os.fsdecode(word) for word in words.split(b"\0")[1:-1]]


def write_in(place: Path) -> Path:
    try:
        return tiny_run.write(place)
    except (OSError, ValueError) as error:
        pytest.skip(f"this file system has no such name: {error}")


def use(config: Path, place: Path, runner: Runner, commands: Sequence[str]) -> None:
    """Distil in a place, follow what is said, and call the other commands on the run."""
    run = place / "runs" / "r"
    variables = {name: str(place / name) for name in ("DRKL_CACHE", "HOME", "TMPDIR")}
    for folder in variables.values():
        Path(folder).mkdir()
    done = runner.call("distill", config, variables=variables)
    tiny_run.check_done(done)
    assert next_command(done) == ["evaluate", str(run)], done.out[-300:]
    for command in commands:
        words: list[object] = [command, run]
        if command == "generate":
            words += ["--prompt", "w1 w2"]
        elif command == "cache":
            words = [command, config, "--output", place / "c"]
        elif command == "data":
            words = [command, config]
        elif command == "compare":
            words = [command, run, run]
        done = runner.call(*words, variables=variables)
        tiny_run.check_done(done)
        if command == "evaluate":
            assert next_command(done) == ["report", str(run)], done.out[-300:]
        if command == "cache":
            _, cached, cache = next_command(done)
            assert (cached, cache) == (str(config), f"teacher.cache={place / 'c'}")
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["run"]["dir"] == str(place / "runs")


@pytest.mark.fault(
    group="Surroundings",
    fault="A path with blanks, umlauts, emoji, a newline, quotes, markup, patterns, a dash first, bytes of no text",
    does="Every command reads and writes there, and the commands that it prints can be pasted.",
)
@pytest.mark.parametrize("name", ["mixed", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_every_command_in_an_odd_place(
    name: str, runner: Runner, tmp_path: Path, injected: Injected, request: pytest.FixtureRequest
) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    every = ["evaluate", "analyze", "report", "generate", "compare", "cache", "data"]
    place = tmp_path / NAMES[name]
    config = write_in(place)
    with injected(name):
        use(config, place, runner, every if slow else ["evaluate", "report"])


@pytest.mark.slow
@pytest.mark.fault(
    group="Surroundings",
    fault="A run folder is renamed to anything, linked, reached as `.`, `..`, with a slash at its end, then resumed",
    does="It goes on there; every other command opens it afterwards.",
)
def test_a_run_goes_on_by_any_of_its_names(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config, run = tiny_run.write(tmp_path), tmp_path / "runs" / "r"
    tiny_run.check_done(runner.call("distill", config))
    cut_off(run)
    shutil.copytree(run, whole := tmp_path / "cut")
    ways: list[tuple[str, str, str | None]] = [
        ("r", ".", "r"), ("r", "../r", "r"), ("r", "..", "r/student"), ("r", "r/", None), ("r", "./r/.", None),
        *((name, "./" + name, None) for name in NAMES.values()), ("link", "link", None),
    ]  # fmt: skip
    for number, (name, word, inside) in enumerate(ways):
        root = tmp_path / f"t{number}"
        root.mkdir()
        with injected(f"{name!r} as {word!r}"):
            try:
                shutil.copytree(whole, root / ("real" if name == "link" else name))
            except (OSError, ValueError):
                continue
            if name == "link":
                (root / "link").symlink_to("real")
            (root / name / "student").mkdir(exist_ok=True)
            cwd = root / inside if inside else root
            done = runner.call("distill", "--resume", word, cwd=cwd)
            if name == NAMES["bytes"]:
                assert done.code == 2 and "no UTF-8 text" in done.err and "Traceback" not in done.err, done.err
                continue
            tiny_run.check_done(done)
            values = yaml.safe_load((root / name / "config.yaml").read_text(encoding="utf-8"))
            assert values["run"]["name"] not in ("", ".", "..")
            tiny_run.check_done(runner.call("evaluate", word, cwd=cwd))
            tiny_run.check_done(runner.call("report", word, cwd=cwd))


def remove_current_folder() -> None:
    """Called in the child."""
    Path.cwd().rmdir()


def cut_off(run: Path) -> None:
    """Make a finished run one that was cut off before its last save."""
    import json

    env = json.loads((run / "env.json").read_text()) | {"finished": None}
    del env["checksum"]
    (run / "env.json").write_text(json.dumps(env))
    shutil.rmtree(run / "student")


@pytest.mark.fault(
    group="Surroundings",
    fault="A home that is not there, no user, no locale, no folder for temporary files, a path that is too long",
    does="The run goes on, or one message says what is missing.",
)
def test_a_bare_environment(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = tiny_run.write(tmp_path, training={"max_steps": 1})
    none = str(tmp_path / "none")
    cases: dict[str, dict[str, str]] = {
        "no home": {"HOME": none, "XDG_CACHE_HOME": ""},
        "a home of no path": {"HOME": "", "USER": "", "LOGNAME": ""},
        "C locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        "cache in a file": {"DRKL_CACHE": str(config)},
        "no TMPDIR": {"TMPDIR": none},
        "home is a file": {"HOME": str(config), "XDG_CACHE_HOME": ""},
        "home is in a file": {"HOME": str(config / "me"), "XDG_CACHE_HOME": "", "HF_HOME": ""},
    }
    for number, (case, variables) in enumerate(cases.items()):
        with injected(case):
            done = runner.call("distill", config, f"run.name=e{number}", variables=variables)
            assert "Traceback" not in done.err, done.err[-400:]
            assert done.code in (0, 2), done.code
    with injected("the current folder is removed"):
        (gone := tmp_path / "gone").mkdir()
        words: dict[str, Any] = {"cwd": gone, "inject": "tests.faults.test_places:remove_current_folder"}
        done = runner.call("distill", config, "run.name=gone", **words)
        assert "Traceback" not in done.err, done.err[-400:]
        assert done.code in (0, 2), done.code
    with injected("too long"):
        done = runner.call("distill", config, f"run.dir={'x/' * 3000}")
        assert "Traceback" not in done.err, done.err[-400:]
        assert done.code == 2
    with injected("a name too long"):
        done = runner.call("distill", config, f"run.name={'x' * 300}")
        assert "Traceback" not in done.err, done.err[-400:]
        assert done.code == 2
