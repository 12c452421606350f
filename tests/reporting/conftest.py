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

from drkl.evaluation.findings import of_analysis
from drkl.runs import RunFolder, read_json, write_json, write_jsonl, write_yaml

ANALYSIS = Path(__file__).resolve().parents[2] / "docs" / "results" / "quickstart.analysis.json"

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
    "student": [2.62, 2.54, 0.59, 0.353, 4.62, 0.318, 3.05, 0.417, 0.128, -0.114, 0.73, -0.246, 13.2, 0.74, 0.94, 11.8],
}
KEYS = [
    "fkl", "rkl", "tvd", "agreement", "nll", "accuracy", "entropy", "confidence", "overconfidence", "confidence_gap",
    "entropy_gap", "target_gap", "rouge_l", "distinct_1", "distinct_2", "self_bleu",
]  # fmt: skip
TEMPERATURES = [0.5, 0.7, 1.0, 1.2, 1.5]
# Keys that a file from before the sweep does not have, with a value that is as good as any.
NEW_KEYS = {
    "rouge_1": 20.0, "rouge_l_best": 24.0, "bleu": 2.1, "ece": 0.04, "brier": 0.6, "tail_rkl": 2.2,
    "tail_mass": 0.14, "overlap_10": 0.41, "rank_correlation": 0.37, "ended": 0.8, "num_answers": 96,
}  # fmt: skip
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
    swept: bool = False,
) -> RunFolder:
    """Write a whole run; ``changes`` maps a model to the metrics that are to differ.

    ``swept``: with intervals, the sweep over temperatures and all else that only newer files have.
    """
    stages = [(root / "stages" / "01-warmup", "fkl", WARMUP_STEPS, 0)] if warmup else []
    for folder, name, steps, offset in [*stages, (root, objective, LAST_STEPS, WARMUP_STEPS if warmup else 0)]:
        name = name if teacher else "ce"
        write_yaml(folder / "config.yaml", _config(root.name, name, steps, teacher, warmup))
        write_json(folder / "env.json", _env())
        write_jsonl(folder / "train.jsonl", _log(steps, offset, teacher))
    run = RunFolder(root)
    if evaluated:
        models = [m for m in METRICS if _present(m, teacher, warmup)]
        found = evaluation(teacher=teacher, warmup=warmup, changes=changes)
        write_json(run.eval_path, sweep(found, models) if swept else found)
        write_jsonl(run.samples_path, _samples(models, TEMPERATURES if swept else [1.0]))
    return run


def evaluation(*, teacher: bool = True, warmup: bool = True, changes: dict[str, dict[str, Any]] | None = None) -> dict:
    """What ``eval.json`` holds."""
    models = [model for model in METRICS if _present(model, teacher, warmup)]
    result: dict[str, Any] = {
        "format": 2, "task": "generation",
        "settings": {
            "prompts": 24, "samples_per_prompt": 4, "sampling_temperature": 1.0, "max_new_tokens": 64, "seed": 0,
            "versions": {"rouge-score": "0.1.2", "sacrebleu": "2.5.1"},
        },
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


def sweep(found: dict[str, Any], models: list[str]) -> dict[str, Any]:
    """Give an evaluation the sections of a sweep."""
    found["settings"] |= {"sweep": TEMPERATURES, "seeds": [0], "gamma": 0.5, "task": "generation", "protocol": None}
    found["sweep"] = {model: [_at(found[model], t) for t in TEMPERATURES] for model in models}
    for model in models:
        found[model] |= NEW_KEYS
        found[model] |= {key: found["sweep"][model][2][key] for key in ("rouge_l", "distinct_2", "self_bleu")}
    found["intervals"] = {
        model: {key: _around(found[model][key], 0.06) for key in ("rkl", "fkl", "agreement", "rouge_l", "distinct_2")
                if found[model].get(key)}
        for model in models
    }  # fmt: skip
    found["coverage"] = {
        model: {"samples": [1, 2, 3, 4], "rouge_l_best": [found[model]["rouge_l"] * (1 + 0.35 * math.log(k))
                for k in (1, 2, 3, 4)], "distinct_answers": [k**0.97 for k in (1, 2, 3, 4)]}
        for model in models
    }  # fmt: skip
    edges = [i / 15 for i in range(16)]
    bins = {model: _bins(_bell(edges, METRICS[model][7], 0.3), place) for place, model in enumerate(models)}
    found["reliability"] = {"edges": edges, **bins, "mass": bins}
    found["distributions"]["edges"]["target"] = [i / 30 for i in range(31)]
    for model in models:
        found["distributions"][model]["target"] = _bell([i / 30 for i in range(31)], METRICS[model][7] * 0.8, 0.28)
    ranks = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500]
    steep = {"teacher": 1.7, "before": 0.1, "warmup": 1.1, "student": 1.4}
    found["tail"] = {"ranks": ranks} | {m: [METRICS[m][7] * r ** -steep[m] / 2 for r in ranks] for m in models}
    return found


