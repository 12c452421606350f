"""The statistics of a position, against numpy and scipy."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from drkl.losses import token_statistics
from tests.objectives import tensors


def by_numpy(z: np.ndarray, y: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    q, p = scipy.special.softmax(z, -1), scipy.special.softmax(y, -1)
    rows, best, target = np.arange(len(z)), z.argmax(-1), y.argmax(-1)
    return {
        "nll": -np.log(q[rows, labels]),
        "accuracy": (best == labels).astype(float),
        "entropy": scipy.stats.entropy(q, axis=-1),
        "confidence": q.max(-1),
        "fkl": scipy.stats.entropy(p, q, axis=-1),
        "rkl": scipy.stats.entropy(q, p, axis=-1),
        "tvd": 0.5 * np.abs(p - q).sum(-1),
        "agreement": (best == target).astype(float),
        "overconfidence": q[rows, best] - p[rows, best],
        "target_gap": q[rows, target] - p[rows, target],
        "teacher_entropy": scipy.stats.entropy(p, axis=-1),
        "teacher_confidence": p.max(-1),
    }


def test_statistics() -> None:
    student, teacher, labels = tensors.logits(rows=30, seed=1)
    teacher[:10] = student[:10] + 0.3 * teacher[:10]  # some positions agree
    labels[5:15] = student[5:15].argmax(-1)
    expected = by_numpy(student.numpy(), teacher.numpy(), labels.numpy())
    found = token_statistics(student, teacher, labels)._asdict()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-10, atol=1e-13, err_msg=key)
    assert {0.0, 1.0} == set(expected["agreement"]) == set(expected["accuracy"])


def test_without_a_teacher_its_columns_are_none() -> None:
    student, teacher, labels = tensors.logits()
    alone = token_statistics(student, None, labels)
    both = token_statistics(student, teacher, labels)
    assert all(torch.equal(a, b) for a, b in zip(alone[:4], both[:4], strict=True))
    assert alone[4:] == (None,) * 8


def test_statistics_are_detached_and_in_fp32() -> None:
    student, teacher, labels = tensors.logits()
    found = token_statistics(student.bfloat16().requires_grad_(), teacher.bfloat16(), labels)
    assert all(x is not None and x.dtype == torch.float32 and not x.requires_grad for x in found)
    wide = token_statistics(student.bfloat16().float(), teacher.bfloat16().float(), labels)
    assert all(torch.equal(a, b) for a, b in zip(found, wide, strict=True))  # type: ignore[arg-type]


def test_excluded_tokens_make_no_nan() -> None:
    student = torch.tensor([[1.0, -math.inf, 0.0], [1.0, 0.5, 0.0]])
    teacher = torch.tensor([[2.0, -math.inf, 0.0], [2.0, -math.inf, 0.0]])
    found = token_statistics(student, teacher, torch.tensor([0, 0]))
    assert not any(x.isnan().any() for x in found if x is not None)
    assert found.rkl is not None and found.rkl.tolist()[1] == math.inf and math.isfinite(found.rkl.tolist()[0])
    np.testing.assert_allclose(found.entropy[0], scipy.stats.entropy(scipy.special.softmax([1.0, 0.0])), rtol=1e-6)


def test_ties_go_to_the_lowest_index() -> None:
    found = token_statistics(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([1]))
    assert found.agreement is not None and float(found.agreement) == float(found.accuracy) == 1.0
    missed = token_statistics(torch.tensor([[0.0, 3.0, 3.0]]), None, torch.tensor([2]))
    assert float(missed.accuracy) == 0.0


def test_positions_may_be_none() -> None:
    student, teacher, labels = (x[:0] for x in tensors.logits())
    assert all(x is not None and x.shape == (0,) for x in token_statistics(student, teacher, labels))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float) -> None:
    student, teacher = torch.tensor([[size, 0.0, 1.0]]), torch.tensor([[0.0, size, 1.0]])
    found = token_statistics(student, teacher, torch.tensor([0]))
    assert all(x is not None and x.isfinite().all() for x in found)


def test_shapes_are_checked_under_pytest() -> None:
    student, teacher, labels = tensors.logits()
    with pytest.raises(jaxtyping.TypeCheckError):
        token_statistics(student, teacher[:, :3], labels)
