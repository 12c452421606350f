"""The building blocks, against scipy."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from drkl.objectives import logspace
from drkl.objectives.logspace import kl, mixture, split

INF = math.inf


def logp(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


A = logp([0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0])
B = logp([0.1, 0.1, 0.8], [0.2, 0.8, 0.0], [0.5, 0.5, 0.0])


def test_kl() -> None:
    expected = scipy.special.rel_entr(A.exp().numpy(), B.exp().numpy()).sum(-1)
    np.testing.assert_allclose(kl(A, B), expected, rtol=1e-13)
    assert kl(B, A).tolist()[2] == INF


def test_kl_is_infinite_where_mass_underflows_on_an_excluded_class() -> None:
    value = kl(torch.tensor([[0.0, -1e4]]), torch.tensor([[0.0, -INF]]))
    assert value.tolist() == [INF]


def test_kl_has_a_finite_gradient_on_excluded_classes() -> None:
    log_a, log_b = (x.clone().requires_grad_() for x in (A, B))
    kl(log_a, log_b).sum().backward()
    assert log_a.grad is not None and log_b.grad is not None
    assert log_a.grad.isfinite().all() and log_b.grad.isfinite().all()
    np.testing.assert_allclose(log_b.grad, -A.exp(), atol=1e-14)


@pytest.mark.parametrize("weight", [0.0, 1e-9, 0.3, 0.5, 1.0])
def test_mixture(weight: float) -> None:
    log_a, log_b = (x.clone().requires_grad_() for x in (A, B))
    mixed = mixture(log_a, log_b, weight)
    np.testing.assert_allclose(mixed.exp().detach(), weight * A.exp() + (1 - weight) * B.exp(), rtol=1e-12)
    mixed.masked_fill(mixed == -INF, 0.0).sum().backward()
    for leaf in (log_a, log_b):
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_split() -> None:
    target = torch.tensor([1, 0, 0])
    two, tail, log_odds = split(A, target)
    np.testing.assert_allclose(two.exp(), [[0.3, 0.7], [0.9, 0.1], [1.0, 0.0]], rtol=1e-13)
    np.testing.assert_allclose(tail.exp(), [[5 / 7, 0, 2 / 7], [0, 1, 0], [0, 0, 0]], rtol=1e-13)
    np.testing.assert_allclose(log_odds, [scipy.special.logit(0.3), math.log(9), INF], rtol=1e-13)


def test_split_at_a_class_that_is_excluded() -> None:
    two, tail, log_odds = split(A[1:2], torch.tensor([2]))
    assert two.tolist() == [[-INF, 0.0]] and log_odds.tolist() == [-INF]
    np.testing.assert_allclose(tail.exp(), [[0.9, 0.1, 0.0]], rtol=1e-13)


@pytest.mark.parametrize("size", [30.0, 1e3, 2e4])
def test_log_odds_are_exact_at_any_confidence(size: float) -> None:
    logits = torch.tensor([[size, 0.0, 1.0], [-size, 0.0, 1.0]], dtype=torch.float64)
    rest = np.logaddexp(0.0, 1.0)
    found = split(torch.log_softmax(logits, -1), torch.tensor([0, 0]))
    np.testing.assert_allclose(found.log_odds, [size - rest, -size - rest], rtol=1e-13)
    np.testing.assert_allclose(
        found.log_two, scipy.special.log_expit([[size - rest, rest - size], [-size - rest, size + rest]])
    )


def test_shapes_are_checked_under_pytest() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        split(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        split(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("vocab", [1, 5, 1023, 1024, 1025, 1300, 2048, 3000])
def test_argmax_is_the_first_of_equals(vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    coarse = generator.integers(0, 4, size=(50, vocab)).astype(float)
    fine = generator.normal(size=(50, vocab))
    peaked = np.zeros((vocab, vocab)) if vocab < 1100 else np.zeros((50, vocab))
    peaked[np.arange(len(peaked)), -1 - np.arange(len(peaked))] = 1.0
    for values in (coarse, fine, peaked, np.full((2, vocab), -np.inf)):
        assert logspace.argmax(torch.from_numpy(values)).tolist() == values.argmax(-1).tolist()
