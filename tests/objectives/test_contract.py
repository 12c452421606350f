"""What holds for every objective: one test per property, over all of them and a spread of their parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from tests.objectives import tensors
from tests.objectives.cases import CASES, CLOSED_FORMS, DIVERGENCES, LIMITS, Case, name
from tests.rounding import assert_near, rounding

every = pytest.mark.parametrize("case", CASES, ids=name)
every_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=name)
every_closed_form = pytest.mark.parametrize("case", CLOSED_FORMS, ids=name)


def test_every_registered_objective_is_among_the_cases() -> None:
    assert {case.objective.name for case in CASES} == {*drkl.OBJECTIVES, "decoupled"}
    closed = {name for name, cls in drkl.OBJECTIVES.items() if cls().has_closed_form}
    assert {case.objective.name for case in CLOSED_FORMS} == closed | {"decoupled"}


@every
def test_equals_the_equations(case: Case) -> None:
    student, teacher, labels = tensors.logits()
    values = tensors.value(case.objective, student, teacher, labels)
    assert values.shape == (6,) and values.dtype == torch.float64
    np.testing.assert_allclose(values, tensors.by_hand(case, student, teacher, labels), rtol=1e-12, atol=1e-14)


@every
def test_equals_the_equations_in_fp32(case: Case) -> None:
    student, teacher, labels = tensors.logits(seed=1)
    student, teacher = student.float(), teacher.float()
    values = tensors.value(case.objective, student, teacher, labels)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, tensors.by_hand(case, student, teacher, labels), rtol=5e-6, atol=1e-6)


@every_divergence
def test_is_never_negative_and_zero_at_agreement(case: Case) -> None:
    student, teacher, labels = tensors.logits(rows=40, seed=2)
    values = tensors.value(case.objective, student, teacher, labels)
    assert (values >= 0).all() and (values > 1e-3).any()
    same, grad = tensors.value_and_grad(case.objective, teacher, teacher, labels)
    bound = rounding(tensors.VOCAB, scale=float(teacher.log_softmax(-1).abs().max()))
    assert same.abs().max() < bound and grad.abs().max() < bound


@every
def test_constants_added_to_the_logits_change_nothing(case: Case) -> None:
    student, teacher, labels = tensors.logits(seed=3)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    shift = torch.linspace(-90, 70, 6, dtype=torch.float64).unsqueeze(-1)
    shifted, shifted_grad = tensors.value_and_grad(case.objective, student + shift, teacher - 2 * shift, labels)
    torch.testing.assert_close(shifted, values, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-11, atol=1e-12)
    # The gradients of a position sum to 0, up to the rounding of the constants that were added.
    assert grad.sum(-1).abs().max() < rounding(tensors.VOCAB, scale=float(grad.abs().sum(-1).max() + 90))


@every
def test_renumbering_the_vocabulary_changes_nothing(case: Case) -> None:
    student, teacher, labels = tensors.logits(seed=4)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    place = torch.argsort(order)
    moved, moved_grad = tensors.value_and_grad(case.objective, student[:, order], teacher[:, order], place[labels])
    torch.testing.assert_close(moved, values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved_grad, grad[:, order], rtol=1e-12, atol=1e-14)


@every
def test_a_position_sees_no_other(case: Case) -> None:
    student, teacher, labels = tensors.logits(seed=5)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    for i in range(6):
        row = slice(i, i + 1)
        alone, alone_grad = tensors.value_and_grad(case.objective, student[row], teacher[row], labels[row])
        # A row by itself may go through another kernel: sums of as many terms as there are classes.
        scale = float(student[row].log_softmax(-1).abs().max() + teacher[row].log_softmax(-1).abs().max())
        assert_near(alone, values[row], tensors.VOCAB, scale * max(1.0, float(values[row].abs())))
        assert_near(alone_grad, grad[row], tensors.VOCAB, scale * max(1.0, float(grad[row].abs().max())))
    student[2], teacher[2] = math.nan, math.nan
    spoilt, spoilt_grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(spoilt[others], values[others]) and torch.equal(spoilt_grad[others], grad[others])
    assert spoilt[2].isnan()


@every
def test_no_position_at_all(case: Case) -> None:
    student, teacher, labels = (x[:0] for x in tensors.logits())
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    assert values.shape == (0,) and grad.shape == (0, tensors.VOCAB)


@every
def test_gradient_is_that_of_the_value(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = tensors.logits(rows=4, vocab=5, scale=1.0, seed=6)
    tensors.hold_weights(monkeypatch, case.objective, student, teacher, labels)

    def function(z: Tensor) -> Tensor:
        return tensors.value(case.objective, z, teacher, labels)

    assert torch.autograd.gradcheck(function, student.requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-6)


@every_divergence
def test_the_teacher_gets_no_gradient(case: Case) -> None:
    student, teacher, labels = tensors.logits()
    student.requires_grad_()
    teacher.requires_grad_()
    tensors.value(case.objective, student, teacher, labels).sum().backward()
    assert teacher.grad is None and student.grad is not None


@every_closed_form
@pytest.mark.parametrize("vocab", [2, 3, 40])
def test_closed_form_equals_autograd(case: Case, vocab: int) -> None:
    student, teacher, labels = tensors.logits(rows=9, vocab=vocab, seed=7)
    values, grad = tensors.value_and_grad(case.objective, student, teacher, labels)
    closed, closed_grad = tensors.closed_form(case.objective, student, teacher, labels)
    torch.testing.assert_close(closed, values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(closed_grad, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", LIMITS, ids=name)
def test_a_closed_form_is_refused_where_there_is_none(case: Case) -> None:
    with pytest.raises((NotImplementedError, AssertionError)):
        tensors.closed_form(case.objective, *tensors.logits())
