"""Curves of cells, averaged over seeds: read from the eval.json of every finished one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.result import Evaluation, SweepPoint
from drkl.studies.kinds import Kind
from drkl.studies.result import CellResult, Study
from drkl.studies.spread import mean_interval

FIDELITY, VARIETY = "rouge_l", "distinct_2"


@dataclass(frozen=True)
class Mean:
    """The mean over seeds; ``interval`` is its 95 % t interval, None with one seed."""

    value: float
    interval: Interval | None
    seeds: int


@dataclass(frozen=True)
class SweepMean:
    """The answers of one kind of cell at one sampling temperature."""

    temperature: float
    fidelity: Mean
    variety: Mean

    @property
    def by_metric(self) -> list[tuple[str, Mean]]:
        """Both means with the keys of their metrics."""
        return [(FIDELITY, self.fidelity), (VARIETY, self.variety)]


@dataclass(frozen=True)
class BinMean:
    """One bin of confidence: means over the seeds that have tokens in it, and the range of their accuracies."""

    share: float
    confidence: float
    accuracy: float
    range: Interval


@dataclass
class Curves:
    """The evaluations of the finished cells by cell, and what could not be read."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Evaluation]:
        """The evaluations of a kind, seed by seed."""
        return [self.evaluations[cell.name] for cell in kind.cells if cell.name in self.evaluations]


def read_curves(study: Study) -> Curves:
    """Read the evaluation of every finished cell whose run folder is there."""
    curves = Curves()
    for cell in study.cells:
        folder = run_folder(study, cell)
        if cell.state != "done" or not (folder / "eval.json").is_file():
            continue
        try:
            curves.evaluations[cell.name] = Evaluation.load(folder)
        except DrklError as error:
            curves.notes.append(f"The curves of {cell.name} are left out: {error}")
    return curves


def run_folder(study: Study, cell: CellResult) -> Path:
    """The run folder of a cell; a relative one is looked for in the study's folder first."""
    inside = study.folder / cell.run
    return inside if inside.is_dir() else cell.run


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean over seeds with its t interval; None without a value."""
    if not values:
        return None
    return Mean(math.fsum(values) / len(values), mean_interval(values), len(values))


def sweep_means(evaluations: Sequence[Evaluation], model: str = "student") -> list[SweepMean]:
    """ROUGE-L and Distinct-2 at every sampling temperature that all evaluations have, the lowest first."""
    sweeps = [by_temperature(one, model) for one in evaluations]
    shared = sorted(set.intersection(*(set(sweep) for sweep in sweeps))) if sweeps else []
    means = []
    for temperature in shared:
        fidelity, variety = (mean_of([sweep[temperature][place] for sweep in sweeps]) for place in (0, 1))
        assert fidelity is not None and variety is not None
        means.append(SweepMean(temperature, fidelity, variety))
    return means


def by_temperature(evaluation: Evaluation, model: str) -> dict[float, tuple[float, float]]:
    """ROUGE-L and Distinct-2 by sampling temperature; without a sweep, at the evaluation's own."""
    points = evaluation.sweep.get(model)
    if points is None:
        values = {key: evaluation.value(model, key) for key in (FIDELITY, VARIETY)}
        own = evaluation.settings.get("sampling_temperature")
        points = [SweepPoint(float(own), values, {})] if isinstance(own, int | float) else []
    found = {point.sampling_temperature: (point.values.get(FIDELITY), point.values.get(VARIETY)) for point in points}
    return {at: (x, y) for at, (x, y) in found.items() if x is not None and y is not None}


def reliability_means(evaluations: Sequence[Evaluation], model: str = "student") -> list[BinMean]:
    """The bins of equal width that some seed has tokens in; none where the evaluations have different bins."""
    reliabilities = [one.reliability for one in evaluations if one.reliability is not None]
    bins = [one.width[model] for one in reliabilities if model in one.width]
    if not bins or any(one.edges != reliabilities[0].edges for one in reliabilities):
        return []
    total = sum(sum(one.counts) for one in bins) or 1
    means = []
    for place in range(len(bins[0].counts)):
        known = [
            (one.counts[place], one.confidence[place], one.accuracy[place]) for one in bins if one.counts[place] > 0
        ]
        rows = [(count, x, y) for count, x, y in known if x is not None and y is not None]
        if rows:
            accuracies = [y for _, _, y in rows]
            x, y = (math.fsum(row[column] for row in rows) / len(rows) for column in (1, 2))
            means.append(BinMean(sum(row[0] for row in rows) / total, x, y, (min(accuracies), max(accuracies))))
    return means


def teacher_of(curves: Curves, means: Callable[[Sequence[Evaluation], str], list[Any]]) -> list[Any]:
    """The teacher's curve over all cells."""
    return means([one for one in curves.evaluations.values() if "teacher" in one.models], "teacher")
