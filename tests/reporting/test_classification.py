"""The page of a classification run, of invented numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drkl.errors import DrklError
from drkl.reporting import figures, report
from drkl.reporting.inputs import read_run
from drkl.reporting.samples import prediction_tables
from drkl.runs import RunFolder, read_json, write_json, write_jsonl, write_yaml
from tests.reporting.conftest import MakeRun

HOSTILE = "<script>alert(1)</script>\u202e\x00"
KEYS = ["accuracy", "macro_f1", "nll", "ece", "calibration_gap", "confidence", "entropy"]
NUMBERS = {"teacher": [0.865, 0.86, 0.59, 0.06, 0.06, 0.92, 0.27], "before": [0.01, 0.001, 4.3, 0.01, 0.0, 0.02, 4.3]}
NUMBERS |= {"student": [0.851, 0.85, 0.62, 0.05, 0.04, 0.89, 0.4]}


def write_run(root: Path, **choices: Any) -> RunFolder:
    """``choices``: ``teacher``, ``evaluated``, ``objective``, ``classes``, ``student`` (numbers that differ)."""
    teacher = choices.get("teacher", True)
    run = RunFolder(root)
    config = {
        "task": "classification",
        "run": {"name": root.name},
        "teacher": {"model": "runs/t/student"} if teacher else None,
        "student": {"init": "random", "config": {"model_type": "bert"}},
        "data": {"path": "rows.jsonl"},
        "objective": {"name": choices.get("objective", "drkl")},
    }
    write_yaml(run.config_path, config)
    write_json(run.env_path, {"command": ["drkl", "distill", "c.yaml"], "data": {"train_rows": 9, "responses_cut": 2}})
    log = [{"step": s, "loss": 3 / s, "nll": 3 / s} for s in (10, 20)]
    write_jsonl(run.train_log_path, [*log, {"step": 20, "eval_loss": 0.2, "eval_nll": 0.3, "seconds": 2.0}])
    if not choices.get("evaluated", True):
        return run
    models = {name: dict(zip(KEYS, values, strict=True)) for name, values in NUMBERS.items()}
    if not teacher:
        del models["teacher"]
    for name, values in models.items():
        values |= {"agreement": 0.91, "fkl": 0.2, "rkl": 0.3, "confidence_gap": -0.03} if teacher else {}
        values |= {"num_rows": 300} | (choices.get("student", {}) if name == "student" else {})
    bins = {"rows": [*[0] * 10, 20, 30, 50, 80, 120]}
    bins |= {key: [*[None] * 10, 0.7, 0.75, 0.82, 0.9, 0.98] for key in ("confidence", "accuracy")}
    table = {"edges": [i / 15 for i in range(16)], "student": bins} | ({"teacher": bins} if teacher else {})
    evaluation = {
        "task": "classification",
        "classes": choices.get("classes", [HOSTILE, "loan", "other"]),
        "reliability": table,
        **models,
    }
    write_json(run.eval_path, evaluation | {"intervals": {"student": {"accuracy": [0.83, 0.87], "ece": [0.03, 0.07]}}})
    lines = [_line(i, teacher) for i in range(40)]
    write_jsonl(run.predictions_path, lines)
    return run


def _line(i: int, teacher: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"id": f"r{i}", "text": f"{HOSTILE} text {i}", "label": HOSTILE, "nll": 0.1 * i}
    line |= {"student": "loan" if i % 2 else HOSTILE, "student_confidence": 0.5 + i / 100}
    return line | ({"teacher": "other" if i % 4 == 1 else HOSTILE, "teacher_confidence": 0.9} if teacher else {})


def page(*runs: RunFolder) -> str:
    return report(list(runs)).read_text()


def test_the_page_has_the_numbers_the_diagrams_and_the_texts(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "a"))
    for expected in ("Calibration error (ECE)", "85.1", "83.0 to 87.0", "Is its confidence equal to its accuracy?",
                     "Where student and teacher differ", "The hardest texts", "Texts cut at the end",
                     "Does the student answer as well as its teacher?", "Macro-F1", "most often: "):  # fmt: skip
        assert expected in text, expected
    assert "Distinct" not in text and "ROUGE" not in text and "next-token" not in text


def test_text_and_labels_cannot_act(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "a"))
    assert text.count("<script") == 1 and "&lt;script&gt;" in text and "\u202e" not in text and "\x00" not in text


def test_the_texts_are_the_disagreements_and_the_least_likely(tmp_path: Path) -> None:
    differ, hard = prediction_tables(read_run(write_run(tmp_path / "a")))
    assert len(differ.rows) == len(hard.rows) == 12 and "8 more are in" in differ.lead
    assert differ.lead.startswith(
        "They differ on 20 of 40 texts; of these the teacher is right on 10, the student on 0."
    )
    assert [text.text[-2:] for text, _, _ in hard.rows[:3]] == ["39", "37", "35"]
    assert ["✓" in sure for _, sure in hard.rows[0][2]] == [False, True]


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, objective=name, student={"ece": ece})
        for name, ece in (("drkl", 0.05), ("fkl", 0.02))
    ]
    text = page(*runs)
    assert "The runs side by side" in text
    assert "Calibration error (ECE) of the students: drkl 0.050, fkl 0.020." in text


def test_without_a_teacher_it_is_about_the_labels(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", teacher=False, objective="ce")
    text = page(run)
    assert "There is no teacher to be close to." in text
    assert "Agreement" not in text and "Where student and teacher differ" not in text and "The hardest texts" in text


def test_an_unevaluated_run_says_so(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "a", evaluated=False))
    assert "has not been evaluated" in text and "Calibration" not in text


def test_two_classes_have_no_tail(tmp_path: Path) -> None:
    wanted = "With two classes the tail is a single class"
    assert wanted in page(write_run(tmp_path / "a", classes=["x", "y"]))
    assert wanted not in page(write_run(tmp_path / "b"))


def test_without_bins_there_is_no_diagram(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.evaluation is not None
    assert [picture.title for picture in figures.confidence(run)] == [
        "Is its confidence equal to its accuracy?", "Probability of the top class",
    ]  # fmt: skip
    assert figures.confidence(replace(run, evaluation=replace(run.evaluation, reliability=None))) == []


def test_runs_of_different_tasks_are_not_compared(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(DrklError, match=r"different tasks .*: a \(classification\), quickstart \(generation\)"):
        report([write_run(tmp_path / "a"), make_run()])


def test_the_scaled_student_stands_beside_the_student(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    evaluation = read_json(run.eval_path)
    evaluation["scaled"] = evaluation["student"] | {"ece": 0.0123}
    evaluation["reliability"]["scaled"] = evaluation["reliability"]["student"]
    fold = {"temperature": 1.31, "rows": 150, "fitted_on": 150, "at_bound": False}
    folds = [fold, fold | {"temperature": 20.0, "at_bound": True}]
    write_json(run.eval_path, evaluation | {"scaling": {"fitted_to": "labels", "folds": folds}})
    page = report(run.root).read_text()
    assert "Scaled student" in page and "logits / 1.31, 20 (each fitted on the other half)" in page
    assert "0.012" in page and "The fitted temperature is 20, an end of what is tried" in page
    picture = next(one for one in figures.confidence(read_run(run.root)) if one.title.startswith("Is its confidence"))
    assert "Scaled student 0.012" in picture.alt
