"""Section 1 of the definitions: how reverse KL splits, what it does to the target, and what DRKL does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from tests.objectives import reference, tensors
from tests.rounding import assert_near, rounding

ZERO = rounding(6, scale=20.0)
"""What rounding leaves of a gradient that is 0: a sum over 6 classes with log-probabilities of at most 20."""
RKL = drkl.make_objective("rkl")
DRKL = drkl.make_objective("drkl")


def autograd(objective: drkl.Objective, student: Tensor, teacher: Tensor) -> np.ndarray:
    return tensors.value_and_grad(objective, student, teacher, torch.zeros(len(student), dtype=torch.long))[1].numpy()


def distributions(student: Tensor, teacher: Tensor) -> list[tuple[list, list, int]]:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return [(reference.softmax(z), reference.softmax(y), reference.top(y)) for z, y in rows]


def matched_targets(log_odds: float) -> tuple[Tensor, Tensor]:
    """A student whose target probability is the teacher's, and whose tail is another."""
    teacher, student = tensors.confident(log_odds, seed=3), tensors.confident(log_odds, seed=4)
    return torch.from_numpy(student[None]), torch.from_numpy(teacher[None])


def test_reverse_kl_is_the_target_and_the_weighted_tail() -> None:
    student, teacher, labels = tensors.logits(rows=20)
    values = tensors.value(RKL, student, teacher, labels)
    for value, (q, p, t) in zip(values.tolist(), distributions(student, teacher), strict=True):
        b, k, _ = reference.parts(q, p, t)
        outside = reference.split(q, t)[0][1]
        assert value == pytest.approx(float(b + outside * k), rel=1e-12)


def test_gradient_of_reverse_kl_is_the_articles() -> None:
    student, teacher, _ = tensors.logits(rows=12)
    for grad, (q, p, t) in zip(autograd(RKL, student, teacher), distributions(student, teacher), strict=True):
        np.testing.assert_allclose(grad, np.array(reference.rkl_gradient(q, p), float), rtol=1e-10, atol=1e-14)
        assert grad[t] == pytest.approx(float(reference.rkl_target_gradient(q, p, t)), rel=1e-10)


