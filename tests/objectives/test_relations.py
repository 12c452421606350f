"""Section 2 of the definitions: what the objectives are to each other, at their limits and in between."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl.objectives import adaptive
from tests.objectives import reference, tensors
from tests.objectives.cases import LIMITS, Case, name
from tests.rounding import rounding

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}


def both(objective: str, rows: tuple[Tensor, Tensor, Tensor], **params: Any) -> tuple[Tensor, Tensor]:
    return tensors.value_and_grad(drkl.make_objective(objective, **params), *rows)


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize(
    ("objective", "params", "other"),
    [
        ("symmetric_kl", {"forward_weight": 1.0}, "fkl"),
        ("symmetric_kl", {"forward_weight": 0.0}, "rkl"),
        ("sfkl", {"skew": 0.0}, "fkl"),
        ("srkl", {"skew": 0.0}, "rkl"),
        ("ab", {"alpha": 1.0, "beta": 0.0}, "fkl"),
        ("ab", {"alpha": 0.0, "beta": 1.0}, "rkl"),
        ("akl", {"mu": 1.0}, "fkl"),
    ],
    ids=str,
)
def test_is_another_at_its_limit(objective: str, params: dict[str, float], other: str) -> None:
    rows = tensors.logits(rows=20, seed=11)
    assert_same(both(objective, rows, **params), both(other, rows))


def test_ab_holds_hellinger_euclid_and_the_log_distance() -> None:
    student, teacher, _ = rows = tensors.logits(rows=20, seed=12)
    q, p = student.softmax(-1), teacher.softmax(-1)
    hellinger = 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)
    torch.testing.assert_close(both("ab", rows, alpha=0.5, beta=0.5)[0], hellinger, **CLOSE)
    torch.testing.assert_close(both("ab", rows, alpha=1.0, beta=1.0)[0], 0.5 * ((p - q) ** 2).sum(-1), **CLOSE)
    logs = 0.5 * ((p.log() - q.log()) ** 2).sum(-1)
    torch.testing.assert_close(both("ab", rows, alpha=0.0, beta=0.0)[0], logs, **CLOSE)


@pytest.mark.parametrize("case", LIMITS, ids=name)
def test_ab_where_the_exponents_cancel(case: Case) -> None:
    student, teacher, labels = tensors.logits(rows=5, seed=13)
    values = tensors.value(case.objective, student, teacher, labels)
    np.testing.assert_allclose(values, tensors.by_hand(case, student, teacher, labels), rtol=1e-12)
    same, grad = tensors.value_and_grad(case.objective, teacher, teacher, labels)
    bound = rounding(tensors.VOCAB, scale=float(teacher.log_softmax(-1).abs().max()))
    assert same.abs().max() < bound and grad.abs().max() < bound

    def function(z: Tensor) -> Tensor:
        return tensors.value(case.objective, z, teacher, labels)

    assert torch.autograd.gradcheck(function, student.requires_grad_(), eps=1e-6, atol=1e-5, rtol=1e-6)
    assert not case.objective.has_closed_form
    excluded = teacher.clone()
    excluded[:, 2] = -math.inf
    assert tensors.value(case.objective, student.detach(), excluded, labels).tolist() == [math.inf] * 5


NEAR = [(1e-6, 0.7), (0.7, 1e-6), (1e-6, 1e-6), (1e-3, 1e-2), (0.02, 0.029), (1e-9, 0.0), (0.0, 1e-9), (0.025, 0.025)]


@pytest.mark.parametrize(("alpha", "beta"), NEAR, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_ab_near_its_limits_in_fp32(alpha: float, beta: float, scale: float) -> None:
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in tensors.logits(9, 30, scale, 14))
    objective = drkl.make_objective("ab", alpha=alpha, beta=beta)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    by_hand = [float(reference.ab(reference.softmax(z), reference.softmax(y), alpha, beta)) for z, y in rows]
    wide = tensors.value_and_grad(objective, student.double(), teacher.double(), labels)
    np.testing.assert_allclose(wide[0], by_hand, rtol=1e-9, atol=1e-12)
    for values, grad in (
        tensors.value_and_grad(objective, student, teacher, labels),
        tensors.closed_form(objective, student, teacher, labels),
    ):
        # A log-probability of -50 is rounded to 4e-6; where it is not weighed down by its probability, that shows.
        np.testing.assert_allclose(values, by_hand, rtol=3e-4, atol=3e-6)
        np.testing.assert_allclose(grad, wide[1], rtol=1e-4, atol=1e-5 * float(wide[1].abs().max()) + 1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.83])
def test_gjs_exchanges_its_sides_with_its_weights(beta: float) -> None:
    student, teacher, labels = tensors.logits(rows=20, seed=15)
    there = both("gjs", (student, teacher, labels), beta=beta)[0]
    back = both("gjs", (teacher, student, labels), beta=1 - beta)[0]
    torch.testing.assert_close(there, back, **CLOSE)
    assert there.max() <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)


@pytest.mark.parametrize("beta", [1e-7, 1 - 1e-7])
def test_gjs_tends_to_nothing_at_its_ends(beta: float) -> None:
    assert both("gjs", tensors.logits(rows=20), beta=beta)[0].max() < 1e-5


def test_todi_has_the_value_of_both_kls_and_another_gradient() -> None:
    rows = tensors.logits(rows=20, seed=16)
    values, grad = both("todi", rows)
    forward, reverse = both("fkl", rows), both("rkl", rows)
    torch.testing.assert_close(values, forward[0] + reverse[0], **CLOSE)
    assert (grad - forward[1] - reverse[1]).abs().max() > 0.1


def test_todi_gradient_class_by_class() -> None:
    """-p/(p+q) p + q/(p+q) q (log q/p + 1), then through the softmax."""
    student, teacher, _ = rows = tensors.logits(rows=20, seed=17)
    q, p = student.softmax(-1).numpy(), teacher.softmax(-1).numpy()
    slope = -p / (p + q) * p + q / (p + q) * q * (np.log(q / p) + 1)
    expected = slope - q * slope.sum(-1, keepdims=True)
    np.testing.assert_allclose(both("todi", rows)[1], expected, rtol=1e-10, atol=1e-13)


def test_akl_weighs_the_kls_by_where_the_gap_lies() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.4, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64).log()
    forward = both("fkl", (student, teacher, None))[0]  # type: ignore[arg-type]
    reverse = both("rkl", (student, teacher, None))[0]  # type: ignore[arg-type]
    for mu, shares in ((0.5, (0.5, 0.0)), (0.4, (0.5, 0.0)), (0.51, (0.75, 0.5)), (0.81, (1.0, 1.0))):
        share = torch.tensor(shares, dtype=torch.float64)
        values = both("akl", (student, teacher, None), mu=mu)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(values, share * forward + (1 - share) * reverse, **CLOSE)


def test_the_head_is_the_shortest_list_the_lower_index_first() -> None:
    flat = torch.zeros(1, 8).log_softmax(-1)
    assert adaptive.head_mask(flat, 0.5)[0].tolist() == [True] * 4 + [False] * 4
    assert adaptive.head_mask(flat, 0.51)[0].tolist() == [True] * 5 + [False] * 3
    ties = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]], dtype=torch.float64).log()
    assert adaptive.head_mask(ties, 0.55)[0].tolist() == [False, True, True, False, False]
    assert adaptive.head_mask(ties, 1.0)[0].all()
    excluded = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    assert adaptive.head_mask(excluded, 1.0)[0].tolist() == [True, False, True]


@pytest.mark.parametrize("mu", [0.3, 0.9, 0.999])
def test_the_head_may_be_long(mu: float) -> None:
    _, teacher, _ = tensors.logits(rows=6, vocab=2000, scale=0.3, seed=18)
    logp = teacher.log_softmax(-1)
    heads = adaptive.head_mask(logp, mu)
    assert heads.sum(-1).max() > adaptive.MOST_TOKENS
    for head, p in zip(heads.numpy(), logp.exp().numpy(), strict=True):
        order = np.argsort(-p, kind="stable")
        count = int(np.searchsorted(np.cumsum(p[order]), mu)) + 1
        assert set(np.flatnonzero(head)) == set(order[:count])


@pytest.mark.parametrize("mu", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_heads_short_list_is_the_whole_sort(mu: float, tied: bool, scale: float) -> None:
    student, teacher, labels = tensors.logits(rows=40, vocab=700, scale=scale, seed=21)
    teacher = (2 * teacher).round() / 2 if tied else teacher
    akl = drkl.make_objective("akl", mu=mu)
    rows = student, teacher, labels
    assert_same(tensors.closed_form(akl, *rows), tensors.value_and_grad(akl, *rows))


def test_dkd_is_the_operator_forward() -> None:
    rows = tensors.logits(rows=20, seed=19)
    operator = drkl.decoupled("fkl", "fkl", gamma=0.7, target_weight=2.0, target="label")
    assert_same(both("dkd", rows, alpha=2.0, beta=0.7, target="label"), tensors.value_and_grad(operator, *rows))


def test_dkd_with_the_teachers_own_weights_is_forward_kl() -> None:
    """FKL = KL(b_p || b_q) + (1 - p_t) KL(p^ || q^)."""
    rows = tensors.logits(rows=20, seed=20)
    operator = drkl.decoupled("fkl", "fkl", weight="teacher")
    assert_same(tensors.value_and_grad(operator, *rows), both("fkl", rows))


def test_a_decoupled_skew_leaves_a_matched_target_alone_and_a_skewed_drkl_does_not() -> None:
    teacher, student = tensors.confident(2.0, seed=3), tensors.confident(2.0, seed=4)
    rows = torch.from_numpy(student[None]), torch.from_numpy(teacher[None]), torch.tensor([0])
    assert abs(tensors.value_and_grad(drkl.decoupled("srkl", "srkl"), *rows)[1][0, 0]) < rounding(6, scale=10.0)
    assert both("drkl", rows, skew=0.1)[1][0, 0] > 1e-4
