"""A study as it stands, in Python, as json and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from drkl.display import ABSENT, markdown_text, number
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import Metric
from drkl.reporting.text import count, markdown_table
from drkl.studies.cells import CellResult, Foretold, Verdict
from drkl.studies.definition import Definition
from drkl.studies.grid import label
from drkl.studies.metrics import known_metrics


@dataclass(frozen=True)
class Study:
    """A study as it stands: what was asked, its cells, and what is decided.

    >>> study = drkl.Study.load("studies/instruction")  # doctest: +SKIP
    >>> table = study.table()  # doctest: +SKIP
    >>> table[~table.exploratory][["metric", "objective.name", "against", "difference", "verdict"]]  # doctest: +SKIP
    """

    definition: Definition
    folder: Path
    cells: tuple[CellResult, ...]
    verdicts: tuple[Verdict, ...]
    """The primary ones first, in the order of the study's file."""
    predictions: tuple[Foretold, ...] = ()
    predicted: Mapping[str, Any] | None = None
    """``commit`` and ``date`` of the last commit of the study's file, ``is_changed`` since; None without git."""
    began: str | None = None
    """When the first cell began, those of other studies among them."""
    changed: tuple[str, ...] = ()
    """Fields of the study's file that are others than when its first cell began, ``primary`` for instance; of ``axes``
    and ``variants`` where something is gone or has other settings."""
    notes: tuple[str, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    """The command, the versions, the commit and the device, as ``env.json`` has them."""
    task: str = "generation"
    """``generation`` or ``classification``."""
    has_more_seeds: bool = False
    """Whether seeds were added after its first cell had begun."""

    @classmethod
    def load(cls, folder: str | Path, *, prompts: bool = True) -> Study:
        """Read a study from its folder, whole or not, and make its verdicts.

        Args:
            folder: with ``study.yaml`` and ``cells/``. A cell whose files are damaged counts as failed.
            prompts: whether the bootstrap over held-out prompts is made, which takes some seconds for each cell.

        Raises:
            DrklError: it is no study's folder, or what its ``study.yaml`` asks cannot be.
        """
        from drkl.studies.reading import read

        return cls(**read(folder, prompts=prompts))

    def table(self) -> Any:
        """Return the verdicts as a pandas ``DataFrame``, a row each; its columns are those of `Verdict`.

        The axes of the cells have a column each, ``against`` is the baseline in words, and every interval has two
        columns.
        """
        import pandas

        rows = []
        for row in self.verdicts:
            distance, around = row.distance or (None, None)
            ends = {"": row.interval, "prompts_": row.prompts_interval, "distance_": around}
            rows.append(
                {"metric": row.metric, **row.axes, "against": label(row.baseline), "verdict": row.verdict}
                | {"difference": row.difference, "exploratory": row.exploratory, "seeds": row.seeds}
                | {name: getattr(row, name) for name in ("p_holm", "t", "p", "t_needed", "seeds_needed")}
                | {f"{of}{end}": None if own is None else own[place] for of, own in ends.items()
                   for place, end in enumerate(("low", "high"))}
                | {"distance": distance, "budget_differs": "; ".join(row.budget_differs), "why": row.why}
            )  # fmt: skip
        return pandas.DataFrame(rows)

    def cell_table(self) -> Any:
        """Return the cells as a pandas ``DataFrame``, a row each: their axes, their state, and a column by metric.

        The numbers of a scaled student are in columns of their own, ``scaled_ece`` for instance.
        """
        import pandas

        return pandas.DataFrame(
            [
                {"cell": one.name, **one.axes, "state": one.state, **one.metrics}
                | {f"scaled_{key}": value for key, value in one.scaled.items()}
                | {f"seconds_{part}": seconds for part, seconds in one.seconds.items()}
                for one in self.cells
            ]
        )

    @property
    def hours(self) -> float:
        """What the study's own cells took, their shares of the starts and of the teacher's caches among it."""
        return sum(sum(one.seconds.values()) for one in self.cells if not self.is_taken(one)) / 3600

    def is_taken(self, cell: CellResult) -> bool:
        """Whether a cell is one of another study."""
        return os.path.relpath(cell.run, self.folder).startswith(os.pardir)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``study.json``."""
        return {
            "name": self.definition.name,
            "folder": f"{self.definition.dir.rstrip('/')}/{self.definition.name}",
            "definition": self.definition.model_dump(mode="json"),
            "task": self.task,
            "made": dict(self.made),
            "began": self.began,
            "predicted": None if self.predicted is None else dict(self.predicted),
            "predictions": [
                one.prediction.model_dump(mode="json") | {"verdict": one.verdict, "came_true": one.came_true}
                for one in self.predictions
            ],
            "cells": [self._cell(one) for one in self.cells],
            "verdicts": [_verdict(row) for row in self.verdicts],
            "cost": {"hours": round(self.hours, 3)},
            "notes": [*self.notes],
        }

    def _cell(self, one: CellResult) -> dict[str, Any]:
        return {
            "name": one.name, "axes": one.axes, "run": Path(os.path.relpath(one.run, self.folder)).as_posix(),
            "state": one.state, "why": one.why, "began": one.began, "start": one.start, "seconds": dict(one.seconds),
            "metrics": dict(one.metrics), "scaled": dict(one.scaled), "teacher": dict(one.teacher),
            "budget": dict(one.budget),
        }  # fmt: skip


def _verdict(row: Verdict) -> dict[str, Any]:
    """A verdict as json has it; dataclasses' own would copy what is read only."""
    values = {entry.name: getattr(row, entry.name) for entry in fields(row)}
    distance = None if row.distance is None else dict(zip(("difference", "interval"), row.distance, strict=True))
    return values | {"by_seed": {str(seed): value for seed, value in row.by_seed.items()}, "distance": distance}


# A table ------------------------------------------------------------------------------------------------------------


def as_markdown(study: Study) -> str:
    """The verdicts as Markdown, for a README or a pull request."""
    done = sum(one.state == "done" for one in study.cells)
    parts = [
        f"# {markdown_text(study.definition.name)}",
        f"{done} of {count(len(study.cells), 'run')} {'is' if done == 1 else 'are'} done. Differences are the cell's "
        "value minus the other's, mean over the seeds. Their 95 % intervals are paired t intervals over seeds, which "
        "hold the held-out prompts fixed; beside them stands the paired bootstrap over prompts, which holds the seeds "
        "fixed.",
        *(f"- {markdown_text(note)}" for note in study.notes),
    ]
    kinds = ((False, "Primary", "p is Holm's, over all of them."), (True, "Exploratory", "p is each one's own."))
    for is_exploratory, title, said in kinds:
        rows = [row for row in study.verdicts if row.exploratory == is_exploratory]
        if rows:
            parts += [f"## {title}", said, _rows(study, rows)]
    if study.predictions:
        parts += ["## Predictions", "\n".join(f"- {_foretold(one)}" for one in study.predictions)]
    if failed := [one for one in study.cells if one.state == "failed"]:
        parts += ["## Failed", "\n".join(f"- {markdown_text(f'{one.name}: {one.why}')}" for one in failed)]
    return "\n\n".join(parts) + "\n"


def finer(metric: Metric, value: float | None, ends: Interval | None) -> Metric:
    """The metric with the digits of a difference: one more than the numbers have, and more for a small one."""
    return metric.finer.fine_enough(value, *(ends or ()))


def with_interval(metric: Metric, value: float | None, ends: Interval | None) -> str:
    """A difference with its sign, and its interval."""
    return f"{finer(metric, value, ends).show(value, signed=True)} {bracketed(metric, value, ends)}".strip()


def bracketed(metric: Metric, value: float | None, ends: Interval | None) -> str:
    """The interval of a difference in brackets; empty where there is none."""
    shown = finer(metric, value, ends)
    return "" if ends is None else f"[{', '.join(shown.show(end, signed=True) for end in ends)}]"


def show_p(value: float | None) -> str:
    """A p-value."""
    return ABSENT if value is None else "< 0.001" if value < 0.001 else number(value, 3)


def _rows(study: Study, rows: Sequence[Verdict]) -> str:
    head = ["Metric", "Cell", "Against", "Verdict", "Difference", "Over prompts", "Seeds", "t", "t needed at most", "p",
            "Seeds to decide"]  # fmt: skip
    known = known_metrics(study.task)
    lines = []
    for row in rows:
        metric = known[row.metric]
        unit = f" ({markdown_text(metric.unit)})" if metric.unit else ""
        verdict = f"**{row.verdict}**" if row.verdict != "undecided" else row.verdict
        p = row.p if row.exploratory else row.p_holm
        cells = [
            f"{markdown_text(metric.title)}{unit}", markdown_text(label(row.axes)), markdown_text(label(row.baseline)),
            verdict, with_interval(metric, row.difference, row.interval),
            bracketed(metric, row.difference, row.prompts_interval), str(row.seeds), number(row.t, 2),
            number(row.t_needed, 2), markdown_text(show_p(p)), number(row.seeds_needed, 0),
        ]  # fmt: skip
        lines.append(cells)
    said: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        pair = f"{label(row.axes)} against {label(row.baseline)}"
        for text in (*filter(None, [row.why]), *(f"Other budgets: {what}." for what in row.budget_differs)):
            said.setdefault(text, {}).setdefault(pair, []).append(row.metric)
    notes = [f"- {markdown_text(f'{text} {_comparisons(by_pair)}')}" for text, by_pair in said.items()]
    return "\n\n".join(filter(None, [markdown_table(head, lines, left=4), "\n".join(notes)]))


def _comparisons(by_pair: Mapping[str, Sequence[str]]) -> str:
    """Metrics by the pairs that they compare, in brackets."""
    found = "; ".join(f"{pair}: {', '.join(metrics)}" for pair, metrics in by_pair.items())
    return f"({found})"


def _foretold(one: Foretold) -> str:
    outcome = {True: "It came true.", False: "It did not come true.", None: "It is not decided."}[one.came_true]
    outcome = one.unanswered or outcome
    asked = one.prediction
    said = asked.text or f"{label(asked.cell)}: {asked.metric} {asked.expect}"
    return f"{markdown_text(said)} {outcome}" + (f" Verdict: {one.verdict}." if one.verdict else "")
