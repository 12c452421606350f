"""Configs of runs that take a second, and the commands for them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from drkl.config import load_config
from drkl.runs import RunFolder
from drkl.training.run import Listener, Mode, distill
from drkl.training.spec import RunSpec
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny

WORDS = [f"w{i}" for i in range(24)]


def write_rows(path: Path, count: int = 40, **changes: Any) -> Path:
    rows = []
    for i in range(count):
        prompt = " ".join(WORDS[(i * 5 + j * 3) % 24] for j in range(1 + i % 5))
        response = " ".join(WORDS[(i + j * j) % 24] for j in range(2 + i % 6))
        rows.append({"id": f"r{i}", "prompt": prompt, "response": response} | changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(root: Path, **sections: Any) -> dict[str, Any]:
    """A whole config under ``root``; ``sections`` are merged into its sections.

    The teacher is written there on the first call.
    """
    teacher, data = root / "teacher", root / "data.jsonl"
    if not teacher.exists():
        tiny.save(tiny.llama(), teacher)
        write_rows(data)
    values: dict[str, Any] = {
        "run": {"name": "r", "dir": str(root / "runs"), "seed": 3, "device": "cpu"},
        "teacher": {"model": str(teacher), "dtype": "fp32"},
        "student": {"init": "prune", "layers": 2},
        "data": {"path": str(data), "max_prompt_tokens": 40, "max_tokens": 80},
        "objective": {"name": "drkl", "gamma": 0.5},
        "training": {
            "max_steps": 6,
            "tokens_per_step": 120,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "eval_every": 2,
            "save_every": 2,
            "arguments": {"logging_steps": 1},
        },
        "evaluation": {"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
    }
    for name, section in copy.deepcopy(sections).items():
        both = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | section if both else section
    return values


STAGES = [{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 4}}]


def specs(values: dict[str, Any], overrides: Sequence[str] = ()) -> list[RunSpec]:
    return load_config(values, overrides)[0].specs()


def train(values: dict[str, Any], mode: Mode = "new", listener: Listener | None = None) -> RunFolder:
    return distill(specs(values), mode=mode, listener=listener, command=["drkl", "distill", mode])


def write_config(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def environment() -> dict[str, str]:
    """One thread: the same sums in the same order, and room for others."""
    source = str(Path(__file__).parents[2] / "src")
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source, "PYTHONWARNINGS": "default"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "drkl.cli", *map(str, arguments)]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True)


def call_killed(moment: str, number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same, in a process that kills itself at a moment that `tests.training.killed` knows."""
    words = [sys.executable, "-m", "tests.training.killed", moment, str(number), *map(str, arguments)]
    root = Path(__file__).parents[2]
    variables = environment()
    variables["PYTHONPATH"] += f"{os.pathsep}{root}"
    return subprocess.run(words, env=variables, capture_output=True, text=True)


def plant_heldout_losses(monkeypatch: pytest.MonkeyPatch, loss_at: Callable[[int], float]) -> None:
    """Held-out losses by their step, in the place of those that are measured: which is the best is no luck then."""
    log = DistillationTrainer.log

    def planted(self: DistillationTrainer, logs: dict[str, float], *args: Any, **words: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = loss_at(self.state.global_step)  # in place, for the choice of the best
        log(self, logs, *args, **words)

    monkeypatch.setattr(DistillationTrainer, "log", planted)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path under a folder, drkl's cache aside, with the contents of the files."""
    paths = [path for path in sorted(root.rglob("*")) if path.relative_to(root).parts[0] != "drkl-cache"]
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def weights(run: RunFolder) -> bytes:
    return (run.student_path / "model.safetensors").read_bytes()


def steps(run: RunFolder) -> list[int]:
    """The steps of the training lines of the log."""
    return [row["step"] for row in run.read_train_log() if "loss" in row]
