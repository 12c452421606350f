"""What is decided of a study's cells, against scipy and numpy; and what is said where nothing can be decided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from drkl.evaluation.answers import AnswerTable
from drkl.evaluation.comparison import compare
from drkl.runs import write_yaml
from drkl.studies.cells import Verdict
from drkl.studies.grid import Cell, cells_of
from drkl.studies.result import Study
from tests.studies.made import definition, evaluation, planted, write_cell, write_study

DRKL, RKL, FKL = ({"objective.name": name} for name in ("drkl", "rkl", "fkl"))
FIVE = {"objective.name": ["fkl", "rkl", "drkl"], "run.seed": [0, 1, 2, 3, 4]}
PRIMARY = [{"metric": "rkl", "cell": DRKL, "against": other} for other in (RKL, FKL)]


def row(study: Study, cell: str = "drkl", against: str = "rkl", metric: str = "rkl") -> Verdict:
    wanted = metric, {"objective.name": cell}, {"objective.name": against}
    return next(one for one in study.verdicts if (one.metric, one.axes, one.baseline) == wanted)


def by_seed(study: Study, name: str, metric: str = "rkl") -> np.ndarray:
    return np.array([one.metrics[metric] for one in study.cells if one.axes["objective.name"] == name])


def test_verdicts_are_those_of_the_paired_t_test_and_holm(tmp_path: Path) -> None:
    asked = definition(primary=PRIMARY, axes=FIVE)
    study = Study.load(write_study(tmp_path, asked, planted({"drkl": -0.2, "fkl": 0.5})), prompts=False)
    names = [(one.axes["objective.name"], one.baseline["objective.name"]) for one in study.verdicts]
    assert names == [("drkl", "rkl"), ("drkl", "fkl"), ("fkl", "rkl")]
    assert [one.exploratory for one in study.verdicts] == [False, False, True]
    p = []
    for one in study.verdicts:
        cell, base = (by_seed(study, axes["objective.name"]) for axes in (one.axes, one.baseline))
        test = scipy.stats.ttest_rel(cell, base)
        ends = test.confidence_interval(0.95)
        assert one.interval == pytest.approx((ends.low, ends.high), rel=1e-9)
        assert (one.t, one.p) == pytest.approx((test.statistic, test.pvalue), rel=1e-9)
        assert one.difference == pytest.approx(np.mean(cell - base), rel=1e-9)
        assert one.by_seed == pytest.approx(dict(enumerate(cell - base)), rel=1e-9)
        assert one.seeds == 5 and one.why is None and one.budget_differs == ()
        p.append(test.pvalue)
    low, high = sorted(p[:2])
    holm = {low: 2 * low, high: max(2 * low, high)}
    assert [one.p_holm for one in study.verdicts] == [pytest.approx(holm[p[0]]), pytest.approx(holm[p[1]]), None]
    assert [one.verdict for one in study.verdicts] == ["better", "better", "worse"]
    assert study.verdicts[0].t_needed == pytest.approx(scipy.stats.t.ppf(1 - 0.025 / 2, 4))
    assert study.verdicts[2].t_needed == pytest.approx(scipy.stats.t.ppf(1 - 0.025, 4))


def test_one_and_true_are_two_cells(tmp_path: Path) -> None:
    """Though Python has them equal: a flag and a number of one axis, for instance."""
    axes = {"training.arguments.x": [1, True], "run.seed": [0, 1, 2]}
    asked = definition(axes=axes, baseline={"training.arguments.x": 1})

    def values(cell: Cell) -> dict[str, float]:
        return {"rkl": 1.0 + (cell.axes["training.arguments.x"] is True) + 0.01 * cell.axes["run.seed"] ** 2}

    (verdict,) = Study.load(write_study(tmp_path, asked, values), prompts=False).verdicts
    assert verdict.axes == {"training.arguments.x": True} and verdict.axes["training.arguments.x"] is True
    assert verdict.difference == pytest.approx(1.0) and verdict.seeds == 3


def test_what_is_undecided_says_how_many_seeds_would_decide_it(tmp_path: Path) -> None:
    asked = definition(primary=PRIMARY, axes=FIVE)
    study = Study.load(write_study(tmp_path, asked, planted({"drkl": -0.02, "fkl": 0.5}, 0.05)), prompts=False)
    one = row(study)
    assert one.verdict == "undecided" and one.seeds_needed is not None and one.seeds_needed > 5
    sd = np.std(list(one.by_seed.values()), ddof=1)
    seeds = np.arange(2, 2000)
    decided = abs(one.difference or 0) * np.sqrt(seeds) / sd >= scipy.stats.t.ppf(1 - 0.0125, seeds - 1)
    assert one.seeds_needed == seeds[decided][0]
    assert (row(study, "drkl", "fkl").seeds_needed or 9) <= 5


def test_a_smallest_difference_goes_before_a_direction(tmp_path: Path) -> None:
    asked = definition(primary=PRIMARY, smallest_difference={"rkl": 0.4})
    study = Study.load(write_study(tmp_path, asked, planted({"drkl": -0.2, "fkl": 0.5})), prompts=False)
    assert [one.verdict for one in study.verdicts] == ["no difference", "better", "worse"]


DIRECTIONS: dict[str, tuple[Mapping[str, float], str, float | None]] = {
    # What rkl and drkl have beyond about 1; the verdict; the ideal, where that decides.
    "rkl": ({"drkl": 0.3}, "worse", None),
    "agreement": ({"drkl": 0.3}, "better", None),
    "overconfidence": ({"rkl": -0.5, "drkl": -2.6}, "worse", 0.0),
    "confidence_gap": ({"rkl": 0.4, "drkl": -1.9}, "better", 0.0),
    "entropy": ({"rkl": 0.2, "drkl": 0.6}, "better", 2.0),
    "confidence": ({"rkl": 0.2, "drkl": 0.6}, "worse", 0.5),
    "stronger_tail_share": ({"drkl": 5.0}, "undecided", None),
}


def test_the_metric_says_which_way_is_better(tmp_path: Path) -> None:
    by_metric = {metric: planted(shift, metric=metric) for metric, (shift, _, _) in DIRECTIONS.items()}
    asked = definition(decide=[*DIRECTIONS], axes={"objective.name": ["rkl", "drkl"], "run.seed": [0, 1, 2]})
    write_study(tmp_path, asked, lambda cell: {metric: of(cell)[metric] for metric, of in by_metric.items()})
    study = Study.load(tmp_path, prompts=False)
    for metric, (_, verdict, ideal) in DIRECTIONS.items():
        one, (cell, base) = row(study, metric=metric), (by_seed(study, name, metric) for name in ("drkl", "rkl"))
        assert (metric, one.verdict) == (metric, verdict)
        assert one.difference == pytest.approx(np.mean(cell - base))
        assert one.why == ("The metric has no better side." if metric == "stronger_tail_share" else None)
        assert (one.distance is None) == (ideal is None)
        if one.distance is not None and ideal is not None:
            far = abs(cell - ideal) - abs(base - ideal)
            ends = scipy.stats.ttest_1samp(far, 0).confidence_interval(0.95)
            assert one.distance == (pytest.approx(far.mean()), pytest.approx((ends.low, ends.high)))


def test_a_scaled_student_is_compared_with_a_student(tmp_path: Path) -> None:
    scaled = {"objective.name": "rkl", "model": "scaled"}
    predictions = [{"metric": "ece", "cell": DRKL, "against": scaled, "expect": "worse"}]
    asked = definition(axes=FIVE, decide=["ece", "distinct_2"], baseline=scaled, predictions=predictions)
    values = planted({"drkl": -0.2, "fkl": 0.5}, metric="ece")
    write_yaml(tmp_path / "study.yaml", asked.model_dump(mode="json"))
    for cell in cells_of(asked):
        own = values(cell)
        write_cell(tmp_path, cell, own, made=evaluation(own, scaled={"ece": own["ece"] / 2}))
    study = Study.load(tmp_path)
    pairs = [(one.metric, one.axes["objective.name"], one.baseline) for one in study.verdicts]
    assert pairs == [("ece", name, scaled) for name in ("fkl", "rkl", "drkl")]  # a scaled student writes no answers
    for one in study.verdicts:
        cell, base = by_seed(study, one.axes["objective.name"], "ece"), by_seed(study, "rkl", "ece") / 2
        assert one.difference == pytest.approx(np.mean(cell - base)) and one.verdict == "worse"
        assert one.by_seed == pytest.approx(dict(enumerate(cell - base)))
        assert one.p == pytest.approx(scipy.stats.ttest_rel(cell, base).pvalue)
    assert study.predictions[0].came_true is True
    assert list(study.table()["against"]) == ["rkl, scaled"] * 3
    assert study.to_json()["cells"][0]["scaled"] == pytest.approx({"ece": study.cells[0].metrics["ece"] / 2})


def test_cells_whose_scaled_student_was_not_measured_are_no_pair(tmp_path: Path) -> None:
    asked = definition(axes=FIVE, decide=["ece"], baseline={"objective.name": "rkl", "model": "scaled"})
    study = Study.load(write_study(tmp_path, asked, planted({}, metric="ece")), prompts=False)
    assert study.verdicts[0].seeds == 0
    assert "the baseline has no ece of its scaled student: it is undefined" in str(study.verdicts[0].why)


def test_a_cell_that_failed_or_is_missing_is_left_out_and_counts_in_the_family(tmp_path: Path) -> None:
    asked = definition(primary=PRIMARY, axes=FIVE)
    write_study(tmp_path, asked, planted({"drkl": -0.2, "fkl": 0.5}))
    for seed in range(4):
        (tmp_path / f"cells/fkl-seed{seed}/eval.json").write_text("{")
    (tmp_path / "cells/rkl-seed0/eval.json").write_text("{}")
    study = Study.load(tmp_path, prompts=False)
    assert [one.state for one in study.cells].count("failed") == 5
    one, other = study.verdicts[:2]
    assert (one.seeds, one.verdict, one.why) == (4, "better", "Left out: seed 0: the baseline has failed.")
    assert one.p_holm == pytest.approx(2 * (one.p or 0))  # the other may be smaller once it can be made
    assert (other.seeds, other.verdict, other.p_holm, other.interval, other.t_needed) == (
        1,
        "undecided",
        None,
        None,
        None,
    )
    assert (
        other.why == "A verdict takes 2 seeds or more; there is 1. Left out: seeds 0, 1, 2, 3: the baseline has failed."
    )


def odd(folder: Path, what: Mapping[str, Any]) -> Verdict:
    """The verdict of a study in which drkl's cell of seed 1 is another."""
    asked, values = definition(axes={"objective.name": ["rkl", "drkl"], "run.seed": [0, 1, 2]}), planted({"drkl": -0.2})
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "study.yaml", asked.model_dump(mode="json"))
    for cell in cells_of(asked):
        words = dict(what) if cell.name == "drkl-seed1" else {}
        numbers = values(cell) | words.pop("values", {})
        made = evaluation(numbers, **words.pop("settings")) if "settings" in words else words.pop("made", None)
        write_cell(folder, cell, numbers, made=made, **words)
    return row(Study.load(folder, prompts=False))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"start": "others"}, "the two began from other weights"),
        ({"values": {"rkl": None}}, "the cell has no rkl: it is undefined, infinite or was not measured"),
        ({"settings": {"suites": ["a"]}}, "the two were evaluated with another suites"),
        ({"settings": {"template": "chat"}}, "the two were evaluated with another template"),
    ],
)
def test_cells_that_are_no_pair_are_said(tmp_path: Path, what: Mapping[str, Any], why: str) -> None:
    one = odd(tmp_path, what)
    assert (one.seeds, sorted(one.by_seed)) == (2, [0, 2])
    assert one.why == f"Left out: seed 1: {why}."


