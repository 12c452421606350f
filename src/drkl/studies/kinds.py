"""Cells of one kind, which differ in their seed alone, and short names for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.evaluation.declared import Metric
from drkl.evaluation.result import Evaluation
from drkl.reporting.text import short
from drkl.studies.cells import CellResult
from drkl.studies.definition import SEED, Settings
from drkl.studies.grid import cells_axes, group_of, label, model_of, same
from drkl.studies.metrics import known_metrics
from drkl.studies.result import Study


@dataclass(frozen=True)
class Kind:
    """The cells of one kind, in the order of their seeds."""

    axes: Settings
    """Without run.seed."""
    label: str
    cells: tuple[CellResult, ...]

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations of its cells, seed by seed."""
        return [cell.evaluation for cell in self.cells if cell.evaluation is not None]

    def values(self, key: str, model: str = "student") -> list[float]:
        """The finished cells' values of a metric, seed by seed; those that have none are left out."""
        return list(self.by_seed(key, model).values())

    def by_seed(self, key: str, model: str = "student") -> dict[Any, float]:
        """The same by seed."""
        done = [cell for cell in self.cells if cell.state == "done" and cell.of(model).get(key) is not None]
        return {cell.axes.get(SEED): cell.of(model)[key] for cell in done}


def key_of(axes: Settings) -> str:
    """The same text for the same axes, whatever their order; run.seed does not count."""
    return json.dumps(group_of(axes), sort_keys=True, default=str)


def kinds_of(study: Study) -> list[Kind]:
    """The kinds of cells in the order in which they first come."""
    cells: dict[str, list[CellResult]] = {}
    for cell in study.cells:
        cells.setdefault(key_of(cell.axes), []).append(cell)
    axes = [group_of(own[0].axes) for own in cells.values()]
    return [
        Kind(own_axes, name, tuple(own)) for own_axes, name, own in zip(axes, labels(axes), cells.values(), strict=True)
    ]


def labels(kinds: Sequence[Settings]) -> list[str]:
    """A name for each kind of what sets it apart.

    >>> labels([{"objective.name": "drkl", "rollouts.share": share, "loss.temperature": 1} for share in (0, 1)])
    ['rollouts.share 0', 'rollouts.share 1']
    """
    first = kinds[0] if kinds else {}
    common = {key: value for key, value in first.items() if all(same(axes.get(key), value) for axes in kinds)}
    return [label(axes, common) or label(axes) or "all cells" for axes in kinds]


class Names:
    """Names of kinds of cells, and of settings that are no kind of the study's."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._by_key = {key_of(kind.axes): kind.label for kind in kinds}

    def of(self, axes: Settings) -> str:
        """The kind's name, with the model that is meant; else the settings as they are written."""
        name = self._by_key.get(key_of(cells_axes(axes))) or label(group_of(cells_axes(axes))) or "all cells"
        return name if model_of(axes) == "student" else f"{name}, {model_of(axes)}"

    def against(self, axes: Settings, baseline: Settings) -> tuple[str, str]:
        """Both names of a comparison."""
        return self.of(axes), self.of(baseline)


def has_one_teacher(cells: Iterable[CellResult]) -> bool:
    """Whether the teacher is the same in all cells, as far as its entropy on the held-out rows says (to 1 %).

    Weights do not say it: those of a cache have another digest.
    """
    found = [entropy for cell in cells if (entropy := cell.teacher.get("entropy")) is not None]
    return not found or max(found) - min(found) <= 0.01 * max(found)


def in_order(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which it first comes."""
    return list(dict.fromkeys(texts))


def seeds_of(study: Study) -> list[Any]:
    """The seeds of the cells, in their order."""
    return list(dict.fromkeys(cell.axes[SEED] for cell in study.cells if SEED in cell.axes))


def metric_of(key: str, task: str) -> Metric:
    """The declared metric, or one that claims nothing for a key that is not declared."""
    title = short(key, 60).replace("_", " ")
    return known_metrics(task).get(key) or Metric(key, title[:1].upper() + title[1:], "", "", "none", "")
