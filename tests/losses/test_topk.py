"""A teacher known on k tokens and the rest: against the equations on k + 1 classes, the bound, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp  # type: ignore[import-untyped]
from torch import Tensor

import drkl
from drkl import DrklError, LMHead, TopK
from drkl.losses import fused
from drkl.objectives.base import on_classes
from tests.losses.test_fused import POSITIONS, VOCAB, Pair, assert_equal, labels, tensor
from tests.objectives import reference
from tests.objectives.cases import CASES, FEW, Case

COMPARED = [case for case in CASES if case.objective.needs_teacher and on_classes(case.objective)]
MAIN = ("fkl", "rkl", "ab", "drkl", "drkl-label", "drkl-0.9-student", "dkd-1.0-0.5-teacher")


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """All cases, those beside `MAIN` among the slow tests."""
    marks = [() if case.id in MAIN else pytest.mark.slow for case in cases]
    params = [pytest.param(case, marks=mark, id=case.id) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize("case", params)


every, few = parametrized(COMPARED), parametrized([case for case in FEW if case in COMPARED])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", 5 * VOCAB * 8)
    monkeypatch.setattr(fused, "BLOCK_BYTES", 2 * VOCAB * 8)


def known(logits: Tensor, k: int, *temperatures: float, seen: Tensor | None = None) -> TopK:
    observed = None if seen is None else seen.clamp(min=0)
    return TopK.of_logits(logits, k, temperatures or (1.0,), observed)


def value_on_classes(case: Case, z: list[float], y: list[float], label: int, k: int, temperature: float = 1.0) -> float:
    """The value from probabilities of the k tokens and the sum of all others; the label apart where it is asked for."""
    q, p = reference.softmax(z, temperature), reference.softmax(y, temperature)
    order = sorted(range(len(y)), key=lambda i: (-y[i], i))
    listed = order[:k]
    if case.objective.needs_labels and label not in listed:
        listed.append(label)
    others = [i for i in range(len(y)) if i not in listed]
    q, p = ([x[i] for i in listed] + [mp.fsum(x[i] for i in others)] for x in (q, p))
    target = listed.index(label) if case.objective.needs_labels else 0
    return float(case.by_hand(q, p, target, target))


def references(case: Case, pair: Pair, seen: Tensor, k: int, temperature: float = 1.0, **_: Any) -> np.ndarray:
    student = LMHead(pair.weight, pair.bias, pair.scale, pair.softcap).logits(pair.hidden)
    teacher = pair.teacher.logits(pair.teacher_hidden)
    rows = zip(student.tolist(), teacher.tolist(), seen.tolist(), strict=True)
    return np.array([0.0 if y < 0 else value_on_classes(case, z, t, y, k, temperature) for z, t, y in rows])


@every
@pytest.mark.parametrize("k", [1, 4, VOCAB - 1, VOCAB])
def test_the_objective_sees_k_tokens_and_the_rest(case: Case, k: int) -> None:
    pair, seen = Pair(bias=True, scale=0.4), labels()
    student = LMHead(pair.weight, pair.bias, 0.4).logits(pair.hidden)
    teacher = known(pair.teacher.logits(pair.teacher_hidden), k, seen=seen)
    found = drkl.distillation_loss(student, teacher, seen, objective=case.objective, reduction="none")
    np.testing.assert_allclose(found.numpy(), references(case, pair, seen, k), rtol=1e-9, atol=1e-10)


@few
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_each_temperature_has_its_own_rest(case: Case, temperature: float) -> None:
    pair, seen = Pair(), labels()
    teacher = known(pair.teacher.logits(pair.teacher_hidden), 3, 1.0, temperature, seen=seen)
    words: dict[str, Any] = {"objective": case.objective, "temperature": temperature, "reduction": "none"}
    found = drkl.fused_distillation_loss(pair.hidden, pair.weight, teacher, None, seen, **words)
    np.testing.assert_allclose(found.numpy(), references(case, pair, seen, 3, temperature), rtol=1e-9, atol=1e-10)


def run(which: str, pair: Pair, teacher: TopK, **words: Any) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in (pair.hidden, pair.weight)]
    head = LMHead(leaves[1], pair.bias, pair.scale, pair.softcap)
    if which == "fused":
        loss = drkl.fused_distillation_loss(leaves[0], head, teacher, None, **words)
    else:
        loss = drkl.distillation_loss(head.logits(leaves[0]), teacher, **words)
    (3.0 * loss).backward()
    return [loss.detach(), *(x.grad for x in leaves)]


@every
@pytest.mark.parametrize("k", [1, 5])
def test_fused_equals_dense(case: Case, k: int) -> None:
    pair, seen = Pair(bias=True, scale=1.5, softcap=2.0), labels()
    teacher = known(pair.teacher.logits(pair.teacher_hidden), k, 1.0, 2.0, seen=seen)
    for words in ({}, {"temperature": 2.0, "kd_weight": 0.3, "t2_scaling": True, "num_tokens": 40}):
        both: dict[str, Any] = {"labels": seen, "objective": case.objective, **words}
        assert_equal(run("fused", pair, teacher, **both), run("dense", pair, teacher, **both))


@pytest.mark.parametrize("objective", ["fkl", "rkl", "gjs", "tvd", "drkl", "dkd", "srkl"])
def test_the_gradient_is_that_of_differences(objective: str) -> None:
    hidden, weight, logits = tensor(3, 4, seed=1), tensor(9, 4, seed=2), tensor(3, 9, seed=3)
    teacher = known(logits, 4, 1.5)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return drkl.distillation_loss(hidden @ weight.T, teacher, objective=objective, temperature=1.5)

    assert torch.autograd.gradcheck(loss, leaves)


@few
def test_all_but_one_token_is_everything(case: Case) -> None:
    pair, seen = Pair(), labels()
    logits = pair.teacher.logits(pair.teacher_hidden)
    words: dict[str, Any] = {"labels": seen, "objective": case.objective}
    found = run("fused", pair, known(logits, VOCAB - 1, seen=seen), **words)
    assert_equal(found, pair.run("dense", 3.0, **words)[:3])


numbers = st.integers(-96, 96).map(lambda eighths: eighths / 8)  # no two that are equal but for rounding


@st.composite
def two_models(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    size = draw(st.integers(3, 9))
    z, y = (draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(2))
    return (
        torch.tensor([z], dtype=torch.float64),
        torch.tensor([y], dtype=torch.float64),
        draw(st.integers(1, size - 1)),
    )


BOUNDS = [case for case in COMPARED if on_classes(case.objective) == "bound" and not case.objective.needs_labels]


@parametrized(BOUNDS)
@settings(max_examples=30)
@given(models=two_models())
def test_coarser_classes_give_a_lower_bound(case: Case, models: tuple[Tensor, Tensor, int]) -> None:
    student, teacher, k = models

    def value(student: Tensor, teacher: Tensor | TopK) -> float:
        return float(drkl.distillation_loss(student, teacher, objective=case.objective))

    coarse, finer, whole = (value(student, part) for part in (known(teacher, k), known(teacher, k + 1), teacher))
    slack = 1e-9 * max(1.0, abs(whole))
    assert -slack <= coarse <= finer + slack <= whole + 2 * slack
    assert abs(value(teacher, known(teacher, k))) <= 1e-9


@given(models=two_models())
def test_mass_outside_of_the_tokens_does_not_escape(models: tuple[Tensor, Tensor, int]) -> None:
    """Moving a student's mass from the k tokens to others is seen: the last class is part of every KL."""
    _, teacher, k = models
    away = teacher.clone()
    away[0, known(teacher, k).ids[0]] -= 5.0
    if k < teacher.shape[1]:
        assert float(drkl.distillation_loss(away, known(teacher, k), objective="rkl")) > 0


