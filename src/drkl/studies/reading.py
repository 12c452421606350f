"""The cells of a study as they stand in their folders: their numbers, how they were trained, and how far they are."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drkl.display import as_number
from drkl.errors import DrklError
from drkl.evaluation.comparison import SAMPLING
from drkl.evaluation.declared import metrics_of
from drkl.evaluation.measured import measured
from drkl.evaluation.paired import MATCHED
from drkl.evaluation.result import SCALED, Evaluation
from drkl.reporting.text import count
from drkl.runs import RunFolder, read_yaml, readable_log
from drkl.studies.cells import CellResult
from drkl.studies.definition import SEED, VARIANT, Definition, read_definition
from drkl.studies.earlier import Earlier
from drkl.studies.folder import base_yaml, changed_fields, has_more_seeds, read_environment
from drkl.studies.grid import Cell, cells_of, check_grid, same, text_of
from drkl.studies.metrics import asked_metrics, check_metrics, known_metrics
from drkl.studies.plan import study_yaml
from drkl.studies.records import Record, began_at, cell_record
from drkl.studies.statistics import MIN_PAIRS
from drkl.studies.verdicts import RESAMPLED, Judge
from drkl.training.settings import ROWS_PER_STEP

_log = logging.getLogger("drkl")
CELLS = "cells"
"""The folder of a study's runs."""
BEST = "best held-out loss"
_CHOSEN = "training.arguments.load_best_model_at_end"
_OF_THE_STUDY = ("began", "predicted", "predicted_now", "changes")
"""What env.json of a study has beside what a run's has."""
DECODING = (*(name for name in SAMPLING if name != "gamma"), "prompts", "sweep", "suites")
"""Settings of an evaluation that two cells have to share; gamma moves no answer, and only a metric without an ideal."""


def read(folder: str | Path, *, prompts: bool = True) -> dict[str, Any]:
    """Read a study, make its verdicts, and return the fields of a `Study`; see `Study.load`."""
    folder = Path(folder)
    path = study_yaml(folder)
    if not path.is_file():
        what = "has no study.yaml" if folder.is_dir() else "is not there"
        raise DrklError(
            f"{str(folder)!r} is no study's folder: it {what}. `drkl study STUDY.yaml` makes one, by the dir and the "
            "name in that file."
        )
    definition = read_definition(path)
    try:
        check_grid(definition)
        derived = [key for key in asked_metrics(definition) if key in MATCHED]
        cells = read_cells(definition, folder, derived)
        task = next((one.evaluation.task for one in cells if one.evaluation is not None), None)
        task = task or _task_of(folder)
        check_metrics(definition, task)
    except DrklError as error:
        raise DrklError(f"{path}: {error}") from error
    earlier = Earlier()
    if gone := [one for one in cells if one.evaluation is not None and one.evaluation.leave_out_what_is_gone()]:
        _log.warning(
            "Warning: of %s the lines beside eval.json are gone, as they are in a copy of the numbers alone: what they "
            "say is as study.json has it, or left out. `drkl evaluate` writes them anew.",
            count(len(gone), "cell"),
        )
        earlier = Earlier.read(folder)
        cells = [earlier.completed(one, derived) for one in cells]
    judge = Judge(definition, cells, known_metrics(task), prompts=prompts)
    verdicts = [earlier.completed_row(row) if prompts else row for row in judge.verdicts()]
    env = read_environment(folder)
    # A cell of another study may have begun before this one did, and a study may have no cell that has.
    began = min((one.began for one in cells if one.began), default=None)
    if began is None and any(one.state == "done" for one in cells):
        began = env.get("began")
    changed = changed_fields(env.get("changes") or [])
    return {
        "definition": definition,
        "folder": folder,
        "cells": tuple(cells),
        "verdicts": tuple(verdicts),
        "predictions": tuple(judge.foretold(verdicts)),
        "predicted": _predicted(env, changed),
        "began": began,
        "changed": tuple(changed),
        "notes": tuple(_notes(definition, cells, env)),
        "made": {name: value for name, value in env.items() if name not in _OF_THE_STUDY},
        "task": task,
        "has_more_seeds": has_more_seeds(env.get("changes") or []),
    }


def _task_of(folder: Path) -> str:
    """The task by the base of a study in which no cell has finished."""
    path = base_yaml(folder)
    values = read_yaml(path) if path.is_file() else {}
    return "classification" if values.get("task") == "classification" else "generation"


def _predicted(env: Mapping[str, Any], changed: Sequence[str]) -> Mapping[str, Any] | None:
    """What git said of the study's file when the first cell began; where it was changed later, what it says now."""
    found = env.get("predicted_now" if changed else "predicted")
    return found if isinstance(found, Mapping) else None


