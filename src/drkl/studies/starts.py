"""What the cells of a study share: the students they start from, and the caches of their teacher."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drkl.config import Config
from drkl.errors import DrklError
from drkl.kept import note_removed
from drkl.reporting.text import count
from drkl.runs import RunFolder
from drkl.studies.definition import read_definition
from drkl.studies.grid import cells_axes, group_of, pair_of, same
from drkl.studies.plan import Plan, Planned, digest, given, study_yaml
from drkl.studies.records import Record, cell_record, was_finished
from drkl.training.spec import RunSpec, run_classes, run_tokenizer, start_of, with_stand_in, without_server

WEIGHTS = ("*.safetensors", "*.bin")
"""Names of the files of a student that are its weights."""


@dataclass(frozen=True)
class Start:
    """The student that the cells of one seed start from."""

    key: str
    record: Record
    """The record of its folder: an ordinary run folder, or one with a ``student/`` alone."""
    runs: tuple[Config, ...]
    """The stages that make it, each a run of its own; the last one lies in its folder. None: its init is all."""
    config: Config
    """What the first of them begins with."""

    @property
    def is_made(self) -> bool:
        """Whether anything has to be made: a pretrained student without stages is there already."""
        return bool(self.runs) or self.config.student.init != "pretrained"

    @property
    def student(self) -> Path:
        """Its model's folder."""
        return RunFolder(self.record.folder).student_path

    @property
    def has_weights(self) -> bool:
        """Whether its weights are there."""
        return not self.is_made or any(any(self.student.glob(name)) for name in WEIGHTS)


@dataclass(frozen=True)
class Cache:
    """A cache of the teacher that cells read."""

    key: str
    record: Record
    kind: str
    temperatures: tuple[float, ...] = ()
    """Those of the losses that read a cache of kind topk."""

    @property
    def folder(self) -> Path:
        """What `drkl cache` writes, which wants a folder of its own."""
        return self.record.folder / "cache"


def start_for(plan: Plan, planned: Planned) -> Start | None:
    """Return the start of a cell; None where each cell trains its stages itself."""
    if not plan.definition.shared.start:
        return None
    known = ("start", planned.cell.name)
    if known not in plan.found:
        plan.found[known] = _start_for(plan, planned)
    found: Start = plan.found[known]
    return found


def _start_for(plan: Plan, planned: Planned) -> Start:
    *stages, last = planned.start.runs()
    made_by = stages or [last]
    key = f"seed{planned.seed}-{digest([_of_run(run, bool(stages), n > 0) for n, run in enumerate(made_by)])[:12]}"
    folder = _found(plan, "starts", key, "start.json")
    root = planned.start.run.model_copy(update={"dir": str(folder.parent), "name": folder.name})
    config = planned.start.model_copy(update={"run": root})
    runs = config.runs()[:-1]
    if runs:
        runs[-1] = runs[-1].model_copy(update={"run": root})
    return Start(key, Record(folder, "start"), tuple(runs), config)


def _of_run(config: Config, trains: bool, goes_on: bool) -> dict[str, Any]:
    """What makes a run's student, wherever it lies and whatever it is evaluated on."""
    values = given(config)
    sections = ["run", "task", "teacher", "tokenizer", "data"]
    sections += [] if goes_on else ["student"]  # that of the run before is counted with it
    sections += ["objective", "loss", "training", "rollouts", "peft"] if trains else []
    return {name: values[name] for name in sections if name in values}


def cell_config(planned: Planned, start: Start | None, cache: Cache | None) -> Config:
    """Return the config that a cell is run with: from its start, and beside the teacher's cache."""
    config = planned.config
    if start is not None and start.is_made:
        student = config.student_from(start.student)
        config = config.model_copy(update={"stages": [], "tokenizer": None, "student": student})
    if cache is not None and config.teacher is not None:
        reads = {"cache": str(cache.folder), "remember_mb": 0, "shard": False}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=reads)})
    return config


def why_live(plan: Plan, planned: Planned) -> str | None:
    """Why a cell reads the teacher itself, though the study has a cache of it; None where it reads the cache."""
    config = planned.config
    teacher = config.teacher
    if teacher is None:
        return "it has no teacher"
    if teacher.cache is not None or teacher.server is not None:
        return f"its teacher is {'a cache' if teacher.cache is not None else 'served'} already"
    if any(spec.rollouts.is_on for spec in config.specs()):
        return "it trains on sampled answers, which are new at every step"
    if config.data.streaming:
        return "its rows are a stream"
    return None


def cache_for(plan: Plan, planned: Planned) -> Cache | None:
    """Return the teacher's cache of a cell; None where it reads the teacher itself."""
    kind = plan.definition.shared.teacher_cache
    if kind is None or why_live(plan, planned) is not None:
        return None
    known = ("cache", planned.cell.name)
    if known not in plan.found:
        plan.found[known] = _cache_for(plan, planned, kind)
    found: Cache = plan.found[known]
    return found


def _cache_for(plan: Plan, planned: Planned, kind: str) -> Cache:
    key, temperatures = _cache_key(plan, planned), set[float]()
    if kind == "topk":
        others = (other for other in plan.cells if why_live(plan, other) is None)
        temperatures = {o.config.loss.temperature for o in others if _cache_key(plan, o) == key}
        key = digest([key, kind, sorted(temperatures)])
    key = key[:12]
    return Cache(key, Record(_found(plan, "teacher", key, "cache.json"), "cache"), kind, tuple(sorted(temperatures)))


