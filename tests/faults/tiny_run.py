"""A run that takes a second, for commands that are tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.faults.forked import Ended
from tests.training import tiny_runs


def write(root: Path, **sections: Any) -> Path:
    """Write a teacher, rows and a config of three steps under ``root``; the config's path."""
    root.mkdir(parents=True, exist_ok=True)
    changes = {"max_steps": 3, "eval_every": 1, "save_every": 1} | sections.pop("training", {})
    return tiny_runs.write_config(tiny_runs.config(root, training=changes, **sections), root / "c.yaml")


def override(key: str, value: Any) -> str:
    """The word of a command line that sets a key of the config."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    text = text.strip().removesuffix("...").strip()
    return f"{key}={text}"


def check_refused(done: Ended, run: Path, word: str) -> None:
    """One message that has the word, before the teacher is loaded, and nothing written: the next try is not refused."""
    assert done.code == 2, f"status {done.code}: {done.err[-300:]}"
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err[-500:]
    assert lines[0].startswith("Error: "), lines[0]
    assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert not run.exists(), "the run folder is there"
    assert "Loading the teacher" not in done.out, "the teacher was loaded first"


def check_done(done: Ended) -> None:
    """It ended well, and said nothing that it should not."""
    assert done.code == 0, f"status {done.code}: {done.err[-500:]}"
    assert "Traceback" not in done.err, done.err[-500:]
