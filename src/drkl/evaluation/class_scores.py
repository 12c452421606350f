"""The numbers of each held-out text from which a classifier's metrics are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drkl.display import as_number
from drkl.evaluation.calibration import Bins, mass_bins, weighted_sums, width_bins


@dataclass(frozen=True)
class ClassScores:
    """Numbers of each text for one model, float64 `[n]` by name; ``predicted`` and ``labels`` are classes `[n]`."""

    columns: dict[str, np.ndarray]
    predicted: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every metric, `[m]` by name, for each of ``weights`` `[m, n]`: how often a text counts. Default: once each.

        All of them are sums over texts, so a resample is a row of weights.
        """
        weights = np.ones((1, len(self))) if weights is None else weights
        means = weighted_sums(weights, np.stack(list(self.columns.values()), -1)) / len(self)
        out = dict(zip(self.columns, means.T, strict=True))
        out["macro_f1"] = self._macro_f1(weights)
        width, mass = self.bins(width_bins), self.bins(mass_bins)
        out |= {"ece": width.ece(weights), "mce": width.mce(weights), "ece_mass": mass.ece(weights)}
        out["calibration_gap"] = out["confidence"] - out["accuracy"]
        if "teacher_confidence" in out:
            out["confidence_gap"] = out["confidence"] - out.pop("teacher_confidence")
        return out

    def bins(self, bins: Callable[[np.ndarray], np.ndarray]) -> Bins:
        """The texts in the bins that ``bins`` makes of their confidence."""
        confidence, size = self.columns["confidence"], len(self)
        return Bins.of(bins(confidence), confidence, self.columns["accuracy"], np.arange(size), size)

    def _macro_f1(self, weights: np.ndarray) -> np.ndarray:
        predicted, labels = (_one_hot(classes, self.num_classes) for classes in (self.predicted, self.labels))
        hits, either = weights @ (predicted * labels), weights @ predicted + weights @ labels
        present = either > 0
        f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=present)
        mean: np.ndarray = f1.sum(-1) / present.sum(-1)
        return mean

    @classmethod
    def of_lines(cls, lines: Sequence[Mapping[str, Any]], model: str = "student") -> ClassScores:
        """The scores of one model from the lines of ``predictions.jsonl``, which are rounded to four digits.

        The teacher's lines have its class and its confidence only; the scaled student has the student's class.
        """
        confidence, prefix = f"{model}_confidence", "scaled_" if model == "scaled" else ""
        model = "student" if prefix else model
        columns = {
            "accuracy": [line[model] == line["label"] for line in lines],
            "confidence": [line[confidence] for line in lines],
        }
        if model == "student":
            for key in ("nll", "overconfidence", "target_gap"):
                if all(as_number(line.get(prefix + key)) is not None for line in lines):
                    columns[key] = [line[prefix + key] for line in lines]
            if all("teacher" in line and "teacher_confidence" in line for line in lines):
                columns["agreement"] = [line["student"] == line["teacher"] for line in lines]
                columns["teacher_confidence"] = [line["teacher_confidence"] for line in lines]
        names = sorted({str(line[key]) for line in lines for key in ("label", model)})
        numbers = {name: number for number, name in enumerate(names)}
        predicted, labels = (np.array([numbers[str(line[key])] for line in lines]) for key in (model, "label"))
        floats = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
        return cls(floats, predicted, labels, len(names))


def _one_hot(classes: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((len(classes), size))
    out[np.arange(len(classes)), classes] = 1.0
    return out
