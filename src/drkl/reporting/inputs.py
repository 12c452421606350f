"""The inputs of a report: run folders, folders of an evaluated pair, and evaluations in memory."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from drkl.analysis.result import read_analysis
from drkl.disk import CannotWrite
from drkl.display import as_number
from drkl.errors import DrklError
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.findings import SHARED, Finding, of_analysis
from drkl.evaluation.result import FILES, MODELS, Evaluation
from drkl.kept import check_log, note_changes
from drkl.reporting.text import short
from drkl.rollouts.health import concerns_of
from drkl.runs import RunFolder, read_text, readable_log
from drkl.training.logs import of_run

_log = logging.getLogger("drkl")
T = TypeVar("T")
Given = ParamSpec("Given")
WATCHED = "watch_"
MAX_POINTS = 300
"""Points of a curve on the page."""
TITLES = {"teacher": "Teacher", "before": "Before", "warmup": "Warm-up", "student": "Student",
          "scaled": "Scaled student"}  # fmt: skip
"""The models' names on the page, by `MODELS`."""
STUDENTS = MODELS[1:]


@dataclass(frozen=True)
class Curve:
    """Values over optimiser steps, counted from the first step of the first stage."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def thinned(self, points: int = MAX_POINTS) -> Curve:
        """At most ``points`` points, each the mean of a stretch of the curve."""
        width = math.ceil(len(self.steps) / points)
        if width <= 1:
            return self
        cuts = [slice(i, i + width) for i in range(0, len(self.steps), width)]
        means = [
            [sum(part) / len(part) for cut in cuts if (part := values[cut])] for values in (self.steps, self.values)
        ]
        return Curve(*means)


@dataclass(frozen=True)
class Stage:
    """The log of one training stage, and its place on the axis that joins the stages.

    ``model`` is the model that the stage trains: "student" for the last stage, "warmup" for those before it.
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
    """The logged gradients on the target's logit: ``watch_*``."""
    texts: list[dict[str, Any]] = field(default_factory=list)
    """Answers to held-out prompts that were written as training went on: ``rollouts.jsonl``."""

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
class Run:
    """Everything that a report shows of one run, one evaluated pair, or one evaluation in memory."""

    name: str
    """The run's ``run.name``; of a pair the name of its folder."""
    folder: RunFolder | None
    evaluation: Evaluation | None
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    analysis: dict[str, Any] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether its training is unknown: an evaluated pair, or an evaluation in memory."""
        return not self.stages

    @property
    def title(self) -> str:
        """The name, short enough for a heading."""
        return short(self.name, 60)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the evaluation or, without one, of the analysis."""
        if self.evaluation is not None:
            return self.evaluation.settings
        return _mapping((self.analysis or {}).get("settings"))

    @property
    def task(self) -> str:
        """``generation`` or ``classification``."""
        if self.evaluation is not None:
            return self.evaluation.task
        given = self.settings if self.is_pair else self.config
        return "classification" if given.get("task") == "classification" else "generation"

    @property
    def objective(self) -> str:
        return short(str(self.section("objective").get("name", "?")), 24)

    @property
    def has_teacher(self) -> bool:
        if self.is_pair:
            return self.evaluation is None or "teacher" in self.models  # an analysis always has one
        return bool(self.config.get("teacher"))

    @property
    def on_classes(self) -> bool:
        """Whether its log compares with a teacher's k most probable tokens, and all others as one class."""
        rows = (row for stage in self.stages for row in (*stage.train, *stage.heldout))
        return any(name.endswith("teacher_mass") for row in rows for name in row)

    @property
    def teacher(self) -> str | None:
        """The teacher's path or id; None without one."""
        names = self.pair_names if self.is_pair else {"teacher": self.section("teacher").get("model")}
        return short(str(names.get("teacher") or "teacher"), 60) if self.has_teacher else None

    @property
    def pair_names(self) -> dict[str, Any]:
        """The models' names in the settings."""
        return _mapping(self.settings.get("models"))

    @property
    def subtitles(self) -> dict[str, str]:
        """A short description of each model."""
        if self.is_pair:
            student = short(str(self.pair_names.get("student") or ""), 60)
            return {
                "teacher": self.teacher or "",
                "before": "",
                "warmup": "",
                "student": student,
                "scaled": self.scaling,
            }
        starts = {"prune": "pruned, untrained", "random": "random weights", "pretrained": "as loaded"}
        return {
            "teacher": self.teacher or "",
            "before": starts.get(str(self.section("student").get("init")), ""),
            "warmup": ", ".join(dict.fromkeys(stage.objective for stage in self.stages[:-1])),
            "student": self.objective,
            "scaled": self.scaling,
        }

    @property
    def scaling(self) -> str:
        """The temperatures on the logits of the scaled student; empty where there is none."""
        made = None if self.evaluation is None else self.evaluation.scaling
        return "" if made is None else made.words

    @property
    def num_steps(self) -> int:
        return self.stages[-1].end if self.stages else 0

    @cached_property
    def config_text(self) -> str:
        return "" if self.is_pair or self.folder is None else read_text(self.folder.config_path)

    @property
    def models(self) -> list[str]:
        """The models that were evaluated, in the order in which they are shown."""
        return self.evaluation.models if self.evaluation is not None else []

    def value(self, model: str, key: str) -> float | None:
        """A model's metric; None where it was not measured."""
        return None if self.evaluation is None else self.evaluation.value(model, key)

    def interval(self, model: str, key: str) -> Interval | None:
        """The 95 % interval of a model's metric; None where there is none."""
        return None if self.evaluation is None else self.evaluation.interval(model, key)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration; empty where it is null or not a mapping."""
        return _mapping(self.config.get(name))

    @cached_property
    def findings(self) -> list[Finding]:
        """The findings of the evaluation; without one, those of the analysis that an evaluation has too."""
        if self.evaluation is not None:
            return self.evaluation.findings
        return [finding for finding in self._analysis_findings if finding.id in SHARED]

    @cached_property
    def analysis_findings(self) -> list[Finding]:
        """The findings of the analysis that are not among ``findings``: an id has one answer."""
        known = {finding.id for finding in self.findings}
        return [finding for finding in self._analysis_findings if finding.id not in known]

    @cached_property
    def concerns(self) -> list[str]:
        """What the log says went wrong with sampled answers, with the steps of the axis that joins the stages."""
        found: list[str] = []
        for stage in self.stages:
            rows = sorted([*stage.train, *stage.heldout], key=lambda row: row["step"])
            shifted = [row | {"step": row["step"] + stage.start} for row in rows]
            found += [concern.text for concern in concerns_of(shifted)]
        return found

    @cached_property
    def _analysis_findings(self) -> list[Finding]:
        return [] if self.analysis is None else _findings_of(self.analysis)


def of_analysis_json(make: Callable[Given, T]) -> Callable[Given, T]:
    """Make a malformed ``analysis.json``, which ``make`` reads, the user's error."""

    @wraps(make)
    def checked(*args: Given.args, **choices: Given.kwargs) -> T:
        try:
            return make(*args, **choices)
        except CannotWrite:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DrklError(
                f"analysis.json is not what `drkl analyze` writes ({type(error).__name__}: {error}); run it again."
            ) from error

    return checked