def test_other_sampling_matters_to_metrics_of_answers_alone(tmp_path: Path) -> None:
    assert odd(tmp_path, {"settings": {"sampling_temperature": 0.7}}).seeds == 3


def test_other_rows_are_no_pair(tmp_path: Path) -> None:
    made = evaluation({"rkl": 0.9})
    made.lines["heldout"] = made.lines["heldout"][1:]
    assert odd(tmp_path, {"made": made}).why == "Left out: seed 1: the two were evaluated on other rows."


def test_other_budgets_are_said(tmp_path: Path) -> None:
    one = odd(tmp_path, {"steps": 90, "tokens": 5049})
    assert one.budget_differs == ("steps: 90 and 100 (seed 1)",) and one.seeds == 3
    assert odd(tmp_path / "more", {"tokens": 5060}).budget_differs == ("tokens: 5,060 and 5,000 (seed 1)",)


def test_seeds_that_change_nothing_decide_nothing(tmp_path: Path) -> None:
    shift = {"rkl": 1.0, "drkl": 0.8, "fkl": 1.0}
    study = Study.load(
        write_study(tmp_path, definition(primary=PRIMARY), lambda c: {"rkl": shift[c.axes["objective.name"]]}),
        prompts=False,
    )
    for one in study.verdicts:
        assert (one.verdict, one.p_holm) == ("undecided", None)
        assert one.why == "Neither side changes with the seed, so that the seeds replicate nothing."


