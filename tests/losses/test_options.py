"""What both losses take besides the objective: a shared vocabulary, position weights, observers, sharded heads."""

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
from torch.utils._python_dispatch import TorchDispatchMode

import drkl
from drkl import DrklError, LMHead
from drkl.losses import LogitChunk, fused
from tests.losses.test_fused import POSITIONS, STUDENT, TEACHER, VOCAB, Pair, assert_equal, labels, tensor
from tests.objectives.cases import FEW, Case, name
from tests.rounding import assert_near

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


class Seen:
    """An observer that keeps copies."""

    def __init__(self) -> None:
        self.chunks: list[LogitChunk] = []

    def __call__(self, chunk: LogitChunk) -> None:
        assert not torch.is_grad_enabled() and not chunk.student.requires_grad
        self.chunks.append(LogitChunk(*(x.clone() if isinstance(x, Tensor) else x for x in chunk)))

    def all(self, name: str) -> Tensor:
        """A field of all chunks, in order and without gaps."""
        starts = [0, *np.cumsum([len(chunk.student) for chunk in self.chunks])[:-1]]
        assert [chunk.start for chunk in self.chunks] == starts
        return torch.cat([getattr(chunk, name) for chunk in self.chunks])


@every
@pytest.mark.parametrize("which", ["fused", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", [{}, {"bias": True, "scale": 1.5, "softcap": 2.0}], ids=str)
def test_an_observer_sees_the_logits_of_every_position_that_counts(
    case: Case, which: str, reduction: Any, head: dict[str, Any]
) -> None:
    """Before the temperature, with the teacher's, whether or not the objective reads them."""
    pair, seen, observed = Pair(**head), Seen(), labels()
    student = LMHead(pair.weight, pair.bias, pair.scale, pair.softcap)
    words: dict[str, Any] = {"objective": case.objective, "temperature": 2.0, "kd_weight": 0.7, "reduction": reduction}
    words |= {"token_weights": WEIGHTS, "observe": seen}
    logits = student.logits(pair.hidden), pair.teacher.logits(pair.teacher_hidden)
    if which == "fused":
        leaf = pair.hidden.clone().requires_grad_()
        drkl.fused_distillation_loss(leaf, student, pair.teacher_hidden, pair.teacher, observed, **words)
        assert len(seen.chunks) == 2
    else:
        drkl.distillation_loss(*logits, observed, **words)
    keep = observed != -100
    assert torch.equal(seen.all("labels"), observed[keep])
    for side, expected in zip(("student", "teacher"), logits, strict=True):
        torch.testing.assert_close(seen.all(side), expected[keep], rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_observing_changes_no_digit(case: Case, dtype: torch.dtype) -> None:
    pair = Pair(bias=True)
    for field in ("hidden", "weight", "bias", "teacher_hidden"):
        setattr(pair, field, getattr(pair, field).to(dtype))
    for which in ("fused", "dense"):
        words: dict[str, Any] = {"labels": labels(), "objective": case.objective, "kd_weight": 0.7}
        plain, observed = pair.run(which, **words), pair.run(which, observe=Seen(), **words)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, observed, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_an_observer_of_a_loss_without_a_teacher(which: str) -> None:
    for words in ({"objective": "ce"}, {"kd_weight": 0.0}):
        pair, seen = Pair(), Seen()
        plain = pair.run(which, labels=labels(), **words)
        found = pair.run(which, labels=labels(), observe=seen, **words)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, found, strict=True))  # type: ignore[arg-type]
        expected = pair.teacher.logits(pair.teacher_hidden)[labels() != -100]
        torch.testing.assert_close(seen.all("teacher"), expected, rtol=1e-12, atol=1e-12)
        alone = Seen()
        if which == "fused":
            drkl.fused_distillation_loss(pair.hidden, pair.weight, None, None, labels(), observe=alone, **words)
        else:
            drkl.distillation_loss(pair.hidden @ pair.weight.T, None, labels(), observe=alone, **words)
        assert {chunk.teacher for chunk in alone.chunks} == {None}


@pytest.mark.parametrize("which", ["fused", "dense"])
def test_an_observer_and_positions_that_all_count_or_none(which: str) -> None:
    seen = Seen()
    Pair().run(which, labels=torch.full((POSITIONS,), -100), observe=seen)
    assert seen.chunks == []
    Pair().run(which, observe=seen)
    assert len(seen.all("student")) == POSITIONS and seen.chunks[0].labels is None
    masked = Seen()
    Pair().run(which, labels=labels(), token_mask=torch.arange(POSITIONS) > 6, observe=masked)
    assert len(masked.all("student")) == 5


@pytest.mark.parametrize("objective", ["drkl", "ce"])
def test_an_observer_of_a_shared_vocabulary(objective: str) -> None:
    heads = [
        tensor(*shape, seed=i) for i, shape in enumerate([(6, STUDENT), (VOCAB, STUDENT), (6, TEACHER), (19, TEACHER)])
    ]
    words: dict[str, Any] = {"labels": torch.tensor([0, 3, 11, -100, 7, 2]), "objective": objective}
    seen = Seen()
    drkl.fused_distillation_loss(*heads, vocab_size=SHARED, observe=seen, **words)
    assert seen.all("student").shape == seen.all("teacher").shape == (5, SHARED)
    with pytest.raises(DrklError, match="The teacher scores 19 tokens and the student 17"):
        drkl.fused_distillation_loss(*heads, observe=seen, **words)


class HeadProducts(TorchDispatchMode):
    """Counts the matrix products that have the vocabulary in one of their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += any(VOCAB in x.shape for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("objective", "further"), [("drkl", 0), ("rkl", 0), ("ce", 2)])
def test_an_observer_costs_no_further_product_with_a_head(objective: str, further: int) -> None:
    """But where the loss reads no teacher: then the teacher's logits, once for each of the two chunks."""
    counts = []
    for words in ({}, {"observe": Seen()}):
        with HeadProducts() as products:
            Pair().run("fused", labels=labels(), objective=objective, **words)
        counts.append(products.count)
    assert counts[0] == (6 if objective == "ce" else 8)  # for each chunk the logits and the two gradients
    assert counts[1] == counts[0] + further


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
    _, (grad_hidden, grad_weight, grad_bias) = seen[0]
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
