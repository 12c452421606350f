"""The cells of a study: the product of its axes and variants, their names, and which of them a setting means."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.result import SCALED
from drkl.studies.definition import MODEL, SEED, VARIANT, Definition, Prediction, Primary, Settings
from drkl.training.config import NAME_PATTERN

LONGEST_VALUE = 32
"""Characters of a value in a cell's name."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    """Its folder's: the values of its axes, as in ``drkl-share1-seed0``."""
    axes: Settings
    """The values of its axes by dotted key, ``run.seed`` the last, and of ``variant`` where there are variants."""


def cells_of(definition: Definition) -> list[Cell]:
    """Return the cells of a study, all of a seed before the next, so that what is cut off is whole seeds.

    Without ``run.seed`` among the axes there is one cell of each kind, whose ``axes`` have no seed.

    Raises:
        DrklError: an axis is empty or has a value twice, a variant sets an axis, or two cells would have one name.
    """
    check_axes(definition)
    groups = groups_of(definition)
    seeds: list[Settings] = [{SEED: seed} for seed in definition.axes[SEED]] if SEED in definition.axes else [{}]
    cells = [Cell(_name(definition, group | seed), group | seed) for seed in seeds for group in groups]
    counts = Counter(cell.name.casefold() for cell in cells)
    if twice := [cell for cell in cells if counts[cell.name.casefold()] > 1]:
        first, second = [cell.axes for cell in twice if cell.name.casefold() == twice[0].name.casefold()][:2]
        raise DrklError(
            f"Two cells would have one folder, {twice[0].name!r}: {words(first)}; and {words(second)}. Change a value "
            "or the name of a variant."
        )
    return cells


def groups_of(definition: Definition) -> list[Settings]:
    """Return the axes of every kind of cell, without ``run.seed``: the cells of a group differ in their seed alone."""
    values = _values(definition)
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def group_of(axes: Mapping[str, Any]) -> Settings:
    """The axes of a cell without ``run.seed``."""
    return {key: value for key, value in axes.items() if key != SEED}


def seed_of(axes: Mapping[str, Any]) -> int | None:
    """The seed of a cell; None where the study has no axis of seeds."""
    return axes.get(SEED)


def select(definition: Definition, start: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> Settings:
    """Return the axes, without ``run.seed``, of the group that settings mean.

    Args:
        definition: of the study.
        start: the axes that ``wanted`` leaves as they are, such as those of the cell that is compared; None: what it
            leaves out must have one value in the study.
        wanted: values by axis. A variant is meant by its name, as ``variant``, or by what it sets. ``model: scaled``
            means the scaled students of the cells, and stands among the axes that are returned; ``model: student``
            means the students themselves.

    Raises:
        DrklError: a key is no axis and set by no variant, the axis has no such value, no variant sets just these, or
            something is left open.
    """
    values = _values(definition)
    chosen = group_of(start or {})
    by_settings = {}
    for key, value in wanted.items():
        if key == SEED:
            raise DrklError(
                f"{words(wanted)}: {SEED} is the replicate: every seed is compared with itself. Leave it out."
            )
        if key == MODEL:
            chosen.pop(MODEL, None)
            if _model(value) == SCALED:
                chosen[MODEL] = SCALED
        elif key in values:
            chosen[key] = _one_of(definition, key, value, values[key])
        elif any(key in settings for settings in definition.variants.values()):
            by_settings[key] = value
        else:
            known = [*values, MODEL, *(key for settings in definition.variants.values() for key in settings)]
            raise DrklError(
                f"{words(wanted)}: {key!r} is no axis of the study and no variant sets it."
                f"{did_you_mean(key, known)} Its axes: {', '.join(values) or 'none'}."
            )
    if by_settings:
        if VARIANT in wanted:
            raise DrklError(f"{words(wanted)} names a variant and what one sets. Give its name alone.")
        chosen[VARIANT] = _variant(definition, by_settings)
    for key, options in values.items():
        if key not in chosen:
            if len(options) > 1:
                raise DrklError(
                    f"{words(wanted) or 'A cell without a key'} leaves {key} open, which has {len(options)} values: "
                    f"{_listed(options)}. Say which of them is meant."
                )
            chosen[key] = options[0]
    return {key: chosen[key] for key in (*values, MODEL) if key in chosen}


def model_of(axes: Mapping[str, Any]) -> str:
    """The model of a group's cells that is compared, by its name in ``eval.json``."""
    return str(axes.get(MODEL, "student"))


