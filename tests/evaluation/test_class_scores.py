"""A classifier's numbers, against loops in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from drkl.data.classification import LabelledRow
from drkl.evaluation.bootstrap import Resampled
from drkl.evaluation.calibration import width_bins
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import CLASS_KEYS as KEYS
from drkl.evaluation.evaluate import run_task
from drkl.evaluation.tasks import Classification, class_scores
from tests.models import tiny_classifiers
from tests.models.tiny_classifiers import CLASSES


def numbers(size: int = 60, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a student and a teacher, and labels; one class is never a label, another never predicted."""
    generator = np.random.default_rng(seed)
    student, teacher = (generator.normal(0, 2, (size, classes)) for _ in range(2))
    student[:, 1] = -9
    labels = generator.integers(0, classes - 1, size)
    student[np.arange(size), labels] += generator.integers(0, 2, size) * 3
    return student, teacher, labels


def by_hand(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    q, p = np.exp(log_softmax(student, -1)), np.exp(log_softmax(teacher, -1))
    said, size = q.argmax(-1), len(labels)
    f1 = []
    for k in range(q.shape[1]):
        hit = sum(1 for s, t in zip(said, labels, strict=True) if s == t == k)
        wrong = sum(1 for s, t in zip(said, labels, strict=True) if s == k != t)
        missed = sum(1 for s, t in zip(said, labels, strict=True) if t == k != s)
        if hit + wrong + missed:
            f1.append(2 * hit / (2 * hit + wrong + missed))
    ece, mce = 0.0, 0.0
    for low in range(15):
        inside = [i for i in range(size) if low / 15 <= q[i].max() < (low + 1) / 15]
        if inside:
            gap = np.mean([q[i].max() for i in inside]) - np.mean([said[i] == labels[i] for i in inside])
            ece, mce = ece + len(inside) / size * abs(gap), max(mce, abs(gap))
    accuracy, confidence = float((said == labels).mean()), float(q.max(-1).mean())
    return {
        "accuracy": accuracy,
        "macro_f1": float(np.mean(f1)),
        "nll": float(-np.log(q[np.arange(size), labels]).mean()),
        "ece": ece,
        "ece_mass": sum(
            len(part) / size * abs(q[part].max(-1).mean() - (said == labels)[part].mean())
            for part in np.array_split(np.argsort(q.max(-1), kind="stable"), 15)
            if len(part)
        ),
        "mce": mce,
        "brier": float(((q - np.eye(q.shape[1])[labels]) ** 2).sum(-1).mean()),
        "calibration_gap": confidence - accuracy,
        "confidence": confidence,
        "entropy": float(-(q * np.log(q)).sum(-1).mean()),
        "agreement": float((said == p.argmax(-1)).mean()),
        "fkl": float(rel_entr(p, q).sum(-1).mean()),
        "rkl": float(rel_entr(q, p).sum(-1).mean()),
        "confidence_gap": confidence - float(p.max(-1).mean()),
        "overconfidence": float((q.max(-1) - p[np.arange(size), said]).mean()),
        "target_gap": float((q[np.arange(size), p.argmax(-1)] - p.max(-1)).mean()),
    }


def scored(student: np.ndarray, teacher: np.ndarray | None, labels: np.ndarray) -> Any:
    return class_scores(torch.tensor(student), torch.tensor(labels), None if teacher is None else torch.tensor(teacher))


@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_that_of_a_loop(seed: int) -> None:
    student, teacher, labels = numbers(seed=seed)
    found = {name: float(value[0]) for name, value in scored(student, teacher, labels).metrics().items()}
    assert found == pytest.approx(by_hand(student, teacher, labels), rel=1e-9)
    assert set(found) == set(KEYS) - {"num_rows"}


def test_a_weight_is_a_repeated_text() -> None:
    student, teacher, labels = numbers(20)
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), size=3).astype(float)
    found = scored(student, teacher, labels).metrics(weights)
    for number, row in enumerate(weights.astype(int)):
        again = np.repeat(np.arange(20), row)
        expected = by_hand(student[again], teacher[again], labels[again])
        expected["ece_mass"] = found["ece_mass"][number]  # of the bins of all the texts
        assert {name: value[number] for name, value in found.items()} == pytest.approx(expected, rel=1e-9)


