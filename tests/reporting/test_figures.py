import pytest

from drkl.evaluation.declared import METRICS
from drkl.reporting import curves, figures
from drkl.reporting.inputs import read_run
from drkl.runs import write_json
from tests.reporting.conftest import MakeRun, evaluation


def test_the_figures_of_a_whole_run(make_run: MakeRun) -> None:
    record = read_run(make_run())
    training, optimiser = curves.training_curves(record)
    titles = [picture.title for picture in (*training, *optimiser, *figures.confidence(record))]
    assert titles == [
        "Reverse KL to the teacher", "Forward KL to the teacher", "Top-token agreement", "Entropy",
        "Negative log-likelihood", "Loss", "Gradient norm", "Learning rate", "Speed",
        "Entropy per token", "Probability of the top token", "Confidence compared with the teacher",
    ]  # fmt: skip
    for picture in training:
        assert 'role="img"' in picture.svg
        assert "over 350 optimiser steps" in picture.alt


def test_colours_are_the_pages_and_ids_the_figures_own(make_run: MakeRun) -> None:
    picture = figures.bars(read_run(make_run()), METRICS["entropy"])
    assert picture is not None
    for model in ("teacher", "before", "warmup", "student"):
        assert f"var(--{model})" in picture.svg
    assert picture.alt == "Entropy: Teacher 2.32, Before 7.90, Warm-up 4.57, Student 3.05"
    assert 'id="bars-entropy-' in picture.svg
    assert "#0068a8" not in picture.svg
    assert "font-family" not in picture.svg.split(">", 1)[1]


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    record = read_run(make_run())
    assert figures.confidence(record) == figures.confidence(record)


@pytest.mark.parametrize(
    "distributions", [None, {"edges": {"entropy": [0, 1]}}, {"edges": {"entropy": [0, 1]}, "student": {"entropy": [0]}}]
)
def test_missing_and_empty_histograms_are_left_out(make_run: MakeRun, distributions: object) -> None:
    run = make_run()
    write_json(run.eval_path, evaluation() | {"distributions": distributions})
    titles = [picture.title for picture in figures.confidence(read_run(run))]
    assert titles == ["Confidence compared with the teacher"]


def test_several_runs_are_drawn_in_their_own_colours(make_run: MakeRun) -> None:
    runs = [read_run(make_run(f"run-{place}", swept=True)) for place in range(7)]
    lines = [line for line, _, _ in figures.lines_of(runs)]
    assert [line.color for line in lines] == [
        "teacher", "student", "run-1", "run-2", "run-3", "run-4", "warmup", "student",
    ]  # fmt: skip
    assert len({(line.color, line.marker, line.dash) for line in lines}) == len(lines)
    assert "M-4.5-4.5H4.5V4.5H-4.5Z" in lines[2].sign and 'stroke="var(--run-1)"' in lines[2].sign
    assert [picture.title for picture in figures.run_dots(runs)] == [
        "Reverse KL", "Forward KL", "Top-token agreement", "Entropy",
    ]  # fmt: skip
