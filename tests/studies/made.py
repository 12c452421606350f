"""Folders of studies as runs would leave them, with the numbers that a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drkl.evaluation.result import Evaluation, Numbers
from drkl.runs import RunFolder, write_json, write_jsonl, write_yaml
from drkl.sealed import sealed
from drkl.studies.definition import Definition
from drkl.studies.grid import Cell, cells_of

ROWS, TOKENS = 8, 5
PROMPTS, SAMPLES = 6, 2
WORDS = "the cat sat on a mat while dogs ran past old houses and rivers".split()
TEACHER = {"rkl": 0.0, "entropy": 2.0, "overconfidence": 0.0, "confidence": 0.5, "accuracy": 0.4}
Values = Callable[[Cell], Mapping[str, float | None]]


def definition(**changes: Any) -> Definition:
    values: dict[str, Any] = {
        "name": "s",
        "base": "quickstart",
        "axes": {"objective.name": ["fkl", "rkl", "drkl"], "run.seed": [0, 1, 2]},
        "baseline": {"objective.name": "rkl"},
        "decide": ["rkl"],
    }
    return Definition(**(values | changes))


def heldout(values: Mapping[str, float | None], model: str, seed: int) -> list[dict[str, Any]]:
    """Rows whose means over tokens are these values."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (ROWS, len(values)))
    noise -= noise.mean(0)
    known = {name: value for name, value in ({"confidence": 0.5, "accuracy": 0.4} | dict(values)).items() if value}
    return [
        {"model": model, "row_id": f"r{row}", "num_tokens": TOKENS, "bins": {"width": [], "mass": []},
         "sums": {name: TOKENS * (value + noise[row, place % noise.shape[1]])
                  for place, (name, value) in enumerate(known.items())}}
        for row in range(ROWS)
    ]  # fmt: skip


def answers(model: str, seed: int, temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """Answers that are more varied the higher the temperature."""
    generator = np.random.default_rng(seed)
    lines = []
    for temperature in temperatures:
        for prompt in range(PROMPTS):
            for sample in range(SAMPLES):
                words = generator.choice(WORDS[: round(7 * temperature**2)], 16)
                lines.append(
                    {"model": model, "prompt_id": f"p{prompt}", "prompt": f"say {prompt}", "sample": sample,
                     "sampling_temperature": temperature, "text": " ".join(words), "num_tokens": 9, "ended": True,
                     "reference": " ".join(WORDS[prompt : prompt + 5])}
                )  # fmt: skip
    return lines


def evaluation(
    values: Mapping[str, float | None],
    seed: int = 0,
    teacher: Mapping[str, float] = TEACHER,
    scaled: Mapping[str, float] | None = None,
    **settings: Any,
) -> Evaluation:
    """An evaluation with these numbers of the student, and with the lines behind those that are over tokens."""
    temperatures = settings.pop("temperatures", ())
    models = {"teacher": dict(teacher), "student": dict(values)}
    more = {} if scaled is None else {"scaled": dict(scaled)}
    lines: dict[str, Any] = {
        "heldout": [
            *heldout(values, "student", seed),
            *heldout(teacher, "teacher", 99),
            *(line for name, own in more.items() for line in heldout(own, name, seed)),
        ],
        "samples": [line for place, model in enumerate(models) for line in answers(model, seed + place, temperatures)],
    }
    known = {"sampling_temperature": 1.0, "prompts": PROMPTS if temperatures else 0, "max_new_tokens": 20, "seeds": [0]}
    return Evaluation(Numbers(models | more), known | settings, lines=lines)  # type: ignore[arg-type]


def write_cell(
    folder: Path,
    cell: Cell,
    values: Mapping[str, float | None],
    *,
    start: str = "weights",
    steps: int = 100,
    tokens: int = 5000,
    place: str | None = None,
    made: Evaluation | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """A finished cell. Of a seed all begin from the same weights."""
    seed = cell.axes.get("run.seed", 0)
    run = RunFolder(folder / "cells" / (place or cell.name))
    run.root.mkdir(parents=True)
    write_yaml(run.config_path, {"run": {"name": cell.name, "seed": seed}, "training": {"tokens_per_step": 50},
                                 "objective": {"name": cell.axes.get("objective.name", "drkl")}})  # fmt: skip
    write_jsonl(run.train_log_path, [{"step": steps, "num_tokens": tokens}])
    inputs = {
        "student": {"weights": f"{start} {seed}"}, "teacher": {"weights": "teacher"},
        "rows": {"training rows": {"digest": "t"}, "held-out rows": {"digest": "h"}},
        "settings": {"training.arguments.load_best_model_at_end": True},
    }  # fmt: skip
    run.write_env(
        {"started": "2026-01-02", "finished": "2026-01-03", "steps": steps, "seconds": 60.0, "inputs": inputs}
    )
    tries = [{"began": f"2026-01-0{1 + seed % 9}", "ended": "2026-01-09", "status": 0, "message": None}]
    known = {"axes": cell.axes, "tries": tries, "seconds": {"start": 20.0, "evaluate": 30.0}, "finished": "2026-01-09"}
    write_json(run.root / "cell.json", sealed(known | dict(about or {})))
    (made or evaluation(values, len(cell.name) + seed)).save(run.root)
    return run.root


def write_study(folder: Path, asked: Definition, values: Values, **words: Any) -> Path:
    """A study of which every cell is done."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "study.yaml", asked.model_dump(mode="json"))
    for cell in cells_of(asked):
        write_cell(folder, cell, values(cell), **words)
    return folder


def planted(shift: Mapping[str, float], spread: float = 0.02, metric: str = "rkl") -> Values:
    """Values by objective with a noise of their own, and a large effect of the seed that all cells share."""

    def values(cell: Cell) -> dict[str, float]:
        seed, name = cell.axes["run.seed"], str(cell.axes["objective.name"])
        noise = np.random.default_rng([seed, *name.encode()]).normal(0, spread)
        return {metric: float(1.0 + 0.3 * np.sin(seed) + shift.get(name, 0.0) + noise)}

    return values