def _at(values: dict[str, Any], temperature: float) -> dict[str, Any]:
    warm = temperature - 1
    row = {
        "sampling_temperature": temperature,
        "rouge_l": values["rouge_l"] * (1 - 0.45 * warm),
        "distinct_2": min(0.995, values["distinct_2"] * (1 + 0.12 * warm)),
        "self_bleu": values["self_bleu"] * math.exp(-1.4 * warm),
    }
    shares = {"rouge_l": 0.08, "distinct_2": 0.01, "self_bleu": 0.08}
    return row | {"intervals": {key: _around(row[key], share) for key, share in shares.items()}}


def _around(value: float, share: float) -> list[float]:
    return [value * (1 - share), value * (1 + share)]


def _bins(counts: list[int], place: int) -> dict[str, Any]:
    middles = [(i + 0.5) / 15 if count else None for i, count in enumerate(counts)]
    return {"tokens": counts, "confidence": middles, "accuracy": [m and m ** (1 + 0.2 * place) for m in middles]}


def write_pair(root: Path, **changes: Any) -> RunFolder:
    """The folder of an outside pair, without config.yaml; ``changes`` goes into the file."""
    found = sweep(evaluation(warmup=False), ["teacher", "student"])
    del found["before"], found["distributions"]["before"]
    found["settings"] |= {
        "models": {"teacher": "org/teacher", "student": "models/small"}, "data": {"path": "rows.jsonl", "rows": 100},
        "command": ["/somewhere/bin/drkl", "evaluate", "--student", "models/small", "--teacher", "org/teacher",
                    "--data", "rows.jsonl", "--output", "out/pair"],
    }  # fmt: skip
    values = {key: found["student"][key] for key in ("rouge_l", "distinct_2", "rkl")}
    suite = {"student": values, "teacher": {"rouge_l": 23.0}, "intervals": {"student": {"rouge_l": [12.0, 14.5]}}}
    found["suites"] = {"dolly": suite, "vicuna": {"student": values}}
    text = json.dumps(found | changes).replace('"student"', '"student"')
    run = RunFolder(root)
    write_json(run.eval_path, json.loads(text))
    rows = _samples(["teacher", "student"], TEMPERATURES)
    write_jsonl(run.samples_path, [row | {"model": row["model"].replace("student", "student")} for row in rows])
    return run


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


def _samples(models: list[str], temperatures: list[float]) -> list[dict[str, Any]]:
    noise, rows = random.Random(5), []
    for number, (prompt, reference) in enumerate(PROMPTS):
        words = reference.split()
        for model, temperature, sample in itertools.product(models, temperatures, range(4)):
            text = reference if model == "teacher" else " ".join(noise.choices(words, k=min(30, 3 * len(words))))
            if model == "before":
                text = " ".join(noise.choices(["##ule", "ivated", "of of", "\n", "Qu", "1", "the", "ĠĠ"], k=24))
            if temperature != 1.0:
                text = f"At {temperature}: {text}"
            rows.append({
                "model": model, "prompt_id": f"row-{number}", "prompt": prompt, "sampling_temperature": temperature,
                "sample": sample, "text": "" if (number, model, sample) == (1, "warmup", 0) else text,
                "reference": reference, "num_tokens": 64 if model == "before" else len(text.split()) + 1,
            })  # fmt: skip
    return rows


def write_heldout(run: RunFolder, **changes: float) -> RunFolder:
    """Write ``heldout.jsonl``: 40 rows with a mean of every metric; ``changes`` are added to the student's means."""
    lines = []
    for model in ("teacher", "student"):
        noise = random.Random(3)
        values = dict(zip(KEYS, METRICS[model], strict=True))
        for row in range(40):
            num_tokens = 20 + row % 7
            shake = noise.gauss(0, 0.05)  # what makes a row hard is the same for every run
            keys = ["rkl", "fkl", "tvd", "agreement", "nll", "accuracy", "entropy", "confidence", "overconfidence"]
            means = {key: values[key] + shake + (changes.get(key, 0.0) if model == "student" else 0) for key in keys}
            sums = {key: num_tokens * mean for key, mean in means.items()}
            if model == "student":
                sums |= {"teacher_entropy": num_tokens * (2.32 + shake)}
                sums |= {"teacher_confidence": num_tokens * (0.531 + shake)}
            filled = [[7, num_tokens, sums["confidence"], sums["accuracy"]]]
            line = {"model": model, "row_id": f"row-{row}", "num_tokens": num_tokens, "sums": sums}
            lines.append(line | {"bins": {"width": filled, "mass": filled}})
    write_jsonl(run.root / "heldout.jsonl", lines)
    return run


def write_analysis(run: RunFolder, *, earlier: bool = False, **settings: Any) -> RunFolder:
    """Write the quickstart's committed analysis; ``earlier``: as a drkl without findings wrote it."""
    content = read_json(ANALYSIS)
    if not earlier:
        content["findings"] = [finding.to_json() for finding in of_analysis(content)]
    content["settings"] |= settings
    write_json(run.analysis_path, content)
    return run


def add_sample(run: RunFolder, **fields: Any) -> None:
    """Put one more row in front of ``samples.jsonl``."""
    row = {"model": "student", "prompt_id": "odd", "prompt": "p", "sampling_temperature": 1.0, "sample": 0, "text": "t",
           "reference": "r", "num_tokens": 3}  # fmt: skip
    old = run.samples_path.read_text(encoding="utf-8")
    run.samples_path.write_text(json.dumps(row | fields) + "\n" + old, encoding="utf-8")