@of_analysis_json
def _findings_of(analysis: Mapping[str, Any]) -> list[Finding]:
    if "findings" in analysis:
        return [Finding.from_json(entry) for entry in analysis["findings"]]
    return of_analysis(analysis)


def read_run(source: str | Path | RunFolder | Evaluation) -> Run:
    """Read everything that a report shows of one run.

    Args:
        source: a run folder, the folder or ``eval.json`` of an evaluated pair, or an evaluation.

    Raises:
        DrklError: it is none of these, or one of its files is malformed.
    """
    if isinstance(source, Evaluation):
        folder = None if source.folder is None else RunFolder(source.folder)
        if folder is None or not folder.eval_path.is_file():
            return Run(source.name, None, source)
        return replace(_read_folder(folder, source), name=source.name)
    root = source.root if isinstance(source, RunFolder) else Path(source)
    if root.is_file():
        return read_run(Evaluation.load(root))
    folder = RunFolder(root)
    if not (folder.eval_path.is_file() or folder.analysis_path.is_file()):
        folder = RunFolder.open(root)
    return _read_folder(folder, Evaluation.load(root) if folder.eval_path.is_file() else None)


def _read_folder(folder: RunFolder, evaluation: Evaluation | None) -> Run:
    trained = folder.config_path.is_file()
    config = folder.read_config() if trained else {}
    for reason in _lost(folder, config, trained):
        _log.warning("Warning: %s: what it says is left out.", reason)
    if trained and folder.student_path.is_dir():
        note_changes(folder)
    name = evaluation.name if evaluation is not None else _mapping(config.get("run")).get("name") or folder.name
    return Run(
        name=str(name),
        folder=folder,
        evaluation=evaluation,
        config=config,
        env=_mapping(folder.read_env()),
        stages=_read_stages(folder) if trained else [],
        analysis=_read_analysis(folder),
    )


