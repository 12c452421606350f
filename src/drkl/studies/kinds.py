"""Cells of one kind, which differ in their seed alone, and short names for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.evaluation.declared import CLASS_METRICS, METRICS, Metric
from drkl.evaluation.paired import AS_VARIED
from drkl.reporting.text import short
from drkl.studies.definition import SEED, VARIANT, Settings
from drkl.studies.result import CellResult, Study

BARE = ("objective.name", VARIANT)
"""Axes whose values say by themselves what they are."""
_CLASSES_ALONE = {"macro_f1", "num_rows"}


@dataclass(frozen=True)
class Kind:
    """The cells of one kind, in the order of their seeds."""

    axes: Settings
    """Without run.seed."""
    label: str
    cells: tuple[CellResult, ...]

    def values(self, key: str) -> list[float]:
        """The finished cells' values of a metric, seed by seed; those that have none are left out."""
        return [cell.metrics[key] for cell in self.cells if cell.state == "done" and cell.metrics.get(key) is not None]

    def by_seed(self, key: str) -> dict[Any, float]:
        """The same by seed."""
        return {
            cell.axes.get(SEED): cell.metrics[key]
            for cell in self.cells
            if cell.state == "done" and cell.metrics.get(key) is not None
        }


def key_of(axes: Settings) -> str:
    """The same text for the same axes, whatever their order; run.seed does not count."""
    return json.dumps({key: value for key, value in axes.items() if key != SEED}, sort_keys=True, default=str)


def kinds_of(study: Study) -> list[Kind]:
    """The kinds of cells in the order in which they first come."""
    cells: dict[str, list[CellResult]] = {}
    for cell in study.cells:
        cells.setdefault(key_of(cell.axes), []).append(cell)
    axes = [{key: value for key, value in own[0].axes.items() if key != SEED} for own in cells.values()]
    names = labels(axes)
    return [Kind(*rest, tuple(own)) for *rest, own in zip(axes, names, cells.values(), strict=True)]


def labels(kinds: Sequence[Settings]) -> list[str]:
    """A name for each kind of what sets it apart: ``drkl, share 1``.

    >>> labels([{"objective.name": "drkl", "rollouts.share": share, "loss.temperature": 1} for share in (0, 1)])
    ['share 0', 'share 1']
    """
    keys = list(dict.fromkeys(key for axes in kinds for key in axes))
    differing = [key for key in keys if len({_text(axes.get(key)) for axes in kinds}) > 1] or keys[:1]
    lasts = Counter(key.rpartition(".")[2] for key in differing)
    names = []
    for axes in kinds:
        parts = []
        for key in differing:
            if key in axes:
                last = key.rpartition(".")[2]
                word = key if lasts[last] > 1 else last.replace("_", " ")
                parts.append(_text(axes[key]) if key in BARE else f"{word} {_text(axes[key])}")
        names.append(", ".join(parts) or "all")
    return names


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, Mapping | list | bool) or value is None else str(value)


class Names:
    """Names of kinds of cells, and of settings that are no kind of the study's."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._by_key = {key_of(kind.axes): kind.label for kind in kinds}

    def of(self, axes: Settings) -> str:
        """The kind's name; else the settings as they are written."""
        known = self._by_key.get(key_of(axes))
        return known or ", ".join(f"{key}={_text(value)}" for key, value in axes.items() if key != SEED) or "all cells"

    def against(self, axes: Settings, baseline: Settings) -> tuple[str, str]:
        """Both names of a comparison."""
        return self.of(axes), self.of(baseline)


def in_order(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which it first comes."""
    return list(dict.fromkeys(texts))


def seeds_of(study: Study) -> list[Any]:
    """The seeds of the cells, in their order."""
    return list(dict.fromkeys(cell.axes[SEED] for cell in study.cells if SEED in cell.axes))


def task_of(study: Study) -> str:
    """``classification`` or ``generation``, by the metrics that the cells have."""
    return "classification" if any(_CLASSES_ALONE & cell.metrics.keys() for cell in study.cells) else "generation"


def metric_of(key: str, task: str) -> Metric:
    """The declared metric, or one that claims nothing for a key that is not declared."""
    known = (CLASS_METRICS if task == "classification" else METRICS) | {AS_VARIED.key: AS_VARIED}
    title = short(key, 60).replace("_", " ")
    return known.get(key) or Metric(key, title[:1].upper() + title[1:], "", "", "none", "")
