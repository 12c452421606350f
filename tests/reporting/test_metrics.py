import pytest

from drkl.reporting.metrics import METRICS, best_student, span_of, value_of
from tests.reporting.conftest import KEYS, NEW_KEYS, evaluation


def test_every_number_of_the_evaluation_has_a_row() -> None:
    assert {*KEYS, *NEW_KEYS, "num_tokens"} <= set(METRICS)
    assert all(metric.definition and metric.title for metric in METRICS.values())


@pytest.mark.parametrize(
    ("key", "old", "new", "teacher", "verdict"),
    [
        ("rkl", 3.24, 2.54, 0.0, "better"),
        ("rkl", 2.54, 3.24, 0.0, "worse"),
        ("rkl", 2.541, 2.542, 0.0, "same"),
        ("agreement", 0.348, 0.353, 1.0, "better"),
        ("agreement", 0.3480, 0.3483, 1.0, "same"),
        ("entropy", 4.57, 3.05, 2.32, "better"),
        ("entropy", 2.0, 1.0, 2.32, "worse"),
        ("entropy", 4.57, 3.05, None, None),
        ("confidence_gap", -0.2, 0.1, 0.0, "better"),
        ("confidence_gap", 0.1, -0.2, 0.0, "worse"),
        ("rkl", None, 1.0, 0.0, None),
        ("rkl", float("nan"), 1.0, 0.0, None),
        ("num_tokens", 1, 2, 3, None),
    ],
)
def test_which_way_is_better(key: str, old: object, new: object, teacher: object, verdict: str | None) -> None:
    assert METRICS[key].verdict(old, new, teacher) == verdict


def test_the_best_student_is_named_only_if_one_is() -> None:
    assert best_student(METRICS["rkl"], evaluation()) == "after"
    assert best_student(METRICS["fkl"], evaluation()) == "warmup"
    tie = evaluation(changes={"after": {"fkl": 2.341}, "warmup": {"fkl": 2.339}})
    assert best_student(METRICS["fkl"], tie) is None
    assert best_student(METRICS["num_tokens"], evaluation()) is None
    assert best_student(METRICS["rkl"], {"after": {"rkl": 1.0}}) is None


@pytest.mark.parametrize("broken", [None, {}, {"after": None}, {"after": {"rkl": None}}, {"after": {"rkl": "1"}}])
def test_a_missing_value_is_none(broken: dict | None) -> None:
    assert value_of(broken, "after", "rkl") is None


@pytest.mark.parametrize(
    "broken", [None, {}, {"a": 3}, {"a": {"b": None}}, {"a": {"b": [1]}}, {"a": {"b": [2, 1]}}, {"a": {"b": ["x", 1]}}]
)
def test_a_broken_interval_is_none(broken: object) -> None:
    assert span_of(broken, "a", "b") is None
    assert span_of({"a": {"b": [1, 2.5]}}, "a", "b") == (1.0, 2.5)
