"""What a study has of each cell, comparison and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.result import Evaluation
from drkl.studies.definition import Outcome, Prediction, Settings

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
    scaled: Mapping[str, float] = field(default_factory=dict)
    """Those of the student with its logits divided by ``evaluation.logit_temperature``, if it was measured so."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What ``start`` and ``cache`` (its shares of them), ``train`` and ``evaluate`` took."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """Steps, trained tokens, how the student was chosen, held-out rows and sampling, as they were."""
    evaluation: Evaluation | None = field(default=None, repr=False, compare=False)
    """The whole evaluation of one that is done: whatever else ``eval.json`` and the files beside it say."""
    began: str | None = None
    """When it was begun first."""

    def of(self, model: str) -> Mapping[str, float]:
        """The numbers of ``student``, ``scaled`` or ``teacher``."""
        return {"student": self.metrics, "scaled": self.scaled, "teacher": self.teacher}[model]


@dataclass(frozen=True)
class Verdict:
    """One metric of the cells of one kind against those of another, paired over seeds."""

    metric: str
    axes: Settings
    """The axes of the cells, without run.seed."""
    baseline: Settings
    """Those of the cells they are compared with, without run.seed."""
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
    """The statistic that decides: of the distances where there is one, else of the differences."""
    p: float | None = None
    t_needed: float | None = None
    """The |t| at which it would be decided with so many seeds; of a primary one at the first step of Holm's."""
    seeds_needed: int | None = None
    """At so many seeds it would be decided, if their mean and standard deviation were as they are now."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    prompts_interval: Interval | None = None
    """95 % bootstrap over held-out prompts of the same mean; the seeds are held fixed."""
    budget_differs: tuple[str, ...] = ()
    distance: tuple[float, Interval | None] | None = None
    """Where the ideal is 0 or the teacher's value: the difference of the distances from it, and its interval."""
    why: str | None = None
    """Why nothing was decided, where it is not the interval that says so; and which seeds were left out."""


@dataclass(frozen=True)
class Foretold:
    """A prediction, and what came of it."""

    prediction: Prediction
    verdict: Outcome | None
    came_true: bool | None

    @property
    def unanswered(self) -> str | None:
        """Why no number can answer it; None where one can."""
        asked = {"metric": self.prediction.metric, "verdict": self.prediction.expect}
        lacking = next((name for name, value in asked.items() if value is None), None)
        return lacking and f"It names no {lacking}, so no number answers it."