def _lost(folder: RunFolder, config: Mapping[str, Any], trained: bool) -> list[str]:
    """What the folder must have had, by what else it has."""
    lines = [folder.root / f"{name}.jsonl" for name in FILES]
    analysed = folder.analysis_folder / "positions.csv"
    lost = []
    for path, traces in ((folder.eval_path, lines), (folder.analysis_path, [analysed])):
        if not path.is_file() and any(trace.is_file() for trace in (*traces, path) if trace.exists()):
            lost.append(f"{path} is gone")
        elif path.is_dir():
            lost.append(f"{path} is a folder")
    names = [f"{n:02d}-{_mapping(stage).get('name')}" for n, stage in enumerate(config.get("stages") or [], start=1)]
    there = [run.root.name for run in folder.stages()]
    if trained and folder.train_log_path.is_file():
        stages = folder.root / "stages"
        lost += [f"{stages / name / folder.config_path.name} is gone" for name in names if name not in there]
    elif not trained and (folder.env_path.is_file() or folder.train_log_path.is_file()):
        lost.append(f"{folder.config_path} is gone")
    return lost


def _read_analysis(folder: RunFolder) -> dict[str, Any] | None:
    return read_analysis(folder) if folder.analysis_path.exists() else None


def _read_stages(run: RunFolder) -> list[Stage]:
    stages: list[Stage] = []
    folders = [*run.stages(), run]
    for position, folder in enumerate(folders):
        start = stages[-1].end if stages else 0
        objective = _mapping(folder.read_config().get("objective")).get("name", "?")
        last = position == len(folders) - 1
        logged, texts = (_read_log(folder, path) for path in (folder.train_log_path, folder.rollouts_path))
        train, heldout, watched = _split_log(logged)
        steps = [row["step"] for row in (*train, *heldout, *watched)]
        stages.append(
            Stage(
                title=short(str(objective) if last else re.sub(r"^\d+-", "", folder.name), 24),
                objective=short(str(objective), 24),
                model="student" if last else "warmup",
                start=start,
                end=start + max(steps, default=0),
                seconds=as_number(_mapping(folder.read_env()).get("seconds")),
                train=train,
                heldout=heldout,
                watched=watched,
                texts=texts,
            )
        )
    return stages


def _read_log(run: RunFolder, path: Path) -> list[dict[str, Any]]:
    """The lines of a log; those that cannot be read are left out, and said."""
    check_log(run, path)
    if path == run.train_log_path:
        rows, wrong = of_run(run)
    else:
        rows, damaged = readable_log(path)
        wrong = f"{damaged}; what could not be read is left out" if damaged else None
    numbers = [row for row in rows if path == run.rollouts_path or not any(map(_is_no_number, row.values()))]
    if len(numbers) < len(rows):
        wrong = wrong or "a line has something else in place of a number; it is left out"
    if wrong:
        _log.warning("Warning: %s: %s.", path, wrong)
    return numbers


def _is_no_number(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def _split_log(rows: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The lines of the training batches, of the held-out rows, and of what was watched, each in the order of steps."""
    # A resumed run repeats the steps between its last checkpoint and its end: the later line is the true one.
    kinds: dict[str, dict[int, dict[str, Any]]] = {"": {}, "eval_": {}, WATCHED: {}}
    for row in rows:
        step = as_number(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            continue
        prefix = next((kind for kind in ("eval_", WATCHED) if any(key.startswith(kind) for key in row)), "")
        if not prefix and "loss" not in row:
            continue  # an evaluation of the user's own, on other rows or by another name
        kinds[prefix][int(step)] = {**row, "step": int(step)}
    return [[kind[step] for step in sorted(kind)] for kind in kinds.values()]


def unique_names(runs: Iterable[Run]) -> list[Run]:
    """The runs with names that differ: a repeated name gets a number."""
    taken: set[str] = set()
    named = []
    for run in runs:
        name, number = run.name, 2
        while name in taken:
            name, number = f"{run.name} ({number})", number + 1
        taken.add(name)
        named.append(run if name == run.name else replace(run, name=name))
    return named


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run, with its objective where the name does not say it."""
    return [
        run.title if run.is_pair or run.objective in run.title.split("-") else f"{run.title} · {run.objective}"
        for run in runs
    ]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
