"""A typed evaluation: the only reader and writer of ``eval.json`` and the files beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drkl.evaluation.bootstrap import Estimate as Estimate
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.findings import Finding

FORMAT = 2
"""Of ``eval.json``. Format 1 has no ``format`` and calls the student of a run ``after``; it is still read."""
MODELS = ("teacher", "before", "warmup", "student")
"""The models of an evaluation in their order: a run's teacher, its student before training, after the warm-up stage,
and as trained; two models from elsewhere are ``teacher`` and ``student``."""

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


@dataclass(frozen=True)
class SweepPoint:
    """The answers of one model at one sampling temperature."""

    sampling_temperature: float
    values: dict[str, float | None]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Coverage:
    """What ``samples[i]`` answers to a prompt bring; see `drkl.evaluation.answers.AnswerTable.coverage`."""

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
    """Of each bin of confidence: how many tokens (or texts), mean confidence, accuracy (None in an empty bin)."""

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
class Evaluation:
    """What `drkl.evaluate` measured.

    ``result["rkl"]`` is the student's; ``result.value("teacher", "entropy")`` is any model's. The per-row lines behind
    the numbers are read from the folder when they are asked for.
    """

    numbers: Numbers
    settings: dict[str, Any]
    """How it was measured: the fields of `EvaluationConfig`, the models, the data, versions, definitions."""
    task: str = "generation"
    """``generation`` or ``classification``."""
    name: str = "evaluation"
    """The run's ``run.name``; of a pair the name of its folder."""
    classes: list[str] = field(default_factory=list)
    suites: dict[str, Numbers] = field(default_factory=dict)
    """Where named suites were evaluated: each one's own numbers."""
    sweep: dict[str, list[SweepPoint]] = field(default_factory=dict)
    """By model, from the lowest sampling temperature to the highest."""
    coverage: dict[str, Coverage] = field(default_factory=dict)
    tail: TailProfile | None = None
    reliability: Reliability | None = None
    distributions: Distributions | None = None
    timing: dict[str, Any] = field(default_factory=dict)
    """Seconds, by model and part, and in ``total``."""
    findings: list[Finding] = field(default_factory=list)
    folder: Path | None = None
    """Where it was loaded from or saved to; None for one in memory."""

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
        raise NotImplementedError

    def finding(self, id: str) -> Finding | None:
        """The finding with this id; None where it was not made."""
        return next((finding for finding in self.findings if finding.id == id), None)

    @property
    def samples(self) -> Lines:
        """The lines of ``samples.jsonl``: every sampled answer; none of a classification."""
        raise NotImplementedError

    @property
    def heldout(self) -> Lines:
        """The lines of ``heldout.jsonl``: the teacher-forced sums of every held-out row, for every model."""
        raise NotImplementedError

    @property
    def predictions(self) -> Lines:
        """The lines of ``predictions.jsonl``: every classified text."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Write ``eval.json`` and the files beside it, and return the folder.

        Each file is written whole or not at all, ``eval.json`` last.
        """
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation from a run folder, from another folder that it was saved to, or from an ``eval.json``.

        Raises:
            DrklError: there is none, it is malformed (the message names file and key), or its format is newer.
        """
        raise NotImplementedError
