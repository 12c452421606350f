from typing import Any

import pytest

from drkl.reporting.record import read_run
from drkl.reporting.tradeoff import SweepPoint, at_diversity, frontier, pictures, sweep_rows, teacher_diversity, verdict
from drkl.runs import read_json, write_json
from tests.reporting.conftest import MakeRun


def _points(*pairs: tuple[float, float], **more: Any) -> list[SweepPoint]:
    return [SweepPoint(1.0 + place, x, y, **more) for place, (x, y) in enumerate(pairs)]


def test_the_frontier_is_what_nothing_beats_on_both_sides() -> None:
    curves = {"a": _points((1, 5), (2, 4), (3, 1)), "b": _points((1, 4), (2, 4), (2.5, 3))}
    found = [(key, point.x, point.y) for key, point in frontier(curves)]
    assert found == [("a", 1, 5), ("a", 2, 4), ("b", 2, 4), ("b", 2.5, 3), ("a", 3, 1)]
    assert frontier({}) == []


def test_between_two_temperatures_the_curve_is_straight() -> None:
    points = [SweepPoint(0.5, 0.8, 20.0, None, (18.0, 22.0)), SweepPoint(1.0, 0.9, 10.0, None, (9.0, 11.0))]
    value, span = at_diversity(points, 0.825) or (0.0, None)
    assert value == pytest.approx(17.5)
    assert span == pytest.approx((15.75, 19.25))
    assert at_diversity(points, 0.9) == (10.0, (9.0, 11.0))
    assert at_diversity(points, 0.95) is None
    assert at_diversity([], 0.9) is None
    assert at_diversity(_points((1, 1), (3, 3), (1, 8)), 2) == (5.5, None)


def test_the_teachers_diversity_is_that_at_temperature_one() -> None:
    assert teacher_diversity([SweepPoint(1.0, 0.9, 1.0)]) == 0.9
    assert teacher_diversity([SweepPoint(0.5, 0.8, 1.0), SweepPoint(1.5, 0.9, 1.0)]) == pytest.approx(0.85)
    assert teacher_diversity([SweepPoint(None, 0.8, 1.0)]) is None


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"rouge_l": 11.0}, "Between drkl and rkl the data do not decide: their intervals overlap."),
        ({"rouge_l": 20.0}, "rkl has the higher ROUGE-L there: its interval stands clear of the others'."),
        ({"rouge_l": 20.0, "distinct_2": 0.5}, "rkl does not come to the teacher's Distinct-2 of 0.930"),
    ],
)
def test_at_matched_diversity(make_run: MakeRun, after: dict[str, float], said: str) -> None:
    same = {"rouge_l": 11.5, "distinct_2": 0.94}
    runs = [make_run("drkl", swept=True, changes={"after": same})]
    runs.append(make_run("rkl", objective="rkl", swept=True, changes={"after": same | after}))
    assert said in verdict([read_run(run) for run in runs])


def test_without_intervals_or_sweep_or_teacher_it_says_so(make_run: MakeRun) -> None:
    run = make_run(swept=True)
    found = read_json(run.eval_path)
    for rows in found["sweep"].values():
        for row in rows:
            del row["intervals"]
    write_json(run.eval_path, found)
    assert "without intervals nobody can say" in verdict([read_run(run)])
    assert verdict([read_run(make_run("old"))]).startswith("There is no sweep")
    assert verdict([read_run(make_run("alone", teacher=False))]) == ""


def test_a_model_that_was_not_swept_is_not_said_to_miss_the_goal(make_run: MakeRun) -> None:
    run = make_run(swept=True)
    found = read_json(run.eval_path)
    found["sweep"] = {model: found["sweep"][model] for model in ("teacher", "after")}
    write_json(run.eval_path, found)
    said = verdict([read_run(run)])
    assert "After 13.7" in said and "does not come" not in said


def test_an_older_file_has_one_point_per_model(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert [len(sweep_rows(record, model)) for model in record.models] == [1] * 4
    assert [picture.title[-10:] for picture in pictures([record])] == ["Distinct-2", "−Self-BLEU"]
    assert "After: at 1: 13.2 and −12." in pictures([record])[1].alt


def test_nothing_sampled_means_no_picture(make_run: MakeRun) -> None:
    none = dict.fromkeys(("rouge_l", "distinct_2", "self_bleu"))
    run = make_run(changes=dict.fromkeys(("teacher", "before", "warmup", "after"), none))
    assert pictures([read_run(run)]) == []
