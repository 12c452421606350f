"""The evidence page: which verdicts a claim rests on, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from benchmarks.rows import Row
from drkl.studies.grid import check_grid, pair_of
from drkl.studies.metrics import check_metrics, known_metrics
from drkl.studies.verdicts import Judge
from scripts import choosing_page, evidence_page, measure_pushes, pushes_page
from scripts.choosing_page import CHOICES, Choice
from scripts.evidence_page import CLAIMS, DRKL, PARTS, RKL, Results, Seen, holds, outcome


def task_of(part: str) -> str:
    return "classification" if part == "classes" else "generation"


def verdict(axes: dict[str, Any], baseline: dict[str, Any], what: str, metric: str = "ece") -> dict[str, Any]:
    return {"metric": metric, "axes": axes, "baseline": baseline, "verdict": what, "difference": 0.1,
            "interval": [0.0, 0.2], "prompts_interval": None, "seeds": 3, "exploratory": False}  # fmt: skip


def test_every_claim_and_advice_names_comparisons_that_their_parts_make() -> None:
    parts = {part.name: part.definition for part in PARTS}
    for part, definition in parts.items():
        check_grid(definition)
        check_metrics(definition, task_of(part))
    asked = {
        part: [
            (one.metric.key, one.axes, one.baseline)
            for one in Judge(definition, [], known_metrics(task_of(part))).asked()
        ]
        for part, definition in parts.items()
    }
    for one in (*CLAIMS, *CHOICES):
        for seen in one.seen:
            pair = pair_of(parts[seen.part], seen.cell, seen.against)
            assert (seen.metric, *pair) in asked[seen.part], (one, seen)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.use)
def test_no_verdict_contradicts_an_advice(choice: Choice) -> None:
    results = Results.read()
    assert choice.seen
    for seen in choice.seen:
        assert holds(seen, results.verdict(seen)) != "not held", seen


def test_an_advice_is_shown_with_the_verdicts_it_rests_on_once_one_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [
        Choice("one", "drkl", "why", (Seen("classes", "ece", DRKL, RKL),)),
        Choice("two", "rkl", "why", (Seen("classes", "rkl", DRKL, RKL),)),
    ]
    results = Results({"classes": {"task": "classification", "verdicts": [verdict(DRKL, RKL, "better")]}})
    monkeypatch.setattr(choosing_page, "CHOICES", choices)
    lines = choosing_page.parts(results)["choices"].splitlines()
    assert len(lines) == 3
    shown = "calibration error (ECE): better, +0.1000 [0.0000, +0.2000], 3 seeds"
    assert lines[-1] == f"| one | **drkl** | why | **decided**<br>classes, drkl against rkl, {shown} |"


def test_a_verdict_is_found_by_what_the_claim_names_of_it() -> None:
    scaled = RKL | {"loss.temperature": 1.0, "model": "scaled"}
    rows = [
        verdict(DRKL | {"loss.temperature": 1.0}, scaled, "worse"),
        verdict(DRKL | {"loss.temperature": 1.0}, RKL | {"loss.temperature": 1.0}, "better"),
    ]
    results = Results({"temperature": {"task": "generation", "verdicts": rows}})
    for against, wanted in ((RKL, "better"), (RKL | {"model": "scaled"}, "worse")):
        found = results.verdict(Seen("temperature", "ece", DRKL, against))
        assert found is not None and found["verdict"] == wanted
    assert results.verdict(Seen("temperature", "rkl", DRKL, RKL)) is None
    assert results.verdict(Seen("classes", "ece", DRKL, RKL)) is None


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better", "better"], "held"),
        (["worse", "no difference"], "not held"),
        (["undecided"], "undecided"),
        ([None, None], "not run"),
        (["better", "undecided", "worse", None], "held in 1, not held in 1, undecided in 1, not run in 1"),
    ],
)
def test_a_claim_is_what_its_verdicts_are(verdicts: list[str | None], said: str) -> None:
    seen = Seen("classes", "ece", DRKL, RKL)
    found = [(seen, None if what is None else verdict(DRKL, RKL, what)) for what in verdicts]
    assert outcome(found) == said
    either = Seen("classes", "ece", DRKL, RKL, "better or no difference")
    assert outcome([(either, verdict(DRKL, RKL, "no difference"))]) == "held"


def test_a_trade_off_says_where_both_sides_of_it_are_as_claimed() -> None:
    trade = next(claim for claim in CLAIMS if claim.is_trade)
    closer, varied = verdict(DRKL, RKL, "no difference", "rkl"), verdict(DRKL, RKL, "better", "distinct_2")
    worse = verdict(DRKL, RKL, "worse", "distinct_2")
    for rows, said in (([closer, varied], "instruction"), ([closer, worse], "none"), ([varied], "none")):
        results = Results({"instruction": {"task": "generation", "verdicts": rows}})
        row = next(line for line in evidence_page.claims(results, []).splitlines() if trade.text in line)
        assert f"Closeness by reverse KL and variety both in: {said}." in row


def test_predictions_that_rest_on_known_numbers_are_counted_apart() -> None:
    told = [
        {"text": "As in one earlier run.", "expect": "better", "verdict": "better", "came_true": True},
        {"text": "As the gradients say.", "expect": "better", "verdict": "worse", "came_true": False},
    ]
    results = Results({part.name: {"predictions": []} for part in PARTS} | {"near": {"predictions": told}})
    last = evidence_page.predictions(results).splitlines()[-1]
    assert last.startswith("1 came true (0 of them expected nothing to be decided), 1 did not, 0 are open.")
    assert last.endswith("a seed that had run, 1 came true, 0 did not, 0 are open.")


def test_the_digest_is_what_the_verdicts_are() -> None:
    rows = [verdict(DRKL, RKL, "better", "overconfidence"), verdict(DRKL, RKL, "undecided", "rkl")]
    rows[1]["exploratory"] = True
    results = Results({"instruction": {"task": "generation", "verdicts": rows}})
    lines = choosing_page.digest(results)["digest"].splitlines()
    assert lines[2] == "| far from its teacher, reverse KL | 3 | **better** +0.1000 | undecided +0.100\\* | – | – | – |"
    assert lines[3] == "| far from its teacher, forward KL | 0 | – | – | – | – | – |"
    assert len(lines) == 2 + 2 * len(choosing_page.CASES)


def pushed(part: str, *overshoots: float, objective: str = "rkl") -> list[Row]:
    """A run for each overshoot; its other columns are 1."""
    other = dict.fromkeys(measure_pushes.HEAD, "1")
    names = {"part": part, "objective": objective}
    return [other | names | {"seed": str(seed), "matched_overshoot": str(value)}
            for seed, value in enumerate(overshoots)]  # fmt: skip


@pytest.mark.parametrize(
    ("overshoots", "said"),
    [((0.2, 0.21, 0.22), "held"), ((0.001, 0.0011), "not held"), ((0.0, 0.1), "undecided"), ((0.3,), "held")],
)
def test_the_push_holds_where_its_interval_over_seeds_lies_above_the_bar(
    overshoots: tuple[float, ...], said: str
) -> None:
    outcomes, texts = pushes_page.outcome(pushed("near", *overshoots) + pushed("near", 0.9, 0.9, objective="drkl"))
    assert outcomes == [said] and len(texts) == 1
    assert ("1 seed" if len(overshoots) == 1 else f"{len(overshoots)} seeds") in texts[0]


def test_a_mean_has_half_of_its_t_interval_over_seeds() -> None:
    values = [0.2, 0.25, 0.31]
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert pushes_page.with_spread(values) == pytest.approx((np.mean(values), (high - low) / 2))
    assert pushes_page.show(values, 100, 1) == f"{100 * np.mean(values):.1f} ± {50 * (high - low):.1f}"
    assert pushes_page.show([0.2], 100, 1) == "20.0"


def test_a_run_that_has_its_row_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of_rkl = {"part": "near", "objective": "rkl"}
    monkeypatch.setattr(measure_pushes, "row_of", lambda run, part: of_rkl | {"seed": run.name})
    monkeypatch.setattr(measure_pushes, "measured", lambda run: {"K": f"of {run.name}"})
    found = list(measure_pushes.rows([Path("0"), Path("1")], "near", pushed("near", 0.1)))
    assert found == [of_rkl | {"seed": "1", "K": "of 1"}]
