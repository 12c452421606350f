"""A run folder as the other rooms write it, made of invented numbers."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drkl.runs import RunFolder, write_json, write_jsonl, write_yaml

WARMUP_STEPS, LAST_STEPS = 170, 180
PROMPTS = [
    ("Why do cats purr?", "Cats purr when they are content, but also when they are hurt or want food."),
    ("Name three rivers in Europe.", "The Danube, the Rhine and the Volga."),
    ("What is a good way to start running?", "Start slowly. Alternate walking and jogging three times a week."),
    ("Give me a recipe for pancakes.", "Mix two eggs, 200 g of flour and 300 ml of milk.\nFry thin layers in butter."),
    ("Is a tomato a fruit?", "Botanically yes: it is a berry. In the kitchen it is used as a vegetable."),
    ("Who wrote Frankenstein?", "Mary Shelley wrote it; it was published in 1818."),
    ("Explain what a mortgage is to a child.", "You borrow money to buy a house and pay it back a bit each month."),
    ("What can I do on a rainy day?", "Read, bake bread, visit a museum, or watch a film with friends."),
    ("Classify: rose, oak, tulip, pine.", "Flowers: rose, tulip. Trees: oak, pine."),
    ("What is the tallest mountain on Earth?", "Mount Everest, 8,849 metres above sea level."),
]
METRICS = {
    "teacher": [0, 0, 0, 1.0, 2.71, 0.482, 2.32, 0.531, 0.0, 0.0, 0.0, 0.0, 23.9, 0.71, 0.93, 17.2],
    "before": [8.91, 11.73, 0.96, 0.021, 11.4, 0.017, 7.9, 0.113, 0.104, -0.418, 5.58, -0.517, 1.1, 0.93, 0.99, 1.4],
    "warmup": [2.34, 3.24, 0.61, 0.348, 4.43, 0.312, 4.57, 0.288, 0.071, -0.243, 2.25, -0.312, 11.8, 0.82, 0.97, 5.1],
    "after": [2.62, 2.54, 0.59, 0.353, 4.62, 0.318, 3.05, 0.417, 0.128, -0.114, 0.73, -0.246, 13.2, 0.74, 0.94, 11.8],
}
KEYS = [
    "fkl", "rkl", "tvd", "agreement", "nll", "accuracy", "entropy", "confidence", "overconfidence", "confidence_gap",
    "entropy_gap", "target_gap", "rouge_l", "distinct_1", "distinct_2", "self_bleu",
]  # fmt: skip
TEACHER_KEYS = ["fkl", "rkl", "tvd", "agreement", "overconfidence", "confidence_gap", "entropy_gap", "target_gap"]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name="quickstart", ...)``: a run folder under ``tmp_path``; see ``write_run``."""
    return lambda name="quickstart", **choices: write_run(tmp_path / "runs" / name, **choices)


def write_run(
    root: Path,
    *,
    objective: str = "drkl",
    teacher: bool = True,
    warmup: bool = True,
    evaluated: bool = True,
    changes: dict[str, dict[str, Any]] | None = None,
) -> RunFolder:
    """Write a whole run; ``changes`` maps a model to the metrics that are to differ."""
    stages = [(root / "stages" / "01-warmup", "fkl", WARMUP_STEPS, 0)] if warmup else []
    for folder, name, steps, offset in [*stages, (root, objective, LAST_STEPS, WARMUP_STEPS if warmup else 0)]:
        name = name if teacher else "ce"
        write_yaml(folder / "config.yaml", _config(root.name, name, steps, teacher, warmup))
        write_json(folder / "env.json", _env())
        write_jsonl(folder / "train.jsonl", _log(steps, offset, teacher))
    run = RunFolder(root)
    if evaluated:
        write_json(run.eval_path, evaluation(teacher=teacher, warmup=warmup, changes=changes))
        write_jsonl(run.samples_path, _samples([m for m in METRICS if _present(m, teacher, warmup)]))
    return run


def evaluation(*, teacher: bool = True, warmup: bool = True, changes: dict[str, dict[str, Any]] | None = None) -> dict:
    """What ``eval.json`` holds."""
    models = [model for model in METRICS if _present(model, teacher, warmup)]
    result: dict[str, Any] = {
        "settings": {
            "prompts": 24, "samples_per_prompt": 4, "sampling_temperature": 1.0, "max_new_tokens": 64, "seed": 0,
            "versions": {"rouge-score": "0.1.2", "sacrebleu": "2.5.1"},
        }
    }  # fmt: skip
    for model in models:
        values: dict[str, Any] = dict(zip(KEYS, METRICS[model], strict=True)) | {"num_tokens": 6821}
        if not teacher:
            values |= dict.fromkeys(TEACHER_KEYS)
        result[model] = values | (changes or {}).get(model, {})
    edges = {"entropy": [i * 11.0 / 30 for i in range(31)], "confidence": [i / 30 for i in range(31)]}
    result["distributions"] = {"edges": edges} | {
        model: {
            "entropy": _bell(edges["entropy"], METRICS[model][6], 1.6),
            "confidence": _bell(edges["confidence"], METRICS[model][7], 0.28),
        }
        for model in models
    }
    result["timing"] = {"teacher_forced": 61.2, "generation": 158.0}
    return result


def _present(model: str, teacher: bool, warmup: bool) -> bool:
    return (teacher or model != "teacher") and (warmup or model != "warmup")