def test_without_seeds_nothing_is_decided(tmp_path: Path) -> None:
    asked = definition(axes={"objective.name": ["rkl", "drkl"]}, smallest_difference={"rkl": 9.0})
    study = Study.load(write_study(tmp_path, asked, lambda cell: {"rkl": 1.0}), prompts=False)
    (one,) = study.verdicts
    assert (one.difference, one.verdict, one.interval, one.by_seed) == (0.0, "undecided", None, {})
    assert one.why == "The study has no axis run.seed: one run of each kind decides nothing."
    assert any("give run.seed two values" in note for note in study.notes)


def test_predictions_come_true_or_not_once_they_are_decided(tmp_path: Path) -> None:
    def said(cell: Mapping[str, Any], expect: str, against: Any = None) -> dict[str, Any]:
        return {"text": "t", "metric": "rkl", "cell": cell, "against": against or {}, "expect": expect}

    predictions = [
        "words alone",
        said(DRKL, "better"),
        said(FKL, "better"),
        said(FKL, "worse", DRKL),
        said(DRKL, "undecided"),
        {"text": "no verdict", "metric": "rkl", "cell": DRKL},
    ]
    study = Study.load(
        write_study(tmp_path, definition(predictions=predictions), planted({"drkl": -0.2, "fkl": 0.5})), prompts=False
    )
    assert [(one.verdict, one.came_true) for one in study.predictions] == [
        (None, None), ("better", True), ("worse", False), ("worse", True), ("better", False), ("better", None),
    ]  # fmt: skip


