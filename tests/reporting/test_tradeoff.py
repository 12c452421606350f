from drkl.reporting.inputs import read_run
from drkl.reporting.tradeoff import Point, frontier, pictures, sweep_of, table
from tests.reporting.conftest import MakeRun


def _points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(1.0 + place, x, y) for place, (x, y) in enumerate(pairs)]


def test_the_frontier_is_what_nothing_beats_on_both_sides() -> None:
    curves = {"a": _points((1, 5), (2, 4), (3, 1)), "b": _points((1, 4), (2, 4), (2.5, 3))}
    found = [(key, point.x, point.y) for key, point in frontier(curves)]
    assert found == [("a", 1, 5), ("a", 2, 4), ("b", 2, 4), ("b", 2.5, 3), ("a", 3, 1)]
    assert frontier({}) == []


def test_an_older_file_has_one_point_per_model(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert [len(sweep_of(record, model)) for model in record.models] == [1] * 4
    assert [picture.title[-10:] for picture in pictures([record])] == ["Distinct-2", "−Self-BLEU"]
    assert "Student: at 1: 13.2 and −12." in pictures([record])[1].alt


def test_nothing_sampled_means_no_picture(make_run: MakeRun) -> None:
    none = dict.fromkeys(("rouge_l", "distinct_2", "self_bleu"))
    run = make_run(changes=dict.fromkeys(("teacher", "before", "warmup", "student"), none))
    assert pictures([read_run(run)]) == []


def test_the_table_has_every_point_of_the_picture(make_run: MakeRun) -> None:
    record = read_run(make_run(swept=True))
    found = table([record])
    assert [len(sweep_of(record, model)) for model in record.models] == [5] * 4
    assert [row[:2] for row in found.rows[:2]] == [["Teacher", "0.5"], ["Teacher", "0.7"]]
    assert found.rows[0][2] == ("29.3", "26.9 to 31.6")