@pytest.mark.parametrize(
    "params",
    [{}, {"gamma": 3.0}, {"weight": "student"}, {"weight": "teacher"}, {"weight": "floor", "gamma": 0.4}],
    ids=str,
)
def test_gradient_of_drkl_is_the_articles(params: dict) -> None:
    student, teacher, labels = tensors.logits(rows=12)
    objective = drkl.make_objective("drkl", **params)
    closed = tensors.closed_form(objective, student, teacher, labels)[1].numpy()
    rows = zip(autograd(objective, student, teacher), closed, distributions(student, teacher), strict=True)
    for grad, closed_grad, (q, p, t) in rows:
        weight = reference.tail_weight(params.get("weight", "constant"), params.get("gamma", 0.5), q, p, t)
        expected = np.array(reference.drkl_gradient(q, p, t, weight), float)
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(closed_grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("log_odds", [0.5, 3.0, 9.0])
def test_reverse_kl_pushes_a_matched_target_and_drkl_does_not(log_odds: float) -> None:
    student, teacher = matched_targets(log_odds)
    ((q, p, t),) = distributions(student, teacher)
    b, k, _ = reference.parts(q, p, t)
    (q_t, outside), _ = reference.split(q, t)
    assert t == 0 and abs(b) < 1e-25 and k > 0.1
    push = float(-q_t * outside * k)
    assert autograd(RKL, student, teacher)[0, t] == pytest.approx(push, rel=1e-8)
    for params in ({}, {"weight": "student"}, {"weight": "floor"}, {"tail": "fkl"}, {"tail": "gjs"}):
        grad = autograd(drkl.make_objective("drkl", **params), student, teacher)[0]
        assert abs(grad[t]) < ZERO
        assert abs(grad).max() > 1e-6


def test_reverse_kl_rests_k_nats_above_the_teacher_and_drkl_on_it() -> None:
    student, teacher = matched_targets(2.0)
    ((q, p, t),) = distributions(student, teacher)
    k = float(reference.parts(q, p, t)[1])
    overconfident = student.clone()
    overconfident[0, t] += k
    assert abs(autograd(RKL, overconfident, teacher)[0, t]) < ZERO
    assert autograd(DRKL, overconfident, teacher)[0, t] > 0.01


def test_a_detached_student_weight_keeps_the_value_of_reverse_kl() -> None:
    student, teacher, labels = tensors.logits(rows=20)
    ablation = drkl.make_objective("drkl", weight="student")
    values, grad = tensors.value_and_grad(ablation, student, teacher, labels)
    torch.testing.assert_close(values, tensors.value(RKL, student, teacher, labels), rtol=1e-12, atol=1e-14)
    assert (grad - torch.from_numpy(autograd(RKL, student, teacher))).abs().max() > 0.01


@pytest.mark.parametrize("log_odds", [-1.0, 0.3, 5.0])
def test_drkls_force_on_the_tail_is_gamma_over_the_rest_times_reverse_kls(log_odds: float) -> None:
    student, teacher = matched_targets(log_odds)
    ((q, p, _),) = distributions(student, teacher)
    k = float(reference.parts(q, p, 0)[1])
    share = np.array(q, float)
    # On a matched target RKL's gradient on the tail is its tail force and the push on the target, paid by the tail.
    reverse = autograd(RKL, student, teacher)[0, 1:] - share[1:] * share[0] * k
    at_label = drkl.make_objective("drkl", target="label", gamma=0.2)
    drkls = autograd(at_label, student, teacher)[0, 1:]
    np.testing.assert_allclose(drkls, 0.2 / (1 - share[0]) * reverse, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "params", [{}, {"gamma": 7.0}, {"weight": "student"}, {"tail": "fkl"}, {"tail": "gjs"}], ids=str
)
@pytest.mark.parametrize("target", ["teacher", "label"])
def test_with_two_classes_drkl_is_reverse_kl(params: dict, target: str) -> None:
    student, teacher, labels = tensors.logits(rows=20, vocab=2)
    objective = drkl.make_objective("drkl", target=target, **params)
    values, grad = tensors.value_and_grad(objective, student, teacher, labels)
    torch.testing.assert_close(values, tensors.value(RKL, student, teacher, labels), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grad, autograd(RKL, student, teacher), rtol=1e-10, atol=1e-14)


def test_the_operator_makes_drkl() -> None:
    student, teacher, labels = tensors.logits()
    spread: list[dict[str, Any]] = [{}, {"target": "label", "weight": "floor", "gamma": 0.2}]
    for params in spread:
        by_name = tensors.value(drkl.make_objective("drkl", tail="fkl", **params), student, teacher, labels)
        operator = tensors.value(drkl.decoupled("rkl", "fkl", **params), student, teacher, labels)
        assert_near(by_name, operator, tensors.VOCAB, 40.0)


def test_js_of_the_tails_is_symmetric_and_bounded() -> None:
    student, teacher, labels = tensors.logits(rows=20, scale=20.0)
    js = drkl.decoupled("gjs", "gjs", gamma=1.0).on_tail
    values = tensors.value(js, student, teacher, labels)
    torch.testing.assert_close(values, tensors.value(js, teacher, student, labels), rtol=1e-12, atol=1e-14)
    assert values.max() <= math.log(2) + 1e-12 and values.max() > 0.6


def test_skew_counts_the_student_into_what_it_is_compared_with() -> None:
    student, teacher, labels = tensors.logits()
    mixture = (0.8 * teacher.softmax(-1) + 0.2 * student.softmax(-1)).log()
    skewed = tensors.value(drkl.make_objective("drkl", skew=0.2, target="label"), student, teacher, labels)
    plain = drkl.make_objective("drkl", target="label")
    torch.testing.assert_close(skewed, tensors.value(plain, student, mixture, labels), rtol=1e-12, atol=1e-14)
    tiny = tensors.value(drkl.make_objective("drkl", skew=1e-30), student, teacher, labels)
    torch.testing.assert_close(tiny, tensors.value(DRKL, student, teacher, labels), rtol=1e-12, atol=1e-14)


def test_skew_makes_the_tail_act_on_the_target() -> None:
    student, teacher = matched_targets(2.0)
    assert abs(autograd(DRKL, student, teacher)[0, 0]) < ZERO
    assert autograd(drkl.make_objective("drkl", skew=0.3), student, teacher)[0, 0] > 1e-3
