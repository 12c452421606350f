"""An analysis of made-up logits: every number against its equation, every answer where it is known."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logit, softmax

from drkl.analysis.analyze import _position_columns, named_objectives
from drkl.analysis.ratios import Ratios
from drkl.analysis.result import Analysis
from drkl.analysis.states import MATCHED, evenly
from drkl.analysis.tables import TARGET_EDGES, overshoot
from drkl.errors import DrklError
from drkl.evaluation.findings import SHARED
from drkl.objectives import make_objective
from drkl.reporting import analysis as shown_analysis
from drkl.reporting.analysis import write_figures
from drkl.runs import read_json, write_json
from tests.analysis import reference
from tests.analysis.made_states import PER_ROW, ROWS, VOCAB, analysed, teacher_logits, with_other_tails
from tests.rounding import rounding


@pytest.fixture(scope="module")
def states() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    teacher, labels, generator = teacher_logits()
    teacher[::5] *= 4  # so that some are all but certain
    student = 0.8 * teacher + generator.normal(size=teacher.shape)
    student[::4] = with_other_tails(teacher, generator)[::4]  # some matched targets
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_observed_is_what_the_equations_say(
    states: tuple[np.ndarray, np.ndarray, np.ndarray], temperature: float
) -> None:
    student, teacher, labels = states
    observed, analysis = analysed(student, teacher, labels, positions=48, temperature=temperature)
    said = {finding.id: finding.text.startswith("At temperature 2: ") for finding in analysis.findings}
    assert said == {name: temperature == 2 and name not in SHARED for name in said}
    top = teacher.argmax(-1)
    known = reference.numbers(student, teacher, top, temperature)
    at = observed.columns
    for ours, theirs in (("q_t", "q_t"), ("p_t", "p_t"), ("rest", "rest_q"), ("B", "B"), ("K", "K"), ("D", "D")):
        np.testing.assert_allclose(at[ours], known[theirs], rtol=1e-9, atol=1e-12)
    slope = np.linalg.norm(known["tail_q"] * (known["log_ratio"] - known["K"][:, None]), axis=-1) / temperature
    np.testing.assert_allclose(at["tail_slope"], slope, rtol=1e-9, atol=1e-12)
    q, p = softmax(student, -1), softmax(teacher, -1)
    own = q.argmax(-1)
    rows = np.arange(len(labels))
    np.testing.assert_allclose(at["confidence"], q.max(-1))
    np.testing.assert_allclose(at["teacher_confidence"], p.max(-1))
    np.testing.assert_allclose(at["target_gap"], q[rows, top] - p[rows, top], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(at["overconfidence"], q[rows, own] - p[rows, own], rtol=1e-9, atol=1e-14)
    assert (at["correct"] == (own == labels)).all() and (at["teacher_correct"] == (top == labels)).all()
    assert (observed.matched == (np.abs(known["D"]) <= MATCHED)).all() and observed.matched.sum() >= 80

    assert observed.sampled.sum() == 48 and (~observed.sampled).sum() == 24
    assert observed.matched[observed.at[~observed.sampled]].all()
    pick = {name: values[observed.at] for name, values in known.items()}
    force = pick["q_t"] * pick["rest_q"] / temperature
    pushes = observed.pushes["rkl"]
    np.testing.assert_allclose(pushes.target_push, force * pick["D"], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(pushes.tail_push, -force * pick["K"], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(pushes.value, pick["B"] + pick["rest_q"] * pick["K"], rtol=1e-9)
    ours = observed.pushes["drkl, γ 0.5"]
    np.testing.assert_allclose(ours.target_push, force * pick["D"], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(ours.tail_push, 0, atol=1e-12)
    np.testing.assert_allclose(ours.tail_force, 0.5 * slope[observed.at], rtol=1e-7)
    np.testing.assert_allclose(ours.value, pick["B"] + 0.5 * pick["K"], rtol=1e-9)
    # The label is the target of `ce`; its push is still that on the teacher's top token.
    q = softmax(student / temperature, -1)[observed.at]
    there, chosen = top[observed.at], labels[observed.at]
    expected = (q[np.arange(len(q)), there] - (there == chosen)) / temperature
    np.testing.assert_allclose(observed.pushes["ce"].target_push, expected, rtol=1e-7, atol=1e-12)


def test_the_tables_are_sums_over_positions(states: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    student, teacher, labels = states
    gamma = 0.3
    observed, analysis = analysed(student, teacher, labels, positions=1000, gamma=gamma)
    at, tables = observed.columns, analysis.tables
    rkl, drkl, sure = at["B"] + at["rest"] * at["K"], at["B"] + gamma * at["K"], at["p_t"] > 0.99
    matched = np.abs(at["D"]) <= MATCHED
    force = at["q_t"] * at["rest"] * at["K"]
    expected = {
        "confidence": at["confidence"].mean(),
        "excess": (at["confidence"] - at["correct"] - at["teacher_confidence"] + at["teacher_correct"]).mean(),
        "overconfidence": at["overconfidence"].mean(),
        "calibration_gap": (at["confidence"] - at["correct"]).mean(),
        "target_gap": (at["q_t"] - at["p_t"]).mean(),
        "target_above": (at["target_gap"] > 0).mean(),
        "tail_share": (at["rest"] * at["K"]).sum() / rkl.sum(),
        "matched": matched.mean(),
        "matched_force": force[matched].mean(),
        "matched_outweighs": (at["K"] > np.abs(at["D"]))[matched].mean(),
        "matched_overshoot": (expit(logit(at["p_t"]) + at["K"]) - at["p_t"])[matched].mean(),
        "stronger": (1 - at["q_t"] < gamma).mean(),
        "weaker": (1 - at["q_t"] > gamma).mean(),
        "tail_force_ratio": gamma * at["tail_slope"].sum() / (at["rest"] * at["tail_slope"]).sum(),
        "sure": sure.mean(),
        "sure_rkl": rkl[sure].sum() / rkl.sum(),
        "sure_drkl": drkl[sure].sum() / drkl.sum(),
    }
    for name, value in expected.items():
        estimate = analysis[name]
        assert estimate.value == pytest.approx(value, rel=1e-9), name
        assert estimate.interval is not None
        low, high = estimate.interval
        assert low <= value <= high and (low < high or value == 1), name

    edges = np.array(TARGET_EDGES)
    assert sum(row["positions"] for row in tables["by_target"]) == len(labels)
    for row, low, high in zip(tables["by_target"], edges[:-1], edges[1:], strict=True):
        here = (at["p_t"] >= low) & ((at["p_t"] < high) | (high == 1))
        assert (row["positions"], row["matched"]) == (here.sum(), (here & matched).sum())
        if (here & matched).any():
            assert row["force"]["value"] == pytest.approx(force[here & matched].mean())
            assert row["K"]["value"] == pytest.approx(at["K"][here & matched].mean())
        else:
            assert row["force"] == {"value": None, "interval": None}
    for name in ("B", "K", "D"):
        one = tables["distributions"][name]
        assert sum(one["histogram"]["positions"]) == len(labels) and one["infinite"] == 0
        assert one["quantiles"]["0.5"] == pytest.approx(np.median(at[name]))
    for row in tables["gammas"]:
        assert row["stronger"] == pytest.approx((at["rest"] < row["gamma"]).mean())
    gaps = {row["objective"]: row["closed_form_gap"] for row in tables["objectives"]}
    assert all(gap < 1e-12 for gap in gaps.values())
    by_name = {row["objective"]: row for row in tables["objectives"]}
    assert list(by_name) == ["rkl", "fkl", "drkl, γ 0.5", "ce", "srkl", "drkl@student"]
    assert by_name["rkl"]["matched_tail_push"]["value"] == pytest.approx(-force[matched].mean(), rel=1e-6)
    assert by_name["rkl"]["sure"]["value"] == pytest.approx(expected["sure_rkl"], rel=1e-6)
    assert by_name["rkl"]["value"]["value"] == pytest.approx(rkl.mean(), rel=1e-9)
    assert abs(by_name["drkl@student"]["matched_tail_push"]["value"]) < 1e-12
    confidence = np.array(tables["reliability"]["student"]["confidence"], dtype=float)
    counts = np.array(tables["reliability"]["student"]["tokens"])
    assert np.nansum(confidence * counts) == pytest.approx(at["confidence"].sum())


@pytest.mark.parametrize("p_t", [1e-6, 0.2, 0.7, 1 - 1e-9])
@pytest.mark.parametrize("K", [0.0, 1e-9, 0.4, 3.0])
def test_reverse_kl_comes_to_rest_there(p_t: float, K: float) -> None:
    # d/dq of B + (1-q) K with the tail held fixed.
    def slope(log_odds: float) -> float:
        return log_odds - math.log(p_t / (1 - p_t)) - K

    start = math.log(p_t / (1 - p_t))
    rest = brentq(slope, start - 1, start + 5, xtol=1e-13)
    above = overshoot(np.array([p_t]), np.array([K]))[0]
    assert above == pytest.approx(expit(rest) - p_t, rel=1e-6, abs=rounding(0))
    assert overshoot(np.array([p_t]), np.array([np.inf]))[0] == pytest.approx(1 - p_t, rel=1e-6)


def answers(analysis: Analysis) -> dict[str, str]:
    return {finding.id: finding.answer for finding in analysis.findings}


def analysis_of(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> Analysis:
    return analysed(student, teacher, labels, positions=8)[1]


def text(analysis: Analysis, id: str) -> str:
    finding = analysis.finding(id)
    assert finding is not None
    return finding.text


def test_a_student_that_was_made_overconfident_is_called_so() -> None:
    teacher, labels, _ = teacher_logits()
    said = answers(analysis_of(1.8 * teacher, teacher, labels))
    assert (said["overconfident_by_teacher"], said["overconfident_by_data"]) == ("yes", "yes")
    # Among many tokens that are all unlikely, too.
    flat, labels, _ = teacher_logits(0.1)
    assert answers(analysis_of(3 * flat, flat, labels))["overconfident_by_teacher"] == "yes"


def test_a_calibrated_student_is_not() -> None:
    teacher, labels, _ = teacher_logits()
    said = answers(analysis_of(teacher, teacher, labels))
    assert (said["overconfident_by_teacher"], said["pushed_when_matched"]) == ("no", "no")
    assert said["overconfident_by_data"] != "yes"
    underconfident = analysis_of(0.6 * teacher, teacher, labels)
    said = answers(underconfident)
    assert (said["overconfident_by_teacher"], said["overconfident_by_data"]) == ("no", "no")
    assert "less probability than its teacher" in text(underconfident, "overconfident_by_teacher")
    # As overconfident as its teacher: by the data, not by its teacher.
    said = answers(analysis_of(3 * teacher, 3 * teacher, labels))
    assert (said["overconfident_by_teacher"], said["overconfident_by_data"]) == ("no", "yes")


def test_a_matched_target_over_another_tail_is_pushed() -> None:
    teacher, labels, generator = teacher_logits(1.0)
    student = with_other_tails(teacher, generator)
    observed, analysis = analysed(student, teacher, labels, positions=64)
    assert observed.matched.all() and np.abs(observed.columns["D"]).max() < 1e-9
    assert answers(analysis)["pushed_when_matched"] == "yes" and analysis["matched"].value == 1
    assert answers(analysis)["tail_dominates"] == "yes"  # the target adds nothing
    pushes = {row["objective"]: row["tail_push"]["value"] for row in analysis.tables["objectives"]}
    assert pushes["rkl"] < -0.01 and abs(pushes["drkl, γ 0.5"]) < 1e-12 and abs(pushes["fkl"]) < 1e-12


def test_too_sure_of_another_token_than_the_target() -> None:
    teacher, labels, _ = teacher_logits(1.0)
    rows, other = np.arange(len(teacher)), teacher.argsort(-1)[:, -2]
    student = teacher.copy()
    student[rows, other] += 3.0
    analysis = analysis_of(student, teacher, labels)
    said = answers(analysis)
    assert (said["overconfident_by_teacher"], said["target_too_high"]) == ("yes", "no")
    assert "overconfident about other tokens" in text(analysis, "target_too_high")
    assert answers(analysis_of(1.8 * teacher, teacher, labels))["target_too_high"] == "yes"


def test_the_two_yardsticks_may_disagree() -> None:
    teacher, labels, _ = teacher_logits()
    # More confident than its teacher, and right to be: it is not confident enough yet.
    said = answers(analysis_of(0.6 * teacher, 0.3 * teacher, labels))
    assert (said["overconfident_by_teacher"], said["overconfident_by_data"]) == ("yes", "no")


def test_few_rows_do_not_decide() -> None:
    teacher, labels, generator = teacher_logits()
    student = teacher + generator.normal(size=teacher.shape)
    few = 4 * PER_ROW
    analysis = analysis_of(student[:few], teacher[:few], labels[:few])
    assert set(answers(analysis).values()) == {"undecided"}
    assert all("ewer than 5 rows decide nothing." in finding.text for finding in analysis.findings)
    none_match = analysis_of(teacher + 9 * np.eye(VOCAB)[teacher.argmax(-1)], teacher, labels)
    assert answers(none_match)["pushed_when_matched"] == "undecided"


def test_ratios_are_over_rows() -> None:
    row = np.array([0, 0, 1, 2, 3])
    ratios = Ratios(row, 4)
    ratios.mean("mean", np.array([1.0, 3.0, 5.0, 7.0, 100.0]), row < 3)
    ratios.mean("none", np.ones(5), row > 7)
    ratios.mean("infinite", np.array([1.0, np.inf, 0.0, 0.0, 0.0]))
    got = ratios.compute(0)
    assert got["mean"]["value"] == 4 and got["mean"]["interval"] is None  # of too few rows
    assert got["none"] == {"value": None, "interval": None} == got["infinite"]
    many = Ratios(np.arange(20), 20)
    many.ratio("share", np.ones(20), np.where(np.arange(20) == 3, np.inf, 1.0))
    many.mean("one", np.full(20, 7.0), np.arange(20) == 3)  # most resamples miss it
    many.mean("four", np.arange(20.0), np.arange(20) < 4)  # 1 % of them do
    got = many.compute(0)
    assert got["share"] == {"value": None, "interval": None}  # no share of what is infinite
    assert got["one"] == {"value": 7.0, "interval": None}
    assert got["four"]["value"] == 1.5 and 0 <= got["four"]["interval"][0] < 1.5 < got["four"]["interval"][1] <= 3
    whole = Ratios(np.arange(50), 50)
    values = np.random.default_rng(0).normal(size=50)
    whole.mean("x", values)
    low, high = whole.compute(0)["x"]["interval"]
    error = values.std() / math.sqrt(50)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_a_token_that_only_the_teacher_excludes_makes_k_infinite(
    states: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    student, teacher, labels = (values.copy() for values in states)
    place = np.argmin(teacher[0])
    teacher[0, place] = -np.inf
    observed, analysis = analysed(student, teacher, labels, positions=20)
    assert observed.columns["K"][0] == np.inf and analysis.tables["distributions"]["K"]["infinite"] == 1
    assert analysis["K"] == (None, None) == analysis["sure_drkl"]
    assert "K is infinite at 1 of the positions" in text(analysis, "tail_dominates")
    said = answers(analysis)
    assert said["sure_positions_dominate"] == said["tail_dominates"] == "undecided"
    q = log_softmax(student[1], -1)
    assert np.isfinite(q).all() and analysis["confidence"].value is not None
    assert json.dumps(analysis.to_json(), allow_nan=False)


def test_evenly() -> None:
    assert evenly(np.arange(5), 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly(np.arange(100), 3).tolist() == [0, 50, 99] or evenly(np.arange(100), 3).tolist() == [0, 49, 99]
    assert len(set(evenly(np.arange(7), 6).tolist())) == 6


def test_the_runs_own_objective_is_named_once() -> None:
    assert list(named_objectives(["rkl", "drkl"], own=make_objective("drkl"))) == ["rkl", "drkl, γ 0.5"]
    own = make_objective("drkl", skew=0.1)
    assert next(iter(named_objectives(["rkl"], own=own).items())) == ("this run's drkl", own)
    with pytest.raises(DrklError, match="Did you mean 'rkl'"):
        named_objectives(["rkll"])


def test_a_gamma_reaches_every_objective_that_names_none() -> None:
    specs = ["rkl", "drkl", "drkl:0.7", "rkl+gjs", "drkl@student", "drkl@floor", "drkl~0.1", "srkl+srkl", "dkd"]
    found = named_objectives(specs, gamma=0.2)
    assert list(found) == [
        "rkl", "drkl, γ 0.2", "drkl, γ 0.7", "rkl+gjs, γ 0.2", "drkl@student", "drkl@floor, γ 0.2", "drkl~0.1, γ 0.2",
        "srkl+srkl, γ 0.2", "dkd",
    ]  # fmt: skip
    assert found["drkl~0.1, γ 0.2"] == make_objective("drkl", skew=0.1, gamma=0.2)


def test_a_line_for_each_position(states: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    observed, analysis = analysed(*states, positions=4)
    columns = _position_columns(observed, [f"={i}" for i in range(ROWS)])
    dataclasses.replace(analysis, positions=columns).save(tmp_path)
    with (tmp_path / "analysis" / "positions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == ROWS * PER_ROW and lines[PER_ROW]["row_id"] == "'=1"  # no spreadsheet runs it
    at = observed.columns
    assert float(lines[9]["K"]) == pytest.approx(at["K"][9], rel=1e-5)
    assert float(lines[9]["rkl_tail_push"]) == pytest.approx(-(at["q_t"] * at["rest"] * at["K"])[9], rel=1e-5)
    assert float(lines[9]["rkl_target_push"]) == pytest.approx((at["q_t"] * at["rest"] * at["D"])[9], rel=1e-5)


def test_an_analysis_is_read_as_it_was_saved(states: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    observed, made = analysed(*states, positions=4)
    made = dataclasses.replace(made, positions=_position_columns(observed, [str(i) for i in range(ROWS)]))
    loaded = Analysis.load(made.save(tmp_path))
    written = read_json(tmp_path / "analysis.json")
    assert set(written.pop("files")) == {"positions.csv"} and written.pop("checksum")
    assert loaded.to_json() == written and loaded.findings == made.findings
    assert loaded["K"] == made["K"] and list(loaded.positions) == list(made.positions)
    np.testing.assert_allclose(loaded.positions["K"], observed.columns["K"], rtol=1e-5)
    assert loaded.positions["label"].tolist() == observed.labels.tolist()
    with pytest.raises(DrklError, match=r"has no mean 'KK'\. Did you mean 'K'"):
        loaded["KK"]

    lines = (tmp_path / "analysis" / "positions.csv").read_text()
    (tmp_path / "analysis" / "positions.csv").write_text(lines.replace("1", "2", 1))
    with pytest.raises(DrklError, match=r"positions\.csv has another content than was written\); run it again"):
        Analysis.load(tmp_path)
    (tmp_path / "analysis" / "positions.csv").write_text(lines)

    # The format before: no findings, another name.
    content = json.loads(json.dumps(loaded.to_json()))
    for key in ("format", "findings"):
        del content[key]
    content["totals"]["own_gap"] = content["totals"].pop("overconfidence")
    write_json(tmp_path / "analysis.json", {"headline": "Yes", "diagnosis": {}, **content})
    old = Analysis.load(tmp_path)
    assert old.findings == loaded.findings and old["overconfidence"] == loaded["overconfidence"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no analysis.json; `drkl analyze"),
        ([], "holds a list; expected an object"),
        ({"format": 3}, "has format 3, and this drkl reads 2 and the one before"),
        ({"format": 2, "findings": []}, r"is not what `drkl analyze` writes \(KeyError: 'settings'\); run it again"),
    ],
)
def test_files_that_are_no_analysis(tmp_path: Path, content: Any, message: str) -> None:
    if content is not None:
        write_json(tmp_path / "analysis.json", content)
    with pytest.raises(DrklError, match=message):
        Analysis.load(tmp_path)


def test_what_has_no_figure_now_has_none(
    states: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_analysis, "svg_text", lambda figure: "<svg></svg>")
    _, teacher, labels = states
    matched = analysis_of(teacher, teacher, labels)
    drawn = {path.name for path in write_figures(matched.to_json(), tmp_path)}
    (tmp_path / "mine.svg").write_text("kept")
    far = analysis_of(teacher + 9 * np.eye(VOCAB)[teacher.argmax(-1)], teacher, labels)
    again = {path.name for path in write_figures(far.to_json(), tmp_path)}
    assert drawn - again == {"push.svg", "rest.svg"} and not again - drawn
    assert {path.name for path in tmp_path.iterdir()} == again | {"mine.svg"}