def _notes(definition: Definition, cells: Sequence[CellResult], env: Mapping[str, Any]) -> Iterator[str]:
    """What is to be said beside the verdicts."""
    seeds = definition.axes.get(SEED, [])
    if len(seeds) < MIN_PAIRS:
        yield "A study decides nothing without several seeds: give run.seed two values or more."
    counts = Counter(one.state for one in cells)
    if others := [f"{many} {state}" for state, many in counts.items() if state != "done"]:
        yield f"{counts['done']} of {len(cells)} cells are done; the others: {', '.join(others)}."
    for one in env.get("changes") or []:
        yield f"Changed at {one.get('when')}, after the first cell began: {'; '.join(map(str, one.get('what', [])))}."
    machines = Counter(_machine(one) for one in cells if one.evaluation is not None)
    if len(machines) > 1:
        told = "; ".join(f"{what} ({many} cells)" for what, many in machines.items())
        yield f"The cells were not all made by the same software on the same kind of device: {told}."


def _machine(cell: CellResult) -> str:
    settings = {} if cell.evaluation is None else cell.evaluation.settings
    versions = settings.get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("drkl", "torch", "transformers") if name in versions]
    return ", ".join([*named, str(settings.get("device") or "device not known")])


def read_cells(definition: Definition, folder: Path, derived: Iterable[str] = ()) -> list[CellResult]:
    """Return the cells of a study in their order, as far as they are.

    Nothing in a folder is an error: a cell with a damaged file has failed, and ``why`` says so.

    Args:
        definition: of the study.
        folder: of the study.
        derived: keys of metrics that are no number of ``eval.json`` but follow from the answers beside it.
    """
    return [read_cell(definition, folder, cell, derived) for cell in cells_of(definition)]


def read_cell(definition: Definition, folder: Path, cell: Cell, derived: Iterable[str] = ()) -> CellResult:
    """Return one cell; arguments as `read_cells`'s."""
    record = cell_record(folder / CELLS / cell.name)
    run, about = RunFolder(record.folder), {}
    try:
        about = _checked(record)
        if "run" in about:  # a cell of another study
            run = RunFolder(folder / about["run"])
        # Results that were copied need no more than their eval.json.
        state, why = record.state() if about else ("done" if run.eval_path.is_file() else "missing", None)
        if state == "done":
            return _finished(definition, cell, run, about, derived)
    except DrklError as error:
        state, why = "failed", str(error)
    return CellResult(
        cell.name, cell.axes, run.root, state, why, about.get("start"), seconds=_seconds(about, {}, None),
        began=began_at(about),
    )  # fmt: skip


def _checked(record: Record) -> dict[str, Any]:
    """What is noted of a cell, as far as it is read here; nothing where there is no file."""
    about = record.read()
    for key, kind in (("axes", dict), ("tries", list), ("seconds", dict), ("start", str), ("run", str), ("began", str)):
        if about.get(key) is None:
            about.pop(key, None)
        elif not isinstance(about[key], kind):
            raise DrklError(f"{record.path}: {key}: expected a {kind.__name__}, found a {type(about[key]).__name__}.")
    if not all(isinstance(one, dict) and one.keys() >= {"began", "status"} for one in about.get("tries", ())):
        raise DrklError(f"{record.path}: tries: expected objects with began and status.")
    return about


def _finished(
    definition: Definition, cell: Cell, run: RunFolder, about: Mapping[str, Any], derived: Iterable[str]
) -> CellResult:
    evaluation = Evaluation.load(run.root)
    evaluation.leave_out_what_is_gone()
    env = run.read_env()
    config = run.read_config() if run.config_path.is_file() else {}
    _check_is_cell(definition, cell, config, about, run)
    models = {name: _numbers(evaluation, name) for name in ("student", "teacher", SCALED)}
    models["student"] |= derived_of(evaluation, derived)
    return CellResult(
        cell.name,
        cell.axes,
        run.root,
        "done",
        None,
        about.get("start") or _first_weights(run, env),
        models["student"],
        models["teacher"],
        models[SCALED],
        _seconds(about, env, evaluation),
        budget_of(run, env, config, evaluation),
        evaluation,
        began_at(about) or env.get("started"),
    )


def _first_weights(run: RunFolder, env: Mapping[str, Any]) -> Any:
    """The digest of the weights that a run began with: those before its first stage, where it trained stages itself."""
    first = next((stage.read_env() for stage in run.stages()), env)
    return _entry(first, "inputs", "student", "weights")


