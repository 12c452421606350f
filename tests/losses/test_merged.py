"""Ids that count as one class: against the equation, fused against dense, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl import DrklError
from drkl.losses import fused
from tests.losses.test_fused import VOCAB, Pair, assert_equal, labels
from tests.losses.test_options import WEIGHTS, Seen
from tests.objectives.cases import FEW, Case, name

KINDS = ("fkl", "rkl", "gjs", "ab", "drkl", "drkl-label", "drkl-0.9-student", "ce")
every = pytest.mark.parametrize("case", [case for case in FEW if case.id in KINDS], ids=name)
SETS = [(15, 2, 16), (4, 9, 12, 15)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", 5 * VOCAB * 8)
    monkeypatch.setattr(fused, "BLOCK_BYTES", 2 * VOCAB * 8)


def merged_logits(logits: list[float], ids: tuple[int, ...], temperature: float) -> list[float]:
    """Logits whose softmax at this temperature has the summed probability at the first place, then the other ids."""
    total = sum(math.exp(logits[i] / temperature) for i in ids)
    return [temperature * math.log(total), *(z for i, z in enumerate(logits) if i not in ids)]


def reference(case: Case, student: Tensor, teacher: Tensor, seen: Tensor, ids: tuple[int, ...], **words: Any) -> Any:
    temperature, kd_weight = words.get("temperature", 1.0), words.get("kd_weight", 1.0)
    values = []
    for z, y, label in zip(student.tolist(), teacher.tolist(), seen.tolist(), strict=True):
        if label < 0:
            values.append(0.0)
            continue
        others = [i for i in range(len(z)) if i not in ids]
        place = 0 if label in ids else 1 + others.index(label)
        value = float(
            case.expected(
                merged_logits(z, ids, temperature), merged_logits(y, ids, temperature), place, temperature=temperature
            )
        )
        q = np.exp(z) / np.exp(z).sum()
        observed = q[list(ids)].sum() if label in ids else q[label]
        values.append(kd_weight * value - (1 - kd_weight) * math.log(observed))
    return np.array(values)


@every
@pytest.mark.parametrize("words", [{}, {"temperature": 2.5}, {"temperature": 0.5, "kd_weight": 0.3}], ids=str)
@pytest.mark.parametrize("ids", SETS, ids=str)
def test_the_summed_probability_is_one_class(case: Case, words: dict[str, Any], ids: tuple[int, ...]) -> None:
    pair = Pair(bias=True, scale=0.4)
    seen = labels()
    seen[1] = ids[-1]  # a label among them
    student = torch.nn.functional.linear(pair.hidden, pair.weight, pair.bias) * 0.4
    teacher = pair.teacher.logits(pair.teacher_hidden)
    found = drkl.distillation_loss(
        student, teacher, seen, objective=case.objective, merged_ids=ids, reduction="none", **words
    )
    expected = reference(case, student, teacher, seen, ids, **words)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("ids", SETS, ids=str)
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"temperature": 2.0, "kd_weight": 0.3, "token_weights": WEIGHTS},
        {"kd_weight": 0.0},
    ],
    ids=["plain", "mixed", "ce"],
)
def test_fused_equals_dense(case: Case, ids: tuple[int, ...], words: dict[str, Any]) -> None:
    seen = labels()
    seen[1], seen[2] = ids[-1], VOCAB - 1
    words = {"labels": seen, "objective": case.objective, "merged_ids": ids, **words}
    pair = Pair(bias=True, scale=1.5, softcap=2.0)
    assert_equal(pair.run("fused", 3.0, **words), pair.run("dense", 3.0, **words))
    pair = Pair()
    words["vocab_size"] = VOCAB if VOCAB - 1 in [*ids, *seen.tolist()] else VOCAB - 1
    assert_equal(pair.run("fused", **words), pair.run("dense", **words))


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_the_gradient_is_that_of_differences(objective: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight, teacher = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3), (6, 3), (2, 6)))
    seen = torch.tensor([5, 1])
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    words: dict[str, Any] = {"objective": objective, "merged_ids": (1, 4), "kd_weight": 0.8, "temperature": 1.5}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return drkl.distillation_loss(hidden @ weight.T, teacher, seen, **words)

    if objective not in ("akl", "todi"):  # their weights get no gradient, and differences see them
        params = {"gamma": 0.5} if objective == "drkl" else {}
        words["objective"] = drkl.make_objective(objective, **params)
        assert torch.autograd.gradcheck(loss, leaves)
    found = torch.autograd.grad(
        drkl.fused_distillation_loss(hidden, weight, torch.eye(6).double()[:2], teacher_weight(teacher), seen, **words),
        leaves,
    )
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def teacher_weight(logits: Tensor) -> Tensor:
    """A head whose logits of the first unit vectors are these."""
    weight = torch.zeros(6, 6, dtype=logits.dtype)
    weight[:, :2] = logits.T
    return weight


def test_two_ends_for_one_event_are_no_difference() -> None:
    """The student stops with 1 where the teacher stops with 4, and all else is the same."""
    student = torch.tensor([[0.0, 9.0, 1.0, 2.0, -9.0]], dtype=torch.float64)
    teacher = student[:, [0, 4, 2, 3, 1]]
    for objective in ("fkl", "rkl", "drkl", "gjs"):
        apart = drkl.distillation_loss(student, teacher, objective=objective)
        merged = drkl.distillation_loss(student, teacher, objective=objective, merged_ids=[1, 4])
        assert float(apart) > 0.5 and abs(float(merged)) < 1e-12


@pytest.mark.parametrize("which", ["fused", "dense"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_observer_sees_the_merged_vocabulary_before_the_temperature(which: str, temperature: float) -> None:
    pair, seen, observed, ids = Pair(bias=True), Seen(), labels(), (15, 2, 16)
    pair.run(which, labels=observed, objective="fkl", merged_ids=ids, temperature=temperature, observe=seen)
    keep = observed >= 0
    logits = torch.nn.functional.linear(pair.hidden, pair.weight, pair.bias)[keep]
    others = [i for i in range(VOCAB) if i not in ids]
    expected = logits.softmax(-1)
    found = seen.all("student").softmax(-1)
    torch.testing.assert_close(found[:, 2], expected[:, list(ids)].sum(-1))
    torch.testing.assert_close(found[:, [i for i in range(VOCAB - 2) if i != 2]], expected[:, others])
    assert seen.all("teacher").shape == found.shape
    place = {token: 2 for token in ids} | {i: i for i in others}
    assert seen.all("labels").tolist() == [place[token] for token in observed[keep].tolist()]


def test_the_place_of_a_merged_id_is_taken_by_the_last() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    seen = Seen()
    drkl.distillation_loss(logits, logits, torch.tensor([4]), merged_ids=[2, 0], observe=seen)
    assert seen.all("student")[0, 1:].tolist() == [1.0, 4.0, 3.0] and seen.all("labels").tolist() == [2]


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_excluded_ids_have_no_gradient(which: str) -> None:
    bias = torch.tensor([0.0, -math.inf, 0.5, -math.inf], dtype=torch.float64)
    hidden = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    head = drkl.LMHead(weight, bias)
    if which == "fused":
        loss = drkl.fused_distillation_loss(hidden, head, hidden.detach(), head.detached(), merged_ids=[1, 3])
    else:
        logits = head.logits(hidden)
        loss = drkl.distillation_loss(logits, logits.detach() + bias, objective="fkl", merged_ids=[1, 3])
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("which", ["fused", "dense"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, VOCAB], rf"merged_ids has the id {VOCAB}; expected ids in \[0, {VOCAB}\), which are compared"),
        ([-1, 3], r"merged_ids has the id -1; expected ids in \[0"),
        ([3, 5, 3], r"merged_ids has the id 3 more than once"),
        ([3], r"merged_ids is \[3\]; expected at least two ids"),
        ([], r"merged_ids is \[\]; expected at least two ids"),
        ([True, 3], r"expected token ids, whole numbers"),
    ],
)
def test_ids_that_cannot_be_merged_are_refused(which: str, ids: Any, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        Pair().run(which, labels=labels(), merged_ids=ids)
    if ids == [3, VOCAB]:
        with pytest.raises(DrklError, match=r"expected ids in \[0, 3\)"):
            Pair().run(which, labels=labels().clamp(max=2), merged_ids=[1, 3], vocab_size=3)
