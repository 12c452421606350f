"""Studies of runs that take a second, and commands that are run in this process, or only pretend to run."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from drkl.runs import RunFolder, read_yaml
from drkl.sealed import sealed
from drkl.studies.commands import Commands
from drkl.studies.plan import Plan, load_study
from tests.models import tiny
from tests.training import tiny_runs

SHORT: dict[str, Any] = {
    "training": {"max_steps": 3, "eval_every": 3, "save_every": 3},
    "stages": [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 2}}],
    "evaluation": {"sweep": []},
}
"""Changes of a base that make it short."""
AXES = {"objective.name": ["rkl", "drkl"], "run.seed": [0, 1]}


def definition(root: Path, **fields: Any) -> dict[str, Any]:
    """The fields of a study of two objectives and two seeds; ``fields`` in their place."""
    return {
        "name": "s", "dir": str(root / "studies"), "base": "base.yaml", "axes": AXES,
        "baseline": {"objective.name": "rkl"}, "decide": ["rkl", "fkl"],
    } | fields  # fmt: skip


def write(root: Path, base: Mapping[str, Any] | None = None, **fields: Any) -> Path:
    """Write a study of a run that warms up, and its base with changes; the study's path."""
    root.mkdir(parents=True, exist_ok=True)
    values = tiny_runs.config(root, **({"stages": tiny_runs.STAGES} if base is None else base))
    values["objective"].pop("gamma", None)  # of the one objective alone
    tiny_runs.write_config(values, root / "base.yaml")
    (root / "study.yaml").write_text(yaml.safe_dump(definition(root, **fields), sort_keys=False))
    return root / "study.yaml"


def ready(root: Path) -> dict[str, Any]:
    """Changes of a base whose student is there already, so that no start has to be made."""
    if not (root / "student").exists():
        tiny.save(tiny.llama(), root / "student")
    return {"student": {"init": "pretrained", "model": str(root / "student"), "layers": None}, "stages": []}


def plan_of(root: Path, base: Mapping[str, Any] | None = None, **fields: Any) -> Plan:
    """Such a study, read and checked."""
    return load_study(write(root, base, **fields))


class Ended:
    """A command that has run."""

    def __init__(self, status: int, looks: int = 0) -> None:
        self.status, self.looks = status, looks
        self.signals: list[int] = []

    def poll(self) -> int | None:
        if self.looks > 0 and not self.signals:
            self.looks -= 1
            return None
        return 128 + self.signals[0] if self.signals else self.status

    def send_signal(self, signum: int) -> None:
        self.signals.append(signum)


def in_this_process(words: Sequence[str], log: Path, variables: Mapping[str, str]) -> Ended:
    """Run ``drkl`` to its end before anything else goes on."""
    from drkl.cli import main

    before, said = sys.argv, io.StringIO()
    sys.argv = ["drkl", *words]
    status = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    with log.open("a") as file:
        file.write(said.getvalue())
    return Ended(status)


class Pretended:
    """Commands that write what is looked at of a run, and nothing else.

    Args:
        fails: by a command's first word and its run's name, the status that it ends with.
        looks: how often each is found running.
    """

    def __init__(self, fails: Mapping[tuple[str, str], int] | None = None, looks: int = 1) -> None:
        self.fails, self.looks = dict(fails or {}), looks
        self.called: list[tuple[str, str]] = []
        self.at: Callable[[str, str], None] = lambda word, name: None
        """Called as a command begins."""

    def __call__(self, words: Sequence[str], log: Path, variables: Mapping[str, str]) -> Ended:
        word, name = words[0], log.parent.name
        self.called.append((word, name))
        self.at(word, name)
        if status := self.fails.get((word, name), 0):
            with log.open("a") as file:
                file.write(f"a line\nError: {name} is broken.\n")
            return Ended(status, self.looks)
        run = RunFolder(log.parent)
        if word == "distill":
            values = read_yaml(words[1])
            run.config_path.write_text(yaml.safe_dump(values))
            run.student_path.mkdir(exist_ok=True)
            (run.student_path / "model.safetensors").write_bytes(b"weights")
            run.env_path.write_text(json.dumps(sealed({"finished": "then", "seconds": 60.0})))
        if word == "evaluate":
            run.eval_path.write_text("{}")
        return Ended(0, self.looks)


def pretending(jobs: int = 1, **words: Any) -> tuple[Commands, Pretended]:
    """Commands that pretend, and what they were called with."""
    pretended = Pretended(**words)
    return Commands(jobs, launch=pretended), pretended
