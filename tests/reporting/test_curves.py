import re
from typing import Any

import pytest

from drkl.reporting.curves import pushes, training_curves
from drkl.reporting.facts import notes
from drkl.reporting.inputs import read_run
from drkl.reporting.plotting import Picture, plot_style
from drkl.reporting.together import trained_together
from drkl.runs import RunFolder, read_jsonl, write_jsonl
from tests.reporting.conftest import MakeRun


def add_looks(run: RunFolder, *looks: dict[str, Any]) -> RunFolder:
    """Before the lines of the same steps, as training writes them."""
    rows = [*looks, *read_jsonl(run.train_log_path)]
    write_jsonl(run.train_log_path, sorted(rows, key=lambda row: row["step"]))
    return run


def look(step: int, target: Any, tail: Any) -> dict[str, Any]:
    return {"step": step, "watch_target_push": target, "watch_tail_push": tail, "watch_q_t": 0.5, "seconds": 1.0}


def drawn(run: RunFolder) -> Picture | None:
    with plot_style():
        return pushes(read_run(run))


def test_the_pushes_of_every_stage_on_one_axis(make_run: MakeRun) -> None:
    run = make_run()
    plain = read_run(run).stages
    add_looks(run.stages()[0], look(1, -0.25, 0.0), look(170, -0.125, 0.0))
    add_looks(run, look(1, 0.0625, -0.25), look(90, 0.0625, -0.125), look(180, 0.03125, -0.0625))
    for ours, theirs in zip(read_run(run).stages, plain, strict=True):
        # The lines of the same steps are still those of the training batches and the held-out rows.
        assert (ours.train, ours.heldout, ours.end) == (theirs.train, theirs.heldout, theirs.end)
    picture = drawn(run)
    assert picture is not None
    assert picture.title == "What pushes the target" and picture.caption.endswith("below 0: training raises it")
    assert picture.alt == (
        "Mean gradient on the target's logit over 350 optimiser steps: target term from -0.25 to 0.0312, tail from 0 "
        "to -0.0625, both from -0.25 to -0.0312."
    )
    for name in ("target term", "tail", "both"):
        assert len(re.findall(f">{name}</text>", picture.svg)) == 1
    assert all(f"var(--{name})" in picture.svg for name in ("run-1", "run-2", "ink"))


def test_a_stage_without_looks_and_a_single_look_can_be_drawn(make_run: MakeRun) -> None:
    picture = drawn(add_looks(make_run(), look(1, -0.5, -0.25)))
    assert picture is not None
    assert "both from -0.75 to -0.75" in picture.alt and picture.svg.count(">both</text>") == 1


def test_a_run_that_was_not_watched_has_no_such_picture(make_run: MakeRun) -> None:
    assert drawn(make_run()) is None


@pytest.mark.parametrize(("target", "tail"), [("x", -0.1), (-0.1, None)])
def test_looks_that_are_no_numbers_are_left_out(make_run: MakeRun, target: Any, tail: Any) -> None:
    assert drawn(add_looks(make_run(), look(1, target, tail))) is None


def test_text_of_users_is_never_maths_nor_markup(make_run: MakeRun) -> None:
    run = make_run(objective="$\\frac{<script>&")
    curves, _ = training_curves(read_run(run))
    assert "<script>" not in curves[0].svg
    assert "$\\frac{&lt;script&gt;" in curves[0].svg


def test_letters_that_the_font_lacks_are_no_warning(make_run: MakeRun) -> None:
    curves, _ = training_curves(read_run(make_run(objective="蒸馏")))
    assert "蒸馏" in curves[0].svg


def test_an_empty_log_has_no_curves(make_run: MakeRun) -> None:
    run = make_run(warmup=False)
    write_jsonl(run.train_log_path, [])
    assert training_curves(read_run(run)) == ([], [])


def test_one_line_and_zero_values_can_be_drawn(make_run: MakeRun) -> None:
    run = make_run(warmup=False, evaluated=False)
    write_jsonl(run.train_log_path, [{"step": 1, "loss": 0.0, "rkl": 0.0, "agreement": 0.0}])
    assert len(training_curves(read_run(run))[0]) == 3


def test_a_log_of_k_and_one_classes_says_so_and_shows_what_is_seen_of_the_teacher(make_run: MakeRun) -> None:
    whole, some = make_run("whole"), make_run("some")
    assert not any("k + 1 classes" in text for text in notes([read_run(whole)]))
    pictures, _ = training_curves(read_run(whole))
    assert not any("k + 1" in one.caption or "seen" in one.title for one in pictures)
    rows = [row | {"teacher_mass": 0.75, "teacher_tail_mass": 0.5} for row in read_jsonl(some.train_log_path)]
    write_jsonl(some.train_log_path, rows)
    run = read_run(some)
    captions = {one.title: one.caption for one in training_curves(run)[0]}
    assert captions["Reverse KL to the teacher"].startswith("KL(q‖p) of k + 1 classes, nats")
    assert captions["Entropy"].endswith("the teacher is dashed, of k + 1 classes: a lower bound")
    assert captions["What is seen of the teacher"].startswith("share of its mass in the k tokens")
    assert "k + 1" not in captions["Top-token agreement"] + captions["Negative log-likelihood"]
    assert any("of these k + 1 classes, lower bounds" in text for text in notes([run]))
    together = trained_together([read_run(whole), run])
    assert together is not None and "KL(p‖q) some of k + 1 classes, nats" in together.curves[1].caption


def test_the_start_is_not_drawn_beside_kls_of_k_and_one_classes(make_run: MakeRun) -> None:
    run = make_run()
    [first, *_], _ = training_curves(read_run(run))
    before = read_run(run).value("before", "rkl")
    write_jsonl(run.train_log_path, [row | {"teacher_mass": 0.5} for row in read_jsonl(run.train_log_path)])
    [second, *_], _ = training_curves(read_run(run))
    assert before is not None and first.svg.count("var(--before)") > second.svg.count("var(--before)")


def test_padding_and_waiting_are_drawn_where_they_are_logged(make_run: MakeRun) -> None:
    run = make_run()
    assert "Padding and waiting" not in {one.title for one in training_curves(read_run(run))[1]}
    rows = [row | {"padding_share": 0.125, "idle_share": 0.25} for row in read_jsonl(run.train_log_path)]
    write_jsonl(run.train_log_path, rows)
    [picture] = [one for one in training_curves(read_run(run))[1] if one.title == "Padding and waiting"]
    assert "waiting from 0.25 to 0.25; padding from 0.125 to 0.125" in picture.alt
