from typing import Any

import pytest

from drkl.reporting.answer import Answer, answer, run_labels
from drkl.reporting.record import read_run
from tests.reporting.conftest import MakeRun


def _point(said: Answer, question: str) -> str:
    return next(point.text for point in said.points if question in point.question)


def test_the_answer_has_the_numbers(make_run: MakeRun) -> None:
    said = answer(read_run(make_run()))
    assert (said.verdict, said.tone) == ("Closer", "good")
    for part in ("350 steps", "from 11.73 to 2.54 nats", "from 8.91 to 2.62 nats", "35\N{NO-BREAK SPACE}%"):
        assert part in said.headline
    assert "A trade" in _point(said, "last stage, drkl")
    assert "one training seed" in _point(said, "trust")
    assert "6,821 held-out tokens" in _point(said, "trust")
    text = _point(said, "Is it the objective")
    assert "/config.yaml objective.name=rkl run.name=quickstart-rkl`" in text
    assert "`drkl report " in text and "/quickstart-rkl`." in text


@pytest.mark.parametrize(
    ("gap", "words"),
    [(0.15, "it is surer than right, by 0.15 (calibration error 0.16; the teacher's 0.06)"),
     (-0.2, "it is less sure than right, by 0.20"), (0.004, "it is as sure as it is right")],
)  # fmt: skip
def test_sureness_is_held_against_the_observed_tokens_too(make_run: MakeRun, gap: float, words: str) -> None:
    changes = {"after": {"calibration_gap": gap, "ece": 0.16}, "teacher": {"ece": 0.06}}
    assert words in _point(answer(read_run(make_run(changes=changes))), "overconfident")
    changes["after"] = {"calibration_gap": None, "ece": None}
    assert "people wrote" not in _point(answer(read_run(make_run(changes=changes))), "overconfident")


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({"rkl": 12.0, "fkl": 9.5, "agreement": 0.02}, "Not closer"),
        ({"rkl": 11.73, "fkl": 8.91, "agreement": 0.021}, "Not closer"),
        ({"rkl": 2.0, "fkl": 9.5, "agreement": 0.3}, "Partly closer"),
        ({"rkl": 2.0, "fkl": None, "agreement": None}, "Closer"),
    ],
)
def test_it_says_no_where_it_is_no(make_run: MakeRun, after: dict[str, Any], verdict: str) -> None:
    assert answer(read_run(make_run(changes={"after": after}))).verdict == verdict


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, "No: it is less sure than its teacher."),
        ({"entropy": 1.1, "confidence_gap": 0.2, "target_gap": 0.1}, "Yes: it is surer than its teacher."),
        ({"entropy": 2.33, "confidence_gap": 0.001, "target_gap": -0.001}, "No: it is as sure as its teacher."),
        ({"entropy": 2.33, "confidence_gap": -0.1, "target_gap": 0.0}, "No: by no measure is it surer"),
        ({"entropy": 1.1, "confidence_gap": 0.2, "target_gap": -0.1}, "By some measures only."),
    ],
)
def test_overconfidence_is_not_claimed_where_there_is_none(
    make_run: MakeRun, changes: dict[str, float], start: str
) -> None:
    text = _point(answer(read_run(make_run(changes={"after": changes}))), "overconfident")
    assert text.startswith(start)
    assert ("cannot show an objective curing that" in text) == start.startswith("No")


def test_the_students_own_top_token_is_not_passed_over(make_run: MakeRun) -> None:
    text = _point(answer(read_run(make_run())), "overconfident")
    assert "+0.13" in text
    assert "35\N{NO-BREAK SPACE}% of tokens" in text


def test_without_an_evaluation_it_says_how_to_get_one(make_run: MakeRun) -> None:
    run = make_run(evaluated=False)
    said = answer(read_run(run))
    assert said.verdict == "Not evaluated"
    assert f"`drkl evaluate {run.root}`" in said.headline
    assert "reverse KL of 2.5" in said.headline


def test_without_a_teacher_it_speaks_of_the_data(make_run: MakeRun) -> None:
    said = answer(read_run(make_run(teacher=False, warmup=False)))
    assert said.verdict == "Better"
    assert "no teacher" in said.headline
    assert "from 11.40 to 4.62 nats" in said.headline


def test_without_a_baseline_nothing_is_called_closer(make_run: MakeRun) -> None:
    said = answer(read_run(make_run(changes={"before": {"rkl": None}})))
    assert said.verdict == "No baseline"
    assert "2.54 nats" in said.headline


def test_runs_are_compared_by_the_digits_shown(make_run: MakeRun) -> None:
    first = read_run(make_run())
    other = read_run(make_run("rkl", objective="rkl", changes={"after": {"rkl": 2.47, "fkl": 2.622, "rouge_l": 13.24}}))
    text = _point(answer(first, [other]), "next to rkl")
    assert "Lowest reverse KL: rkl (2.47, this run 2.54)" in text
    assert "forward KL" not in text
    assert "ROUGE" not in text


def test_runs_of_one_name_are_told_apart(make_run: MakeRun) -> None:
    record, other = read_run(make_run()), read_run(make_run("rkl", objective="rkl"))
    assert run_labels([record, other, record]) == ["quickstart · drkl (1)", "rkl", "quickstart · drkl (2)"]
