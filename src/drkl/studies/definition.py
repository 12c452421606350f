"""What a study asks: its yaml file."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from drkl.config import plain_numbers
from drkl.errors import DrklError, did_you_mean
from drkl.runs import read_yaml
from drkl.training.config import NAME_PATTERN

SEED = "run.seed"
"""The axis whose values are the replicates."""
VARIANT = "variant"
"""The axis of named settings."""
MODEL = "model"
"""The key by which a comparison takes the scaled student of cells: their logits divided by a temperature."""
MOST_PRIMARY = 6
"""More comparisons in one family decide nothing at a few seeds: Holm over six needs |t| above 10.9 at three seeds."""

Settings = dict[str, Any]
"""Values by their dotted keys in a run's config, and the name of a variant by `VARIANT`."""
Outcome = Literal["better", "worse", "no difference", "undecided"]


class Primary(BaseModel):
    """A comparison that the study's file names, and that is corrected for the others so named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(description="Key of a metric of eval.json.")
    cell: Settings = Field(
        description="Dotted keys and values of the cells that are compared; model: scaled takes their students with "
        "evaluation.logit_temperature."
    )
    against: Settings = Field(description="Keys that differ in the cells they are compared with.")


class Prediction(BaseModel):
    """What is expected, written before the runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field("", description="The prediction in words.")
    metric: str | None = Field(None, description="Key of a metric of eval.json; null where words alone say it.")
    cell: Settings = Field(default_factory=dict, description="As in primary.")
    against: Settings = Field(default_factory=dict, description="As in primary; default the baseline.")
    expect: Outcome | None = Field(None, description="The verdict that is expected.")


class Shared(BaseModel):
    """What the cells of a study have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: bool = Field(True, description="Whether the cells of a seed start from one student, warmed up once.")
    teacher_cache: Literal["hidden", "topk"] | None = Field(
        None, description="Kind of the teacher's cache that is written once for all cells; null reads the teacher live."
    )
    dir: str | None = Field(None, description="Folder of the starts and of the cache; default shared/ in the study's.")
    cells: tuple[str, ...] = Field((), description="Folders of other studies, whose finished cells are used if equal.")

    @field_validator("dir")
    @classmethod
    def _find_home(cls, folder: str | None) -> str | None:
        return None if folder is None else os.path.expanduser(folder)

    @field_validator("cells")
    @classmethod
    def _find_homes(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(os.path.expanduser, folders))


class Definition(BaseModel):
    """A study: a grid of runs of one recipe, and what is to be decided by them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of the study's folder.", pattern=NAME_PATTERN)
    dir: str = Field("studies", description="Folder that the study's folder is made in.")
    base: str = Field(description="Name of a recipe, or a yaml file; a path is relative to the study's file.")
    settings: Settings = Field(
        default_factory=dict, description="Dotted keys that every cell has in place of the base's."
    )
    axes: dict[str, list[Any]] = Field(
        default_factory=dict, description="Values by dotted key; run.seed has the seeds."
    )
    variants: dict[str, Settings] = Field(default_factory=dict, description="One more axis: named settings.")
    baseline: Settings = Field(description="Keys that differ in the cell that each cell is compared with.")
    decide: list[str] = Field(description="Keys of the metrics of eval.json that are compared.")
    shared: Shared = Field(default_factory=Shared)
    smallest_difference: dict[str, float] = Field(
        default_factory=dict, description="By metric the difference below which two cells count as equal."
    )
    predictions: list[str | Prediction] = Field(
        default_factory=list, description="What is expected, written before the runs."
    )
    primary: list[Primary] = Field(
        default_factory=list, max_length=MOST_PRIMARY, description="The comparisons that decide, at most six."
    )
    keep_students: bool = Field(True, description="Whether cells keep their students once these are evaluated.")

    @field_validator("dir")
    @classmethod
    def _find_home(cls, folder: str) -> str:
        return os.path.expanduser(folder)


_PARTS: dict[str, type[BaseModel]] = {"shared": Shared, "primary": Primary, "predictions": Prediction}
"""The models of the fields that have keys of their own."""


def read_definition(path: str | Path) -> Definition:
    """Read a study's yaml file by itself; neither its base nor what it selects is looked at.

    Raises:
        DrklError: the file is missing or broken, or has an unknown key or a value that cannot be.
    """
    values = plain_numbers(read_yaml(path))
    try:
        return Definition.model_validate(values)
    except ValidationError as error:
        raise DrklError("\n".join(dict.fromkeys(f"{path}: {line}" for line in _explained(error)))) from error


def _explained(error: ValidationError) -> list[str]:
    """What is wrong, a line for each thing."""
    problems = error.errors(include_url=False)
    structured = {problem["loc"][:2] for problem in problems if "Prediction" in problem["loc"]}
    lines = []
    for problem in problems:
        loc = problem["loc"]
        if loc[0] == "predictions" and loc[-1] == "str" and loc[:2] in structured:
            if not isinstance(problem["input"], dict):
                lines.append(f"{_dotted(loc[:2])}: expected a sentence, or text, metric, cell, against and expect")
            continue
        if loc[-1] == "Prediction":
            continue  # it is no mapping: said as of the sentence
        where, message = _dotted(loc), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = [*(_PARTS.get(str(loc[0]), Definition) if len(loc) > 1 else Definition).model_fields]
            message = f"unknown key.{did_you_mean(str(loc[-1]), known)} Known here: {', '.join(known)}."
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] == "string_pattern_mismatch":
            message = f"{problem['input']!r} is no name of a folder: letters, digits, '.', '_' and '-', no sign first"
        else:
            message = f"{message[0].lower()}{message[1:]}, got {reprlib.repr(problem['input'])}"
        lines.append(f"{where}: {message}")
    return lines


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc if part not in ("str", "Prediction"))