def test_the_target_is_the_teachers_top_token_though_the_rest_has_more() -> None:
    logits = torch.full((1, 40), 0.0, dtype=torch.float64)
    logits[0, 7] = 0.5  # .04 of the mass; the rest has .9
    student = torch.zeros(1, 40, dtype=torch.float64)
    q_t, p_t = 1 / 40, math.exp(0.5) / (39 + math.exp(0.5))
    b = q_t * math.log(q_t / p_t) + (1 - q_t) * math.log((1 - q_t) / (1 - p_t))
    found = drkl.distillation_loss(student, known(logits, 3), objective="drkl")
    assert float(found) == pytest.approx(b, rel=1e-9)  # the tails are flat on both sides: K = 0


def test_ties_take_the_lower_ids() -> None:
    logits = torch.zeros(2, 600)
    logits[1, 500] = 1.0
    topk = known(logits, 3)
    assert topk.ids.tolist() == [[0, 1, 2], [500, 0, 1]]
    assert topk.log_rest[:, 0].tolist() == pytest.approx([math.log(597)] * 2)


def test_a_tail_of_next_to_nothing_keeps_its_digits() -> None:
    logits = torch.tensor([[60.0, 20.0, 3.0, 2.0]])
    topk = known(logits, 2)
    assert float(topk.log_rest) == pytest.approx(math.log(math.exp(3) + math.exp(2)), rel=1e-6)
    student = torch.tensor([[60.0, 5.0, 4.0, 1.0]])
    found = drkl.distillation_loss(student, topk, objective="drkl", temperature=1.0)
    q, p = (np.array([math.exp(z - x[0]) for z in x]) for x in (student[0].tolist(), logits[0].tolist()))
    q_tail, p_tail = (np.array([x[1], x[2] + x[3]]) / x[1:].sum() for x in (q, p))
    assert float(found) == pytest.approx(0.5 * float((q_tail * np.log(q_tail / p_tail)).sum()), rel=1e-5)


