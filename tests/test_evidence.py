"""The evidence page: which verdicts a claim rests on, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from drkl.studies.grid import check_grid, pair_of
from drkl.studies.metrics import check_metrics, known_metrics
from drkl.studies.verdicts import Judge
from scripts import choosing_page
from scripts.choosing_page import CHOICES, Choice
from scripts.evidence_page import CLAIMS, DRKL, PARTS, RKL, Results, Seen, holds, outcome


def task_of(part: str) -> str:
    return "classification" if part == "classes" else "generation"


def verdict(axes: dict[str, Any], baseline: dict[str, Any], what: str, metric: str = "ece") -> dict[str, Any]:
    return {"metric": metric, "axes": axes, "baseline": baseline, "verdict": what, "difference": 0.1,
            "interval": [0.0, 0.2], "prompts_interval": None, "seeds": 3}  # fmt: skip


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


def test_the_digest_is_what_the_verdicts_are() -> None:
    rows = [verdict(DRKL, RKL, "better", "overconfidence"), verdict(DRKL, RKL, "undecided", "rkl")]
    results = Results({"instruction": {"task": "generation", "verdicts": rows}})
    lines = choosing_page.digest(results)["digest"].splitlines()
    assert lines[2] == "| far from its teacher, reverse KL | 3 | **better** +0.1000 | undecided +0.100 | – | – | – |"
    assert lines[3] == "| far from its teacher, forward KL | 0 | – | – | – | – | – |"
    assert len(lines) == 2 + 2 * len(choosing_page.CASES)
