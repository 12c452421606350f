"""The numbers in the article's figures: from numpy and scipy by the equations, and the same as in the committed csv."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit, logit, logsumexp, ndtri, rel_entr

import drkl
import drkl.analysis
from drkl.reporting.plotting import plot_style, svg_text
from scripts import article_rows, draw_figures

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
GAMMA, SKEW, TAIL = 0.5, 0.1, 49
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: make() for name, make in article_rows.ROWS.items()}
    torch.set_num_threads(threads)
    return found


def columns(rows: Sequence[dict[str, Any]], *keys: str, **fixed: Any) -> tuple[np.ndarray, ...]:
    some = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
    assert some, fixed
    return tuple(np.array([row[key] for row in some]) for key in keys)


def kl(a: np.ndarray, b: np.ndarray) -> Any:
    return rel_entr(a, b).sum(-1)


def pair(target: Any) -> np.ndarray:
    return np.stack([target, 1 - np.asarray(target)], -1)


def slanted_tail(K: float) -> np.ndarray:
    """q^ with KL(q^ || uniform) = K, log q^_j linear in j."""

    def tail(slope: float) -> np.ndarray:
        logs = -slope * np.arange(TAIL)
        return np.exp(logs - logsumexp(logs))

    return tail(brentq(lambda slope: kl(tail(slope), np.full(TAIL, 1 / TAIL)) - K, 0.0, 50.0, xtol=1e-14))


def value(name: str, q_t: float, q_tail: np.ndarray, p_t: float, p_tail: np.ndarray, skew: float = SKEW) -> float:
    """One position's loss from its equation."""
    q, p = np.append(q_t, (1 - q_t) * q_tail), np.append(p_t, (1 - p_t) * p_tail)
    m = (1 - skew) * p + skew * q
    if name == "rkl":
        return float(kl(q, p))
    if name == "srkl":
        return float(kl(q, m))
    if name == "drkl":
        return float(kl(pair(q_t), pair(p_t)) + GAMMA * kl(q_tail, p_tail))
    if name == "drkl(skew)":
        return float(kl(pair(q_t), pair(m[0])) + GAMMA * kl(q_tail, m[1:] / m[1:].sum()))
    assert name == "decoupled(srkl, srkl)"
    tails = kl(q_tail, (1 - skew) * p_tail + skew * q_tail)
    return float(kl(pair(q_t), pair(m[0])) + GAMMA * tails)


def slope(loss: Callable[[float], float], at: float, step: float = 1e-4) -> float:
    return (loss(at + step) - loss(at - step)) / (2 * step)


@pytest.mark.parametrize("name", article_rows.ROWS)
def test_the_committed_csv_is_what_the_functions_give(rows: Rows, name: str) -> None:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        kept = list(csv.DictReader(file))
    assert list(kept[0]) == list(rows[name][0]) and len(kept) == len(rows[name])
    for key in kept[0]:
        old, new = [row[key] for row in kept], [row[key] for row in rows[name]]
        if all(isinstance(value, float) for value in new):
            # One unit of the sixth digit that is written; what is below 1e-12 is written as 0.
            assert np.allclose(np.array(old, float), new, rtol=1e-5, atol=1e-11), key
        else:
            assert [str(value) if isinstance(value, str) else f"{value:.6g}" for value in new] == old, key
    assert (FOLDER / f"{name}.svg").is_file()


def test_the_student_s_tails_are_k_nats_from_the_teacher_s() -> None:
    for K in (0.0, 0.5, 1.0, 2.5):
        expected = slanted_tail(K) if K else np.full(TAIL, 1 / TAIL)
        assert np.allclose(article_rows.tail_at(K).numpy(), expected, rtol=1e-9)


def test_the_flow_is_the_slope_of_the_equation(rows: Rows) -> None:
    for name, weight in (("rkl", lambda q_t: 1 - q_t), ("drkl", lambda q_t: GAMMA)):
        q_t, p_t, K, push = columns(rows["article-1-flow"], "q_t", "p_t", "K", "push", objective=name)

        def loss(q_t: Any, p_t: Any = p_t, K: Any = K, weight: Any = weight) -> Any:
            return kl(pair(q_t), pair(p_t)) + weight(q_t) * K

        # d q_t / d z_t = q_t (1-q_t).
        assert np.allclose(push, q_t * (1 - q_t) * slope(loss, q_t, 1e-5), rtol=0, atol=1e-8)


