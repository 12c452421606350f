"""An evaluated run as ``drkl compare`` reads it, and whether two of them were measured on the same things."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from drkl.display import as_number
from drkl.errors import DrklError
from drkl.evaluation.declared import metrics_of
from drkl.runs import RunFolder, read_json, read_jsonl

Line = Mapping[str, Any]

STUDENTS = ("after", "student")
"""The trained student of a run, and that of a pair of models from elsewhere."""
SAMPLING = (
    "sampling_temperature",
    "max_new_tokens",
    "samples_per_prompt",
    "seeds",
    "seed",
    "protocol",
    "template",
    "gamma",
)


@dataclass(frozen=True)
class Evaluated:
    """An evaluated run or pair: ``eval.json``, and the lines that its numbers are made of."""

    folder: RunFolder
    numbers: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Evaluated:
        """Return the evaluation in ``path``, with a ``config.yaml`` beside it or without one."""
        folder = RunFolder(Path(path))
        if not folder.root.is_dir():
            raise DrklError(f"There is no folder {str(path)!r}.")
        if not folder.eval_path.is_file():
            raise DrklError(f"{str(path)!r} has no eval.json; `drkl evaluate {path}` makes it.")
        numbers = read_json(folder.eval_path)
        if not isinstance(numbers, dict) or not any(isinstance(numbers.get(name), dict) for name in STUDENTS):
            raise DrklError(f"{folder.eval_path} has the numbers of no student ({' or '.join(STUDENTS)}).")
        return cls(folder, numbers)

    def __str__(self) -> str:
        return str(self.folder.root)

    @property
    def student(self) -> str:
        """What the trained student is called here."""
        return next(name for name in STUDENTS if isinstance(self.numbers.get(name), dict))

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it was measured."""
        settings = self.numbers.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def task(self) -> str:
        """generation or classification."""
        return str(self.settings.get("task") or self.numbers.get("task") or "generation")

    def value(self, model: str, key: str) -> float | None:
        """One number of ``eval.json``."""
        values = self.numbers.get(model)
        return as_number(values.get(key)) if isinstance(values, dict) else None

    def lines(self, name: str, keys: Iterable[str]) -> list[Line]:
        """The lines of a file.

        Raises:
            DrklError: there is no such file, or a line lacks one of ``keys``.
        """
        path = self.folder.root / name
        if not path.is_file():
            raise DrklError(f"{str(self)!r} has no {name}; `drkl evaluate` writes it beside eval.json.")
        rows: list[Line] = [*read_jsonl(path)]
        for number, row in enumerate(rows, start=1):
            if lacking := [key for key in keys if key not in row]:
                raise DrklError(f"{path}:{number} lacks {', '.join(lacking)}.")
        return rows

    def heldout(self) -> Sets:
        """The lines of ``heldout.jsonl`` by suite (and no temperature)."""
        return self._sets(self.lines("heldout.jsonl", ("model", "row_id", "num_tokens")), lambda line: None)

    def samples(self) -> Sets:
        """The lines of ``samples.jsonl`` by suite and sampling temperature; none where nothing was sampled."""
        if not (self.folder.samples_path.is_file() or self.settings.get("prompts")):
            return {}
        keys = ("model", "prompt_id", "prompt", "sampling_temperature", "sample", "text", "reference", "num_tokens")
        return self._sets(self.lines("samples.jsonl", keys), lambda line: float(line["sampling_temperature"]))

    def _sets(self, lines: Iterable[Line], temperature: Callable[[Line], float | None]) -> Sets:
        found: Sets = {}
        for line in lines:
            models = found.setdefault((line.get("suite"), temperature(line)), {})
            models.setdefault(line["model"], []).append(line)
        return {name: models for name, models in found.items() if self.student in models}


Pair = tuple[Evaluated, Evaluated]
Models = dict[str, list[Line]]
"""Lines by the model that they are of."""
Sets = dict[tuple[str | None, float | None], Models]
"""By suite and sampling temperature; those where the student has lines."""