def test_a_sure_and_right_model_is_calibrated_and_one_without_a_teacher_has_no_distance() -> None:
    labels = np.array([0, 1, 2, 0])
    found = scored(np.eye(3)[labels] * 1e4, None, labels).metrics()
    assert (found["accuracy"][0], found["ece"][0], found["macro_f1"][0]) == (1, 0, 1)
    assert found["ece_mass"][0] == found["mce"][0] == found["brier"][0] == 0
    assert not {"fkl", "rkl", "agreement", "confidence_gap"} & found.keys()


def test_an_infinite_distance_counts_only_where_its_text_is_drawn() -> None:
    student, teacher, labels = numbers(20)
    teacher[3, 2] = -np.inf
    weights = np.ones((2, 20))
    weights[1, 3], weights[1, 4] = 0, 2
    found = scored(student, teacher, labels).metrics(weights)["rkl"]
    again = [i for i in range(20) if i != 3] + [4]
    assert found.tolist() == [np.inf, pytest.approx(by_hand(student[again], teacher[again], labels[again])["rkl"])]


def test_bins_hold_every_text_once() -> None:
    student, teacher, labels = numbers()
    table = scored(student, teacher, labels).bins(width_bins).reliability()
    assert sum(table[0]) == 60 and len(table[0]) == 15
    for rows, confidence, accuracy, low in zip(*table, range(15), strict=True):
        if rows:
            assert low / 15 <= confidence < (low + 1) / 15 and (accuracy * rows) == pytest.approx(
                round(accuracy * rows)
            )
        else:
            assert confidence is None and accuracy is None


def test_intervals_are_as_wide_as_the_binomials() -> None:
    student, teacher, labels = numbers(400)
    scores = scored(student, teacher, labels)
    size = len(scores.labels)
    found = Resampled.of(scores.metrics, size, 0).intervals()
    accuracy = float(scores.metrics()["accuracy"][0])
    width = 2 * 1.96 * np.sqrt(accuracy * (1 - accuracy) / 400)
    low, high = found["accuracy"]
    assert low < accuracy < high and high - low == pytest.approx(width, rel=0.1)
    assert (
        found == Resampled.of(scores.metrics, size, 0).intervals() != Resampled.of(scores.metrics, size, 1).intervals()
    )
    assert found["macro_f1"][0] < found["macro_f1"][1] and set(found) == set(KEYS) - {"num_rows"}


def test_eval_json_and_predictions(tmp_path: Path) -> None:
    rows = [LabelledRow(f"r{i}", (1, *range(6, 7 + i % 5), 2), i % 3, f"text {i}") for i in range(12)]
    models = {"teacher": lambda: tiny_classifiers.make(seed=1), "student": lambda: tiny_classifiers.make("llama", 2)}
    seen: list[tuple[str, int, int]] = []
    task = Classification(rows, CLASSES, EvaluationConfig(), pad_id=0)
    run_task(task, models, on_progress=lambda *args: seen.append(args)).save(tmp_path)
    table = json.loads((tmp_path / "eval.json").read_text())
    assert table["student"].keys() == set(KEYS) and table["teacher"]["fkl"] == 0 and table["student"]["num_rows"] == 12
    assert table["reliability"]["edges"][-1] == 1 and table["intervals"]["student"]["accuracy"]
    assert seen[-1] == ("student: reading", 12, 12)
    saved = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in saved] == [row.id for row in rows]
    student = models["student"]()
    for row, line in zip(rows, saved, strict=True):
        logits = student(input_ids=torch.tensor([row.ids])).logits[0].detach().numpy()
        q = np.exp(log_softmax(logits))
        assert (line["label"], line["student"]) == (CLASSES[row.label], CLASSES[q.argmax()])
        assert line["student_confidence"] == pytest.approx(q.max(), abs=1e-3)
        assert line["nll"] == pytest.approx(-np.log(q[row.label]), abs=1e-3)
        assert line["teacher"] in CLASSES and line["text"] == row.text
