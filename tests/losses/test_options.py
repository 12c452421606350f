"""What both losses take besides the objective: a shared vocabulary, weights of positions, statistics, sharded heads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl import DrklError, LMHead
from drkl.losses import fused
from tests.losses.test_fused import POSITIONS, STUDENT, TEACHER, VOCAB, Pair, assert_equal, labels, tensor
from tests.objectives import reference
from tests.objectives.cases import FEW, Case, name
from tests.rounding import assert_near, rounding

every = pytest.mark.parametrize("case", FEW, ids=name)
WEIGHTS = torch.linspace(0.0, 2.0, POSITIONS, dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", 5 * VOCAB * 8)
    monkeypatch.setattr(fused, "BLOCK_BYTES", 2 * VOCAB * 8)


@every
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_of_positions_fused_and_dense(case: Case, softcap: float | None) -> None:
    words: dict[str, Any] = {
        "labels": labels(),
        "objective": case.objective,
        "token_weights": WEIGHTS,
        "kd_weight": 0.7,
    }
    pair = Pair(bias=True, scale=1.5, softcap=softcap)
    assert_equal(pair.run("fused", 3.0, **words), pair.run("dense", 3.0, **words))


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_a_weighted_loss_is_the_weighted_sum_over_the_count(which: str) -> None:
    pair = Pair()
    values = drkl.distillation_loss(
        pair.hidden @ pair.weight.T, pair.teacher.logits(pair.teacher_hidden), labels(), reduction="none"
    )
    found = pair.run(which, labels=labels(), token_weights=WEIGHTS)[0]
    assert found is not None
    assert float(found) == pytest.approx(float((values * WEIGHTS).sum()) / 9, rel=1e-12)
    none = pair.run(which, labels=labels(), token_weights=torch.zeros(POSITIONS))
    assert all(float(x.abs().sum()) == 0.0 for x in none if x is not None)


def test_a_position_without_weight_may_be_infinite() -> None:
    student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]])
    leaf = student.clone().requires_grad_()
    loss = drkl.distillation_loss(leaf, teacher, objective="rkl", token_weights=torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[0] == 0).all()
    hidden, head = torch.ones(2, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    excludes = LMHead(torch.zeros(3, 1), bias=torch.tensor([0.0, 1.0, -math.inf]))
    nothing = drkl.fused_distillation_loss(
        hidden, head, torch.ones(2, 1), excludes, objective="rkl", token_weights=torch.zeros(2)
    )
    nothing.backward()
    assert nothing.item() == 0.0 and hidden.grad is not None and head.grad is not None
    assert (hidden.grad == 0).all() and (head.grad == 0).all()


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_weights_of_another_shape_are_refused(which: str) -> None:
    with pytest.raises(DrklError, match=r"token_weights has shape \[3\]; expected \[13\], one per position"):
        Pair().run(which, labels=labels(), token_weights=torch.ones(3))


SHARED = 12


def unequal(**words: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Fused with vocab_size on heads of 17 and 19 tokens, and dense on both heads cut by hand."""
    hidden, weight, bias = tensor(6, STUDENT, seed=0), tensor(VOCAB, STUDENT, seed=1), tensor(VOCAB, seed=2)
    teacher_hidden, teacher_weight = tensor(6, TEACHER, seed=3), tensor(VOCAB + 2, TEACHER, seed=4)
    found = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    words = {"labels": torch.tensor([0, 3, 11, -100, 7, 2]), **words}
    head = LMHead(found[1], found[2])
    drkl.fused_distillation_loss(found[0], head, teacher_hidden, teacher_weight, vocab_size=SHARED, **words).backward()
    expected = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = expected[0] @ expected[1][:SHARED].T + expected[2][:SHARED]
    drkl.distillation_loss(logits, teacher_hidden @ teacher_weight[:SHARED].T, **words).backward()
    return [x.grad for x in found if x.grad is not None], [x.grad for x in expected if x.grad is not None]


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_unequal_vocabularies_are_cut_before_the_softmax(objective: str) -> None:
    found, expected = unequal(objective=objective, kd_weight=0.6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (found[1][SHARED:] == 0).all()
    student, teacher = tensor(6, 9, seed=7), tensor(6, 8, seed=8)
    observed = torch.tensor([0, 1, 2, 3, 4, 5])
    cut = drkl.distillation_loss(student, teacher, observed, objective=objective, vocab_size=7)
    by_hand = drkl.distillation_loss(student[:, :7], teacher[:, :7], observed, objective=objective)
    assert_near(cut, by_hand, terms=7, scale=20.0)


@pytest.mark.parametrize("vocab_size", [0, -1, 18, True])
def test_a_vocabulary_that_one_model_does_not_have_is_refused(vocab_size: Any) -> None:
    with pytest.raises(DrklError, match=r"expected a whole number in \[1, 17\], what both models have"):
        Pair().run("fused", vocab_size=vocab_size)
    with pytest.raises(DrklError, match=r"expected a whole number in \[1, 17\], what both models have"):
        Pair().run("dense", vocab_size=vocab_size)


def test_a_label_outside_the_shared_vocabulary_is_refused() -> None:
    with pytest.raises(DrklError, match=r"labels run from 0 to 11; expected ids in \[0, 8\)"):
        drkl.distillation_loss(torch.zeros(2, 12), torch.zeros(2, 12), torch.tensor([0, 11]), vocab_size=8)


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics_by_hand(case: Case, temperature: float) -> None:
    pair, observed = Pair(), labels()
    student, teacher = pair.hidden @ pair.weight.T, pair.teacher.logits(pair.teacher_hidden)
    words: dict[str, Any] = {"objective": case.objective, "temperature": temperature, "token_weights": WEIGHTS}
    dense, by_dense = drkl.distillation_loss(student, teacher, observed, return_stats=True, **words)
    loss, by_fused = drkl.fused_distillation_loss(
        pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher, observed, return_stats=True, **words
    )
    torch.testing.assert_close(loss, dense, rtol=1e-12, atol=1e-14)
    for a, b in zip(by_fused, by_dense, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
            assert not a.requires_grad and a.shape == (POSITIONS,) and (a[observed == -100] == 0).all()
    has_target = hasattr(case.objective, "target")
    assert (by_fused.B is not None) == (by_fused.K is not None) == has_target
    for i in range(POSITIONS):
        if observed[i] == -100:
            continue
        z, y, label = student[i].tolist(), teacher[i].tolist(), int(observed[i])
        q, p = reference.softmax(z, temperature), reference.softmax(y, temperature)
        t = label if case.objective.needs_labels and case.objective.needs_teacher else reference.top(y)
        expected = {
            "value": case.expected(z, y, label, temperature),
            "student_entropy": -sum(x * reference.mp.log(x) for x in q),
            "max_q": max(q),
        }
        if case.objective.needs_teacher:
            expected |= {
                "teacher_entropy": -sum(x * reference.mp.log(x) for x in p),
                "max_p": max(p),
                "q_t": q[t],
                "p_t": p[t],
            }
        if has_target:
            expected["B"], expected["K"], _ = reference.parts(q, p, t)
        for column, number in expected.items():
            np.testing.assert_allclose(float(getattr(by_fused, column)[i]), float(number), rtol=1e-10, atol=1e-12)


def test_statistics_do_not_change_the_gradient() -> None:
    pair = Pair()
    plain = pair.run("fused", labels=labels())
    leaf = pair.hidden.clone().requires_grad_()
    loss, statistics = drkl.fused_distillation_loss(
        leaf, pair.weight, pair.teacher_hidden, pair.teacher, labels(), return_stats=True
    )
    loss.backward()
    assert_near(plain[1], leaf.grad, VOCAB)
    assert type(statistics).__name__ == "PositionStatistics"
    with torch.no_grad():
        again, same = drkl.fused_distillation_loss(
            pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher, labels(), return_stats=True
        )
    assert_near(again, loss.detach(), VOCAB + POSITIONS, 20.0)
    assert_near(same.value, statistics.value, VOCAB, 20.0)


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_statistics_come_out_of_the_row_step(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_further_pass(*_: Any) -> None:
        raise AssertionError("The rows were looked at twice.")

    monkeypatch.setattr("drkl.losses.fused.position_statistics", no_further_pass)
    pair = Pair()
    words: dict[str, Any] = {"objective": objective, "return_stats": True, "kd_weight": 0.7}
    drkl.fused_distillation_loss(pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher, labels(), **words)


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_statistics_where_two_tokens_are_the_teachers_best(objective: str) -> None:
    pair = Pair()
    pair.teacher.weight[[3, 9]] = 20 * pair.teacher_hidden.sum(0)
    student, teacher = pair.hidden @ pair.weight.T, pair.teacher.logits(pair.teacher_hidden)
    words: dict[str, Any] = {"objective": objective, "return_stats": True}
    _, dense = drkl.distillation_loss(student, teacher, labels(), **words)
    _, fused = drkl.fused_distillation_loss(
        pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher, labels(), **words
    )
    for a, b in zip(fused, dense, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_statistics_of_an_objective_that_does_not_fill_them() -> None:
    class Plain(type(drkl.make_objective("fkl"))):  # type: ignore[misc]
        def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
            return super().value_and_grad_(student_logits, teacher_logits, labels)  # type: ignore[no-any-return]

    pair = Pair()
    heads = (pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher, labels())
    found, expected = (
        drkl.fused_distillation_loss(*heads, objective=o, return_stats=True)[1] for o in (Plain(), "fkl")
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_statistics_in_fp32_of_confident_positions(objective: str) -> None:
    student, teacher = tensor(6, 40, seed=1, scale=3.0), tensor(6, 40, seed=2, scale=3.0)
    student[:, 5] += torch.linspace(-20, 40, 6)
    teacher[:, 5] += torch.linspace(40, 0, 6)
    eye = torch.eye(40, dtype=torch.float64)
    observed = torch.tensor([5, 1, 5, 3, 5, 5])
    words: dict[str, Any] = {"objective": objective, "return_stats": True}
    _, gold = drkl.distillation_loss(student.float().double(), teacher.float().double(), observed, **words)
    _, found = drkl.fused_distillation_loss(
        student.float(), eye.float(), teacher.float(), eye.float(), observed, **words
    )
    # Every log of a probability is off by a few units in the last place of the largest logit.
    close = rounding(0, float(student.abs().max() + teacher.abs().max()), torch.float32)
    for a, b in zip(found, gold, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a.double(), b, rtol=close, atol=close)


def test_a_frozen_head_gets_no_gradient_and_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(bias=True)
    leaf = pair.hidden.clone().requires_grad_()
    seen: list[Any] = []
    run = fused._run

    def watch(*args: Any, **words: Any) -> Any:
        seen.append(run(*args, **words))
        return seen[-1]

    monkeypatch.setattr(fused, "_run", watch)
    head = LMHead(pair.weight, pair.bias)
    drkl.fused_distillation_loss(leaf, head, pair.teacher_hidden, pair.teacher, labels()).backward()
    _, grad_hidden, grad_weight, grad_bias = seen[0]
    assert grad_hidden is not None and grad_weight is None and grad_bias is None
    torch.testing.assert_close(leaf.grad, pair.run("dense", labels=labels())[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_in_low_precision_gathers_its_gradient_in_fp32(dtype: torch.dtype) -> None:
    """Four hundred chunks of one position: summed in bf16, each would round the sum to 8 bits."""
    fused.CHUNK_BYTES = fused.BLOCK_BYTES = 1
    count, hidden_size, vocab = 400, 4, 6
    hidden, weight = tensor(count, hidden_size, seed=0).to(dtype), tensor(vocab, hidden_size, seed=1).to(dtype)
    teacher_hidden, teacher_weight = tensor(count, 5, seed=2).to(dtype), tensor(vocab, 5, seed=3).to(dtype)
    leaf = weight.clone().requires_grad_()
    drkl.fused_distillation_loss(
        hidden.requires_grad_(), leaf, teacher_hidden, teacher_weight, reduction="sum", objective="rkl"
    ).backward()
    wide = weight.double().requires_grad_()
    exact = drkl.distillation_loss(
        hidden.detach().double() @ wide.T,
        teacher_hidden.double() @ teacher_weight.double().T,
        objective="rkl",
        reduction="sum",
    )
    exact.backward()
    assert leaf.grad is not None and wide.grad is not None and leaf.grad.dtype == dtype
    scale = float(wide.grad.abs().max())
    assert float((leaf.grad.double() - wide.grad).abs().max()) < scale * 2 * torch.finfo(dtype).eps


def test_a_sharded_head_is_gathered_once(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        pair = Pair()
        sharded = distribute_tensor(pair.weight, mesh, [Shard(0)]).requires_grad_()
        leaf = pair.hidden.clone().requires_grad_()
        teacher = distribute_tensor(pair.teacher.weight, mesh, [Shard(0)])
        loss = drkl.fused_distillation_loss(leaf, sharded, pair.teacher_hidden, teacher, labels())
        loss.backward()
        expected = pair.run("dense", labels=labels())
        torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-10, atol=1e-12)
        assert isinstance(sharded.grad, DTensor)
        torch.testing.assert_close(sharded.grad.full_tensor(), expected[2], rtol=1e-10, atol=1e-12)
    finally:
        distributed.destroy_process_group()


COMPILED = """
import torch, torch._dynamo, drkl

def tensor(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

teacher_hidden, teacher_head = tensor(13, 9, seed=3), tensor(17, 9, seed=4)

def step(hidden, weight):
    loss = drkl.fused_distillation_loss(hidden * 2, weight, teacher_hidden, teacher_head)
    return loss * 3

def leaves():
    return [tensor(13, 6, seed=0).requires_grad_(), tensor(17, 6, seed=1).requires_grad_()]

plain = leaves()
step(*plain).backward()
explanation = torch._dynamo.explain(step)(*leaves())
torch._dynamo.reset()
compiled = leaves()
torch.compile(step, backend="eager")(*compiled).backward()
for a, b in zip(plain, compiled):
    torch.testing.assert_close(a.grad, b.grad)
print(explanation.graph_break_count)
"""


@pytest.mark.slow
def test_compiling_breaks_the_graph_at_most_once() -> None:
    """In a process of its own: under pytest, every function is wrapped by the checks of its types."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 1
