"""A study of invented numbers, near those of docs/results/quickstart; its verdicts are scipy's."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from drkl.evaluation.declared import metrics_of
from drkl.evaluation.result import Evaluation, Numbers, Reliability, ReliabilityBins, SweepPoint
from drkl.studies.cells import CellResult, Foretold, State, Verdict
from drkl.studies.definition import Definition, Prediction, Primary
from drkl.studies.result import Study

MEANS = {
    "rkl": {"fkl": 2.794, "rkl": 2.549, "drkl": 2.525}, "fkl": {"fkl": 1.832, "rkl": 2.559, "drkl": 2.380},
    "agreement": {"fkl": 0.404, "rkl": 0.369, "drkl": 0.371}, "ece": {"fkl": 0.014, "rkl": 0.221, "drkl": 0.154},
    "overconfidence": {"fkl": 0.001, "rkl": 0.205, "drkl": 0.140},
    "calibration_gap": {"fkl": 0.012, "rkl": 0.221, "drkl": 0.154},
    "tail_rkl": {"fkl": 2.507, "rkl": 2.296, "drkl": 2.198}, "rouge_l": {"fkl": 9.55, "rkl": 11.74, "drkl": 11.37},
    "distinct_2": {"fkl": 0.945, "rkl": 0.837, "drkl": 0.857}, "self_bleu": {"fkl": 2.46, "rkl": 5.36, "drkl": 5.83},
}  # fmt: skip
NOISE = {
    "rkl": 0.012, "fkl": 0.02, "agreement": 0.003, "ece": 0.004, "overconfidence": 0.004, "calibration_gap": 0.004,
    "tail_rkl": 0.015, "rouge_l": 0.35, "distinct_2": 0.012, "self_bleu": 0.8,
}  # fmt: skip
TEACHER = {"ece": 0.064, "overconfidence": 0.0, "rouge_l": 13.2, "distinct_2": 0.923, "self_bleu": 5.52}
SWEEP = {
    "teacher": [(18.2, 0.742), (18.4, 0.821), (13.2, 0.923), (8.6, 0.975), (3.3, 0.993)],
    "fkl": [(15.8, 0.504), (14.5, 0.738), (9.6, 0.945), (7.8, 0.985), (4.7, 0.998)],
    "rkl": [(13.1, 0.411), (13.2, 0.555), (11.7, 0.837), (10.3, 0.939), (6.8, 0.99)],
    "drkl": [(13.2, 0.417), (13.1, 0.627), (11.4, 0.857), (9.3, 0.959), (6.0, 0.984)],
}
TEMPERATURES = (0.5, 0.7, 1.0, 1.2, 1.5)
CLASSES = {
    "rkl": 0.21, "fkl": 0.19, "agreement": 0.86, "ece": 0.05, "overconfidence": 0.04, "calibration_gap": 0.05,
    "accuracy": 0.85, "macro_f1": 0.845, "num_rows": 3080.0,
}  # fmt: skip
OBJECTIVES = "ce fkl rkl srkl sfkl gjs js akl tvd dkd ab symmetric drkl".split()


def example(
    *,
    objectives: Sequence[str] = ("fkl", "rkl", "drkl"),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    variants: Sequence[str] = (),
    baseline: str = "rkl",
    task: str = "generation",
    states: dict[tuple[str, int], tuple[State, str | None]] | None = None,
    primary: Sequence[tuple[str, str, str]] | None = None,
    curves: bool = True,
    metrics: Sequence[str] | None = None,
    **more: Any,
) -> Study:
    """A study with its cells' evaluations; nothing is written.

    Args:
        states: by name and seed what is not done, with its message.
        metrics: what is decided on; default all that the example has.
        primary: metric, cell and against; default the six of the issue, or none for other objectives.
        more: fields of Study in place of the invented ones.
    """
    names, axis = (list(variants), "variant") if variants else (list(objectives), "objective.name")
    decide = list(metrics or [key for key in (MEANS if task == "generation" else CLASSES) if key != "num_rows"])
    if primary is None:
        pairs = [("drkl", "rkl"), ("drkl", "fkl")] if {"drkl", "rkl", "fkl"} <= {*names} else []
        keys = ("overconfidence", "distinct_2" if task == "generation" else "ece", "rkl")
        primary = [(key, *pair) for pair in pairs for key in keys]
    folder = Path("studies/instruction")
    cells = [
        _cell(folder, name, axis, seed, place, decide, task, (states or {}).get((name, seed)), curves)
        for seed in seeds
        for place, name in enumerate(names)
    ]
    definition = Definition(
        name="instruction",
        base="quickstart",
        axes={"run.seed": list(seeds)} | ({} if variants else {axis: names}),
        variants={name: {"objective.gamma": 0.1 * place} for place, name in enumerate(variants)},
        baseline={axis: baseline},
        decide=decide,
        smallest_difference={"rkl": 0.05},
        primary=[Primary(metric=key, cell={axis: a}, against={axis: b}) for key, a, b in primary],
    )
    rows = [
        *(_verdict(cells, axis, a, b, key, task, len(primary)) for key, a, b in primary),
        *(
            _verdict(cells, axis, name, baseline, key, task, 0)
            for key in decide
            for name in names
            if name != baseline and (key, name, baseline) not in primary
        ),
    ]
    return Study(**({
        "definition": definition, "folder": folder, "cells": tuple(cells), "verdicts": tuple(rows),
        "predictions": _predictions(axis, rows) if primary else (),
        "predicted": {"commit": "0123abcdef456789", "date": "2026-11-29T09:12:00+01:00", "is_changed": False},
        "task": task, "began": "2026-11-29T10:02:11+00:00",
    } | more))  # fmt: skip


def _predictions(axis: str, rows: Sequence[Verdict]) -> tuple[Foretold, ...]:
    asked = [
        Prediction(text="DRKL is less overconfident than RKL.", metric="overconfidence", cell={axis: "drkl"},
                   against={axis: "rkl"}, expect="better"),
        Prediction(text="DRKL is further from its teacher by reverse KL than RKL, which minimises it.", metric="rkl",
                   cell={axis: "drkl"}, against={axis: "rkl"}, expect="worse"),
        Prediction(text="FKL’s students are the most varied of the three, and DRKL’s are between.", expect=None),
    ]  # fmt: skip
    told = []
    for one in asked:
        pair = ("drkl", "rkl")
        found = [row for row in rows if row.metric == one.metric and (row.axes[axis], row.baseline[axis]) == pair]
        row = found[0] if found else None
        verdict = row.verdict if row else None
        came = None if row is None or verdict == "undecided" else verdict == one.expect
        told.append(Foretold(one, verdict, came))
    return tuple(told)


def _mean(name: str, key: str, place: int, task: str) -> float:
    if task == "classification":
        return CLASSES[key] * (1 + 0.02 * ((place * 7) % 5 - 2))
    known = MEANS[key]
    return known.get(name, known["rkl"] + (known["drkl"] - known["rkl"]) * ((place * 5) % 7) / 4)


def _cell(folder: Path, name: str, axis: str, seed: int, place: int, keys: Sequence[str], task: str,
          state: tuple[State, str | None] | None, curves: bool) -> CellResult:  # fmt: skip
    draw = random.Random(f"{name}-{seed}")
    shared = random.Random(f"seed-{seed}")
    common = {key: shared.gauss(0, 1) for key in keys}
    noise = {key: NOISE.get(key, 0.004) for key in keys}
    values = {key: _mean(name, key, place, task) + noise[key] * (common[key] + 0.5 * draw.gauss(0, 1)) for key in keys}
    if task == "classification":
        values["num_rows"] = 3080.0
    axes, run = {axis: name, "run.seed": seed}, folder / "cells" / f"cell-{place}-seed{seed}"
    if state is not None and state[0] != "done":
        spent = {"train": 300.0} if state[0] == "failed" else {}
        return CellResult(f"{name}-seed{seed}", axes, run, *state, seconds=spent)
    evaluation = _evaluation(name, values, draw, task) if curves else None
    return CellResult(
        f"{name}-seed{seed}", axes, run, "done", start=f"{seed:x}3f9a2c1d40e7", metrics=values,
        teacher={key: TEACHER[key] for key in keys if key in TEACHER},
        seconds={"start": 95.0, "train": 610.0 + draw.gauss(0, 15), "evaluate": 214.0 + draw.gauss(0, 5)},
        budget={"steps": 360, "tokens": 812_000 + 900 * seed, "selection": "last step", "heldout_rows": 100,
                "sampling": {"prompts": 64, "samples_per_prompt": 4, "max_new_tokens": 64}},
        evaluation=evaluation,
    )  # fmt: skip


def _evaluation(name: str, values: dict[str, float], draw: random.Random, task: str) -> Evaluation:
    edges = [place / 15 for place in range(16)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]

    def bins(gap: float) -> ReliabilityBins:
        counts = [168, 454, 555, 640, 590, 567, 527, 497, 433, 374, 307, 278, 317, 264, 638]
        right = [max(0.0, min(1.0, x - gap * (0.4 + 1.6 * x * (1 - x) * 2) + draw.gauss(0, 0.012))) for x in middles]
        return ReliabilityBins(counts, list(middles), list(right))

    teacher: dict[str, float | None] = {key: TEACHER.get(key, 0.0) for key in values}

    def point(temperature: float, x: float, y: float, spread: float) -> SweepPoint:
        varied = min(1.0, y + draw.gauss(0, 0.024 * spread))
        return SweepPoint(temperature, {"rouge_l": x + draw.gauss(0, spread), "distinct_2": varied}, {})

    sweep = {
        model: [point(t, x, y, spread) for t, (x, y) in zip(TEMPERATURES, SWEEP.get(own, SWEEP["drkl"]), strict=True)]
        for model, own, spread in (("teacher", "teacher", 0.0), ("student", name, 0.4))
    }
    return Evaluation(
        Numbers({"teacher": teacher, "student": dict(values)}),
        {"sampling_temperature": 1.0, "versions": {"drkl": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"}},
        task=task,
        sweep=sweep if task == "generation" else {},
        reliability=Reliability(edges, {"teacher": bins(0.06), "student": bins(values.get("calibration_gap", 0.1))}),
    )


def _verdict(
    cells: Sequence[CellResult], axis: str, name: str, other: str, key: str, task: str, family: int
) -> Verdict:
    """A verdict as the statistics would give it, but for Holm's steps: every p is multiplied by the family's size."""
    sides = [
        {cell.axes["run.seed"]: cell for cell in cells if cell.axes[axis] == of and cell.state == "done"}
        for of in (name, other)
    ]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    own, base = ([side[seed].metrics[key] for seed in seeds] for side in sides)
    differences = np.array(own) - np.array(base)
    row: dict[str, Any] = {
        "metric": key, "axes": {axis: name}, "baseline": {axis: other}, "seeds": len(seeds), "exploratory": not family,
        "by_seed": dict(zip(seeds, map(float, differences), strict=True)), "p_holm": None, "interval": None,
        "difference": float(differences.mean()) if seeds else None, "verdict": "undecided",
    }  # fmt: skip
    if len(seeds) < 2:
        return Verdict(**row | {"why": f"{len(seeds)} pair of seeds: at least two are needed."})
    better = metrics_of(task)[key].better
    ideal = {"zero": 0.0, "teacher": TEACHER.get(key, 0.0)}.get(better)
    apart = np.abs(np.array(own) - ideal) - np.abs(np.array(base) - ideal) if ideal is not None else differences
    t, p = (float(value) for value in stats.ttest_1samp(apart, 0))
    degrees = len(seeds) - 1

    def ends(values: np.ndarray) -> tuple[float, float]:
        half = stats.t.ppf(0.975, degrees) * values.std(ddof=1) / len(values) ** 0.5
        return float(values.mean() - half), float(values.mean() + half)

    holm = min(1.0, p * family) if family else None
    is_decided = (holm if holm is not None else p) <= 0.05
    is_less = apart.mean() < 0
    good = is_less == (better in ("lower", "zero", "teacher"))
    row |= {
        "interval": ends(differences), "t": t, "p": p, "p_holm": holm,
        "verdict": ("better" if good else "worse") if is_decided else "undecided",
        "t_needed": float(stats.t.ppf(1 - 0.025 / max(family, 1), degrees)), "seeds_needed": None if is_decided else 9,
        "prompts_interval": (float(differences.mean()) - 0.02, float(differences.mean()) + 0.02),
        "distance": (float(apart.mean()), ends(apart)) if ideal is not None else None,
    }  # fmt: skip
    low, high = row["interval"]
    if key == "rkl" and low > -0.05 and high < 0.05:
        row["verdict"] = "no difference"
    return Verdict(**row)