def test_masses() -> None:
    p = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    mass, tail = known(torch.from_numpy(np.log(p))[None], 2).masses()
    assert float(mass) == pytest.approx(0.8) and float(tail) == pytest.approx(0.3 / 0.5)
    mass, tail = known(torch.tensor([[0.0, -math.inf, -math.inf]]), 1).masses()
    assert float(mass) == 1 and float(tail) == 1


def test_fewer_tokens_than_k_and_excluded_ones() -> None:
    """A server may give fewer; -1 is no token, on either side."""
    pair = Pair()
    logits = pair.teacher.logits(pair.teacher_hidden)
    three = known(logits, 3)
    padded = TopK(
        torch.cat([three.ids, torch.full((POSITIONS, 2), -1)], -1),
        torch.cat([three.logits, torch.zeros(POSITIONS, 2)], -1), three.log_rest, VOCAB,
    )  # fmt: skip
    for case in (case for case in COMPARED if case.id in MAIN and not case.objective.needs_labels):
        words: dict[str, Any] = {"objective": case.objective}
        for which in ("fused", "dense"):
            assert_equal(run(which, pair, padded, **words), run(which, pair, three, **words))


def test_a_token_that_the_teacher_excludes_makes_reverse_kl_infinite() -> None:
    logits = torch.tensor([[2.0, 1.0, -math.inf, -math.inf]])
    student = torch.zeros(1, 4)
    for k in (1, 3):
        topk = known(logits, k)
        values = [float(drkl.distillation_loss(student, topk, objective=name)) for name in ("rkl", "fkl")]
        fused_value = drkl.fused_distillation_loss(torch.eye(4)[:1], torch.zeros(4, 4), topk, None, objective="rkl")
        if k == 3:
            assert values[0] == math.inf and float(fused_value) == math.inf
        assert math.isfinite(values[1])


@few
@pytest.mark.parametrize("ids", [(15, 2, 16), (4, 9, 12, 15)], ids=str)
def test_merged_ids(case: Case, ids: tuple[int, ...]) -> None:
    """With every member among the k tokens it is the summed probability; without any, that of the rest has them."""
    pair, seen = Pair(), labels()
    logits = pair.teacher.logits(pair.teacher_hidden)
    logits[:, ids] += 25.0
    words: dict[str, Any] = {"labels": seen, "objective": case.objective, "merged_ids": ids, "kd_weight": 0.7}
    teacher = known(logits, 6, seen=seen)
    assert_equal(run("fused", pair, teacher, **words), run("dense", pair, teacher, **words))
    if not case.objective.needs_labels:
        columns = [i for i in range(VOCAB) if i not in ids]

        def merged(values: Tensor) -> list[list[float]]:
            return torch.cat([values[:, ids].logsumexp(-1, keepdim=True), values[:, columns]], -1).tolist()

        student = pair.hidden @ pair.weight.T
        rows = zip(merged(student), merged(logits), seen.tolist(), strict=True)
        expected = [0.0 if y < 0 else value_on_classes(case, z, t, 0, 6 - len(ids) + 1) for z, t, y in rows]
        words = {"objective": case.objective, "merged_ids": ids, "reduction": "none"}
        found = drkl.distillation_loss(student, teacher, seen, **words)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_an_observer_sees_what_is_known() -> None:
    pair, seen = Pair(), labels()
    teacher = known(pair.teacher.logits(pair.teacher_hidden), 4, seen=seen)
    chunks: list[Any] = []
    run("fused", pair, teacher, labels=seen, observe=chunks.append)
    keep = seen >= 0
    assert torch.equal(torch.cat([chunk.teacher.ids for chunk in chunks]), teacher.ids[keep])
    assert all(len(chunk.teacher) == len(chunk.student) for chunk in chunks)


