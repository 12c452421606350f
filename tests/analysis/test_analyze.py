"""What `drkl analyze` finds in made-up states: every number against its equation, every answer where it is known."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logit, softmax

from drkl.analysis.command import named_objectives, positions_csv
from drkl.analysis.diagnosis import decide
from drkl.analysis.ratios import Ratios
from drkl.analysis.states import MATCHED, evenly
from drkl.analysis.tables import TARGET_EDGES, overshoot
from drkl.errors import DrklError
from drkl.objectives import make_objective
from drkl.reporting import analysis as shown_analysis
from drkl.reporting.analysis import section, write_figures
from drkl.reporting.exports import as_csv, as_markdown
from drkl.reporting.html import write_report
from drkl.reporting.record import open_run, read_run
from drkl.runs import read_json, write_json
from tests.analysis import reference
from tests.analysis.made_states import PER_ROW, ROWS, VOCAB, found, teacher_logits, with_other_tails
from tests.reporting.conftest import write_pair, write_run
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
    observed, tables = found(student, teacher, labels, positions=48, temperature=temperature)
    said = {name: one["text"].startswith("At temperature 2: ") for name, one in tables["diagnosis"].items()}
    assert said == {name: temperature == 2 and name not in ("overconfident", "target") for name in said}
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
    np.testing.assert_allclose(at["own_gap"], q[rows, own] - p[rows, own], rtol=1e-9, atol=1e-14)
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
    observed, tables = found(student, teacher, labels, positions=1000, gamma=gamma)
    at = observed.columns
    rkl, drkl, sure = at["B"] + at["rest"] * at["K"], at["B"] + gamma * at["K"], at["p_t"] > 0.99
    matched = np.abs(at["D"]) <= MATCHED
    force = at["q_t"] * at["rest"] * at["K"]
    expected = {
        "confidence": at["confidence"].mean(),
        "excess": (at["confidence"] - at["correct"] - at["teacher_confidence"] + at["teacher_correct"]).mean(),
        "own_gap": at["own_gap"].mean(),
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
        one = tables["totals"][name]
        assert one["value"] == pytest.approx(value, rel=1e-9), name
        low, high = one["interval"]
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
    assert gaps["srkl"] is None and all(gap < 1e-12 for name, gap in gaps.items() if name != "srkl")
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


def answers(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    _, tables = found(student, teacher, labels, positions=8)
    return {name: one["answer"] for name, one in tables["diagnosis"].items()} | {"headline": tables["headline"]}


def test_a_student_that_was_made_overconfident_is_called_so() -> None:
    teacher, labels, _ = teacher_logits()
    said = answers(1.8 * teacher, teacher, labels)
    assert said["overconfident"] == "yes" and said["headline"].startswith("Yes: the student is overconfident")
    # Among many tokens that are all unlikely, too.
    flat, labels, _ = teacher_logits(0.1)
    assert answers(3 * flat, flat, labels)["overconfident"] == "yes"


def test_a_calibrated_student_is_not() -> None:
    teacher, labels, _ = teacher_logits()
    said = answers(teacher, teacher, labels)
    assert (said["overconfident"], said["pushed"]) == ("no", "no")
    assert said["headline"].startswith("No: the student is not overconfident")
    said = answers(0.6 * teacher, teacher, labels)
    assert said["overconfident"] == "no"
    _, tables = found(0.6 * teacher, teacher, labels, positions=8)
    assert "It is less sure than its teacher" in tables["diagnosis"]["overconfident"]["text"]
    said = answers(3 * teacher, 3 * teacher, labels)
    assert said["headline"].startswith("No: the student is not overconfident beyond what its teacher is, and")


def test_a_matched_target_over_another_tail_is_pushed() -> None:
    teacher, labels, generator = teacher_logits(1.0)
    student = with_other_tails(teacher, generator)
    observed, tables = found(student, teacher, labels, positions=64)
    assert observed.matched.all() and np.abs(observed.columns["D"]).max() < 1e-9
    pushed = tables["diagnosis"]["pushed"]
    assert pushed["answer"] == "yes" and pushed["numbers"]["matched"]["value"] == 1
    assert tables["diagnosis"]["tail"]["answer"] == "yes"  # the target adds nothing
    pushes = {row["objective"]: row["tail_push"]["value"] for row in tables["objectives"]}
    assert pushes["rkl"] < -0.01 and abs(pushes["drkl, γ 0.5"]) < 1e-12 and abs(pushes["fkl"]) < 1e-12


def test_too_sure_of_another_token_than_the_target() -> None:
    teacher, labels, _ = teacher_logits(1.0)
    rows, other = np.arange(len(teacher)), teacher.argsort(-1)[:, -2]
    student = teacher.copy()
    student[rows, other] += 3.0
    _, tables = found(student, teacher, labels, positions=8)
    said = {name: one["answer"] for name, one in tables["diagnosis"].items()}
    assert (said["overconfident"], said["target"]) == ("yes", "no")
    assert "it is so of other tokens" in tables["diagnosis"]["target"]["text"]
    assert answers(1.8 * teacher, teacher, labels)["target"] == "yes"


def test_the_two_yardsticks_may_disagree() -> None:
    teacher, labels, _ = teacher_logits()
    said = answers(0.6 * teacher, 0.3 * teacher, labels)  # surer than its teacher, and right to be: not sure enough yet
    assert said["overconfident"] == "partly" and said["headline"].startswith(
        "In part: the student is overconfident by its teacher, not by the data"
    )


def test_few_rows_do_not_decide() -> None:
    teacher, labels, generator = teacher_logits()
    student = teacher + generator.normal(size=teacher.shape)
    few = 4 * PER_ROW
    _, tables = found(student[:few], teacher[:few], labels[:few], positions=8)
    assert {one["answer"] for one in tables["diagnosis"].values()} == {"undecided"}
    assert all(one["text"].endswith("Fewer than 5 rows decide nothing.") for one in tables["diagnosis"].values())
    assert tables["headline"].startswith("Undecided")
    assert (
        answers(teacher + 9 * np.eye(VOCAB)[teacher.argmax(-1)], teacher, labels)["pushed"] == "undecided"
    )  # none match


@pytest.mark.parametrize(
    ("value", "interval", "answer"),
    [(0.2, [0.1, 0.3], "yes"), (0.2, [0.0, 0.3], "undecided"), (0.0, [-0.1, 0.05], "no"), (0.05, [0.05, 0.05], "no"),
     (None, None, "undecided"), (0.9, None, "undecided")],
)  # fmt: skip
def test_decide(value: float | None, interval: list[float] | None, answer: str) -> None:
    assert decide({"value": value, "interval": interval}, 0.05) == answer


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
    observed, tables = found(student, teacher, labels, positions=20)
    assert observed.columns["K"][0] == np.inf and tables["distributions"]["K"]["infinite"] == 1
    assert tables["totals"]["K"] == {"value": None, "interval": None} == tables["totals"]["sure_drkl"]
    assert "K is infinite at 1 of the positions" in tables["diagnosis"]["tail"]["text"]
    assert tables["diagnosis"]["sure"]["answer"] == tables["diagnosis"]["tail"]["answer"] == "undecided"
    q = log_softmax(student[1], -1)
    assert np.isfinite(q).all() and tables["totals"]["confidence"]["value"] is not None


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
    for spec in ("rkl~0.1", "rkl+gjs~0.1"):
        with pytest.raises(DrklError, match="has no skew; drkl, srkl and sfkl have"):
            named_objectives([spec])
    with pytest.raises(DrklError, match=r"'1\.\.2' is no number; expected a skew, as in drkl~0.1"):
        named_objectives(["drkl~1..2"])


def test_a_line_for_each_position(states: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    observed, _ = found(*states, positions=4)
    lines = list(csv.DictReader(io.StringIO(positions_csv(observed, [f"={i}" for i in range(ROWS)]))))
    assert len(lines) == ROWS * PER_ROW and lines[PER_ROW]["row_id"] == "'=1"  # no spreadsheet runs it
    at = observed.columns
    assert float(lines[9]["K"]) == pytest.approx(at["K"][9], rel=1e-5)
    assert float(lines[9]["rkl_tail_push"]) == pytest.approx(-(at["q_t"] * at["rest"] * at["K"])[9], rel=1e-5)
    assert float(lines[9]["rkl_target_push"]) == pytest.approx((at["q_t"] * at["rest"] * at["D"])[9], rel=1e-5)


def test_what_is_read_from_the_file_stays_text_on_the_page(
    states: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    _, tables = found(*states, positions=8)
    tables["headline"] = tables["objectives"][0]["objective"] = "<script>alert(1)</script>"
    tables["diagnosis"]["tail"]["text"] = "</style><script>\x00"
    tables["settings"] |= {"models": {"teacher": "<b>t", "student": "s"}, "command": ["drkl", "analyze"]}
    write_json(tmp_path / "analysis.json", tables)
    page = write_report(open_run(tmp_path)).read_text()
    assert "<script>alert" not in page and "</style><script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>t" not in page


@pytest.fixture(scope="module")
def tables(states: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Any]:
    """An analysis as its file holds it."""
    _, made = found(*states, positions=8)
    made["settings"] |= {"models": {"teacher": "org/teacher", "student": "models/small"}}
    return made


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their drawing, which is what takes the time."""
    monkeypatch.setattr(shown_analysis, "to_svg", lambda figure, name, alt: Markup("<svg></svg>"))


