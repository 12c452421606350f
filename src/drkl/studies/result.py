"""What came out of a study: its cells and its verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.result import Evaluation
from drkl.studies.definition import Definition, Outcome, Prediction, Settings

State = Literal["done", "failed", "running", "interrupted", "missing"]


@dataclass(frozen=True)
class CellResult:
    """One run of a study."""

    name: str
    axes: Settings
    """The values of its axes, run.seed among them, and of ``variant`` where there are variants."""
    run: Path
    """Its run folder."""
    state: State
    why: str | None = None
    """The last message of one that failed."""
    start: str | None = None
    """Digest of the weights that it began with."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The student's numbers by metric, as they stand in eval.json."""
    teacher: Mapping[str, float] = field(default_factory=dict)
    """The teacher's."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of ``start`` (its share), ``train`` and ``evaluate``."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """Steps, trained tokens, how the student was chosen, held-out rows and sampling, as they were."""
    evaluation: Evaluation | None = field(default=None, repr=False, compare=False)
    """Of one that is done: whatever else ``eval.json`` and the files beside it say."""
    began: str | None = None
    """When it was begun first."""


@dataclass(frozen=True)
class Verdict:
    """One metric of the cells of one kind against those of another, paired over seeds."""

    metric: str
    axes: Settings
    """Of the cells, without run.seed."""
    baseline: Settings
    """Of the cells they are compared with, without run.seed."""
    difference: float | None
    """Mean over the seeds of cell minus baseline."""
    interval: Interval | None
    """95 %, paired t over seeds; the held-out prompts are held fixed."""
    p_holm: float | None
    """The p-value after Holm's correction over the primary comparisons; None for an exploratory one."""
    seeds: int
    """Pairs."""
    exploratory: bool
    verdict: Outcome
    t: float | None = None
    p: float | None = None
    t_needed: float | None = None
    seeds_needed: int | None = None
    by_seed: Mapping[int, float] = field(default_factory=dict)
    prompts_interval: Interval | None = None
    """95 % bootstrap over held-out prompts of the same mean; the seeds are held fixed."""
    budget_differs: tuple[str, ...] = ()
    distance: tuple[float, Interval | None] | None = None
    """Of a metric whose ideal is 0 or the teacher's value: the difference of the distances, and its interval."""
    why: str | None = None
    """Why nothing was decided, where it is not the interval that says so."""


@dataclass(frozen=True)
class Foretold:
    """A prediction, and what came of it."""

    prediction: Prediction
    verdict: Outcome | None
    came_true: bool | None


@dataclass(frozen=True)
class Study:
    """A study as it stands."""

    definition: Definition
    folder: Path
    cells: tuple[CellResult, ...]
    verdicts: tuple[Verdict, ...]
    predictions: tuple[Foretold, ...] = ()
    predicted: Mapping[str, Any] | None = None
    """``commit`` and ``date`` of the last commit of the study's file, ``is_changed`` since; None without git."""
    began: str | None = None
    """When the first cell began."""
    notes: tuple[str, ...] = ()
