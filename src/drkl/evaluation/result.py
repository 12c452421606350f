"""A typed evaluation: the only reader and writer of ``eval.json`` and the files beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, AllowInfNan, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from drkl.display import shell_word
from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.bootstrap import Estimate as Estimate
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import metrics_of
from drkl.evaluation.findings import Answer, Finding, of_evaluation
from drkl.kept import MARK, described, note_changes, note_other_student
from drkl.runs import RunFolder, json_text, jsonl_text, read_jsonl, read_sealed, write_together
from drkl.sealed import sealed

_log = logging.getLogger("drkl")

FORMAT = 2
"""The format of ``eval.json``. Format 1 has no ``format`` and calls a run's student ``after``; it is still read."""
MEASURED = ("teacher", "before", "warmup", "student")
"""The models of an evaluation in their order: a run's teacher, its student before training, after the warm-up stage,
and as trained; two models from elsewhere are ``teacher`` and ``student``."""
SCALED = "scaled"
"""The student once more, with a temperature on its logits. It answers nothing."""
MODELS = (*MEASURED, SCALED)
"""All that have numbers."""

Lines = list[dict[str, Any]]
FILES: dict[str, tuple[str, ...]] = {
    "samples": ("model", "prompt_id", "prompt", "sampling_temperature", "sample", "text", "reference", "num_tokens"),
    "heldout": ("model", "row_id", "num_tokens", "sums", "bins"),
    "predictions": ("id", "text", "label", "student", "student_confidence", "nll"),
}
"""The json-lines files beside ``eval.json``, and what every line of them has."""


@dataclass(frozen=True)
class Numbers:
    """The metrics of every model on one set of rows, with their 95 % intervals."""

    values: dict[str, dict[str, float | None]]
    """By model and metric; None where a metric is not defined or infinite."""
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models that were evaluated, in the order of `MODELS`."""
        return [name for name in MODELS if name in self.values]

    def value(self, model: str, key: str) -> float | None:
        """A model's metric; None where it was not measured."""
        return self.values.get(model, {}).get(key)

    def interval(self, model: str, key: str) -> Interval | None:
        """The 95 % interval of a model's metric; None where there is none."""
        return self.intervals.get(model, {}).get(key)

    def estimate(self, model: str, key: str) -> Estimate:
        """A model's metric with its 95 % interval."""
        return Estimate(self.value(model, key), self.interval(model, key))


@dataclass(frozen=True)
class SweepPoint:
    """The answers of one model at one sampling temperature."""

    sampling_temperature: float
    values: dict[str, float | None]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Coverage:
    """Metrics of ``samples[i]`` answers to a prompt; see `drkl.evaluation.answers.AnswerTable.coverage`."""

    samples: list[int]
    rouge_l_best: list[float | None]
    distinct_answers: list[float]


@dataclass(frozen=True)
class TailProfile:
    """Mean probability of the tokens at the teacher's ``ranks``, by model."""

    ranks: list[int]
    means: dict[str, list[float | None]]


