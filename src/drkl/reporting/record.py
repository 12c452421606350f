"""One run folder read into memory: configuration, log of all stages, evaluation, samples."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from drkl.display import as_number
from drkl.errors import DrklError
from drkl.reporting.metrics import MODEL_TITLES, MODELS
from drkl.reporting.text import short
from drkl.runs import RunFolder, read_json, read_jsonl, read_text

WATCHED = "watch_"
MAX_POINTS = 300
"""Of a curve on the page."""


@dataclass(frozen=True)
class Curve:
    """Values over optimiser steps, counted from the first step of the first stage."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


def thin(curve: Curve, points: int = MAX_POINTS) -> Curve:
    """At most ``points`` points, each the mean of a stretch of the curve."""
    width = math.ceil(len(curve.steps) / points)
    if width <= 1:
        return curve
    cuts = [slice(i, i + width) for i in range(0, len(curve.steps), width)]
    means = [[sum(part) / len(part) for cut in cuts if (part := values[cut])] for values in (curve.steps, curve.values)]
    return Curve(*means)


@dataclass(frozen=True)
class Stage:
    """One stage's log, and where it stands on the axis that joins the stages.

    ``model`` is the model that the stage makes: "warmup" for every stage but the last, "after" for that.
    """

    title: str
    objective: str
    model: str
    start: int
    end: int
    seconds: float | None
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    watched: list[dict[str, Any]]
    """What was logged of the pushes on the target: ``watch_*``."""

    def curve(self, key: str, *, heldout: bool = False) -> Curve:
        """The logged values of ``key`` (of ``eval_key`` on held-out rows)."""
        steps, values = [], []
        name = f"eval_{key}" if heldout else key
        for row in self.heldout if heldout else self.watched if key.startswith(WATCHED) else self.train:
            value = as_number(row.get(name))
            if value is not None:
                steps.append(self.start + row["step"])
                values.append(value)
        return Curve(steps, values)