def _cache_key(plan: Plan, planned: Planned) -> str:
    """A hash of the teacher and of the rows that it reads."""
    runs = planned.config.runs()
    runs = runs[-1:] if plan.definition.shared.start else runs
    values = [given(run) for run in runs]
    return digest([[value.get(name) for name in ("teacher", "tokenizer", "task", "data")] for value in values])


def _found(plan: Plan, what: str, key: str, record: str) -> Path:
    """The folder of something that is shared: of this study, or of one whose cells it uses, where it is there."""
    own = plan.shared / what / key
    if (own / record).exists():
        return own
    for shared in _others(plan):
        if (shared / what / key / record).exists():
            return shared / what / key
    return own


def _others(plan: Plan) -> list[Path]:
    """The shared folders of the studies whose cells are used."""
    found = []
    for name in plan.definition.shared.cells:
        known = study_yaml(Path(name))
        own = read_definition(known).shared.dir if known.is_file() else None
        found.append(Path(name) / "shared" if own is None else Path(own))
    return found


def unpaired(plan: Plan) -> list[str]:
    """What is to be said of primary comparisons whose cells cannot begin from the same weights."""
    found = []
    for number, entry in enumerate(plan.definition.primary):
        sides = [cells_axes(axes) for axes in pair_of(plan.definition, entry.cell, entry.against)]
        one, other = (next(p for p in plan.cells if same(group_of(p.cell.axes), axes)) for axes in sides)
        if why := _why_apart(plan, one, other):
            found.append(
                f"primary.{number} will decide nothing: {one.cell.name} and {other.cell.name} cannot begin from the "
                f"same weights, since {why}."
            )
    return found


def _why_apart(plan: Plan, one: Planned, other: Planned) -> str | None:
    """Why two cells of a seed begin from other weights; None where they may begin from the same."""
    students = [planned.config.student for planned in (one, other)]
    if any(getattr(students[0], name) != getattr(students[1], name) for name in ("init", "layers", "model")):
        return "their student is another"
    starts = start_for(plan, one), start_for(plan, other)
    if starts[0] is None or starts[1] is None or starts[0].key == starts[1].key:
        return None
    if any(start is not None and start.runs for start in starts):
        return (
            "a key that sets them apart changes the stages that train their starts; with shared.start: false each "
            "trains its own stages from the same initial weights"
        )
    return None


def check_not_remade(plan: Plan, start: Start) -> None:
    """Raise DrklError where a start that was trained is gone and a finished cell began from it."""
    began = _began_from(plan, start)
    if began and start.runs:
        raise DrklError(
            f"The start {str(start.student)!r} is gone, and {_finished(began)} began from it. Trained anew on another "
            f"machine it may differ, and {_PAIRED} Bring it back from a copy, or remove these cells."
        )


def check_same(plan: Plan, start: Start, found: str) -> None:
    """Raise DrklError, and drop the weights, where initial weights made anew are not those that finished cells had.

    Args:
        plan: of the study.
        start: of those cells.
        found: the digest of the weights made anew.
    """
    others = {path: known for path, known in _began_from(plan, start).items() if known != found}
    if others:
        drop_weights(start)
        raise DrklError(
            f"The start {str(start.student)!r} was gone, and made anew here it is another one than that which "
            f"{_finished(others)} began from, and {_PAIRED} Bring the first one back from a copy, or remove these "
            "cells."
        )


_PAIRED = "cells are compared only if they began from the same weights."


def _finished(began: Mapping[str, Any]) -> str:
    return f"{count(len(began), 'finished cell')} ({', '.join(began)})"


def _began_from(plan: Plan, start: Start) -> dict[str, str | None]:
    """The finished cells that began from a start, by their folders, each with the digest of what it began with."""
    known = {str(planned.folder.root): cell_record(planned.folder.root).readable() for planned in plan.cells}
    return {
        root: about.get("start")
        for root, about in known.items()
        if was_finished(about) and about.get("start_key") == start.key
    }


def make_init(start: Start) -> None:
    """Write the student of a start without stages: its initial weights."""
    from drkl.models.load import quiet_transformers, words_of
    from drkl.training.own_files import put_in_place

    quiet_transformers()
    (spec,) = with_stand_in(start.config.specs()[-1:], without_server)
    student, tokenizer = _student(spec)
    staging = start.student.with_name(f".{start.student.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    student.save_pretrained(staging)
    words_of(tokenizer).save_pretrained(staging)
    put_in_place(staging, start.student)


def weights_of(start: Start) -> str:
    """The digest of the weights that a cell begins with."""
    from drkl.models.fingerprint import describe_model
    from drkl.models.load import quiet_transformers

    quiet_transformers()
    config = start.config
    if start.is_made:
        student = config.student_from(start.student)
        config = config.model_copy(update={"stages": [], "tokenizer": None, "student": student})
    (spec,) = with_stand_in(config.specs(), without_server)
    return describe_model(_student(spec)[0])["weights"]


def _student(spec: RunSpec) -> tuple[Any, Any]:
    """The student of a run before its first step, and its tokenizer, as training makes them."""
    from drkl.models.student import make_student

    specs: Sequence[RunSpec] = [spec]
    classes, tokenizer = run_classes(specs), run_tokenizer(specs)
    teacher = start_of(spec.student, spec.teacher)
    return make_student(spec.student, teacher, spec.run.seed, tokenizer, classes), tokenizer


def drop_weights(start: Start) -> None:
    """Remove the weights of a start whose cells are all finished; what is noted of it stays."""
    run = RunFolder(start.record.folder)
    for folder in (run, *run.stages()):
        if folder.env_path.is_file():
            note_removed(folder)
        for path in (folder.student_path, folder.checkpoints_path):
            shutil.rmtree(path, ignore_errors=True)