def _check_is_cell(
    definition: Definition, cell: Cell, config: Mapping[str, Any], about: Mapping[str, Any], run: RunFolder
) -> None:
    """Raise DrklError where a run is another than the cell that its folder is named for."""
    said = about.get("axes", cell.axes)
    if not same(dict(said), cell.axes):
        raise DrklError(f"cell.json of {run.root} says that the run is another cell: {json.dumps(said)}.")
    settings = {key: value for key, value in cell.axes.items() if key != VARIANT}
    settings |= definition.variants.get(cell.axes.get(VARIANT, ""), {})
    for key, value in settings.items():
        # A number, or the objective, stands in config.yaml as it was given; much else is settled there.
        found = _entry(config, *key.split("."))
        is_plain = key == "objective.name" or (isinstance(value, int | float) and not isinstance(value, bool))
        if is_plain and found is not None and not same(found, value):
            raise DrklError(
                f"{run.config_path} has {key} {text_of(found)}, and the cell is of {text_of(value)}. Move the folder "
                "away: it belongs to another study."
            )


def _numbers(evaluation: Evaluation, model: str) -> dict[str, float]:
    values = {key: evaluation.value(model, key) for key in metrics_of(evaluation.task)}
    return {key: value for key, value in values.items() if value is not None}


def derived_of(evaluation: Evaluation, keys: Iterable[str]) -> dict[str, float]:
    """The student's numbers that follow from its answers; those are left out that it does not have.

    Raises:
        DrklError: the files beside ``eval.json`` are damaged.
    """
    if evaluation.task == "classification":
        return {}
    found = {key: measured(evaluation, key, seed=RESAMPLED).values.get("student") for key in keys}
    return {key: float(column[0]) for key, column in found.items() if column is not None}


# What a cell was trained and evaluated with -------------------------------------------------------------------------


def budget_of(run: RunFolder, env: Mapping[str, Any], config: Mapping[str, Any], of: Evaluation) -> dict[str, Any]:
    """Return what the cells of a study should have in common, as the run itself noted it; None for what it did not.

    ``steps``; ``tokens``, as far as they were logged; ``rows per step`` or ``tokens per step``; ``selection``;
    ``training rows``, ``held-out rows`` and ``teacher``, by digests of their content; ``evaluated rows`` and
    ``evaluated prompts``, likewise; ``sampling``, the settings; ``student_step``, which may differ.
    """
    inputs = env.get("inputs")
    chooses = (_entry(inputs, "settings") or {}).get(_CHOSEN)
    patience = _entry(config, "training", "early_stop_patience")
    selection = None if chooses is None else BEST if chooses else "last step"
    lines, _ = readable_log(run.train_log_path)
    tokens = [as_number(line.get("num_tokens")) for line in lines]
    return {
        "steps": env.get("steps"),
        "tokens": next((count for count in reversed(tokens) if count is not None), None),
        "tokens per step": _entry(config, "training", "tokens_per_step"),
        "rows per step": (_entry(inputs, "settings") or {}).get(ROWS_PER_STEP)
        or _entry(config, "training", "per_device_train_batch_size"),
        "selection": f"{selection}, patience {patience}" if selection and patience else selection,
        "training rows": _entry(inputs, "rows", "training rows", "digest"),
        "held-out rows": _entry(inputs, "rows", "held-out rows", "digest"),
        "teacher": _entry(inputs, "teacher", "weights"),
        "evaluated rows": _digest_of_rows(of),
        "evaluated prompts": _digest_of_prompts(of),
        "sampling": {name: of.settings.get(name) for name in DECODING},
        "student_step": env.get("student_step"),
    }


def _digest_of_rows(of: Evaluation) -> str | None:
    if of.task == "classification":
        return _digest([line["id"], line["text"], line["label"]] for line in of.predictions)
    lines = (line for line in of.heldout if line["model"] == "student")
    return _digest([line.get("suite"), line["row_id"], line["num_tokens"]] for line in lines)


def _digest_of_prompts(of: Evaluation) -> str | None:
    lines = (line for line in of.samples if line["model"] == "student")
    prompts = ([line.get("suite"), line["prompt_id"], line["prompt"], line["reference"]] for line in lines)
    return _digest(dict.fromkeys(json.dumps(prompt) for prompt in prompts))


def _digest(values: Iterable[Any]) -> str | None:
    """A digest of values in their order; None of no value."""
    text = json.dumps(list(values))
    return None if text == "[]" else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _seconds(about: Mapping[str, Any], env: Mapping[str, Any], of: Evaluation | None) -> dict[str, float]:
    """Seconds of the parts, by the cell's own record, else by the run's."""
    known = {
        "train": as_number(env.get("seconds")),
        "evaluate": None if of is None else as_number(of.timing.get("total")),
    } | {name: as_number(value) for name, value in about.get("seconds", {}).items()}
    return {name: value for name, value in known.items() if value is not None}


def _entry(values: Any, *keys: str) -> Any:
    """A value in nested mappings; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