def cells_axes(axes: Mapping[str, Any]) -> Settings:
    """The axes of a group without the model of its cells that is meant."""
    return {key: value for key, value in axes.items() if key != MODEL}


def baseline_of(definition: Definition, axes: Mapping[str, Any]) -> Settings:
    """Return the axes, without ``run.seed``, of what a cell is compared with.

    The baseline fixes its own keys; the others equal the cell's.

    Raises:
        DrklError: as `select`.
    """
    return select(definition, axes, definition.baseline)


def pair_of(definition: Definition, cell: Mapping[str, Any], against: Mapping[str, Any]) -> tuple[Settings, Settings]:
    """Return the groups of a primary comparison or of a prediction: the cells', and what they are compared with.

    Args:
        definition: of the study.
        cell: the settings of the cells.
        against: what differs in the others; nothing: the baseline.

    Raises:
        DrklError: as `select`, or the two are one.
    """
    axes = select(definition, None, cell)
    other = select(definition, axes, against or definition.baseline)
    if same(other, axes):
        raise DrklError(f"{words(cell)} is compared with itself: against has {words(against or definition.baseline)}.")
    return axes, other


def check_grid(definition: Definition) -> None:
    """Check the axes, the variants, and what the baseline, the primary comparisons and the predictions select.

    Raises:
        DrklError: one of them is wrong; the message names it.
    """
    cells_of(definition)
    for place, check in _selections(definition):
        try:
            check()
        except DrklError as error:
            raise DrklError(f"{place}: {error}") from error
    pairs = [[entry.metric, *pair_of(definition, entry.cell, entry.against)] for entry in definition.primary]
    for (first, one), (second, other) in itertools.combinations(enumerate(pairs), 2):
        if same(one, other):
            raise DrklError(f"primary.{second} is primary.{first} once more.")


def _selections(definition: Definition) -> Iterator[tuple[str, Any]]:
    yield "baseline", lambda: [baseline_of(definition, axes) for axes in groups_of(definition)]
    for number, primary in enumerate(definition.primary):
        yield f"primary.{number}", lambda of=primary: pair_of(definition, of.cell, of.against)
    for number, prediction in enumerate(definition.predictions):
        if isinstance(prediction, Prediction) and (prediction.cell or prediction.against or prediction.metric):
            yield f"predictions.{number}", lambda of=prediction: pair_of(definition, of.cell, of.against)


def scaled_places(definition: Definition) -> Iterator[str]:
    """Yield the keys of the study's file that mean a scaled student."""
    if definition.baseline.get(MODEL) == SCALED:
        yield "baseline"
    compared: list[Primary | Prediction | str] = [*definition.primary, *definition.predictions]
    for place, entry in enumerate(compared):
        if not isinstance(entry, str) and SCALED in (entry.cell.get(MODEL), entry.against.get(MODEL)):
            is_primary = place < len(definition.primary)
            yield f"primary.{place}" if is_primary else f"predictions.{place - len(definition.primary)}"