@pytest.mark.usefixtures("sketchy")
def test_the_page_says_whose_analysis_it_shows(tables: dict[str, Any], tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "pair")
    write_json(pair.analysis_path, tables)
    shown = section([read_run(pair)])
    assert shown is not None and shown.notice == "" and shown.others == []
    assert shown.note.startswith("models/small beside org/teacher: 320 positions of 40 rows")
    tables = tables | {"settings": tables["settings"] | {"models": {"teacher": "org/teacher", "student": "another"}}}
    write_json(pair.analysis_path, tables)
    shown = section([read_run(pair)])
    assert shown is not None and shown.notice.startswith("This analysis is of other models than the evaluation")

    run = write_run(tmp_path / "run")
    assert section([read_run(run)]) is None
    finished = {"finished": "2026-01-02T10:00:00+00:00"}
    write_json(run.analysis_path, tables | {"timing": finished})
    for trained, stale in (("2026-01-02T09:00:00+00:00", False), ("2026-01-02T11:00:00+00:00", True)):
        write_json(run.env_path, read_json(run.env_path) | {"finished": trained})
        shown = section([read_run(run), read_run(pair)])
        assert shown is not None and shown.notice.startswith("The student was trained anew") == stale
        assert [headline for _, headline in shown.others] == [tables["headline"]] * 2
    text = as_markdown([read_run(run), read_run(pair)])
    assert "The student was trained anew" in text and text.count("## Does reverse KL make it too sure?") == 1