@dataclass(frozen=True)
class ReliabilityBins:
    """By bin of confidence: number of tokens (or texts), mean confidence, accuracy (None in an empty bin)."""

    counts: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, by model: in bins of equal ``width`` (with ``edges``) and of equal ``mass``."""

    edges: list[float]
    width: dict[str, ReliabilityBins]
    mass: dict[str, ReliabilityBins] = field(default_factory=dict)


@dataclass(frozen=True)
class Distributions:
    """Histograms over held-out tokens of ``entropy``, ``confidence`` and ``target`` (q of the teacher's top token)."""

    edges: dict[str, list[float]]
    counts: dict[str, dict[str, list[int]]]
    """By model and quantity; of the teacher, and without one, there may be fewer."""


@dataclass(frozen=True)
class Fold:
    """Held-out rows that were measured with one temperature."""

    temperature: float
    rows: int
    """How many rows were measured with it."""
    fitted_on: int = 0
    """How many other rows it was fitted on; 0 where it was given."""
    at_bound: bool = False
    """Whether it is the lowest or the highest that a fit tries: the best one may lie beyond."""


@dataclass(frozen=True)
class Scaling:
    """The temperatures of the model ``scaled``: the student with its logits divided by them."""

    fitted_to: str | None
    """``labels``, ``teacher``, or None where the temperature was given."""
    folds: list[Fold]

    @property
    def words(self) -> str:
        """A short description: ``logits / 1.31, 1.28 (each fitted on the other half)``."""
        numbers = ", ".join(f"{fold.temperature:.3g}" for fold in self.folds)
        if self.fitted_to is None:
            return f"logits / {numbers}"
        to = "" if self.fitted_to == "labels" else " to the teacher"
        return f"logits / {numbers} (each fitted{to} on the other half)"

    @property
    def note(self) -> str:
        """What is to be said of temperatures at a bound; empty where none is."""
        ends = [fold.temperature for fold in self.folds if fold.at_bound]
        if not ends:
            return ""
        numbers = " and ".join(f"{end:g}" for end in dict.fromkeys(ends))
        return f"The fitted temperature is {numbers}, an end of what is tried: no temperature in between is the best."

    def to_json(self) -> dict[str, Any]:
        """The section of ``eval.json``."""
        return {
            "definition": "The student's logits / temperature, each row's own; intervals hold the temperatures fixed.",
            "fitted_to": self.fitted_to,
            "folds": [vars(fold) for fold in self.folds],
        }


@dataclass(frozen=True)
class Evaluation:
    """The result of `drkl.evaluate`.

    ``result["rkl"]`` is the student's; ``result.value("teacher", "entropy")`` is any model's. The lines behind the
    numbers are in memory, or read from the folder when they are first asked for.
    """

    numbers: Numbers
    settings: dict[str, Any]
    """The settings of the evaluation: the fields of `EvaluationConfig`, the models, the data, versions, definitions."""
    task: str = "generation"
    """``generation`` or ``classification``."""
    name: str = "evaluation"
    """The run's ``run.name``; of a pair the name of its folder."""
    classes: list[str] = field(default_factory=list)
    suites: dict[str, Numbers] = field(default_factory=dict)
    """The numbers of each named suite, if suites were evaluated."""
    sweep: dict[str, list[SweepPoint]] = field(default_factory=dict)
    """By model, from the lowest sampling temperature to the highest."""
    coverage: dict[str, Coverage] = field(default_factory=dict)
    tail: TailProfile | None = None
    reliability: Reliability | None = None
    distributions: Distributions | None = None
    scaling: Scaling | None = None
    """The temperatures of the model ``scaled``, where there is one."""
    timing: dict[str, Any] = field(default_factory=dict)
    """Seconds, by model and part, and in ``total``."""
    findings: list[Finding] = field(default_factory=list)
    folder: Path | None = None
    """The folder that it was loaded from or saved to; None in memory."""
    lines: dict[str, Lines] = field(default_factory=dict, repr=False, compare=False)
    """The lines that are in memory, by the names in `FILES`."""
    files: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Sizes and checksums of the files of lines in the folder, by their names."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Resampled metrics that `drkl.evaluation.comparison` keeps for the next comparison."""

    def __str__(self) -> str:
        return self.name if self.folder is None else str(self.folder)

    @property
    def models(self) -> list[str]:
        """The models that were evaluated, in the order of `MODELS`."""
        return self.numbers.models

    def value(self, model: str, key: str) -> float | None:
        """A model's metric; None where it was not measured."""
        return self.numbers.value(model, key)

    def interval(self, model: str, key: str) -> Interval | None:
        """The 95 % interval of a model's metric; None where there is none."""
        return self.numbers.interval(model, key)

    def __getitem__(self, key: str) -> Estimate:
        """The student's metric with its 95 % interval.

        Raises:
            DrklError: there is no such metric.
        """
        known = metrics_of(self.task)
        if key not in known:
            raise DrklError(f"There is no metric {key!r} of {self.task}.{did_you_mean(key, known)}")
        return self.numbers.estimate("student", key)

    def finding(self, id: str) -> Finding | None:
        """Return the finding with this id, or None."""
        return next((finding for finding in self.findings if finding.id == id), None)

    def num_units(self, of: str) -> int | None:
        """Return the number of units over which metrics ``of`` tokens, answers or texts are resampled, if known.

        They are held-out rows, prompts and texts.
        """
        data = self.settings.get("data") or {}
        size: int | None = self.settings.get("prompts") if of == "answers" else data.get("heldout_rows")
        return size

    @property
    def samples(self) -> Lines:
        """The lines of ``samples.jsonl``: every sampled answer; none of a classification."""
        return self._lines("samples")

    @property
    def heldout(self) -> Lines:
        """The lines of ``heldout.jsonl``: the teacher-forced sums of every held-out row, for every model."""
        return self._lines("heldout")

    @property
    def predictions(self) -> Lines:
        """The lines of ``predictions.jsonl``: every classified text."""
        return self._lines("predictions")

    def leave_out_what_is_gone(self) -> list[str]:
        """Take the lines of files that were written and are gone as none, without a warning; return those files."""
        if self.folder is None:
            return []
        written = [name for name in FILES if self.files.get(f"{name}.jsonl") is not None]
        gone = [name for name in written if not os.path.lexists(self.folder / f"{name}.jsonl")]
        self.lines.update({name: [] for name in gone})
        return [f"{name}.jsonl" for name in gone]

    def _lines(self, name: str) -> Lines:
        if name not in self.lines:
            path = None if self.folder is None else self.folder / f"{name}.jsonl"
            self.lines[name] = [] if path is None else _read_lines(path, FILES[name], self.files.get(f"{name}.jsonl"))
        return self.lines[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``eval.json``: the models at its top level, everything else beside them."""
        sections: dict[str, Any] = {
            "findings": [finding.to_json() for finding in self.findings],
            "sweep": {
                model: [
                    {"sampling_temperature": point.sampling_temperature, **point.values, "intervals": point.intervals}
                    for point in points
                ]
                for model, points in self.sweep.items()
            },
            "coverage": {model: vars(coverage) for model, coverage in self.coverage.items()},
        }
        if self.tail is not None:
            sections["tail"] = {"ranks": self.tail.ranks, **self.tail.means}
        sections["suites"] = {name: _numbers_json(numbers) for name, numbers in self.suites.items()}
        if (bins := self.reliability) is not None:
            unit = "rows" if self.task == "classification" else "tokens"
            width, mass = (
                {
                    model: {unit: own.counts, "confidence": own.confidence, "accuracy": own.accuracy}
                    for model, own in kind.items()
                }
                for kind in (bins.width, bins.mass)
            )
            sections["reliability"] = {"edges": bins.edges, **width} | ({"mass": mass} if mass else {})
        if self.distributions is not None:
            sections["distributions"] = {"edges": self.distributions.edges, **self.distributions.counts}
        if self.scaling is not None:
            sections["scaling"] = self.scaling.to_json()
        classification = {"task": self.task} if self.task == "classification" else {}
        return {
            **classification,
            "settings": self.settings,
            **({"classes": self.classes} if self.classes else {}),
            **_numbers_json(self.numbers),
            **{name: section for name, section in sections.items() if section},
            "timing": self.timing,
            "format": FORMAT,
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``eval.json`` and the files beside it, and return the folder.

        All files are written or none, ``eval.json`` last; a power cut leaves them.

        Raises:
            CannotWrite: nobody can write there.
        """
        run = RunFolder(Path(folder))
        files = {run.root / f"{name}.jsonl": jsonl_text(lines) for name in FILES if (lines := self._lines(name))}
        said = {path.name: described(text.encode()) for path, text in files.items()}
        write_together(files | {run.eval_path: json_text(sealed(self.to_json() | {"files": said}))})
        return run.root

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation from a run folder, from another folder that it was saved to, or from an ``eval.json``.

        Raises:
            DrklError: there is none, it is malformed (the message names file and key), or its format is newer.
        """
        if not isinstance(path, str | Path):
            raise DrklError(f"Expected an Evaluation, or the folder of one; got a {type(path).__name__}.")
        path = Path(path)
        file = path if path.is_file() else path / "eval.json"
        if not path.exists():
            raise DrklError(f"There is no folder {str(path)!r}.")
        if not file.is_file():
            raise DrklError(f"{str(path)!r} has no eval.json; `drkl evaluate {shell_word(path)}` makes it.")
        if file.name != "eval.json":  # copied out of its folder: no lines beside it
            return _read(file, file.name.removesuffix(".json").removesuffix(".eval"), None)
        folder = RunFolder(file.parent)
        run = None
        if folder.config_path.is_file():
            note_changes(folder, strict=False)
            run = folder.read_config().get("run")
        named = run.get("name") if isinstance(run, dict) else None
        result = _read(file, str(named or folder.name), folder.root)
        if run is not None:
            note_other_student(folder, result.settings.get(MARK))
        return result


def _numbers_json(numbers: Numbers) -> dict[str, Any]:
    return {**{model: numbers.values[model] for model in numbers.models}, "intervals": numbers.intervals}


# The file ---------------------------------------------------------------------------------------------------------

Number = Annotated[float, Strict(), AllowInfNan(False)]
Count = Annotated[int, Strict()]
Values = dict[str, Number | None]
Ends = tuple[Number, Number]


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _ByModel(_Section):
    """A section with keys of its own and a key for each model."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def models(self) -> dict[str, Any]:
        return {name: value for name, value in (self.__pydantic_extra__ or {}).items() if name in MODELS}


class _Numbers(_Section):
    teacher: Values | None = None
    before: Values | None = None
    warmup: Values | None = None
    student: Values
    scaled: Values | None = None
    intervals: dict[str, dict[str, Ends]] = {}

    def numbers(self) -> Numbers:
        values = {name: getattr(self, name) for name in MODELS}
        return Numbers({name: own for name, own in values.items() if own is not None}, self.intervals)


class _SweepPoint(_Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: Values = Field(init=False)

    sampling_temperature: Number
    intervals: dict[str, Ends] = {}


class _Bins(_Section):
    counts: list[Count] = Field(validation_alias=AliasChoices("tokens", "rows"))
    confidence: list[Number | None]
    accuracy: list[Number | None]


class _Reliability(_ByModel):
    __pydantic_extra__: dict[str, _Bins] = Field(init=False)

    edges: list[Number]
    mass: dict[str, _Bins] = {}

    @model_validator(mode="after")
    def _check(self) -> _Reliability:
        for own in (*self.models.values(), *self.mass.values()):
            _check_lengths(len(self.edges) - 1, own.counts, own.confidence, own.accuracy)
        return self


class _Tail(_ByModel):
    __pydantic_extra__: dict[str, list[Number | None]] = Field(init=False)

    ranks: list[Count]

    @model_validator(mode="after")
    def _check(self) -> _Tail:
        _check_lengths(len(self.ranks), *self.models.values())
        return self


class _Coverage(_Section):
    samples: list[Count]
    rouge_l_best: list[Number | None]
    distinct_answers: list[Number]

    @model_validator(mode="after")
    def _check(self) -> _Coverage:
        _check_lengths(len(self.samples), self.rouge_l_best, self.distinct_answers)
        return self


class _Distributions(_ByModel):
    __pydantic_extra__: dict[str, dict[str, list[Count]]] = Field(init=False)

    edges: dict[str, list[Number]]

    @model_validator(mode="after")
    def _check(self) -> _Distributions:
        for own in self.models.values():
            for name, counts in own.items():
                _check_lengths(len(self.edges.get(name, ())) - 1, counts)
        return self


class _Fold(_Section):
    temperature: Number
    rows: Count
    fitted_on: Count = 0
    at_bound: bool = False


class _Scaling(_Section):
    fitted_to: str | None = None
    folds: list[_Fold]


class _Estimate(_Section):
    value: Number | None
    interval: Ends | None = None


class _Finding(_Section):
    id: str
    question: str
    answer: Answer
    numbers: dict[str, _Estimate] = {}
    text: str


class _Settings(_Section):
    """The settings that are read again; all the others stay as they are."""

    task: str | None = None
    prompts: Count | None = None
    samples_per_prompt: Count | None = None
    sampling_temperature: Number | None = None
    sweep: list[Number] = []
    max_new_tokens: Count | None = None
    seed: Count | None = None
    seeds: list[Count] = []
    gamma: Number | None = None
    suites: list[str] = []
    models: dict[str, str | None] = {}
    protocol: str | None = None
    template: str | None = None
    data: dict[str, Any] = {}
    device: str | None = None
    versions: dict[str, str] = {}
    definitions: dict[str, str] = {}


class _Said(_Section):
    bytes: Count
    xxh3: str


class _File(_Numbers):
    files: dict[str, _Said] = {}
    task: str | None = None
    settings: _Settings = _Settings()
    classes: list[str] = []
    suites: dict[str, _Numbers] = {}
    sweep: dict[str, list[_SweepPoint]] = {}
    coverage: dict[str, _Coverage] = {}
    tail: _Tail | None = None
    reliability: _Reliability | None = None
    distributions: _Distributions | None = None
    scaling: _Scaling | None = None
    findings: list[_Finding] = []
    timing: dict[str, Any] = {}


def _read(path: Path, name: str, folder: Path | None) -> Evaluation:
    try:
        raw = read_sealed(path)
    except DrklError as error:
        raise DrklError(f"{error} {_ANEW}") from error
    version = raw.get("format", 1)
    if version not in (1, FORMAT):
        raise DrklError(
            f"{path} has the format {version!r}, and this drkl reads the formats 1 to {FORMAT}. Read it with the drkl "
            f"that wrote it, or evaluate again."
        )
    if version == 1:
        raw = _renamed(raw)
    if not isinstance(raw.get("student"), dict):
        raise DrklError(f"{path}: student: the numbers of the student are missing. {_ANEW}")
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        raise DrklError(
            f"{path}: {place}: {reason[:1].lower()}{reason[1:]}; got {value[:60]}{'...' * (len(value) > 60)}. {_ANEW}"
        ) from error
    numbers, bins, tail, histograms = file.numbers(), file.reliability, file.tail, file.distributions
    scaled = file.scaling
    evaluation = Evaluation(
        numbers,
        raw.get("settings") or {},
        file.task or file.settings.task or "generation",
        name,
        file.classes,
        {suite: own.numbers() for suite, own in file.suites.items()},
        {
            model: sorted(
                (SweepPoint(p.sampling_temperature, p.__pydantic_extra__ or {}, p.intervals) for p in points),
                key=lambda point: point.sampling_temperature,
            )
            for model, points in file.sweep.items()
        },
        {model: Coverage(**dict(own)) for model, own in file.coverage.items()},
        None if tail is None else TailProfile(tail.ranks, tail.models),
        None if bins is None else Reliability(bins.edges, _bins(bins.models), _bins(bins.mass)),
        None if histograms is None else Distributions(histograms.edges, histograms.models),
        None if scaled is None else Scaling(scaled.fitted_to, [Fold(**dict(fold)) for fold in scaled.folds]),
        file.timing,
        [Finding.from_json(finding.model_dump()) for finding in file.findings],
        folder,
        files={name: dict(said) for name, said in file.files.items()},
    )
    return evaluation if evaluation.findings else replace(evaluation, findings=of_evaluation(evaluation))


_ANEW = "`drkl evaluate` writes it anew."


def _bins(by_model: Mapping[str, _Bins]) -> dict[str, ReliabilityBins]:
    return {model: ReliabilityBins(own.counts, own.confidence, own.accuracy) for model, own in by_model.items()}


def _check_lengths(expected: int, *columns: Sequence[Any]) -> None:
    for column in columns:
        if len(column) != expected:
            raise ValueError(f"expected {expected} entries, found {len(column)}")


def _renamed(value: Any, depth: int = 0) -> Any:
    """Format 1 called the student of a run ``after``: a key of the file, its sections, and what those hold by name."""
    if not isinstance(value, dict) or depth > 3:
        return value
    return {"student" if key == "after" else key: _renamed(entry, depth + 1) for key, entry in value.items()}


def _read_lines(path: Path, keys: Iterable[str], said: Mapping[str, Any] | None) -> Lines:
    """The lines of a file; none, with a warning where there were some, if it is gone."""
    if not os.path.lexists(path):
        if said is not None:
            _log.warning("Warning: %s is gone: what it says is left out. %s", path, _ANEW)
        return []
    try:
        rows: Lines = read_jsonl(path)
    except DrklError as error:
        raise DrklError(f"{error} {_ANEW}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DrklError(f"{path}:{number} holds a {type(row).__name__}; expected an object. {_ANEW}")
        if lacking := [key for key in keys if key not in row]:
            raise DrklError(f"{path}:{number} lacks {', '.join(lacking)}. {_ANEW}")
        if row.get("model") == "after":  # of format 1
            row["model"] = "student"
    if said is not None and described(path.read_bytes()) != said:
        raise DrklError(f"{path} has another content than was written, by the checksum in eval.json. {_ANEW}")
    return rows
