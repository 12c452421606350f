"""Temperatures on the logits: against scipy's minimiser, and what is measured with them against the equations."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from drkl.data.classification import LabelledRow
from drkl.errors import DrklError
from drkl.evaluation import scaling
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import CLASS_KEYS, TOKEN_KEYS
from drkl.evaluation.evaluate import run_task
from drkl.evaluation.positions import PositionTable
from drkl.evaluation.result import Evaluation
from drkl.evaluation.scaling import HIGHEST, LOWEST, fit, halves_of, slopes_at, temperatures_of
from drkl.evaluation.store import Store
from drkl.evaluation.tasks import Classification, Generation, Parts
from drkl.models.readout import CHUNK, Readout
from drkl.processes import Place, Share
from tests.evaluation import tiny
from tests.models import tiny_classifiers

pytestmark = pytest.mark.usefixtures("few_resamples")
IDS = [f"row-{i}" for i in range(40)]


def numbers(seed: int, size: int, true: float, classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / true)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (size, classes))
    return logits, np.array([rng.choice(classes, p=p) for p in softmax(logits / true, -1)])


def states(logits: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Readout:
    return Readout(torch.tensor(logits), torch.tensor(labels), torch.tensor(rows), None)


def best(logits: np.ndarray, anchors: np.ndarray) -> float:
    """The temperature with the least cross-entropy to distributions `[n, classes]`, by scipy."""

    def loss(u: float) -> float:
        return float(-(anchors * log_softmax(logits / np.exp(u), -1)).sum(-1).mean())

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("wanted", ["fit", "fit_to_teacher"])
def test_each_half_is_measured_with_the_others_best_temperature(true: float, wanted: str) -> None:
    rows = np.sort(np.random.default_rng(3).integers(0, len(IDS), 700))
    logits, labels = numbers(1, len(rows), true)
    teacher = logits / true + np.random.default_rng(2).normal(0, 0.3, logits.shape)
    found = temperatures_of(
        wanted, IDS, states(logits, labels, rows), states(teacher, labels, rows) if wanted != "fit" else None
    )
    assert not isinstance(found, str)
    anchors = np.eye(logits.shape[1])[labels] if wanted == "fit" else softmax(teacher, -1)
    halves = halves_of(IDS)
    assert sorted(np.bincount(halves)) == [20, 20]
    for half, fold in enumerate(found.scaling.folds):
        others = halves[rows] != half
        assert fold.temperature == pytest.approx(best(logits[others], anchors[others]), rel=1e-5)
        assert (fold.rows, fold.fitted_on, fold.at_bound) == (20, 20, False)
        assert set(found.of_rows[halves == half]) == {fold.temperature}
    assert found.scaling.fitted_to == {"fit": "labels"}.get(wanted, "teacher")
    assert found.scaling.folds[0].temperature == pytest.approx(true, rel=0.3)


def test_a_calibrated_model_keeps_its_temperature() -> None:
    rows = np.arange(4000) % len(IDS)
    logits, labels = numbers(5, 4000, 1.0, classes=4)
    found = temperatures_of("fit", IDS, states(logits, labels, rows), None)
    assert not isinstance(found, str)
    assert [fold.temperature for fold in found.scaling.folds] == pytest.approx([1.0, 1.0], abs=0.06)
    same = states(logits, labels, rows)
    exact = temperatures_of("fit_to_teacher", IDS, same, states(logits, labels, rows))
    assert not isinstance(exact, str)
    assert [fold.temperature for fold in exact.scaling.folds] == pytest.approx([1.0, 1.0], abs=1e-9)


@pytest.mark.parametrize(("right", "end"), [(True, LOWEST), (False, HIGHEST)])
def test_a_temperature_at_an_end_is_said(right: bool, end: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (80, 5))
    labels = logits.argmax(-1) if right else logits.argmin(-1)
    found = temperatures_of("fit", IDS, states(logits, labels, np.arange(80) % 40), None)
    assert not isinstance(found, str)
    assert [(fold.temperature, fold.at_bound) for fold in found.scaling.folds] == [(end, True)] * 2
    assert f"The fitted temperature is {end:g}, an end of what is tried" in found.scaling.note


def test_flat_logits_and_excluded_tokens() -> None:
    flat = temperatures_of("fit", IDS, states(np.zeros((80, 5)), np.zeros(80, int), np.arange(80) % 40), None)
    assert not isinstance(flat, str)
    assert [(fold.temperature, fold.at_bound) for fold in flat.scaling.folds] == [(1.0, False)] * 2
    logits, labels = numbers(4, 80, 2.0, classes=5)
    rows = np.arange(80) % 40
    logits[:, 4], logits[:10, 3] = -math.inf, -math.inf
    labels = np.minimum(labels, 3)
    kept = ~((np.arange(80) < 10) & (labels == 3))  # an excluded label has an infinite loss at any temperature
    found = temperatures_of("fit", IDS, states(logits, labels, rows), None)
    finite = np.where(np.isinf(logits), -1e9, logits)
    other = temperatures_of("fit", IDS, states(finite[kept], labels[kept], rows[kept]), None)
    assert not isinstance(found, str) and not isinstance(other, str)
    assert found.of_rows == pytest.approx(other.of_rows, rel=1e-9)


def test_a_single_row_has_no_other_half() -> None:
    found = temperatures_of("fit", ["a"], states(np.zeros((3, 2)), np.zeros(3, int), np.zeros(3, int)), None)
    assert isinstance(found, str) and "there is a single row" in found
    given = temperatures_of(2.0, ["a"], states(np.zeros((3, 2)), np.zeros(3, int), np.zeros(3, int)), None)
    assert not isinstance(given, str) and given.of_rows.tolist() == [2.0] and given.scaling.words == "logits / 2"


@settings(max_examples=25)
@given(st.integers(0, 1000), st.floats(0.06, 18.0))
def test_the_slopes_are_the_derivatives_of_the_loss(seed: int, temperature: float) -> None:
    logits, labels = numbers(seed, 3, 1.5)
    b, h = 1 / temperature, 1e-6

    def loss(at: float) -> np.ndarray:
        rows: np.ndarray = -log_softmax(logits * at, -1)[np.arange(3), labels]
        return rows

    slope, _ = slopes_at(torch.tensor(logits), None, torch.tensor(labels), torch.full((3, 1), b, dtype=torch.float64))
    assert slope[:, 0].numpy() == pytest.approx((loss(b + h) - loss(b - h)) / (2 * h), abs=1e-5)
    up, curved = (
        slopes_at(torch.tensor(logits), None, torch.tensor(labels), torch.full((3, 1), at, dtype=torch.float64))
        for at in (b + h, b)
    )
    assert curved[1][:, 0].numpy() == pytest.approx(((up[0] - slope)[:, 0] / h).numpy(), abs=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_a_fit_takes_few_passes(seed: int, folds: int) -> None:
    data = [numbers(seed + i, 60, 10 ** np.random.default_rng(seed + i).uniform(-1, 1)) for i in range(folds)]
    passes = 0

    def slopes(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal passes
        passes += 1
        values = []
        for (logits, labels), own in zip(data, b, strict=True):
            at = torch.tensor(own).expand(len(labels), -1)
            values.append([v.sum(0).numpy() for v in slopes_at(torch.tensor(logits), None, torch.tensor(labels), at)])
        slope, curvature = zip(*values, strict=True)
        return np.stack(slope), np.stack(curvature)

    for (logits, labels), found in zip(data, fit(slopes, folds), strict=True):
        assert found.temperature == pytest.approx(best(logits, np.eye(logits.shape[1])[labels]), rel=2e-4)
    assert passes <= 7


def test_processes_fit_the_same_to_the_last_bit() -> None:
    size = 3 * CHUNK + 17
    rows = np.sort(np.random.default_rng(0).integers(0, 40, size))
    whole = states(*numbers(8, size, 2.0), rows)
    alone = temperatures_of("fit", IDS, whole, None)
    parts = [whole.own(Share(Place(place, 2), lambda own: own)) for place in (0, 1)]

    def slopes(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums: list[Any] = []
        halves = halves_of(IDS)
        for part in parts:
            kept: list[Any] = []
            share = Share(Place(0, 2), lambda own, kept=kept: kept.extend(own) or own)  # type: ignore[misc]
            scaling._slopes_of(part, None, halves, share)(b)
            sums += kept  # chunks 0 and 2, then 1 and 3
        total = np.sum([one for _, one in sorted(sums, key=lambda one: one[0])], axis=0)
        return total[0], total[1]

    assert not isinstance(alone, str)
    folds = fit(slopes, 2)[::-1]
    assert [fold.temperature for fold in folds] == [fold.temperature for fold in alone.scaling.folds]


# What is measured -------------------------------------------------------------------------------------------------

SETTINGS = EvaluationConfig(prompts=0, seed=1, sweep=())


def generation(wanted: Any, *, rows: int = 12, parts: Parts | None = None, teacher: bool = True) -> Evaluation:
    task = Generation(
        tiny.tokenizer(), tiny.rows(rows), SETTINGS.model_copy(update={"logit_temperature": wanted}), pad_id=0,
        parts=parts,
    )  # fmt: skip
    models: dict[str, Any] = {"student": lambda: tiny.llama(3)} | ({"teacher": tiny.llama} if teacher else {})
    return run_task(task, models)


def classification(wanted: Any, *, rows: int = 30) -> Evaluation:
    texts = [LabelledRow(f"r{i}", (1, *range(6, 7 + i % 5), 2), i % 3, f"text {i}") for i in range(rows)]
    task = Classification(texts, tiny_classifiers.CLASSES, EvaluationConfig(logit_temperature=wanted), pad_id=0)
    models = {"teacher": lambda: tiny_classifiers.make(seed=1), "student": lambda: tiny_classifiers.make("llama", 2)}
    return run_task(task, models)


@pytest.mark.parametrize(("evaluate", "keys"), [(generation, TOKEN_KEYS), (classification, CLASS_KEYS)])
def test_temperature_1_is_the_student_to_the_last_bit(evaluate: Any, keys: tuple[str, ...]) -> None:
    found, plain = evaluate(1.0), evaluate(None)
    assert {key: found.value("scaled", key) for key in keys} == {key: found.value("student", key) for key in keys}
    intervals = found.numbers.intervals
    assert intervals["scaled"] == {key: ends for key, ends in intervals["student"].items() if key in keys}
    assert found.reliability.width["scaled"] == found.reliability.width["student"]
    changed = found.finding("calibrated_by_temperature")
    assert changed.answer == "no" and changed.numbers["ece_difference"].value == 0
    # Without the setting nothing is there, and with it nothing else changes.
    assert plain.models == ["teacher", "student"] and plain.scaling is None
    assert plain.finding("calibrated_by_temperature") is None
    assert [plain.numbers.values[name] for name in plain.models] == [found.numbers.values[n] for n in plain.models]


@pytest.mark.slow
def test_tokens_are_measured_at_their_rows_temperature() -> None:
    found = generation("fit_to_teacher")
    rows, models = tiny.rows(12), (tiny.llama(3), tiny.llama())
    by_row = {line["row_id"]: line["temperature"] for line in found.heldout if line["model"] == "scaled"}
    assert found.scaling is not None and found.scaling.folds[0].rows == 6
    assert set(by_row.values()) == {fold.temperature for fold in found.scaling.folds}
    expected = PositionTable()
    nll = []
    for number, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        start, labels = len(row.prompt_ids) - 1, torch.tensor(row.response_ids)
        q, p = (model(input_ids=ids).logits[0, start:-1].detach() for model in models)
        scaled = q / by_row[row.id]
        nll += [*(-log_softmax(scaled.numpy(), -1)[np.arange(len(labels)), labels])]
        expected.update(scaled, p, labels, torch.full((len(labels),), number))
    computed = expected.compute()
    for key in ("ece", "ece_mass", "mce", "brier", "fkl", "rkl", "overconfidence", "tail_rkl", "entropy", "confidence"):
        assert found.value("scaled", key) == pytest.approx(computed[key], abs=1e-6), key
    assert found.value("scaled", "nll") == pytest.approx(np.mean(nll), abs=1e-6)
    assert found.value("scaled", "accuracy") == found.value("student", "accuracy")
    assert found.value("scaled", "rouge_l") is None


def test_texts_are_measured_at_their_own_temperature() -> None:
    found = classification("fit")
    for line in found.predictions:
        assert line["scaled_temperature"] in {fold.temperature for fold in found.scaling.folds}  # type: ignore[union-attr]
    nll = np.mean([line["scaled_nll"] for line in found.predictions])
    assert found.value("scaled", "nll") == pytest.approx(nll, abs=1e-4)
    sure = np.mean([line["scaled_confidence"] for line in found.predictions])
    assert found.value("scaled", "confidence") == pytest.approx(sure, abs=1e-4)
    student = tiny_classifiers.make("llama", 2)
    first = found.predictions[4]
    logits = student(input_ids=torch.tensor([(1, *range(6, 11), 2)])).logits[0].detach().double().numpy()
    q = softmax(logits / first["scaled_temperature"])
    assert first["scaled_confidence"] == pytest.approx(q.max(), abs=1e-4)
    assert found.settings["logit_temperature"] == "fit"


def test_the_file_has_it_and_an_old_one_has_not(tmp_path: Any) -> None:
    made = generation("fit")
    loaded = Evaluation.load(made.save(tmp_path))
    assert loaded.scaling == made.scaling and loaded.models == ["teacher", "student", "scaled"]
    assert loaded.to_json() == replace(made, folder=tmp_path).to_json() | {"timing": loaded.timing}
    assert loaded.to_json()["scaling"]["fitted_to"] == "labels"


@pytest.mark.slow
def test_finished_parts_are_used_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(Store(tmp_path / "own"), Store(tmp_path / "shared"))
    first = generation("fit", parts=parts)
    monkeypatch.setattr("drkl.evaluation.tasks.temperatures_of", None)
    monkeypatch.setattr("drkl.evaluation.tasks.compare", None)
    again = generation("fit", parts=parts)
    assert replace(again, timing={}).to_json() == replace(first, timing={}).to_json()


@pytest.mark.slow
def test_what_cannot_be_fitted_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "drkl"):
        found = generation("fit", rows=1)
    assert found.models == ["teacher", "student"] and found.scaling is None
    assert "logit_temperature: A temperature is fitted on other rows" in caplog.text
    with pytest.raises(DrklError, match="no teacher's distribution to fit the student to"):
        generation("fit_to_teacher", teacher=False)
    assert generation("fit", teacher=False).value("scaled", "ece") is not None
