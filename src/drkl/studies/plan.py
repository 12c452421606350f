"""A study that is ready to run: its definition, its base, and the config of every cell, all checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from drkl.config import Config, load_config
from drkl.errors import DrklError
from drkl.folders import checksum
from drkl.recipes import find_recipe
from drkl.runs import RunFolder, json_text
from drkl.studies.definition import SEED, VARIANT, Definition, Settings, read_definition
from drkl.studies.grid import Cell, cells_of, check_grid, scaled_places, words
from drkl.studies.metrics import check_metrics

OF_THE_START = ("student", "teacher", "tokenizer", "data", "task", "peft", "stages", "run")
"""Sections of a config whose keys change the student that a cell starts from."""
_FIXED = {"run.name": "the cell's own", "run.dir": "the study's"}
"""Keys that the study sets."""


@dataclass(frozen=True)
class Planned:
    """A cell and its config."""

    cell: Cell
    config: Config
    """As the base would be run with its settings: with the stages, and the student of the base."""
    start: Config
    """The base with those of its settings that change the start."""
    notes: tuple[str, ...] = ()
    """What is to be said of settings without an effect."""

    @property
    def folder(self) -> RunFolder:
        """The cell's run folder."""
        return self.config.folder

    @property
    def seed(self) -> int:
        """Its replicate; the base's seed where the study has no axis of seeds."""
        return self.config.run.seed


@dataclass(frozen=True)
class Plan:
    """A study that is ready to run."""

    path: Path
    """Its yaml file."""
    definition: Definition
    base: Config
    """The base with the study's settings."""
    cells: tuple[Planned, ...]
    """All of a seed before the next."""
    found: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was found out of cells already."""

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.definition.dir) / self.definition.name

    @property
    def shared(self) -> Path:
        """Where the starts and the teacher's caches are made."""
        return self.folder / "shared" if self.definition.shared.dir is None else Path(self.definition.shared.dir)

    @property
    def notes(self) -> list[str]:
        """What is to be said before anything runs."""
        notes = list(dict.fromkeys(note for planned in self.cells for note in planned.notes))
        if SEED not in self.definition.axes:
            notes.append(
                f"{SEED} is none of the axes, so there is one replicate of each cell, and nothing can be decided: "
                "give it several seeds."
            )
        elif len(self.definition.axes[SEED]) == 1:
            notes.append("There is one seed, so that nothing can be decided: give run.seed several.")
        for name in self.definition.shared.cells:
            if not study_yaml(Path(name)).is_file():
                notes.append(f"shared.cells: no study has begun in {name!r}, so nothing of it is used.")
        return notes


def study_yaml(folder: Path) -> Path:
    """The definition in a study's folder, as it was run."""
    return folder / "study.yaml"


def load_study(path: str | Path) -> Plan:
    """Read a study's yaml file, and check all that can be checked before anything runs.

    Raises:
        DrklError: the file is missing or broken; an unknown key, metric, axis or variant; a cell that is no valid run.
    """
    path = Path(path)
    definition = read_definition(path)
    try:
        check_grid(definition)
        base = _config(definition, path, definition.settings)[0]
        check_metrics(definition, base.task)
        starts: dict[str, Config] = {}
        cells = tuple(_planned(definition, path, cell, starts) for cell in cells_of(definition))
        _check_scaled(definition, cells)
    except DrklError as error:
        raise error if str(error).startswith(str(path)) else DrklError(f"{path}: {error}") from error
    plan = Plan(path, definition, base, cells)
    _check_apart(plan)
    return plan


def _check_scaled(definition: Definition, cells: Iterable[Planned]) -> None:
    """Raise DrklError where scaled students are compared that are not measured, or by a metric that they have not."""
    unscaled = next((one for one in cells if one.config.evaluation.logit_temperature is None), None)
    if unscaled is not None and (place := next(scaled_places(definition), None)):
        raise DrklError(
            f"{place} has model: scaled, and the cell {unscaled.cell.name} has no evaluation.logit_temperature, so "
            "that its scaled student is not measured. Set it among the study's settings, to fit for instance."
        )


def _check_apart(plan: Plan) -> None:
    """Raise DrklError where the study's own copies would be written over the files that it is read from."""
    for given_file, name in ((plan.path, "study.yaml"), (base_of(plan.definition, plan.path), "base.yaml")):
        if given_file.resolve() == (plan.folder / name).resolve():
            raise DrklError(
                f"{given_file} lies where the study keeps a copy of its own, in its folder {str(plan.folder)!r}, and "
                "would be overwritten. Move it, beside that folder for instance."
            )


def base_of(definition: Definition, path: Path) -> Path:
    """The yaml file of a study's base: beside the study's file, from the current folder, or a recipe by its name."""
    beside = path.parent / os.path.expanduser(definition.base)
    return beside if beside.is_file() else find_recipe(definition.base)


def settings_of(definition: Definition, cell: Cell) -> Settings:
    """The dotted keys that a cell changes in the base: the study's ``settings``, and its own, which go before them."""
    return definition.settings | _own_settings(definition, cell)


def _own_settings(definition: Definition, cell: Cell) -> Settings:
    """The dotted keys of a cell's axes and of its variant."""
    axes = {key: value for key, value in cell.axes.items() if key != VARIANT}
    return axes | definition.variants.get(str(cell.axes.get(VARIANT)), {})


def digest(value: Any) -> str:
    """A hash of something that json can hold.

    Raises:
        DrklError: a number in it is infinite or not a number.
    """
    try:
        return checksum(json_text(value).encode())
    except ValueError as error:
        raise DrklError(
            "A setting is infinite or not a number (.inf or .nan), which the records of a study cannot hold."
        ) from error


def given(config: Config) -> dict[str, Any]:
    """A config without its defaults, and without where the run lies: two that are equal in it run the same."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["run"] = {key: value for key, value in values.get("run", {}).items() if f"run.{key}" not in _FIXED}
    # What was given fits no longer to the models, also where it is the default.
    data = values.setdefault("data", {})
    return values | {"data": data | config.data.given_lengths}


def _planned(definition: Definition, path: Path, cell: Cell, starts: dict[str, Config]) -> Planned:
    where = {"run.dir": str(Path(definition.dir) / definition.name / "cells"), "run.name": cell.name}
    settings, own = settings_of(definition, cell), _own_settings(definition, cell)
    of_start = definition.settings | {k: v for k, v in own.items() if k.partition(".")[0] in OF_THE_START}
    try:
        config, notes = _config(definition, path, settings | where)
        key = digest(of_start)
        starts[key] = starts.get(key) or _config(definition, path, of_start)[0]
        return Planned(cell, config, starts[key], tuple(notes))
    except DrklError as error:
        raise DrklError(f"The cell {cell.name} ({words(cell.axes)}) is no valid run: {error}") from error


def _config(definition: Definition, path: Path, settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    for key in (*definition.settings, *definition.axes, *_keys(definition.variants.values())):
        if key in _FIXED:
            raise DrklError(f"{key} is {_FIXED[key]}, as all cells have folders in {definition.dir!r}. Leave it out.")
    return load_config(_base_path(definition, path), [_override(key, value) for key, value in settings.items()])


def _base_path(definition: Definition, path: Path) -> Path:
    try:
        return base_of(definition, path)
    except DrklError as error:
        raise DrklError(f"base: {error}") from error


def _keys(many: Iterable[Mapping[str, Any]]) -> list[str]:
    return [key for settings in many for key in settings]


def _override(key: str, value: Any) -> str:
    """The word of a command line that sets a key."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return f"{key}={text.strip().removesuffix('...').strip()}"
