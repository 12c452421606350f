"""The drop-in for TRL's loss: its signature, its reductions, any objective."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl import DrklError
from tests.objectives import reference

Z, Y = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
LABELS = torch.tensor([[1, -100, 2], [0, 4, -100]])


def by_hand(temperature: float = 1.0) -> list[float]:
    kept = LABELS != -100
    return [
        float(reference.gjs(reference.softmax(z, temperature), reference.softmax(y, temperature), 0.3))
        for z, y in zip(Z[kept].tolist(), Y[kept].tolist(), strict=True)
    ]


def test_the_signature_is_trls() -> None:
    parameters = inspect.signature(drkl.as_gkd_loss()).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "student_logits": inspect.Parameter.empty,
        "teacher_logits": inspect.Parameter.empty,
        "labels": None,
        "beta": 0.5,
        "temperature": 1.0,
        "reduction": "batchmean",
        "num_items_in_batch": None,
    }


def test_the_reductions() -> None:
    loss = drkl.as_gkd_loss("gjs", beta=0.3)
    expected = by_hand()
    assert float(loss(Z, Y, LABELS)) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(loss(Z, Y, LABELS, reduction="mean")) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(loss(Z, Y, LABELS, reduction="sum")) == pytest.approx(np.sum(expected), rel=1e-12)
    np.testing.assert_allclose(loss(Z, Y, LABELS, reduction="none"), expected, rtol=1e-12)
    assert loss(Z, Y, reduction="none").shape == (2, 3)
    for count in (10, torch.tensor(10)):
        assert float(loss(Z, Y, LABELS, num_items_in_batch=count)) == pytest.approx(np.sum(expected) / 10, rel=1e-12)
    nothing = loss(Z.clone().requires_grad_(), Y, torch.full_like(LABELS, -100))
    assert nothing.requires_grad and float(nothing.detach()) == 0.0


def test_the_temperature_is_the_callers_unless_it_was_set() -> None:
    assert float(drkl.as_gkd_loss("gjs", beta=0.3)(Z, Y, LABELS, temperature=2.0)) == pytest.approx(
        np.mean(by_hand(2.0)), rel=1e-12
    )
    assert float(drkl.as_gkd_loss("gjs", beta=0.3, temperature=2.0)(Z, Y, LABELS)) == pytest.approx(
        np.mean(by_hand(2.0)), rel=1e-12
    )


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_any_objective_as_a_method_that_is_none(objective: str) -> None:
    class Trainer:
        generalized_jsd_loss = staticmethod(drkl.as_gkd_loss(objective))

        def compute(self) -> Tensor:
            return self.generalized_jsd_loss(student_logits=Z, teacher_logits=Y, labels=LABELS, beta=0.9)

    expected = drkl.distillation_loss(Z, Y, LABELS, objective=objective)
    assert torch.equal(Trainer().compute(), expected)


@pytest.mark.parametrize(
    ("words", "call", "message"),
    [
        ({"objective": "jsd"}, {}, "There is no objective 'jsd'"),
        ({"objective": "gjs", "beta": 1.0}, {}, "gjs.beta is 1.0"),
        ({}, {"reduction": "max"}, "reduction is 'max'; expected 'batchmean', 'mean', 'sum' or 'none'."),
    ],
    ids=str,
)
def test_refuses(words: dict[str, Any], call: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.as_gkd_loss(**words)(Z, Y, LABELS, **call)
    assert message in str(caught.value)