def test_reverse_kl_rests_k_nats_above_the_teacher_and_drkl_at_it(rows: Rows) -> None:
    for name, shift in (("rkl", 1.0), ("drkl", 0.0)):
        p_t, K, at_rest = columns(rows["article-1-flow"], "p_t", "K", "rest_q_t", objective=name)
        assert np.allclose(at_rest, expit(logit(p_t) + shift * K), rtol=0, atol=1e-9)
    objectives = {"rkl": 1.0, "drkl": 0.0}
    for name, shift in objectives.items():
        for p_t, K in ((0.05, 2.0), (0.5, 0.5), (0.875, 1.0)):
            teacher = article_rows.log_probs(torch.tensor([p_t]).double(), article_rows.uniform())

            def push(log_odds: float, name: str = name, K: float = K, teacher: torch.Tensor = teacher) -> float:
                q_t = torch.tensor([log_odds], dtype=torch.float64).sigmoid()
                student = article_rows.log_probs(q_t, article_rows.tail_at(K))
                return float(article_rows.push(drkl.make_objective(name), student, teacher))

            assert brentq(push, -10, 10, xtol=1e-12) == pytest.approx(logit(p_t) + shift * K, abs=1e-6)


def test_an_aligned_target_is_pushed_by_reverse_kl_alone_and_the_tail_by_both(rows: Rows) -> None:
    for name in ("rkl", "drkl"):
        q_t, K, push, norm = columns(rows["article-2-aligned"], "q_t", "K", "push", "tail_norm", objective=name)
        expected = -q_t * (1 - q_t) * K if name == "rkl" else 0 * K
        assert np.abs(push - expected).max() < 1e-12
        for at in range(0, len(K), 5):
            tail = slanted_tail(K[at]) if K[at] > 1e-9 else np.full(TAIL, 1 / TAIL)
            d = np.log(tail * TAIL)
            forces = {
                "rkl": (1 - q_t[at]) * tail * (d - (1 - q_t[at]) * K[at]),
                "drkl": GAMMA * tail * (d - K[at]),
            }
            assert norm[at] == pytest.approx(np.linalg.norm(forces[name]), rel=1e-7, abs=1e-12)
        assert (norm[K > 1e-9] > 1e-3).all() and norm[K < 1e-9].max() < 1e-12


def test_every_objective_is_0_at_the_teacher_s_end_of_the_path(rows: Rows) -> None:
    path = rows["article-3-path"]
    p = np.arange(1, 1001) ** -1.3
    p /= p.sum()
    entropy = -(p * np.log(p)).sum()
    assert {row["objective"] for row in path} == set(drkl.OBJECTIVES)
    for name in drkl.OBJECTIVES:
        left, values, norm = columns(path, "left", "value", "norm", objective=name)
        assert left[-1] == 0 and norm[-1] < 1e-12
        values = values - (entropy if name == "ce" else 0)
        assert abs(values[-1]) < 1e-12
        assert (values[:-1] > 0).all() and (norm[:-1] > 0).all()
        # The next order is a share of the noise that is left: 0.03 in a standard deviation.
        power = np.log(values[-3] / values[-2]) / np.log(left[-3] / left[-2])
        assert power == pytest.approx(1 if name == "tvd" else 2, abs=0.05), name


def test_the_path_s_divergences_are_scipy_s(rows: Rows) -> None:
    path = rows["article-3-path"]
    logits = -1.3 * np.log(np.arange(1, 1001))
    noise = 3 * ndtri(((np.arange(1000) * 617) % 1000 + 0.5) / 1000)
    (left,) = columns(path, "left", objective="rkl")
    logq, logp = (x - logsumexp(x, -1, keepdims=True) for x in (logits + left[:, None] * noise, logits[None]))
    q, p = np.exp(logq), np.exp(logp)
    expected = {"fkl": kl(p, q), "rkl": kl(q, p), "tvd": np.abs(p - q).sum(-1) / 2, "ce": -(p * logq).sum(-1)}
    for name, values in expected.items():
        (found,) = columns(path, "value", objective=name)
        assert np.allclose(found, values, rtol=1e-9, atol=1e-12), name
    (norm,) = columns(path, "norm", objective="fkl")
    assert np.allclose(norm, np.linalg.norm(q - p, axis=-1), rtol=1e-9, atol=1e-12)


def test_the_mixture_pushes_an_aligned_target_down_and_the_mixed_parts_do_not(rows: Rows) -> None:
    tail, p_tail = slanted_tail(1.0), np.full(TAIL, 1 / TAIL)
    found = {name: columns(rows["article-4-mixture"], "x", "y", objective=name, against="q_t")
             for name in article_rows.mixed()}  # fmt: skip
    q_t = found["rkl"][0]
    excess = (tail**2 / ((1 - SKEW) * p_tail + SKEW * tail)).sum() - 1
    assert np.allclose(found["drkl(skew)"][1], GAMMA * SKEW * q_t * excess, rtol=1e-9)
    assert (found["drkl(skew)"][1] > 0).all()
    assert np.abs(found["drkl"][1]).max() < 1e-12 and np.abs(found["decoupled(srkl, srkl)"][1]).max() < 1e-12
    assert np.allclose(found["rkl"][1], -q_t * (1 - q_t), rtol=1e-9)
    for at in (0, 20, 47):
        expected = slope(lambda s: value("srkl", expit(s), tail, q_t[at], p_tail), logit(q_t[at]))  # noqa: B023
        assert found["srkl"][1][at] == pytest.approx(expected, abs=1e-8)
    assert (found["srkl"][1] < 0).all() and (found["srkl"][1] > found["rkl"][1]).all()


