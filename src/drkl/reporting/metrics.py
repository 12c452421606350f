"""How a metric is shown: the models' names, which way is better, the best student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drkl.display import as_number
from drkl.evaluation.declared import METRICS, Better, Group, Metric, groups_of, metrics_of

__all__ = [
    "DIRECTIONS", "METRICS", "MODELS", "MODEL_TITLES", "STUDENTS", "Group", "Metric", "best_student", "groups_of",
    "metrics_of", "span_of", "value_of",
]  # fmt: skip

MODELS = ("teacher", "before", "warmup", "after")
STUDENTS = ("before", "warmup", "after")
MODEL_TITLES = {"teacher": "Teacher", "before": "Before", "warmup": "Warm-up", "after": "After"}

DIRECTIONS: dict[Better, tuple[str, str]] = {
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "zero": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}0", "nearer to 0 is better"),
    "teacher": ("\N{RIGHTWARDS ARROW}\N{THIN SPACE}T", "the teacher's is best"),
    "none": ("", ""),
}


def best_student(metric: Metric, evaluation: Mapping[str, Any]) -> str | None:
    """The student nearest to ideal by the shown digits; None for a tie, or with fewer than two to choose from."""
    teacher = value_of(evaluation, "teacher", metric.key)
    distances = {}
    for model in STUDENTS:
        value = value_of(evaluation, model, metric.key)
        away = None if value is None else metric.distance(value, teacher)
        if away is not None:
            distances[model] = round(away * metric.scale, metric.digits)
    least = [model for model, away in distances.items() if away == min(distances.values())]
    return least[0] if len(distances) > 1 and len(least) == 1 else None


def value_of(evaluation: Mapping[str, Any] | None, model: str, key: str) -> float | None:
    """One number of ``eval.json``, or None where it is missing, null or not finite."""
    values = (evaluation or {}).get(model)
    return as_number(values.get(key)) if isinstance(values, Mapping) else None


def span_of(table: Any, *keys: str) -> tuple[float, float] | None:
    """An interval ``[low, high]`` under ``keys``; None where it is missing, broken or of no width."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(table, list) or len(table) != 2:
        return None
    low, high = (as_number(end) for end in table)
    return (low, high) if low is not None and high is not None and low < high else None