@pytest.mark.usefixtures("sketchy")
def test_the_csv_has_its_numbers(tables: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "analysis.json", tables)
    lines = list(csv.DictReader(io.StringIO(as_csv([read_run(open_run(tmp_path))]))))
    named = {line["metric"]: line for line in lines}
    one = tables["totals"]["own_gap"]
    line = named["analysis own_gap"]
    assert (float(line["value"]), float(line["low"]), float(line["high"])) == (one["value"], *one["interval"])
    assert line["model"] == "student" and "analysis rkl tail_push" in named
    assert sum(name.startswith("analysis drkl, γ 0.5 ") for name in named) >= 8
    several = [read_run(open_run(tmp_path))] * 2
    assert "The runs side by side" not in as_markdown(several)  # nothing was evaluated


def test_what_has_no_figure_now_has_none(
    states: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_analysis, "svg_text", lambda figure: "<svg></svg>")
    _, teacher, labels = states
    _, matched = found(teacher, teacher, labels, positions=8)
    drawn = {path.name for path in write_figures(matched, tmp_path)}
    (tmp_path / "mine.svg").write_text("kept")
    _, apart = found(teacher + 9 * np.eye(VOCAB)[teacher.argmax(-1)], teacher, labels, positions=8)
    again = {path.name for path in write_figures(apart, tmp_path)}
    assert drawn - again == {"push.svg", "rest.svg"} and not again - drawn
    assert {path.name for path in tmp_path.iterdir()} == again | {"mine.svg"}
