"""The loss from logits, position by position against the equations; then masks, reductions, dtypes and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl.errors import DrklError
from drkl.losses.common import denominator, make_settings
from tests.objectives import reference, tensors
from tests.objectives.cases import CASES, Case, name
from tests.rounding import assert_near

IGNORE = -100
SHAPE = (2, 4)
KEPT = [1, 2, 4, 5]  # flat positions that both the labels and the mask keep


def batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    student, teacher, labels = tensors.logits(rows=8, vocab=6, seed=seed)
    mask = torch.tensor([True, True, True, False, True, True, False, True])
    labels[[0, 6, 7]] = IGNORE
    return {
        "student_logits": student.to(dtype).reshape(2, 4, 6),
        "teacher_logits": teacher.to(dtype).reshape(2, 4, 6),
        "labels": labels.reshape(SHAPE),
        "token_mask": mask.reshape(SHAPE),
    }


def expected(case: Case, inputs: dict[str, Tensor], temperature: float, kd_weight: float, t2: bool) -> np.ndarray:
    """kd_weight KD(T) T^2 + (1 - kd_weight) CE at each flat position, 0 where it does not count."""
    student, teacher = (inputs[k].reshape(8, -1).tolist() for k in ("student_logits", "teacher_logits"))
    out = np.zeros(8)
    for i in KEPT:
        label = int(inputs["labels"].reshape(-1)[i])
        value = case.expected(student[i], teacher[i], label, temperature)
        cross_entropy = reference.cross_entropy(reference.softmax(student[i]), label)
        out[i] = float(kd_weight * value * (temperature**2 if t2 else 1) + (1 - kd_weight) * cross_entropy)
    return out


SETTINGS = [
    (1.0, 1.0, False),
    (2.0, 1.0, False),
    (2.0, 1.0, True),
    (0.5, 0.3, True),
    (3.0, 0.3, False),
    (2.0, 0.0, True),
]


@pytest.mark.parametrize(("temperature", "kd_weight", "t2_scaling"), SETTINGS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_the_equations(case: Case, temperature: float, kd_weight: float, t2_scaling: bool) -> None:
    inputs = batch()
    words: dict[str, Any] = {"temperature": temperature, "kd_weight": kd_weight, "t2_scaling": t2_scaling}
    by_hand = expected(case, inputs, temperature, kd_weight, t2_scaling)
    reductions: Any = {
        "none": by_hand.reshape(SHAPE),
        "sum": by_hand.sum(),
        "mean": by_hand.sum() / len(KEPT),
    }
    for reduction, values in reductions.items():
        loss = drkl.distillation_loss(**inputs, objective=case.objective, reduction=reduction, **words)
        np.testing.assert_allclose(loss, values, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_tokens", [10, 10.0, torch.tensor(10), torch.tensor(10.0)], ids=repr)
def test_the_sum_is_divided_by_the_tokens_of_the_step(num_tokens: Any) -> None:
    total = drkl.distillation_loss(**batch(), reduction="sum")
    loss = drkl.distillation_loss(**batch(), num_tokens=num_tokens)
    assert float(loss) == pytest.approx(float(total) / 10, rel=1e-14)


@pytest.mark.parametrize(
    ("num_tokens", "count", "divisor"),
    [(None, 7, 7.0), (None, 0, 1.0), (0, 0, 1.0), (0.0, 3, 1.0), (0.5, 3, 0.5), (12, 3, 12.0)],
)
def test_nothing_is_divided_by_zero(num_tokens: Any, count: int, divisor: float) -> None:
    assert denominator(num_tokens, count) == divisor
    if num_tokens is not None:
        assert float(denominator(torch.tensor(num_tokens), count)) == divisor


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", ["ce", "fkl", "rkl", "drkl"])
def test_without_a_valid_position_it_is_zero_with_a_graph(objective: str, reduction: Any) -> None:
    inputs = batch()
    student = inputs["student_logits"].requires_grad_()
    inputs["labels"] = torch.full(SHAPE, IGNORE)
    loss = drkl.distillation_loss(**inputs, objective=objective, reduction=reduction, kd_weight=0.5)
    assert (loss == 0).all()
    loss.sum().backward()
    assert student.grad is not None and (student.grad == 0).all()


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kd_weight", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", ["ce", "fkl", "rkl", "drkl"])
def test_ignored_positions_do_not_exist(objective: str, reduction: Any, kd_weight: float, garbage: float) -> None:
    words: Any = {"objective": objective, "reduction": reduction, "kd_weight": kd_weight}
    clean = drkl.distillation_loss(**batch(), **words)
    inputs = batch()
    ignored = torch.tensor([i not in KEPT for i in range(8)]).reshape(SHAPE)
    inputs["student_logits"][ignored] = garbage
    inputs["teacher_logits"][ignored] = garbage
    student = inputs["student_logits"].requires_grad_()
    loss = drkl.distillation_loss(**inputs, **words)
    assert torch.equal(loss, clean)
    loss.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert (student.grad[ignored] == 0).all() and (student.grad[~ignored] != 0).any(-1).all()


def test_masks_may_be_numbers_and_either_may_be_left_out() -> None:
    inputs = batch()
    both = drkl.distillation_loss(**inputs, reduction="sum")
    mask = inputs["token_mask"] & (inputs["labels"] != IGNORE)
    logits = (inputs["student_logits"], inputs["teacher_logits"])
    for number in (mask, mask.long(), mask.float()):
        assert torch.equal(drkl.distillation_loss(*logits, token_mask=number, reduction="sum"), both)
    labels = inputs["labels"].masked_fill(~mask, IGNORE)
    assert torch.equal(drkl.distillation_loss(*logits, labels, reduction="sum"), both)
    assert torch.equal(
        drkl.distillation_loss(*logits, labels.int(), objective="ce", reduction="sum", kd_weight=0.5),
        drkl.distillation_loss(*logits, labels, objective="ce", reduction="sum", kd_weight=0.5),
    )


def test_every_position_counts_without_labels_and_mask() -> None:
    inputs = batch()
    logits = (inputs["student_logits"], inputs["teacher_logits"])
    values = drkl.distillation_loss(*logits, reduction="none")
    assert values.shape == SHAPE and (values > 0).all()
    assert float(drkl.distillation_loss(*logits)) == pytest.approx(float(values.mean()), rel=1e-13)
    one = drkl.distillation_loss(logits[0][0, 0], logits[1][0, 0], reduction="none")
    assert one.shape == ()
    assert_near(one, values[0, 0], 6, 20.0)  # log-probabilities of at most 20


def test_only_the_student_gets_a_gradient_through_every_reduction() -> None:
    grads = []
    for reduction in ("mean", "sum", "none"):
        inputs = batch()
        student, teacher = (inputs[k].requires_grad_() for k in ("student_logits", "teacher_logits"))
        loss = drkl.distillation_loss(**inputs, reduction=reduction)
        (3.0 * loss.sum()).backward()
        assert teacher.grad is None and student.grad is not None
        grads.append(student.grad)
    torch.testing.assert_close(grads[0] * len(KEPT), grads[1], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grads[1], grads[2], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ["ce", "fkl", "rkl", "drkl"])
def test_low_precision_logits_are_compared_in_fp32(objective: str, dtype: torch.dtype) -> None:
    inputs = batch(dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    words: Any = {"objective": objective, "kd_weight": 0.5, "temperature": 2.0}
    loss, same = (drkl.distillation_loss(**x, **words) for x in (inputs, wide))
    assert loss.dtype == torch.float32 and torch.equal(loss, same)
    student = inputs["student_logits"].requires_grad_()
    drkl.distillation_loss(**inputs, **words).backward()
    assert student.grad is not None and student.grad.dtype == dtype


def test_dtypes_of_student_and_teacher_may_differ() -> None:
    inputs = batch()
    inputs["teacher_logits"] = inputs["teacher_logits"].bfloat16()
    same = {**inputs, "teacher_logits": inputs["teacher_logits"].double()}
    loss = drkl.distillation_loss(**inputs, objective="rkl")
    assert float(loss) == pytest.approx(float(drkl.distillation_loss(**same, objective="rkl")), rel=1e-6)


def test_autocast_changes_nothing() -> None:
    inputs = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = drkl.distillation_loss(**inputs, kd_weight=0.5, temperature=2.0)
    assert torch.equal(inside, drkl.distillation_loss(**inputs, kd_weight=0.5, temperature=2.0))


def test_a_teacher_is_not_needed_where_none_is_read() -> None:
    inputs = batch()
    student, labels = inputs["student_logits"], inputs["labels"]
    alone = drkl.distillation_loss(student, None, labels, objective="ce")
    assert_near(alone, drkl.distillation_loss(student, None, labels, objective="drkl", kd_weight=0.0), 6, 20.0)
    assert torch.equal(alone, drkl.distillation_loss(student, torch.full((1, 3), math.nan), labels, objective="ce"))
    by_torch = torch.nn.functional.cross_entropy(student.reshape(8, -1), labels.reshape(-1))
    torch.testing.assert_close(alone, by_torch, rtol=1e-13, atol=1e-15)


Z = torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.long)
IN_VOCABULARY = "expected ids in [0, 5) or -100 for positions that do not count."
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0."),
    ({"temperature": -1.0}, "temperature is -1.0; expected a finite number above 0."),
    ({"temperature": math.nan}, "temperature is nan; expected a finite number above 0."),
    ({"temperature": math.inf}, "temperature is inf; expected a finite number above 0."),
    ({"kd_weight": 1.1}, "kd_weight is 1.1; expected a number in [0, 1]."),
    ({"kd_weight": -0.1}, "kd_weight is -0.1; expected a number in [0, 1]."),
    ({"kd_weight": math.nan}, "kd_weight is nan; expected a number in [0, 1]."),
    ({"reduction": "batchmean"}, "reduction is 'batchmean'; expected 'mean', 'sum' or 'none'."),
    ({"num_tokens": -1}, "num_tokens is -1; expected the number of valid tokens of the optimiser step."),
    (
        {"objective": "rlk"},
        "There is no objective 'rlk'. Did you mean 'rkl'? Known: " + ", ".join(drkl.OBJECTIVES) + ", decoupled.",
    ),
    ({"labels": LABELS[0]}, "labels has shape [3]; expected [2, 3], one per position."),
    ({"token_mask": LABELS.T}, "token_mask has shape [3, 2]; expected [2, 3], one per position."),
    ({"labels": LABELS + 5}, "labels run from 5 to 5; expected ids in [0, 5) or -100 for positions that do not count."),
    (
        {"labels": LABELS - 1},
        "labels run from -1 to -1; expected ids in [0, 5) or -100 for positions that do not count.",
    ),
    (
        {"labels": None, "kd_weight": 0.9},
        "Objective 'drkl' needs labels here (kd_weight < 1 adds a cross-entropy), but labels is None.",
    ),
    (
        {"labels": None, "objective": drkl.make_objective("drkl", target="label")},
        "Objective 'drkl' needs labels here (its target is the label), but labels is None.",
    ),
    (
        {"labels": None, "objective": "ce"},
        "Objective 'ce' needs labels here (its target is the label), but labels is None.",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=str)
@pytest.mark.usefixtures("unchecked")
def test_refuses(change: dict[str, Any], message: str) -> None:
    words = {"labels": LABELS, **change}
    with pytest.raises(DrklError) as caught:
        drkl.distillation_loss(Z, Z, **words)
    assert str(caught.value) == message
    with pytest.raises(DrklError) as caught:
        drkl.fused_distillation_loss(Z, torch.zeros(5, 5), Z, torch.zeros(5, 5), **words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (None, "Objective 'drkl' compares with a teacher, but teacher_logits is None."),
        (
            torch.zeros(2, 3, 7),
            "The teacher scores 7 tokens and the student 5. Every objective compares the two over one vocabulary. "
            "If the tokenizers agree up to padding, vocab_size (at most 5, the ids they share) cuts both before the "
            "softmax; if they differ, the two cannot be compared.",
        ),
        (
            torch.zeros(2, 4, 5),
            "teacher_logits has shape [2, 4, 5] and student_logits [2, 3, 5]; expected the same positions.",
        ),
    ],
    ids=["none", "vocabulary", "positions"],
)
def test_refuses_a_teacher(teacher: Tensor | None, message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.distillation_loss(Z, teacher, LABELS)
    assert str(caught.value) == message


def test_an_ignored_label_may_lie_outside_the_mask_only() -> None:
    labels = LABELS.clone()
    labels[0, 0] = 99
    mask = torch.ones_like(labels)
    mask[0, 0] = 0
    assert float(drkl.distillation_loss(Z, Z, labels, token_mask=mask)) == 0.0
    with pytest.raises(DrklError, match="labels run from 0 to 99"):
        drkl.distillation_loss(Z, Z, labels)


def test_settings_scale_the_objective_by_the_square_of_the_temperature_on_demand() -> None:
    assert make_settings("rkl", 3.0, 0.5, True, "mean").kd_factor == 4.5
    assert make_settings("rkl", 3.0, 0.5, False, "mean").kd_factor == 0.5