def test_where_the_mixtures_rest_and_what_they_are_worth(rows: Rows) -> None:
    tail, p_tail, half = slanted_tail(1.0), np.full(TAIL, 1 / TAIL), np.full(48, 1 / 48)
    for name in article_rows.mixed():
        skews, at_rest = columns(rows["article-4-mixture"], "x", "y", objective=name, against="skew")
        for skew, q_t in list(zip(skews, at_rest, strict=True))[::6]:

            def derivative(log_odds: float, name: str = name, skew: float = skew) -> float:
                return slope(lambda s: value(name, expit(s), tail, 0.6, p_tail, skew), log_odds)

            assert logit(q_t) == pytest.approx(brentq(derivative, -5, 5), abs=1e-6)
        share, values = columns(rows["article-4-mixture"], "x", "y", objective=name, against="share")
        for x, found in zip(share, values, strict=True):
            teacher = np.append(np.full(24, x / 24), np.full(24, (1 - x) / 24))
            assert found == pytest.approx(value(name, 0.6, half, 0.6, teacher), rel=1e-9, abs=1e-12)


def test_a_constant_gamma_strengthens_where_q_t_is_above_1_less_gamma(rows: Rows) -> None:
    q_t, gamma, ratio = columns(rows["article-5-gamma"], "q_t", "gamma", "ratio", weight="constant")
    assert np.allclose(ratio, gamma / (1 - q_t), rtol=1e-9)
    assert ((ratio > 1) == (q_t > 1 - gamma)).all() and (ratio > 1).any() and (ratio < 1).any()
    q_t, ratio = columns(rows["article-5-gamma"], "q_t", "ratio", weight="floor")
    assert np.allclose(ratio, np.maximum(GAMMA, 1 - q_t) / (1 - q_t), rtol=1e-9) and ratio.min() > 1 - 1e-9
    (ratio,) = columns(rows["article-5-gamma"], "ratio", weight="student")
    assert (ratio == 1).all()


def test_pushes_and_values_at_each_temperature(rows: Rows) -> None:
    heat = rows["article-6-temperature"]
    tails = [1.5 * ndtri(((np.arange(TAIL) * stride) % TAIL + 0.5) / TAIL) for stride in (18, 1)]
    z_t = logsumexp(tails[1]) + logit(0.6)
    for row in heat:
        name, T = row["objective"], row["T"]
        q, p = ((x := np.append(t, tail) / T) - logsumexp(x)
                for t, tail in ((z_t + row["offset"], tails[0]), (z_t, tails[1])))  # fmt: skip
        q_t, p_t, D = np.exp(q[0]), np.exp(p[0]), row["offset"] / T
        q_tail, p_tail = np.exp(q[1:]) / (1 - q_t), np.exp(p[1:]) / (1 - p_t)
        K = kl(q_tail, p_tail)
        if name == "fkl":
            expected = (kl(np.exp(p), np.exp(q)), (q_t - p_t) / T, 0.0)
        else:
            tail_push = -q_t * (1 - q_t) * K / T if name == "rkl" else 0.0
            expected = (value(name, q_t, q_tail, p_t, p_tail), q_t * (1 - q_t) * D / T, tail_push)
        found = [row[key] for key in ("value", "target_push", "tail_push", "q_t", "p_t", "K")]
        assert found == pytest.approx([*expected, q_t, p_t, K], rel=1e-9, abs=1e-12)


def test_the_push_on_an_aligned_target_falls_faster_than_the_gradient(rows: Rows) -> None:
    T, push, norm = columns(rows["article-6-temperature"], "T", "tail_push", "norm", objective="rkl",
                            against="temperature")  # fmt: skip
    assert (np.diff(np.log(-push)) < np.diff(np.log(norm))).all()
    # The powers are limits: the next order is 1/T of the logits' spread.
    hot = []
    for T in (2e3, 4e3):
        student, teacher = article_rows.heat_logits(torch.zeros(1).double())
        found = drkl.analysis.decompose(student, teacher, objective="rkl", temperature=T)
        hot.append((float(found.tail_push), float((found.target_grad + found.tail_grad).norm())))
    assert np.log2(np.divide(*hot)) == pytest.approx([3, 2], abs=0.01)


def test_a_figure_is_drawn_from_its_csv_with_the_same_bytes(rows: Rows) -> None:
    assert list(draw_figures.DRAWN) == list(article_rows.ROWS)
    name = "article-2-aligned"
    with plot_style(text_as_paths=True):
        first, second = (
            svg_text(draw_figures.DRAWN[name](draw_figures.read_rows(article_rows.as_csv(rows[name]))))
            for _ in range(2)
        )
    assert first == second
