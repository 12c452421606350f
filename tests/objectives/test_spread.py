"""Every objective over its whole domain: hypothesis draws the parameters and the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drkl
from tests.objectives import reference, tensors

unit = st.floats(0.0, 1.0)
inside = st.floats(0.01, 0.99)
weight = st.just(0.0) | st.floats(1e-6, 4.0)  # 40 digits are too few for less: the equation has 1 / (alpha beta)
shares = st.sampled_from(["constant", "student", "teacher", "floor"])
target = st.sampled_from(["teacher", "label"])
# An objective that is not here is drawn with its defaults.
PARAMS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "symmetric_kl": st.fixed_dictionaries({"forward_weight": unit}),
    "gjs": st.fixed_dictionaries({"beta": inside}),
    "sfkl": st.fixed_dictionaries({"skew": st.floats(0.0, 0.99)}),
    "srkl": st.fixed_dictionaries({"skew": st.floats(0.0, 0.99)}),
    "akl": st.fixed_dictionaries({"mu": st.floats(0.01, 1.0)}),
    "ab": st.fixed_dictionaries({"alpha": weight, "beta": weight}),
    "dkd": st.fixed_dictionaries({"alpha": st.floats(0.0, 4.0), "beta": st.floats(0.01, 8.0), "target": target}),
    "drkl": st.fixed_dictionaries(
        {
            "gamma": st.floats(0.01, 8.0),
            "target": target,
            "weight": shares,
            "tail": st.sampled_from(["rkl", "fkl", "gjs"]),
        }
    ),
}


@st.composite
def objectives(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(drkl.OBJECTIVES)))
    return name, draw(PARAMS.get(name, st.just({})))


@st.composite
def positions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vocab = draw(st.integers(2, 40))
    return tensors.logits(3, vocab, draw(st.floats(0.05, 8.0)), draw(st.integers(0, 2**31)))


def expected(name: str, params: dict[str, Any], student: Any, teacher: Any, label: int) -> Any:
    q, p = reference.softmax(student), reference.softmax(teacher)
    at = label if params.get("target") == "label" else reference.top(teacher)
    if name == "ce":
        return reference.cross_entropy(q, label)
    if name == "dkd":
        words = {"on_target": "fkl", "on_tail": "fkl", "target_weight": params["alpha"], "gamma": params["beta"]}
        return reference.decoupled(q, p, at, **words)
    if name == "drkl":
        words = {"on_tail": params["tail"], "gamma": params["gamma"], "weight": params["weight"]}
        return reference.decoupled(q, p, at, **words)
    return reference.PARTS[name](q, p, **params)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(objectives(), positions())
def test_value_and_both_gradients(
    named: tuple[str, dict[str, Any]], rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    name, params = named
    objective = drkl.make_objective(name, **params)
    values, grad = tensors.value_and_grad(objective, *rows)
    by_hand = [expected(name, params, z, y, label) for z, y, label in zip(*(x.tolist() for x in rows), strict=True)]
    np.testing.assert_allclose(values, np.array(by_hand, float), rtol=1e-9, atol=1e-12)
    assert grad.sum(-1).abs().max() < 1e-11
    if objective.has_closed_form:
        closed, closed_grad = tensors.closed_form(objective, *rows)
        torch.testing.assert_close(closed, values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(closed_grad, grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(reference.PARTS)),
    st.sampled_from(sorted(reference.PARTS)),
    st.floats(0.01, 8.0),
    st.floats(0.0, 3.0),
    target,
    shares,
    positions(),
)
def test_the_operator_on_any_two_parts(
    on_target: str,
    on_tail: str,
    gamma: float,
    target_weight: float,
    at: str,
    share: str,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    words: dict[str, Any] = {"on_target": on_target, "on_tail": on_tail, "gamma": gamma, "target_weight": target_weight}
    objective = drkl.decoupled(**words, target=at, weight=share)
    values, grad = tensors.value_and_grad(objective, *rows)
    by_hand = []
    for student, teacher, label in zip(*(x.tolist() for x in rows), strict=True):
        t = label if at == "label" else reference.top(teacher)
        q, p = reference.softmax(student), reference.softmax(teacher)
        by_hand.append(float(reference.decoupled(q, p, t, **words, weight=share)))
    np.testing.assert_allclose(values, by_hand, rtol=1e-9, atol=1e-12)
    if objective.has_closed_form:
        closed, closed_grad = tensors.closed_form(objective, *rows)
        torch.testing.assert_close(closed, values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(closed_grad, grad, rtol=1e-9, atol=1e-12)