@pytest.mark.parametrize(("expect", "missing", "came_true"), [
    ("undecided", False, True), ("better", False, None), ("undecided", True, None),
])  # fmt: skip
def test_a_prediction_of_what_is_open_waits(tmp_path: Path, expect: str, missing: bool, came_true: bool | None) -> None:
    foretold = {"text": "t", "metric": "rkl", "cell": DRKL, "expect": expect}
    write_study(tmp_path, definition(predictions=[foretold]), planted({}))
    if missing:
        (tmp_path / "cells/drkl-seed2").rename(tmp_path / "gone")
    (one,) = Study.load(tmp_path, prompts=False).predictions
    assert (one.verdict, one.came_true) == ("undecided", came_true)


def test_the_bootstrap_over_prompts_is_of_the_mean_over_seeds(tmp_path: Path) -> None:
    study = Study.load(write_study(tmp_path, definition(), planted({"drkl": -0.2})))
    weights = np.random.default_rng(0).multinomial(8, [1 / 8] * 8, size=1000)
    by_row = []
    for seed in range(3):
        sums = []
        for name in ("drkl", "rkl"):
            run = next(one for one in study.cells if one.name == f"{name}-seed{seed}").evaluation
            assert run is not None
            sums.append([line["sums"]["rkl"] for line in run.heldout if line["model"] == "student"])
        by_row.append((np.array(sums[0]) - np.array(sums[1])) / 5)  # five tokens a row
    expected = np.percentile(weights @ np.mean(by_row, 0) / 8, (2.5, 97.5))
    assert row(study).prompts_interval == pytest.approx(tuple(expected), rel=1e-9)


def test_metrics_of_answers_and_those_that_follow_from_them(tmp_path: Path) -> None:
    keys = ["rouge_l", "distinct_2", "rouge_l_best_when_as_varied"]
    asked = definition(decide=keys, axes={"objective.name": ["rkl", "drkl"], "run.seed": [0, 1]})

    def made(cell: Cell) -> Any:
        seed = 10 * cell.axes["run.seed"] + (cell.axes["objective.name"] == "drkl")
        whole = evaluation({"rkl": 1.0}, seed, temperatures=(0.5, 1.0, 1.4))
        for model in ("student", "teacher"):
            lines = [line for line in whole.samples if line["model"] == model and line["sampling_temperature"] == 1]
            whole.numbers.values[model] |= AnswerTable.from_samples(lines, 20).compute()
        return whole

    write_yaml(tmp_path / "study.yaml", asked.model_dump(mode="json"))
    for cell in cells_of(asked):
        write_cell(tmp_path, cell, {}, made=made(cell))
    study = Study.load(tmp_path)
    runs = {one.name: one.evaluation for one in study.cells}
    first, second = runs["rkl-seed0"], runs["drkl-seed0"]
    assert first is not None and second is not None
    table = next(one for one in compare(first, second).tables if one.sampling_temperature == 1.0)
    by_key = {difference.metric.key: difference for difference in table.differences}
    for key in keys:
        one = row(study, metric=key)
        assert one.by_seed[0] == pytest.approx(by_key[key].difference, abs=1e-9)
        assert one.prompts_interval is not None and one.seeds == 2