def test_positions_of_any_shape_and_parts() -> None:
    pair, seen = Pair(shape=(3, 4)), labels((3, 5))[:, :4]
    flat = known(pair.teacher.logits(pair.teacher_hidden).reshape(12, VOCAB), 3)
    shaped = TopK(flat.ids.view(3, 4, 3), flat.logits.view(3, 4, 3), flat.log_rest.view(3, 4, 1), VOCAB)
    found = drkl.fused_distillation_loss(pair.hidden, pair.weight, shaped, None, seen)
    again = drkl.fused_distillation_loss(pair.hidden.reshape(12, -1), pair.weight, flat, None, seen.reshape(-1))
    assert torch.equal(found, again)
    parts = TopK.cat([flat[:5], flat[5:]])
    assert (
        torch.equal(parts.ids, flat.ids) and torch.equal(parts.log_rest, flat.log_rest) and parts.label_logits is None
    )


def some(**changes: Any) -> TopK:
    values: dict[str, Any] = {
        "ids": torch.tensor([[1, 2]]), "logits": torch.zeros(1, 2), "log_rest": torch.zeros(1, 1), "vocab_size": VOCAB,
    } | changes  # fmt: skip
    return TopK(**values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"objective": lambda q, p, y: (q - p).abs().sum(-1)}, "on_classes"),
        ({"objective": drkl.make_objective("ab", alpha=0.0, beta=0.0)}, "every token counts alike"),
        ({"objective": drkl.decoupled("rkl", drkl.make_objective("ab", alpha=1.0, beta=-1.0))}, "its tail is 'ab'"),
        ({"temperature": 2.0}, "known with the rest at 1 alone"),
        ({"objective": drkl.make_objective("drkl", target="label"), "labels": torch.tensor([9])}, "its logit is not"),
        ({"vocab_size": VOCAB - 1}, "of 17 ids, and the student is compared on 16"),
        ({"teacher": some(ids=torch.tensor([[1, VOCAB]]))}, "ids up to 17; expected ids in"),
        ({"teacher": some(ids=torch.tensor([[-1, 2]]))}, "or -1 after the first"),
        ({"teacher": known(torch.zeros(2, VOCAB), 2)}, "is of positions"),
        ({"teacher_head": torch.zeros(VOCAB, 3)}, "leave teacher_head out"),
    ],
)
def test_refusals(words: dict[str, Any], message: str) -> None:
    words = {"teacher": some(), "teacher_head": None, **words}
    teacher, head = words.pop("teacher"), words.pop("teacher_head")
    hidden, weight = torch.zeros(1, 3), torch.zeros(VOCAB, 3)
    with pytest.raises(DrklError, match=message):
        drkl.fused_distillation_loss(hidden, weight, teacher, head, **words)
    if head is None:
        with pytest.raises(DrklError, match=message):
            drkl.distillation_loss(hidden @ weight.T, teacher, **words)


@pytest.mark.parametrize(
    "changes", [{"logits": torch.zeros(1, 3)}, {"log_rest": torch.zeros(1, 2)}, {"log_rest": torch.zeros(1)}], ids=str
)
def test_shapes_that_do_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(DrklError, match="one for each temperature"):
        some(**changes)


def test_more_refusals_of_what_is_made() -> None:
    with pytest.raises(DrklError, match="one for each position"):
        some(label_logits=torch.zeros(2))
    for k in (0, VOCAB + 1):
        with pytest.raises(DrklError, match=f"k is {k}; expected a number from 1 to {VOCAB}"):
            known(torch.zeros(1, VOCAB), k)


def test_a_function_may_say_that_classes_are_alike_to_it() -> None:
    def half_distance(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return 0.5 * (student_logp.exp() - teacher_logp.exp()).abs().sum(-1)

    half_distance.on_classes = "bound"  # type: ignore[attr-defined]
    pair = Pair()
    teacher = known(pair.teacher.logits(pair.teacher_hidden), 4)
    found = run("fused", pair, teacher, objective=half_distance)
    assert_equal(found, run("dense", pair, teacher, objective="tvd"))


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_a_label_that_the_teacher_excludes_where_nothing_else_is_left(which: str) -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    student, seen = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True), torch.tensor([2])
    objective = drkl.make_objective("dkd", target="label", beta=0.0)
    words: dict[str, Any] = {"labels": seen, "objective": objective}
    teacher = known(logits, 1, seen=seen)
    if which == "fused":
        loss = drkl.fused_distillation_loss(student, torch.eye(3, dtype=torch.float64), teacher, None, **words)
    else:
        loss = drkl.distillation_loss(student, teacher, **words)
    loss.backward()
    # The label has no mass in the teacher: KL(b_p || b_q) = -log(1 - q_t).
    expected = -math.log1p(-math.exp(2.0) / (1.0 + math.exp(1.0) + math.exp(2.0)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert student.grad is not None and student.grad.isfinite().all()
