import pytest

from drkl.reporting import figures
from drkl.reporting.record import Curve, read_run, thin
from drkl.runs import write_json, write_jsonl
from tests.reporting.conftest import MakeRun, evaluation


def test_the_figures_of_a_whole_run(make_run: MakeRun) -> None:
    record = read_run(make_run())
    curves, optimiser = figures.training_curves(record)
    titles = [picture.title for picture in (*curves, *optimiser, *figures.distributions(record))]
    assert titles == [
        "Reverse KL to the teacher", "Forward KL to the teacher", "Top-token agreement", "Entropy",
        "Negative log-likelihood", "Loss", "Gradient norm", "Learning rate", "Speed",
        "Entropy per token", "Probability of the top token", "Surer or less sure than the teacher",
    ]  # fmt: skip
    for picture in curves:
        assert 'role="img"' in picture.svg
        assert "over 350 optimiser steps" in picture.alt


def test_colours_are_the_pages_and_ids_the_figures_own(make_run: MakeRun) -> None:
    picture = figures.bars(read_run(make_run()), "entropy")
    assert picture is not None
    for model in ("teacher", "before", "warmup", "after"):
        assert f"var(--{model})" in picture.svg
    assert picture.alt == "Entropy: Teacher 2.32, Before 7.90, Warm-up 4.57, After 3.05"
    assert 'id="bars-entropy-' in picture.svg
    assert "#0068a8" not in picture.svg
    assert "font-family" not in picture.svg.split(">", 1)[1]


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert figures.distributions(record) == figures.distributions(record)


def test_text_of_users_is_never_maths_nor_markup(make_run: MakeRun) -> None:
    run = make_run(objective="$\\frac{<script>&")
    curves, _ = figures.training_curves(read_run(run))
    assert "<script>" not in curves[0].svg
    assert "$\\frac{&lt;script&gt;" in curves[0].svg


def test_letters_that_the_font_lacks_are_no_warning(make_run: MakeRun) -> None:
    curves, _ = figures.training_curves(read_run(make_run(objective="蒸馏")))
    assert "蒸馏" in curves[0].svg


@pytest.mark.parametrize(
    "distributions",
    [None, [], {}, {"edges": 3}, {"edges": {"entropy": [0, 1]}, "after": {"entropy": [0]}},
     {"edges": {"entropy": [0, 1, 1]}, "after": {"entropy": [1, 2]}},
     {"edges": {"entropy": [0, 1, 2]}, "after": {"entropy": [1]}}, {"edges": {"entropy": None}, "after": None}],
)  # fmt: skip
def test_broken_histograms_are_left_out(make_run: MakeRun, distributions: object) -> None:
    run = make_run()
    write_json(run.eval_path, evaluation() | {"distributions": distributions})
    assert [picture.title for picture in figures.distributions(read_run(run))] == [
        "Surer or less sure than the teacher"
    ]


def test_an_empty_log_has_no_curves(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    write_jsonl(run.train_log_path, [])
    assert figures.training_curves(read_run(run)) == ([], [])


def test_one_line_and_zero_values_can_be_drawn(make_run: MakeRun) -> None:
    run = make_run(warmup=False, evaluated=False)
    write_jsonl(run.train_log_path, [{"step": 1, "loss": 0.0, "rkl": 0.0, "agreement": 0.0}])
    assert len(figures.training_curves(read_run(run))[0]) == 3


def test_long_curves_are_thinned_to_means() -> None:
    curve = thin(Curve([float(i) for i in range(1000)], [2.0 * i for i in range(1000)]), points=10)
    assert len(curve.steps) == 10
    assert curve.steps[0] == 49.5
    assert curve.values[0] == 99.0
