"""Section 3 of the definitions: confident positions, huge logits, excluded tokens, ties. The truth has 40 digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from tests.objectives import reference, tensors
from tests.objectives.cases import CASES, CLOSED_FORMS, DIVERGENCES, Case, name
from tests.rounding import assert_near, rounding

INF = math.inf
every = pytest.mark.parametrize("case", CASES, ids=name)
every_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=name)
every_closed_form = pytest.mark.parametrize("case", CLOSED_FORMS, ids=name)
DRKL = drkl.make_objective("drkl")


def rows(*values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def huge(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    high, low = 1e4, -1e4
    student = rows([high, low, 0, 1], [low, high, 0, 1], [high, high, low, low], [0, 1, 2, low], [high, 1, 2, 3])
    teacher = rows([low, high, 0, 1], [low, high, 1, 0], [high, low, low, high], [0, 2, high, 3], [high, 3, 1, 2])
    return student.to(dtype), teacher.to(dtype), torch.tensor([0, 1, 2, 3, 0])


SIZE = 2e4
"""The largest log-probabilities of `huge`."""


def coarse(dtype: torch.dtype) -> float:
    """Two units in the last place of such a log-probability: what is left of a tail is that coarse."""
    return rounding(0, scale=SIZE / 2, dtype=dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits(case: Case, dtype: torch.dtype) -> None:
    student, teacher, labels = huge(dtype)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    expected = tensors.by_hand(case, student, teacher, labels)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(values, expected, rtol=coarse(dtype), atol=coarse(dtype))
    assert grad.isfinite().all()


@every_closed_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits_in_the_closed_form(case: Case, dtype: torch.dtype) -> None:
    student, teacher, labels = huge(dtype)
    _, grad = tensors.value_and_grad(case.objective, student.double(), teacher.double(), labels)
    values, closed_grad = tensors.closed_form(case.objective, student, teacher, labels)
    tolerance = {"rtol": coarse(dtype), "atol": coarse(dtype)}
    np.testing.assert_allclose(values, tensors.by_hand(case, student, teacher, labels), **tolerance)
    np.testing.assert_allclose(closed_grad / SIZE, grad / SIZE, **tolerance)


def confident(log_odds_q: float, log_odds_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32, with tails about 4 nats apart; class 0 is the target."""
    teacher = tensors.confident(log_odds_p, vocab=40, seed=1)
    student = tensors.confident(log_odds_q, vocab=40, seed=2)
    pair = torch.from_numpy(np.stack([student, teacher])).float()
    return pair[:1], pair[1:], torch.zeros(1, dtype=torch.long)


CONFIDENT = [(15.0, 15.0), (18.0, 18.0), (22.0, 22.0), (22.0, 3.0), (3.0, 22.0), (5.0, math.log(1e12)), (60.0, 80.0)]


@pytest.mark.parametrize(("student", "teacher"), CONFIDENT)
def test_the_tail_of_a_confident_position_is_seen_in_fp32(student: float, teacher: float) -> None:
    z, y, labels = confident(student, teacher)
    (q, p, t) = reference.softmax(z[0].tolist()), reference.softmax(y[0].tolist()), reference.top(y[0].tolist())
    b, k, _ = reference.parts(q, p, t)
    assert t == 0 and 2 < k < 8
    for tail in ("rkl", "fkl", "gjs"):
        objective = drkl.make_objective("drkl", tail=tail, gamma=1.0)
        on_tail = float(reference.PARTS[tail](reference.split(q, 0)[1], reference.split(p, 0)[1]))
        # Every log of a probability is off by up to a few units in the last place of the largest logit.
        close = pytest.approx(float(b) + on_tail, rel=rounding(0, float(z.abs().max() + y.abs().max()), torch.float32))
        assert float(tensors.value(objective, z, y, labels)) == close
        if objective.has_closed_form:
            assert float(tensors.closed_form(objective, z, y, labels)[0]) == close


@pytest.mark.parametrize(("student", "teacher"), CONFIDENT)
@pytest.mark.parametrize("weight", ["student", "teacher"])
def test_weights_of_confident_positions_do_not_round_to_zero(student: float, teacher: float, weight: str) -> None:
    z, y, labels = confident(student, teacher)
    objective = drkl.make_objective("drkl", weight=weight)
    expected = reference.decoupled(reference.softmax(z[0].tolist()), reference.softmax(y[0].tolist()), 0, weight=weight)
    # The log-odds of fp32 logits carry an error of some 1e-6, relative in the weight.
    assert float(tensors.value(objective, z, y, labels)) == pytest.approx(float(expected), rel=3e-5)
    assert float(tensors.closed_form(objective, z, y, labels)[0]) == pytest.approx(float(expected), rel=3e-5)