@dataclass(frozen=True)
class RunRecord:
    """What a report says about one run."""

    run: RunFolder
    config: dict[str, Any]
    env: dict[str, Any]
    stages: list[Stage]
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    analysis: dict[str, Any] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether this is only an evaluation of two models that somebody else trained: there is no ``config.yaml``."""
        return not self.stages

    @property
    def name(self) -> str:
        return short(str(self.section("run").get("name") or self.run.name), 60)

    @property
    def settings(self) -> dict[str, Any]:
        """How it was evaluated; where it was only analysed, how that was done."""
        if self.evaluation is None and self.analysis is not None:
            return _mapping(_student_as_after(self.analysis.get("settings")))
        return _mapping((self.evaluation or {}).get("settings"))

    @property
    def task(self) -> str:
        """``classification``, or ``generation`` for anything else."""
        said = (self.settings if self.is_pair else self.config).get("task")
        return "classification" if said == "classification" else "generation"

    @property
    def objective(self) -> str:
        return short(str(self.section("objective").get("name", "?")), 24)

    @property
    def has_teacher(self) -> bool:
        if self.is_pair:
            return self.evaluation is None or "teacher" in self.models  # an analysis always has one
        return bool(self.config.get("teacher"))

    @property
    def teacher(self) -> str | None:
        named = (
            _mapping(self.settings.get("models")) if self.is_pair else {"teacher": self.section("teacher").get("model")}
        )
        return short(str(named.get("teacher") or "teacher"), 60) if self.has_teacher else None

    @property
    def titles(self) -> dict[str, str]:
        """The models' names on the page."""
        return MODEL_TITLES | ({"after": "Student"} if self.is_pair else {})

    @property
    def subtitles(self) -> dict[str, str]:
        """What each model is, in a word or two."""
        if self.is_pair:
            student = short(str(_mapping(self.settings.get("models")).get("after") or ""), 60)
            return {"teacher": self.teacher or "", "before": "", "warmup": "", "after": student}
        starts = {"prune": "pruned, untrained", "random": "random weights", "pretrained": "as loaded"}
        return {
            "teacher": self.teacher or "",
            "before": starts.get(str(self.section("student").get("init")), ""),
            "warmup": ", ".join(dict.fromkeys(stage.objective for stage in self.stages[:-1])),
            "after": self.objective,
        }

    @property
    def num_steps(self) -> int:
        return self.stages[-1].end if self.stages else 0

    @cached_property
    def config_text(self) -> str:
        return "" if self.is_pair else read_text(self.run.config_path)

    @property
    def models(self) -> list[str]:
        """The models that were evaluated, in the order in which they are shown."""
        return [model for model in MODELS if isinstance((self.evaluation or {}).get(model), Mapping)]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration; empty where it is null or not a mapping."""
        return _mapping(self.config.get(name))


def open_run(path: str | Path) -> RunFolder:
    """A run folder, or the one into which `drkl evaluate` or `drkl analyze` wrote about two models of anybody's.

    Raises:
        DrklError: it is neither.
    """
    folder = RunFolder(Path(path))
    is_pair = folder.eval_path.is_file() or folder.analysis_path.is_file()
    return folder if is_pair and not folder.config_path.is_file() else RunFolder.open(path)


def read_run(run: RunFolder) -> RunRecord:
    """Read all that a report shows of one run.

    Raises:
        DrklError: a file of the run is broken; a missing ``eval.json`` or file of samples is not an error.
    """
    evaluation = read_json(run.eval_path) if run.eval_path.is_file() else None
    if evaluation is not None and not isinstance(evaluation, dict):
        raise DrklError(
            f"{run.eval_path} holds a {type(evaluation).__name__}; expected an object with a key per model. "
            f"`drkl evaluate {run.root}` writes it anew."
        )
    samples, predictions = (
        [row for row in read_jsonl(path) if isinstance(row, dict)] if path.is_file() else []
        for path in (run.samples_path, run.predictions_path)
    )
    if evaluation is not None and "student" in evaluation and "after" not in evaluation:
        evaluation = _student_as_after(evaluation)
        samples = [row | {"model": "after"} if row.get("model") == "student" else row for row in samples]
    trained = run.config_path.is_file()
    return RunRecord(
        run=run,
        config=run.read_config() if trained else {},
        env=_mapping(run.read_env()),
        stages=_read_stages(run) if trained else [],
        evaluation=evaluation,
        samples=samples,
        predictions=predictions,
        analysis=_read_analysis(run),
    )


def _read_analysis(run: RunFolder) -> dict[str, Any] | None:
    found = read_json(run.analysis_path) if run.analysis_path.is_file() else None
    if found is not None and not isinstance(found, dict):
        raise DrklError(
            f"{run.analysis_path} holds a {type(found).__name__}; expected an object. `drkl analyze {run.root}` writes "
            "it anew."
        )
    return found


def _student_as_after(value: Any, depth: int = 0) -> Any:
    # Models are keys of the file itself, of its sections, and of what those hold by name ("mass", a suite).
    if not isinstance(value, dict) or depth > 3:
        return value
    return {"after" if key == "student" else key: _student_as_after(one, depth + 1) for key, one in value.items()}


def _read_stages(run: RunFolder) -> list[Stage]:
    stages: list[Stage] = []
    folders = [*run.stages(), run]
    for position, folder in enumerate(folders):
        start = stages[-1].end if stages else 0
        objective = _mapping(folder.read_config().get("objective")).get("name", "?")
        last = position == len(folders) - 1
        train, heldout, watched = _split_log(folder.read_train_log())
        steps = [row["step"] for row in (*train, *heldout, *watched)]
        stages.append(
            Stage(
                title=short(str(objective) if last else re.sub(r"^\d+-", "", folder.name), 24),
                objective=short(str(objective), 24),
                model="after" if last else "warmup",
                start=start,
                end=start + max(steps, default=0),
                seconds=as_number(_mapping(folder.read_env()).get("seconds")),
                train=train,
                heldout=heldout,
                watched=watched,
            )
        )
    return stages


def _split_log(rows: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The lines of the training batches, of the held-out rows, and of what was watched, each in the order of steps."""
    # A resumed run repeats the steps between its last checkpoint and its end: the later line is the true one.
    kinds: dict[str, dict[int, dict[str, Any]]] = {"": {}, "eval_": {}, WATCHED: {}}
    for row in rows:
        step = as_number(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            continue
        prefix = next((kind for kind in ("eval_", WATCHED) if any(key.startswith(kind) for key in row)), "")
        kinds[prefix][int(step)] = {**row, "step": int(step)}
    return [[kind[step] for step in sorted(kind)] for kind in kinds.values()]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
