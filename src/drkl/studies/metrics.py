"""The metrics that a study can decide by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite

from drkl.errors import DrklError, did_you_mean
from drkl.evaluation.declared import Metric, metrics_of
from drkl.evaluation.paired import MATCHED
from drkl.evaluation.result import SCALED
from drkl.studies.definition import Definition, Prediction, Primary
from drkl.studies.grid import model_of, pair_of


def known_metrics(task: str) -> dict[str, Metric]:
    """The metrics of a task by their keys; those too that follow from the answers beside ``eval.json``."""
    return metrics_of(task) | (MATCHED if task != "classification" else {})


def asked_metrics(definition: Definition) -> list[str]:
    """The keys of the metrics that a study compares, those of ``decide`` first."""
    foretold = [p.metric for p in definition.predictions if isinstance(p, Prediction) and p.metric is not None]
    return list(dict.fromkeys([*definition.decide, *(entry.metric for entry in definition.primary), *foretold]))


def check_metrics(definition: Definition, task: str) -> None:
    """Refuse metrics that there are not or that a scaled student has not, and differences that nothing is decided by.

    Raises:
        DrklError: one of them; the message names the key of the study's file.
    """
    known = known_metrics(task)
    for place, key in _named(definition):
        if key not in known:
            raise DrklError(f"{place}: there is no metric {key!r} of {task}.{did_you_mean(key, known)}")
    if not definition.decide:
        raise DrklError("decide names no metric: nothing would be compared.")
    for number, key in enumerate(definition.decide):
        if key in definition.decide[:number]:
            raise DrklError(f"decide.{number}: {key!r} stands there twice.")
    for key, size in definition.smallest_difference.items():
        if not (isfinite(size) and size > 0):
            raise DrklError(f"smallest_difference.{key} is {size}; expected a number above 0.")
        if key not in asked_metrics(definition):
            raise DrklError(f"smallest_difference.{key}: the metric is in none of decide, primary and predictions.")
    for place, problem in _unanswerable(definition, known):
        raise DrklError(f"{place}: {problem}")
    for number, entry in enumerate(definition.primary):
        if known[entry.metric].better == "none":
            raise DrklError(
                f"primary.{number}.metric: {entry.metric} has no better side, so that nothing could be decided. Leave "
                "it to decide, which shows the difference."
            )
    for place, asked in _compared(definition):
        models = map(model_of, pair_of(definition, asked.cell, asked.against))
        if SCALED in models and known[str(asked.metric)].of == "answers":
            raise DrklError(
                f"{place} has model: scaled, which writes no answers, and {asked.metric} is of answers. A scaled "
                "student differs by its probabilities on the held-out rows alone."
            )


def _unanswerable(definition: Definition, known: Mapping[str, Metric]) -> Iterator[tuple[str, str]]:
    """Verdicts that are expected and that no comparison can have, with their places and the reasons."""
    for number, one in enumerate(definition.predictions):
        if not isinstance(one, Prediction) or one.expect is None:
            continue
        place = f"predictions.{number}"
        if one.metric is None:
            yield place, f"it expects {one.expect!r} and names no metric; name one, or leave expect out."
        elif one.expect == "no difference" and one.metric not in definition.smallest_difference:
            yield (
                f"{place}.expect",
                f"no difference is never said of {one.metric}, which has no smallest_difference. Name one.",
            )
        elif one.expect in ("better", "worse") and known[one.metric].better == "none":
            yield f"{place}.expect", f"{one.metric} has no better side, so that {one.expect} is never said of it."


def _compared(definition: Definition) -> Iterator[tuple[str, Primary | Prediction]]:
    """The primary comparisons, and the predictions that name a metric, with their places."""
    yield from ((f"primary.{number}", entry) for number, entry in enumerate(definition.primary))
    for number, prediction in enumerate(definition.predictions):
        if isinstance(prediction, Prediction) and prediction.metric is not None:
            yield f"predictions.{number}", prediction


def _named(definition: Definition) -> Iterator[tuple[str, str]]:
    """Every metric that is named, with its place."""
    yield from ((f"decide.{number}", key) for number, key in enumerate(definition.decide))
    yield from ((f"{place}.metric", str(entry.metric)) for place, entry in _compared(definition))
    yield from ((f"smallest_difference.{key}", key) for key in definition.smallest_difference)