@every
def test_a_token_both_exclude_adds_nothing(case: Case) -> None:
    student, teacher, labels = tensors.logits(vocab=6, seed=8)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    wider = [torch.cat([x[:, :2], torch.full((6, 2), -INF), x[:, 2:]], -1) for x in (student, teacher)]
    moved = torch.where(labels < 2, labels, labels + 2)
    wide_values, wide_grad = tensors.value_and_grad(case.objective, wider[0], wider[1], moved)
    torch.testing.assert_close(wide_values, values, rtol=1e-12, atol=1e-14)
    assert (wide_grad[:, 2:4] == 0).all()
    kept = torch.tensor([0, 1, 4, 5, 6, 7])
    torch.testing.assert_close(wide_grad[:, kept], grad, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.parametrize("excluded", ["student", "teacher", "different"])
@pytest.mark.parametrize("token", [0, 1, 2], ids=["label", "top", "other"])
def test_a_token_one_excludes_is_infinite_or_finite_but_never_nan(case: Case, excluded: str, token: int) -> None:
    student, teacher = rows([0.3, -0.4, 1.2, 0.1]), rows([0.2, 3.0, -0.5, 0.7])
    labels = torch.tensor([0])
    if excluded in ("student", "different"):
        student[0, token] = -INF
    if excluded in ("teacher", "different"):
        teacher[0, token if excluded == "teacher" else 3] = -INF
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    np.testing.assert_allclose(values, tensors.by_hand(case, student, teacher, labels), rtol=1e-12)
    assert not values.isnan().any() and not grad.isnan().any()


@pytest.mark.parametrize("objective", ["rkl", "drkl"])
def test_reverse_kl_and_drkl_are_infinite_on_a_token_the_teacher_excludes(objective: str) -> None:
    student, teacher = rows([0.0, 1.0, -60.0]), rows([1.0, 0.0, -INF])
    labels = torch.tensor([0])
    assert tensors.value(drkl.make_objective(objective), student, teacher, labels).tolist() == [INF]
    underflow = tensors.value(drkl.make_objective(objective), student * 1e3, teacher, labels)
    assert underflow.tolist() == [INF]
    skewed = drkl.make_objective("drkl", skew=0.1)
    assert tensors.value(skewed, student, teacher, labels).isfinite().all()


ONLY_TARGET = [2.0, -INF, -INF]
SPREAD = [2.0, 0.5, -1.0]


@pytest.mark.parametrize(
    ("student", "teacher", "drkl_value"),
    [(ONLY_TARGET, ONLY_TARGET, 0.0), (SPREAD, ONLY_TARGET, INF), (ONLY_TARGET, SPREAD, None)],
    ids=["both", "the teacher's", "the student's"],
)
def test_empty_tails(student: list[float], teacher: list[float], drkl_value: float | None) -> None:
    z, y, labels = rows(student), rows(teacher), torch.tensor([0])
    for case in DIVERGENCES:
        values, grad = tensors.value_and_grad(case.objective, z, y, labels)
        assert float(values) == pytest.approx(float(tensors.by_hand(case, z, y, labels)[0]), rel=1e-12), case.id
        assert grad.isfinite().all(), case.id
    if drkl_value is None:
        drkl_value = -float(torch.log_softmax(y, -1)[0, 0])  # B alone: the student has no tail to compare
    assert float(tensors.value(DRKL, z, y, labels)) == pytest.approx(drkl_value, abs=rounding(3, scale=2.0))


def test_a_part_without_weight_adds_nothing_even_where_it_is_infinite() -> None:
    student, teacher = rows([1.0, 0.0, 0.5]), rows([0.0, 1.0, -INF])
    no_target = drkl.decoupled("fkl", "fkl", target="label", target_weight=0.0)
    value, grad = tensors.value_and_grad(no_target, rows([-INF, 0.0, 0.5]), rows(SPREAD), torch.tensor([0]))
    assert value.isfinite().all() and grad.isfinite().all()
    no_tail = drkl.make_objective("drkl", weight="student", target="label")
    alone = rows([5000.0, 0.0, 0.5])  # 1 - q_t underflows to 0, while the teacher excludes a token of the tail
    assert tensors.value(no_tail, alone, teacher, torch.tensor([0])).isfinite().all()
    assert tensors.value(no_tail, student, teacher, torch.tensor([0])).tolist() == [INF]


@pytest.mark.parametrize("vocab", [5, 97, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_lowest_index_is_the_target_on_ties(vocab: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(vocab)
    teacher = torch.from_numpy(generator.normal(size=(3, vocab))).to(dtype)
    student = torch.from_numpy(generator.normal(size=(3, vocab))).to(dtype)
    first, second = vocab // 3, vocab - 2
    teacher[:, [first, second]] = 7.0
    labels = torch.full((3,), first)
    by_teacher = tensors.value(DRKL, student, teacher, labels)
    at_label = drkl.make_objective("drkl", target="label")
    assert_near(by_teacher, tensors.value(at_label, student, teacher, labels), vocab, 10.0)
    assert not torch.allclose(by_teacher, tensors.value(at_label, student, teacher, torch.full((3,), second)))
    closed = [tensors.closed_form(objective, student, teacher, labels)[1] for objective in (DRKL, at_label)]
    assert_near(*closed, vocab)


def test_all_the_teachers_logits_tie() -> None:
    student = rows([0.1, 0.2, 0.3])
    expected = reference.decoupled(reference.softmax([0.1, 0.2, 0.3]), reference.softmax([0, 0, 0]), 0)
    value = tensors.value(DRKL, student, torch.zeros_like(student), torch.tensor([2]))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