@dataclass(frozen=True)
class Unit:
    """What is resampled: how a line names it, and which fields say that it is the same in both runs.

    ``lacking`` says why a number of ``eval.json`` has no paired difference.
    """

    plural: str
    id: str
    same: tuple[str, ...]
    lacking: str


ROWS = Unit("held-out rows", "row_id", ("num_tokens",), "not in heldout.jsonl")
PROMPTS = Unit("prompts", "prompt_id", ("prompt", "reference"), "no function of how often a prompt counts")
TEXTS = Unit("texts", "id", ("text", "label"), "not in predictions.jsonl")


def same_units(pair: Pair, unit: Unit, lines: Sequence[Sequence[Line]]) -> list[Any]:
    """The ids of what both runs were evaluated on, in the order of the first.

    Raises:
        DrklError: they differ.
    """
    first, second = ({line[unit.id]: line for line in rows} for rows in lines)
    if not first and not second:
        raise DrklError(f"{pair[0]} and {pair[1]} have no {unit.plural}.")
    for (one, here), (_, there) in (((pair[0], first), (pair[1], second)), ((pair[1], second), (pair[0], first))):
        if alone := [name for name in here if name not in there]:
            raise DrklError(
                f"The {unit.plural} differ: {len(alone)} of {len(here)} are in {one} only, such as {alone[0]!r}. "
                "Only runs evaluated on the same data can be compared."
            )
    for name, line in first.items():
        for key in unit.same:
            if line[key] != second[name][key]:
                values = " and ".join(_short(value) for value in (line[key], second[name][key]))
                raise DrklError(
                    f"The {unit.plural} differ: {name!r} has as {key} {values}. "
                    "Only runs evaluated on the same data can be compared."
                )
    return list(first)


def in_order(lines: Sequence[Line], unit: Unit, ids: Sequence[Any], run: Evaluated) -> list[Line]:
    """The lines as the ids stand."""
    by_id: dict[Any, list[Line]] = {}
    for line in lines:
        by_id.setdefault(line[unit.id], []).append(line)
    if by_id.keys() != set(ids):
        raise DrklError(f"The models in {run} were evaluated on different {unit.plural}; `drkl evaluate` it again.")
    return [line for name in ids for line in by_id[name]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def different_settings(pair: Pair) -> Iterator[str]:
    """A sentence for each setting of the sampling that is not the same in both."""
    for key in SAMPLING:
        a, b = (run.settings.get(key) for run in pair)
        if a != b:
            yield f"{key} is {_short(a)} in A and {_short(b)} in B."


def different_teachers(pair: Pair) -> Iterator[str]:
    """A sentence where the teachers have other names, or other numbers on the same rows."""
    models = [run.settings.get("models") for run in pair]
    names = [found.get("teacher") for found in models if isinstance(found, dict)]
    if len(names) == 2 and names[0] != names[1]:
        yield f"The teachers differ: {_short(names[0])} in A, {_short(names[1])} in B."
        return
    for key in ("nll", "entropy", "confidence"):
        a, b = (run.value("teacher", key) for run in pair)
        same = a is b is None or (a is not None and b is not None and isclose(a, b, rel_tol=1e-3))
        if not same:
            metric = metrics_of(pair[0].task)[key]
            yield f"The teachers differ: {metric.title} {metric.show(a)} in A, {metric.show(b)} in B."
            return


def only_in_one(what: str, sets: Sequence[Sets]) -> Iterator[str]:
    """A sentence for each set or sampling temperature that one of the two lacks."""
    for name, here, there in (("A", sets[0], sets[1]), ("B", sets[1], sets[0])):
        for suite, temperature in here:
            if (suite, temperature) not in there:
                at = "" if temperature is None else f" at sampling temperature {temperature:g}"
                yield f"Only {name} has {what}{'' if suite is None else f' of {suite}'}{at}: not compared."