def check_axes(definition: Definition) -> None:
    """Check the axes and variants by themselves.

    Raises:
        DrklError: an axis has no value, one twice, or one that names a variant; a variant sets an axis or nothing.
    """
    if VARIANT in definition.axes:
        raise DrklError(f"axes.{VARIANT}: named settings stand under variants, not among the axes.")
    if MODEL in definition.axes:
        raise DrklError(f"axes.{MODEL}: {MODEL} says which model of a cell is compared; it is no key of a recipe.")
    for key, values in definition.axes.items():
        if not values:
            raise DrklError(f"axes.{key} has no value. Give one at least, or leave the axis out.")
        for place, value in enumerate(values):
            if any(same(value, other) for other in values[:place]):
                raise DrklError(f"axes.{key} has {text_of(value)} twice.")
    for seed in definition.axes.get(SEED, ()):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise DrklError(f"axes.{SEED} has {text_of(seed)}; expected whole numbers from 0 on.")
    for name, settings in definition.variants.items():
        if not re.fullmatch(NAME_PATTERN, name):
            raise DrklError(
                f"variants: {name!r} cannot be part of a folder's name. Use letters, digits, '.', '_', '-'."
            )
        if both := [key for key in settings if key in definition.axes or key in (SEED, VARIANT)]:
            why = "is the replicate" if both[0] == SEED else "is an axis"
            raise DrklError(f"variants.{name} sets {both[0]}, which {why}. A key belongs to the one or to the other.")
    for name, other in itertools.combinations(definition.variants, 2):
        if same(definition.variants[name], definition.variants[other]):
            raise DrklError(f"variants.{name} and variants.{other} set the same.")


def same(one: Any, other: Any) -> bool:
    """Whether two values of yaml are one setting: 0 and 0.0 are, 1 and true are not."""
    return _plain(one) == _plain(other)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _values(definition: Definition) -> dict[str, list[Any]]:
    """The values of every axis but ``run.seed``, that of the variants the last."""
    values = {key: list(options) for key, options in definition.axes.items() if key != SEED}
    return values | ({VARIANT: list(definition.variants)} if definition.variants else {})


def _one_of(definition: Definition, key: str, value: Any, options: list[Any]) -> Any:
    for option in options:
        if same(option, value):
            return option
    texts = [option for option in options if isinstance(option, str)]
    hint = did_you_mean(value, texts) if isinstance(value, str) else ""
    raise DrklError(f"{key} has no value {text_of(value)} in the study.{hint} It has {_listed(options)}.")


def _model(value: Any) -> str:
    if value not in ("student", SCALED):
        raise DrklError(f"{MODEL} is {text_of(value)}; expected student or {SCALED}.")
    return str(value)


def _variant(definition: Definition, settings: Settings) -> str:
    for name, own in definition.variants.items():
        if same(own, settings):
            return name
    known = "; ".join(f"{name} ({words(own)})" for name, own in definition.variants.items())
    raise DrklError(f"No variant sets just {words(settings)}. The variants: {known}.")


# Words ------------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """A value of yaml in short: text as it is, the rest as json has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, default=str)


def words(settings: Mapping[str, Any]) -> str:
    """Settings on a line: ``objective.name drkl, rollouts.share 1``."""
    return ", ".join(f"{key} {text_of(value)}" for key, value in settings.items())


def label(axes: Mapping[str, Any], leave_out: Mapping[str, Any] | None = None) -> str:
    """The values of a group's axes on a line, an objective and a variant without their key.

    >>> label({"objective.name": "drkl", "rollouts.share": 1.0})
    'drkl, rollouts.share 1'

    Args:
        axes: of the group.
        leave_out: axes that are not said where they have this value.
    """
    given = leave_out or {}
    said = {key: value for key, value in axes.items() if key not in given or not same(given[key], value)}
    bare = ("objective.name", VARIANT, MODEL)
    return ", ".join(text_of(value) if key in bare else f"{key} {text_of(value)}" for key, value in said.items())


def _listed(options: list[Any]) -> str:
    return ", ".join(text_of(option) for option in options)


def _name(definition: Definition, axes: Settings) -> str:
    """A name that depends on the cell's own values alone, so that it stays when others are added."""
    last = Counter(key.rpartition(".")[2] for key in definition.axes)
    parts = []
    for key, value in axes.items():
        short = key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key.replace(".", "-")
        parts.append(("" if key in ("objective.name", VARIANT) else _safe(short)) + _safe(text_of(value)))
    name = "-".join(parts) or "cell"
    return name if re.fullmatch(NAME_PATTERN, name) else f"cell-{name.lstrip('._-')}"


def _safe(text: str) -> str:
    """Text as a part of a folder's name; a digest tells apart what cannot stand in one."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:LONGEST_VALUE]
    if plain == text and text == text.lower():
        return text
    return f"{plain}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}".lstrip("-")