def _bell(edges: list[float], centre: float, width: float) -> list[int]:
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    weights = [math.exp(-(((middle - centre) / width) ** 2) / 2) for middle in middles]
    return [round(6821 * weight / sum(weights)) for weight in weights]


def _config(name: str, objective: str, steps: int, teacher: bool, warmup: bool) -> dict[str, Any]:
    return {
        "run": {"name": name, "dir": "runs", "seed": 0, "device": "auto"},
        "teacher": {"model": "smollm2-135m-instruct", "dtype": "bfloat16"} if teacher else None,
        "student": {"init": "prune", "model": None, "layers": 9, "dtype": "float32"},
        "data": {"path": "bundled:dolly", "eval_path": "bundled:dolly-eval", "max_prompt_tokens": 256},
        "objective": {"name": objective} | ({"gamma": 0.5} if objective == "drkl" else {}),
        "loss": {"temperature": 1.0, "kd_weight": 1.0, "t2_scaling": False},
        "training": {"max_steps": steps, "tokens_per_step": 900, "learning_rate": 5e-4, "precision": "bf16"},
        "stages": [{"name": "warmup"}] if warmup else [],
        "evaluation": {"prompts": 24, "samples_per_prompt": 4, "sampling_temperature": 1.0, "max_new_tokens": 64},
    }


def _env() -> dict[str, Any]:
    return {
        "drkl": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "git_commit": "0123abc",
        "device": "cpu", "device_name": "CPU", "num_threads": 2, "platform": "Linux",
        "command": ["/somewhere/.venv/bin/drkl", "distill", "recipes/quickstart.yaml"],
        "started": "2025-01-02T10:00:00+00:00", "finished": "2025-01-02T10:07:20+00:00", "seconds": 440.0,
        "data": {"train_rows": 1976, "heldout_rows": 100, "responses_cut": 3,
                 "dropped": {"prompt_too_long": 24, "empty_response": 0}},
        "parameters": {"student": 60_000_000, "teacher": 134_515_008},
    }  # fmt: skip


def _log(steps: int, offset: int, teacher: bool) -> list[dict[str, Any]]:
    noise, rows = random.Random(offset), []
    starts, ends = ((8.9, 11.7, 7.9, 0.02), (2.34, 3.24, 4.57, 0.348)) if not offset else (
        (2.34, 3.24, 4.57, 0.348), (2.62, 2.54, 3.05, 0.353))  # fmt: skip
    for step in range(5, steps + 1, 5):
        speed = 22 if not offset else 30
        fkl, rkl, entropy, agreement = (
            end + (start - end) * math.exp(-step / speed) for start, end in zip(starts, ends, strict=True)
        )
        shake = noise.gauss(1, 0.05)
        row: dict[str, Any] = {
            "step": step, "loss": (rkl if offset else fkl) * shake, "grad_norm": 1 + 3 * noise.random(),
            "learning_rate": 5e-4 * (1 + math.cos(math.pi * step / steps)) / 2, "num_tokens": 900 * step,
            "tokens_per_second": 350 + noise.gauss(0, 20), "seconds": 2.4 * step,
        }  # fmt: skip
        known = {"fkl": fkl * shake, "rkl": rkl * shake, "student_entropy": entropy * noise.gauss(1, 0.03),
                 "teacher_entropy": noise.gauss(2.32, 0.1), "agreement": agreement * noise.gauss(1, 0.06)}  # fmt: skip
        rows.append(row | (known if teacher else {"student_entropy": entropy}))
        if step % 30 == 0 or step == steps:
            held = {"step": step, "eval_loss": rkl if offset else fkl, "eval_nll": fkl + 2, "seconds": 2.4 * step,
                    "eval_student_entropy": entropy}  # fmt: skip
            known = {"eval_fkl": fkl, "eval_rkl": rkl, "eval_agreement": agreement, "eval_teacher_entropy": 2.32}
            rows.append(held | (known if teacher else {}))
    return rows


def _samples(models: list[str]) -> list[dict[str, Any]]:
    noise, rows = random.Random(5), []
    for number, (prompt, reference) in enumerate(PROMPTS):
        words = reference.split()
        for model in models:
            for sample in range(4):
                text = reference if model == "teacher" else " ".join(noise.choices(words, k=min(30, 3 * len(words))))
                if model == "before":
                    text = " ".join(noise.choices(["##ule", "ivated", "of of", "\n", "Qu", "1", "the", "ĠĠ"], k=24))
                rows.append({
                    "model": model, "prompt_id": f"row-{number}", "prompt": prompt, "sampling_temperature": 1.0,
                    "sample": sample, "text": "" if (number, model, sample) == (1, "warmup", 0) else text,
                    "reference": reference, "num_tokens": 64 if model == "before" else len(text.split()) + 1,
                })  # fmt: skip
    return rows


def add_sample(run: RunFolder, **fields: Any) -> None:
    """Put one more row in front of ``samples.jsonl``."""
    row = {"model": "after", "prompt_id": "odd", "prompt": "p", "sampling_temperature": 1.0, "sample": 0, "text": "t",
           "reference": "r", "num_tokens": 3}  # fmt: skip
    old = run.samples_path.read_text(encoding="utf-8")
    run.samples_path.write_text(json.dumps(row | fields) + "\n" + old, encoding="utf-8")
