"""The numpy reference against the one of 40 digits: values of every variant, at every hazard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.losses import walk_inputs
from tests.losses.walk_inputs import VARIANTS, Rows, Variant
from tests.objectives import answers, reference

DIGITS = 1e-36
"""What is left of a difference of numbers near 1 in 40 digits."""
FEW = ("todi", "akl-mu=0.5", "ab-alpha=3.0-beta=0.25", "drkl-skew=0.9-weight=floor-target=label")
MARKS = [() if variant.id in FEW else pytest.mark.slow for variant in VARIANTS]
every = pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=marks, id=v.id) for v, marks in zip(VARIANTS, MARKS, strict=True)]
)


def with_many_digits(variant: Variant, q: list[Any], p: list[Any], target: int, label: int) -> Any:
    params = {key: value for key, value in variant.params.items() if key != "target"}
    if variant.name == "ce":
        return reference.cross_entropy(q, label)
    if variant.name == "dkd":
        params = {"on_target": "fkl", "on_tail": "fkl", "target_weight": params["alpha"], "gamma": params["beta"]}
    if "tail" in params:
        params["on_tail"] = params.pop("tail")
    if variant.name in ("dkd", "drkl", "decoupled"):
        return reference.decoupled(q, p, target, **params)
    return reference.PARTS[variant.name](q, p, **params)


def values(variant: Variant, rows: Rows, temperature: float) -> list[float]:
    found = []
    at_label = variant.params.get("target") == "label"
    for z, y, label in zip(rows.student.tolist(), rows.teacher.tolist(), rows.labels.tolist(), strict=True):
        q, p = reference.softmax(z, temperature), reference.softmax(y, temperature)
        found.append(float(with_many_digits(variant, q, p, label if at_label else reference.top(y), label)))
    return found


@every
def test_equals_forty_digits(variant: Variant, request: pytest.FixtureRequest) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    for vocab, temperature in [(5, 1.0), (2, 0.7), (1, 1.0)] if slow else [(3, 1.0)]:
        rows = walk_inputs.rows(vocab)
        near = np.full((len(rows.names), 1), 1e-15)
        found = answers.loss(
            variant.name, variant.params, rows.student, rows.teacher, rows.labels, near, temperature=temperature
        )
        expected = np.array(values(variant, rows, temperature))
        # numpy's widest floats may be those of 64 bits; a log-probability is up to 4e4 here.
        size = abs(rows.student).max(-1, where=np.isfinite(rows.student), initial=1) / temperature
        size += abs(rows.teacher).max(-1, where=np.isfinite(rows.teacher), initial=1) / temperature
        budget = (2 * size + vocab + 8) * np.finfo(np.float64).eps * found.size + found.slack + DIGITS
        for i, name in enumerate(rows.names):
            same = found.value[i] == expected[i] or abs(found.value[i] - expected[i]) <= budget[i]
            beyond = abs(found.value[i]) > 1e300 and expected[i] > 1e300
            assert same or beyond or np.isinf(found.slack[i]), (name, found.value[i], expected[i], budget[i])
