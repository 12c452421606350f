"""Findings: planted numbers have the answers that were planted, and no two places answer one question differently."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drkl.evaluation.bootstrap import Estimate, Resampled
from drkl.evaluation.comparison import compare, side_by_side
from drkl.evaluation.declared import CLASS_METRICS, METRICS
from drkl.evaluation.findings import (
    IDS,
    MIN_UNITS,
    QUESTIONS,
    SHARED,
    Finding,
    above,
    not_below,
    of_analysis,
    of_comparison,
    of_evaluation,
    sureness,
    together,
)
from drkl.evaluation.paired import Curve, Difference, at_variety
from drkl.evaluation.positions import PositionTable
from drkl.evaluation.result import Evaluation, Numbers

ROOT = Path(__file__).resolve().parents[2]


def evaluation(values: dict[str, Any], intervals: Any = None, *, rows: int = 50, **changes: Any) -> Evaluation:
    settings = {"data": {"heldout_rows": rows}, "prompts": rows}
    return Evaluation(Numbers(values, intervals or {}), settings, **changes)


def answers(findings: list[Finding]) -> dict[str, str]:
    assert all(count == 1 for count in Counter(finding.id for finding in findings).values())
    return {finding.id: finding.answer for finding in findings}


@pytest.mark.parametrize(
    ("ends", "over", "at_least"),
    [
        ((0.1, 0.2), "yes", "yes"),
        ((-0.2, -0.1), "no", "no"),
        ((-0.1, 0.1), "undecided", "undecided"),
        ((0.0, 0.0), "no", "yes"),
        ((1e-9, 2e-9), "no", "yes"),
        (None, "undecided", "undecided"),
    ],
)
def test_an_interval_decides(ends: Any, over: str, at_least: str) -> None:
    assert above(Estimate(0.0, ends)) == over and not_below(Estimate(0.0, ends)) == at_least


@pytest.mark.parametrize(
    ("each", "all_together"),
    [("yes yes", "yes"), ("yes undecided", "yes"), ("no undecided", "no"), ("yes no", "undecided"),
     ("undecided undecided", "undecided"), ("", "undecided")],
)  # fmt: skip
def test_several_measures_answer_together(each: Any, all_together: str) -> None:
    assert together(each.split()) == all_together


def test_a_student_less_sure_than_its_teacher_is_not_overconfident_by_it() -> None:
    numbers = {
        "overconfidence": Estimate(-0.1, (-0.12, -0.08)), "calibration_gap": Estimate(0.05, (0.04, 0.06)),
        "target_gap": Estimate(0.02, (-0.01, 0.05)), "confidence": Estimate(0.5), "accuracy": Estimate(0.45),
        "teacher_calibration_gap": Estimate(0.2, (0.1, 0.3)),
    }  # fmt: skip
    found = sureness(numbers, 40)
    assert answers(found) == dict(zip(SHARED, ("no", "yes", "undecided"), strict=True))
    by_teacher, by_data, target = (finding.text for finding in found)
    assert "10.0 points [8.0, 12.0] less probability than its teacher does" in by_teacher
    assert "confidence (50.0 %) is 5.0 points [4.0, 6.0] above its accuracy (45.0 %)" in by_data
    assert "the teacher's is 20.0 points [10.0, 30.0] above the teacher's accuracy" in by_data
    assert "2.0 points [−1.0, 5.0] more probability" in target
    alone = answers(sureness({key: numbers[key] for key in ("calibration_gap", "confidence", "accuracy")}, 40,
                             has_teacher=False))  # fmt: skip
    assert alone == dict(zip(SHARED, ("not_applicable", "yes", "not_applicable"), strict=True))
    few = sureness(numbers, MIN_UNITS - 1)
    assert {finding.answer for finding in few} == {"undecided"} and "fewer than 5 rows decide nothing" in few[0].text


def test_where_the_student_is_overconfident_of_other_tokens_the_target_says_so() -> None:
    numbers = {"overconfidence": Estimate(0.1, (0.08, 0.12)), "target_gap": Estimate(-0.3, (-0.4, -0.2))}
    found = sureness(numbers, 40)
    assert answers(found)["target_too_high"] == "no" and "other tokens" in found[-1].text


def table_of(noise: float, rows: int = 12) -> PositionTable:
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(rows), generator.integers(2, 9, rows))
    teacher = generator.normal(0, 2, (len(owner), 9))
    student = teacher + noise * generator.normal(0, 1, teacher.shape)
    labels = generator.integers(0, 9, len(owner))
    table = PositionTable()
    table.update(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), torch.tensor(owner))
    return table


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_evaluation_and_analysis_answer_what_they_share_alike(noise: float) -> None:
    """The page once said no in one section and yes in another, for one run."""
    keys = ("overconfidence", "calibration_gap", "target_gap", "confidence", "accuracy")
    resampled = {
        name: Resampled.of(table.metrics, table.num_rows, 0)
        for name, table in (("student", table_of(noise)), ("teacher", table_of(0.0)))
    }
    of_student = evaluation(
        {name: dict(found.points) for name, found in resampled.items()},
        {name: found.intervals() for name, found in resampled.items()},
        rows=12,
    )
    found = of_evaluation(of_student)
    totals = {key: Estimate(of_student.value("student", key), of_student.interval("student", key)) for key in keys}
    totals["teacher_calibration_gap"] = Estimate(
        of_student.value("teacher", "calibration_gap"), of_student.interval("teacher", "calibration_gap")
    )
    assert found[: len(SHARED)] == sureness(totals, 12)
    for seed in range(3):  # the answers are those of the numbers, however often they are asked for
        again = of_evaluation(of_student)
        assert [finding.to_json() for finding in again] == [finding.to_json() for finding in found], seed


ANALYSIS = {
    "settings": {"gamma": 0.5, "temperature": 1.0, "rows": 30, "positions": 200},
    "counts": {"matched": 20, "matched_rows": 9, "infinite_K": 0},
    "totals": {
        name: {"value": value, "interval": ends}
        for name, value, ends in (
            ("overconfidence", 0.1, [0.05, 0.2]), ("calibration_gap", 0.1, [-0.1, 0.2]), ("confidence", 0.5, None),
            ("target_gap", -0.1, [-0.2, -0.05]), ("accuracy", 0.4, None), ("teacher_calibration_gap", 0.0, None),
            ("matched", 0.1, [0.05, 0.2]), ("matched_p_t", 0.5, [0.4, 0.6]), ("matched_K", 1.0, [0.9, 1.1]),
            ("matched_outweighs", 0.9, [0.8, 1.0]), ("matched_force", 0.2, [0.1, 0.3]),
            ("matched_overshoot", 0.05, [0.03, 0.07]), ("tail_share", 0.4, [0.3, 0.45]), ("K", 2.0, [1.0, 3.0]),
            ("stronger", 0.5, [0.4, 0.6]), ("weaker", 0.5, [0.4, 0.6]), ("tail_force_ratio", 1.0, [0.9, 1.1]),
            ("sure", 0.1, [0.05, 0.15]), ("sure_drkl", 0.7, [0.6, 0.8]), ("sure_rkl", 0.2, [0.1, 0.3]),
        )
    },
}  # fmt: skip


def test_the_findings_of_an_analysis() -> None:
    found = of_analysis(ANALYSIS)
    assert answers(found) == {
        "overconfident_by_teacher": "yes", "overconfident_by_data": "undecided", "target_too_high": "no",
        "pushed_when_matched": "yes", "tail_dominates": "no", "drkl_strengthens_tail": "undecided",
        "sure_positions_dominate": "yes",
    }  # fmt: skip
    assert "A lower gamma helps" in found[-1].text and 'weight="floor"' in found[-2].text
    assert answers(of_analysis(ANALYSIS, shared=False)).keys() == answers(found).keys() - set(SHARED)


@pytest.mark.parametrize(
    ("section", "change", "text"),
    [
        ("settings", {"temperature": 2.0}, "At temperature 2: "),
        ("counts", {"infinite_K": 3}, "K is infinite at 3 of the positions"),
        ("settings", {"rows": 2}, "Fewer than 5 rows decide nothing."),
        ("totals", {"matched_p_t": {"value": None, "interval": None}}, "At none of the 200 positions the target"),
        ("totals", {"matched_overshoot": {"value": 0.1, "interval": None}}, "There is no interval: the target matches"),
        ("totals", {"tail_share": {"value": None, "interval": None}}, "Reverse KL is 0 or infinite here"),
    ],
)
def test_what_the_sentences_of_an_analysis_add(section: str, change: dict[str, Any], text: str) -> None:
    tables: Any = ANALYSIS | {section: ANALYSIS[section] | change}
    assert any(text in finding.text for finding in of_analysis(tables))


VALUES = {
    "teacher": {"rkl": 0.0, "fkl": 0.0, "agreement": 1.0, "nll": 2.0, "rouge_l": 20.0, "distinct_2": 0.9},
    "before": {"rkl": 5.0, "fkl": 4.0, "agreement": 0.2, "nll": 6.0},
    "student": {"rkl": 2.0, "fkl": 4.5, "agreement": 0.5, "nll": 4.0, "rouge_l": 15.0, "distinct_2": 0.8},
}


def ends(width: float) -> dict[str, Any]:
    return {model: {key: (value - width, value + width) for key, value in own.items()} for model, own in VALUES.items()}


def test_closer_and_better_are_decided_by_paired_differences_where_there_are_some() -> None:
    wide = evaluation(VALUES, ends(9.0))
    assert {answers(of_evaluation(wide))[name] for name in ("closer", "better_on_data", "as_good", "varied")} == {
        "undecided"
    }
    paired: Any = {
        ("student", "before"): {"rkl": Estimate(-3.0, (-4.0, -2.0)), "fkl": Estimate(0.5, (-0.1, 1.0)),
                                "agreement": Estimate(0.3, (0.2, 0.4)), "nll": Estimate(-2.0, (-3.0, -1.0))},
        ("student", "teacher"): {"rouge_l": Estimate(-5.0, (-9.0, -1.0)), "distinct_2": Estimate(-0.1, (-0.2, -0.01))},
    }  # fmt: skip
    found = answers(of_evaluation(wide, paired))
    assert (found["closer"], found["better_on_data"], found["as_good"], found["varied"]) == ("yes", "yes", "no", "no")
    paired["student", "before"]["fkl"] = Estimate(0.5, (0.1, 1.0))
    contradiction = next(f for f in of_evaluation(wide, paired) if f.id == "closer")
    assert contradiction.answer == "undecided" and "contradict each other" in contradiction.text
    assert "Reverse KL 2.00 nats, before training 5.00 nats (−3.000 [−4.000, −2.000])" in contradiction.text
    assert contradiction.numbers["rkl_difference"] == paired["student", "before"]["rkl"]
    assert answers(of_evaluation(replace(wide, settings={"data": {"heldout_rows": 2}}), paired))["closer"] == (
        "undecided"
    )
    # Without pairs, intervals that have nothing in common decide.
    narrow = answers(of_evaluation(evaluation(VALUES, ends(0.01))))
    assert (narrow["better_on_data"], narrow["as_good"], narrow["varied"]) == ("yes", "no", "no")


def test_what_does_not_apply_says_why() -> None:
    alone = {f.id: f for f in of_evaluation(evaluation({"student": VALUES["student"]}, ends(0.1)))}
    assert alone["closer"].text == "There is no teacher to be close to."
    assert alone["better_on_data"].text == "The student before training was not evaluated."
    assert alone["varied"].answer == alone["as_good_when_as_varied"].answer == "not_applicable"
    two = evaluation({"teacher": {"accuracy": 0.9}, "student": {"accuracy": 0.9}}, task="classification",
                     classes=["a", "b"])  # fmt: skip
    found = {f.id: f for f in of_evaluation(two)}
    assert "DRKL without a skew equals reverse KL" in found["tail_dominates"].text
    assert found["varied"].text == "A classifier writes no answers."
    assert "tail_dominates" not in answers(of_evaluation(replace(two, classes=["a", "b", "c"])))


def test_more_varied_is_as_varied_and_says_to_read_the_samples() -> None:
    paired = {("student", "teacher"): {"distinct_2": Estimate(0.05, (0.01, 0.1))}}
    found = next(f for f in of_evaluation(evaluation(VALUES), paired) if f.id == "varied")
    assert found.answer == "yes" and "read the samples" in found.text


def curve(points: dict[float, tuple[float, float]], spread: float = 0.0) -> Curve:
    noise = np.random.default_rng(0).normal(0, 1, 200)
    return Curve.of({
        t: Resampled(
            {"distinct_2": x, "rouge_l": y}, {"distinct_2": np.full(200, x), "rouge_l": y + spread * noise}
        ) for t, (x, y) in points.items()
    })  # fmt: skip


@pytest.mark.parametrize(
    ("student", "answer", "text"),
    [
        ({0.5: (0.5, 12.0), 1.5: (0.9, 6.0)}, "no", "the student's ROUGE-L is 9.0 and the teacher's 10.0"),
        ({0.5: (0.5, 14.0), 1.5: (0.9, 10.0)}, "yes", "the student's ROUGE-L is 12.0"),
        ({0.5: (0.1, 14.0), 1.5: (0.3, 10.0)}, "not_applicable", "Distinct-2 of 0.700: its own is 0.100 to 0.300"),
        ({1.0: (0.7, 10.0)}, "not_applicable", "There is no sweep"),
    ],
)
def test_as_good_where_as_varied(student: Any, answer: str, text: str) -> None:
    curves = {"student": curve(student, 0.1), "teacher": curve({0.5: (0.5, 12.0), 1.0: (0.7, 10.0)}, 0.1)}
    found = of_evaluation(evaluation(VALUES), curves=curves)[-1]
    assert (found.id, found.answer) == ("as_good_when_as_varied", answer) and text in found.text


def test_the_best_crossing_counts() -> None:
    variety = np.array([[0.0], [1.0], [0.0]])
    quality = np.array([[1.0], [2.0], [9.0]])
    assert at_variety(variety, quality, np.array([0.5])).tolist() == [5.5]
    assert np.isnan(at_variety(variety, quality, np.array([2.0]))).all()
    assert at_variety(variety, quality, np.array([1.0])).tolist() == [2.0]


def test_findings_survive_json_and_have_ids_of_the_list() -> None:
    every = [*of_evaluation(evaluation(VALUES, ends(0.1))), *of_analysis(ANALYSIS)]
    difference = Difference(METRICS["rkl"], 1.0, 0.5, (-0.7, -0.3), "B better")
    every += of_comparison([difference, replace(difference, metric=METRICS["entropy"], teacher=1.0)], "dolly")
    for finding in every:
        assert finding.id in IDS and finding.question and finding.text.endswith(".")
        assert Finding.from_json(json.loads(json.dumps(finding.to_json(), allow_nan=False))) == finding
        assert set(finding.to_json()) == {"id", "question", "answer", "numbers", "text"}
    assert len(set(IDS)) == len(IDS) and set(QUESTIONS) < set(IDS)


def test_the_two_yardsticks_have_names_of_their_own_in_every_table() -> None:
    """`drkl compare` once had an "Overconfidence" and a "Confidence gap" that preferred different runs."""
    for metrics in (METRICS, CLASS_METRICS):
        titles = {metric.title: key for key, metric in metrics.items() if "onfiden" in metric.title}
        assert titles == {
            "Overconfidence by the teacher": "overconfidence", "Overconfidence by the data": "calibration_gap",
            "Confidence": "confidence", "Confidence minus the teacher's": "confidence_gap",
        }  # fmt: skip


# Several runs -----------------------------------------------------------------------------------------------------


def run(noise: float, seed: int, folder: str) -> Evaluation:
    """A student at this distance from a teacher that all runs share, with its own luck."""
    generator = np.random.default_rng(1)
    owner = np.repeat(np.arange(20), generator.integers(2, 9, 20))
    teacher = generator.normal(0, 2, (len(owner), 9))
    labels = generator.integers(0, 9, len(owner))
    lines, values, intervals = [], {}, {}
    for name, logits in (
        ("teacher", teacher),
        ("student", teacher + noise * np.random.default_rng(seed).normal(0, 1, teacher.shape)),
    ):
        table = PositionTable()
        table.update(torch.tensor(logits), torch.tensor(teacher), torch.tensor(labels), torch.tensor(owner))
        lines += [{"model": name, **line} for line in table.rows([f"r{i}" for i in range(20)])]
        values[name], intervals[name] = table.compute(), table.intervals(0)
    settings = {"data": {"heldout_rows": 20}, "prompts": 0, "models": {"teacher": "t"}, "sampling_temperature": 1.0}
    return Evaluation(Numbers(values, intervals), settings, name=folder, lines={"heldout": lines})


RUNS = [run(0.5, 1, "a"), run(0.5, 2, "b"), run(2.0, 3, "c"), run(0.5, 4, "d")]


def test_no_winner_is_named_that_the_comparison_calls_undecided() -> None:
    """The page once ranked runs by their rounded values, and named winners that `drkl compare` did not."""
    for runs in itertools.chain(itertools.combinations(RUNS, 2), [RUNS]):
        names = [evaluation.name for evaluation in runs]
        undecided = 0
        for standing in side_by_side(runs):
            key = standing.metric.key
            for a, b in itertools.combinations(range(len(runs)), 2):
                verdict = {d.metric.key: d.verdict for d in compare(runs[a], runs[b]).tables[0].differences}.get(key)
                if a in standing.values and b in standing.values and verdict is not None:
                    won = {pair for pair, decided in standing.better.items() if decided and set(pair) == {a, b}}
                    assert won == {"A better": {(a, b)}, "B better": {(b, a)}, "undecided": set()}[verdict]
            text = standing.text(names)
            if standing.winner is None:
                undecided += 1
                assert " is best" not in text and " is better" not in text
                assert "do not decide between" in text or "could be tested" in text
            else:
                assert f"{names[standing.winner]} is " in text
        assert undecided, "runs that differ by luck alone"


def test_a_planted_winner_is_named_and_a_planted_loser_never_leads() -> None:
    (pair,) = side_by_side([RUNS[2], RUNS[0]], ["rkl"])
    assert pair.winner == 1 and list(pair.values) == [1, 0] and pair.text(["c", "a"]).endswith("; a is better.")
    (several,) = side_by_side(RUNS, ["rkl"])
    assert 2 not in several.leaders and len(several.leaders) >= 1


def test_runs_without_lines_or_on_other_rows_are_not_ranked() -> None:
    bare = replace(RUNS[0], lines={}, cache={})
    (standing,) = side_by_side([bare, RUNS[2]], ["rkl"])
    assert standing.winner is None and "has no heldout.jsonl" in standing.text(["a", "c"])
    (alone,) = side_by_side([RUNS[0]], ["rkl"])
    assert alone.winner is None and alone.text(["a"]).endswith(".")


def test_the_committed_evaluation_has_one_answer_for_each_question() -> None:
    found = Evaluation.load(ROOT / "docs" / "results" / "quickstart.eval.json")
    assert answers(found.findings)["overconfident_by_teacher"] == "yes"
    assert answers(found.findings)["overconfident_by_data"] == "yes"
    assert answers(found.findings)["closer"] == "yes"


@pytest.mark.parametrize(("scaled", "answer"), [(0.02, "yes"), (0.12, "no"), (0.05, "undecided")])
def test_a_temperature_calibrates_where_the_error_falls(scaled: float, answer: str) -> None:
    values = {"student": {"ece": 0.06, "calibration_gap": 0.05}, "scaled": {"ece": scaled, "calibration_gap": -0.01}}
    intervals = {name: {"ece": (own["ece"] - 0.02, own["ece"] + 0.01)} for name, own in values.items()}
    found = {finding.id: finding for finding in of_evaluation(evaluation(values, intervals))}
    finding = found["calibrated_by_temperature"]
    assert finding.answer == answer and f"with the temperature {scaled:.3f}" in finding.text
    assert "Its confidence is then 1.0 points below its accuracy, without it 5.0 points above." in finding.text
    assert set(finding.numbers) >= {"ece", "scaled_ece", "ece_difference", "scaled_calibration_gap"}
    alone = of_evaluation(evaluation({"student": values["student"]}))
    assert "calibrated_by_temperature" not in {finding.id for finding in alone}
