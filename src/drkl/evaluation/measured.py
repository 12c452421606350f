"""One metric of an evaluation by model, with its resamples: what a study takes of each of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.bootstrap import Resampled
from drkl.evaluation.comparison import PROMPTS, ROWS, TEXTS, Unit, in_order
from drkl.evaluation.declared import Metric, metrics_of
from drkl.evaluation.findings import sweep_curve
from drkl.evaluation.paired import MATCHED, Curve, when_as_varied
from drkl.evaluation.result import Evaluation

_UNITS: dict[str, Unit] = {"tokens": ROWS, "answers": PROMPTS, "texts": TEXTS}


class Resamples(NamedTuple):
    """A metric of the models of one evaluation.

    Two evaluations of the same ``ids`` with the same seed meet the same resamples: their columns are paired.
    """

    metric: Metric
    values: dict[str, np.ndarray]
    """By model `[1 + resamples]`: its own number, as in ``eval.json``, and those of resamples of the units; the number
    alone where the lines that can be resampled are not there. Models without the metric are left out."""
    unit: str
    """What was resampled: held-out rows, prompts or texts."""
    ids: list[str]
    """The units, in the order in which they were resampled; empty where they were not."""


def measured(evaluation: Evaluation, key: str, *, seed: int | None = None) -> Resamples:
    """Every model's value of a metric, at the main sampling temperature, with its bootstrap resamples.

    >>> measured(drkl.Evaluation.load("runs/a"), "rouge_l_best_when_as_varied").values["student"][0]  # doctest: +SKIP

    Args:
        evaluation: with the lines beside its ``eval.json``.
        key: of a metric of its task, or ``rouge_l_when_as_varied`` or ``rouge_l_best_when_as_varied``: ROUGE-L where
            each model is as varied as its teacher is at temperature 1.
        seed: of the resampling; default that of the evaluation, whose intervals are then those of these resamples.

    Raises:
        DrklError: there is no such metric.
    """
    known = metrics_of(evaluation.task) | (MATCHED if evaluation.task == "generation" else {})
    if key not in known:
        raise DrklError(f"There is no metric {key!r} of {evaluation.task}.{did_you_mean(key, known)}")
    metric = known[key]
    lines = _Lines(evaluation, _UNITS[metric.of], int(evaluation.settings.get("seed") or 0) if seed is None else seed)
    if key in MATCHED:
        values = _matched(evaluation, lines, key.removesuffix("_when_as_varied"))
    else:
        main = evaluation.settings.get("sampling_temperature") if metric.of == "answers" else None
        values = {
            model: np.array([value, *lines.resampled(main, model).values.get(key, ())])
            for model in evaluation.models
            if (value := evaluation.value(model, key)) is not None
        }
    resampled = any(len(column) > 1 for column in values.values())
    return Resamples(metric, values, lines.unit.plural, lines.ids if resampled else [])


def _matched(evaluation: Evaluation, lines: _Lines, quality: str) -> dict[str, np.ndarray]:
    """The quality of teacher and student where each is as varied as the teacher."""
    curves = {
        model: Curve.of({t: lines.resampled(t, model) for t in lines.temperatures(model)}, quality)
        for model in ("teacher", "student")
    }
    if not curves["student"].temperatures:
        swept = {model: sweep_curve(evaluation, model, quality) for model in curves}
        curves = {model: Curve(c.temperatures, c.variety[:, :1], c.quality[:, :1]) for model, c in swept.items()}
    matched = when_as_varied(curves["student"], curves["teacher"])
    if isinstance(matched, str):
        return {}
    _, ours, theirs = matched
    return {model: own for model, own in (("teacher", theirs), ("student", ours)) if isfinite(own[0])}


class _Lines:
    """The lines of an evaluation by sampling temperature (None without one) and model, and what is resampled of them.

    Ids are different in the whole evaluation: where there are several suites, they begin with the suite's name.
    """

    def __init__(self, evaluation: Evaluation, unit: Unit, seed: int) -> None:
        self.evaluation, self.unit, self.seed = evaluation, unit, seed
        self.groups: dict[tuple[Any, str], list[dict[str, Any]]] = {}
        lines: list[dict[str, Any]] = getattr(evaluation, unit.file)
        for line in lines:
            for model in [line["model"]] if "model" in line else _classified(line):
                self.groups.setdefault((line.get("sampling_temperature"), model), []).append(line)
        self.ids: list[str] = list(dict.fromkeys(line[unit.id] for line in lines))

    def temperatures(self, model: str) -> list[float]:
        return [temperature for temperature, name in self.groups if name == model]

    def resampled(self, temperature: float | None, model: str) -> Resampled:
        """Cached in the evaluation; nothing where there are no lines."""
        lines = self.groups.get((temperature, model))
        if lines is None:
            return Resampled({}, {})
        key = ("measured", self.unit.plural, temperature, model, self.seed)
        if key not in self.evaluation.cache:
            ordered = in_order(lines, self.unit, self.ids, self.evaluation)
            metrics = self.unit.metrics(ordered, self.evaluation, model)
            self.evaluation.cache[key] = Resampled.of(metrics, len(self.ids), self.seed)
        found: Resampled = self.evaluation.cache[key]
        return found


def _classified(line: Mapping[str, Any]) -> Sequence[str]:
    return [model for model in ("teacher", "student", "scaled") if f"{model}_confidence" in line]
