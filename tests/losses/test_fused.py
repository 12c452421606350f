"""The fused loss equals the two naive lines that it stands for: value, and the gradient of everything that has one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import drkl
from drkl import DrklError, LMHead
from drkl.losses import fused
from tests.objectives.cases import FEW, Case, name
from tests.rounding import rounding

IGNORE = -100
POSITIONS, VOCAB, STUDENT, TEACHER = 13, 17, 6, 9
every = pytest.mark.parametrize("case", FEW, ids=name)
registered = pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))


@pytest.fixture(
    params=[
        pytest.param((10**9, 10**9), id="whole"),
        pytest.param((5 * VOCAB * 8, 2 * VOCAB * 8), id="ragged"),
        pytest.param((1, 1), id="single", marks=pytest.mark.slow),
    ]
)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Everything in one chunk, chunks of 5 in blocks of 2 (with rests), or single rows."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", request.param[0])
    monkeypatch.setattr(fused, "BLOCK_BYTES", request.param[1])
    size: tuple[int, int] = request.param
    return size


def tensor(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels(shape: tuple[int, ...] = (POSITIONS,)) -> Tensor:
    drawn = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))
    drawn.view(-1)[[0, 3, 4, 12]] = IGNORE
    return drawn


class Pair:
    """The inputs of both sides: hidden states, a head's tensors, and a teacher."""

    def __init__(self, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, shape: Any = None):
        shape = shape or (POSITIONS,)
        self.hidden = tensor(*shape, STUDENT, seed=0)
        self.weight = tensor(VOCAB, STUDENT, seed=1)
        self.bias = tensor(VOCAB, seed=2) if bias else None
        self.scale, self.softcap = scale, softcap
        self.teacher_hidden = tensor(*shape, TEACHER, seed=3)
        teacher_bias = tensor(VOCAB, seed=6) if bias else None
        self.teacher = LMHead(tensor(VOCAB, TEACHER, seed=4), teacher_bias, scale, softcap)

    def run(self, which: str, upstream: float = 1.0, **words: Any) -> list[Tensor | None]:
        """Loss, and the gradients on hidden states, weight and bias."""
        leaves = [None if x is None else x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        head = LMHead(weight, bias, self.scale, self.softcap)
        if which == "fused":
            loss = drkl.fused_distillation_loss(hidden, head, self.teacher_hidden, self.teacher, **words)
        else:
            loss = drkl.distillation_loss(head.logits(hidden), self.teacher.logits(self.teacher_hidden), **words)
        (upstream * loss).backward()
        return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every
def test_equals_dense(case: Case, sizes: tuple[int, int]) -> None:
    words: dict[str, Any] = {"labels": labels(), "objective": case.objective}
    assert_equal(Pair().run("fused", 3.0, **words), Pair().run("dense", 3.0, **words))


@every
@pytest.mark.parametrize(
    ("temperature", "t2_scaling", "kd_weight"),
    [(2.0, False, 1.0), (1.0, False, 0.3), (2.0, True, 0.3), (0.5, True, 0.3), (2.0, True, 0.0)],
)
def test_equals_dense_with_temperature_and_cross_entropy(
    case: Case, temperature: float, t2_scaling: bool, kd_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "BLOCK_BYTES", 4 * VOCAB * 8)
    words: dict[str, Any] = {
        "labels": labels(),
        "objective": case.objective,
        "temperature": temperature,
        "t2_scaling": t2_scaling,
        "kd_weight": kd_weight,
        "num_tokens": 40,
    }
    assert_equal(Pair().run("fused", **words), Pair().run("dense", **words))


HEADS: list[dict[str, Any]] = [
    {"bias": True},
    {"scale": 0.25},
    {"scale": 2.0},
    {"softcap": 2.0},
    {"bias": True, "scale": 3.0, "softcap": 1.5},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@registered
def test_equals_dense_through_every_kind_of_head(objective: str, head: dict[str, Any], sizes: tuple[int, int]) -> None:
    words: dict[str, Any] = {"labels": labels(), "objective": objective, "kd_weight": 0.6, "temperature": 1.5}
    assert_equal(Pair(**head).run("fused", 3.0, **words), Pair(**head).run("dense", 3.0, **words))


@registered
def test_masks_and_any_number_of_dimensions(objective: str, sizes: tuple[int, int]) -> None:
    shape = (2, 3, 4)
    words: dict[str, Any] = {
        "labels": labels(shape),
        "token_mask": torch.arange(24).reshape(shape) % 3 > 0,
        "objective": objective,
        "reduction": "sum",
    }
    found, expected = (Pair(shape=shape, bias=True).run(which, **words) for which in ("fused", "dense"))
    assert_equal(found, expected)
    assert found[1] is not None and found[1].shape == (*shape, STUDENT)


@pytest.mark.parametrize("masked_by", ["labels", "token_mask"])
@registered
def test_no_valid_position(objective: str, masked_by: str) -> None:
    nothing: dict[str, Any] = {
        "labels": torch.full((POSITIONS,), IGNORE) if masked_by == "labels" else labels(),
        "token_mask": torch.zeros(POSITIONS) if masked_by == "token_mask" else None,
    }
    found = Pair(bias=True).run("fused", objective=objective, kd_weight=0.5, **nothing)
    assert all(x is not None and (x == 0).all() for x in found)


@pytest.mark.parametrize("garbage", [math.inf, math.nan])
@registered
def test_ignored_positions_do_not_exist(objective: str, garbage: float) -> None:
    words: dict[str, Any] = {"labels": labels(), "objective": objective, "kd_weight": 0.5}
    pair, clean = Pair(), Pair().run("fused", **words)
    ignored = words["labels"] == IGNORE
    pair.hidden[ignored] = pair.teacher_hidden[ignored] = garbage
    found = pair.run("fused", **words)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, clean, strict=True))  # type: ignore[arg-type]
    assert found[1] is not None and (found[1][ignored] == 0).all()


@every
def test_reduction_none_gives_values_without_a_graph(case: Case, sizes: tuple[int, int]) -> None:
    pair = Pair()
    words: Any = {"labels": labels(), "objective": case.objective, "reduction": "none", "kd_weight": 0.7}
    hidden, weight = pair.hidden.requires_grad_(), pair.weight.requires_grad_()
    values = drkl.fused_distillation_loss(hidden, weight, pair.teacher_hidden, pair.teacher, **words)
    teacher = pair.teacher.logits(pair.teacher_hidden)
    expected = drkl.distillation_loss(LMHead(weight).logits(hidden), teacher, **words)
    assert values.shape == (POSITIONS,) and not values.requires_grad
    torch.testing.assert_close(values, expected.detach(), rtol=1e-10, atol=1e-10)


def test_without_labels_every_position_counts() -> None:
    assert_equal(Pair().run("fused"), Pair().run("dense"))
    assert_equal(Pair().run("fused", reduction="sum"), Pair().run("dense", reduction="sum"))


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Which gradients `_run` makes: hidden states, weight, bias."""
    made: list[tuple[bool, ...]] = []
    original = fused._run

    def recorded(*args: Any, **words: Any) -> Any:
        values, grads = original(*args, **words)
        made.append(tuple(grad is not None for grad in grads))
        return values, grads

    monkeypatch.setattr(fused, "_run", recorded)
    return made


@registered
def test_only_gradients_that_are_wanted_are_made(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pair = spy(monkeypatch), Pair(bias=True)
    assert pair.bias is not None
    expected = Pair(bias=True).run("dense", labels=labels(), objective=objective)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        leaves = [
            x.clone().requires_grad_(w) for x, w in zip((pair.hidden, pair.weight, pair.bias), wanted, strict=True)
        ]
        head = LMHead(leaves[1], leaves[2])
        loss = drkl.fused_distillation_loss(
            leaves[0], head, pair.teacher_hidden, pair.teacher, labels(), objective=objective
        )
        loss.backward()
        assert made.pop() == wanted
        assert_equal([x.grad for x in leaves], [g if w else None for g, w in zip(expected[1:], wanted, strict=True)])


def test_a_frozen_student_makes_no_gradient_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pair = spy(monkeypatch), Pair()
    loss = drkl.fused_distillation_loss(pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher)
    assert not loss.requires_grad and made == [(False, False, False)]


def test_without_grad_mode_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pair = spy(monkeypatch), Pair()
    hidden, weight = pair.hidden.requires_grad_(), pair.weight.requires_grad_()
    with torch.no_grad():
        loss = drkl.fused_distillation_loss(hidden, weight, pair.teacher_hidden, pair.teacher, labels())
    assert made == [(False, False, False)] and not loss.requires_grad
    assert_equal([loss], [Pair().run("dense", labels=labels())[0]])


def test_the_teacher_gets_no_gradient_and_nobodys_tensors_are_changed() -> None:
    pair = Pair(bias=True)
    tensors = [pair.hidden, pair.weight, pair.bias, pair.teacher_hidden, pair.teacher.weight, pair.teacher.bias]
    given = [x for x in tensors if x is not None]
    before = [x.clone() for x in given]
    for x in given:
        x.requires_grad_()
    loss = drkl.fused_distillation_loss(
        pair.hidden, LMHead(pair.weight, pair.bias), pair.teacher_hidden, pair.teacher, labels(), temperature=2.0
    )
    loss.backward()
    assert [x.grad is not None for x in given] == [True, True, True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_gradients_are_given_away_once() -> None:
    pair = Pair()
    hidden = pair.hidden.requires_grad_()
    loss = drkl.fused_distillation_loss(hidden, pair.weight, pair.teacher_hidden, pair.teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice; its gradients are made once and given away"):
        loss.backward()


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    pair, tokens = Pair(), torch.arange(POSITIONS)
    grads = []
    for which in ("fused", "dense"):
        weight = pair.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        if which == "fused":
            loss = drkl.fused_distillation_loss(hidden, weight, pair.teacher_hidden, pair.teacher, labels())
        else:
            loss = drkl.distillation_loss(hidden @ weight.T, pair.teacher.logits(pair.teacher_hidden), labels())
        loss.backward()
        grads.append(weight.grad)
    assert_equal(grads[:1], grads[1:])


@pytest.mark.parametrize("whose", ["teacher", "both"])
@every
def test_excluded_tokens_take_the_definition(case: Case, whose: str, sizes: tuple[int, int]) -> None:
    """A bias of -inf: infinite where the definition is, the same as dense everywhere, and never NaN."""

    def pair() -> Pair:
        made = Pair(bias=True)
        assert made.bias is not None and made.teacher.bias is not None
        for bias in (made.teacher.bias, made.bias)[: 1 if whose == "teacher" else 2]:
            bias[[2, 11]] = -math.inf
        return made

    counted = labels()
    counted[(counted == 2) | (counted == 11)] = 0
    words: dict[str, Any] = {"labels": counted, "objective": case.objective, "kd_weight": 0.5}
    found, expected = pair().run("fused", **words), pair().run("dense", **words)
    assert_equal(found[:1] + found[2:], expected[:1] + expected[2:])
    assert not any(x.isnan().any() for x in found if x is not None)
    if whose == "both":
        assert found[0] is not None and found[0].isfinite()
        assert_equal(found, expected)


def test_one_infinite_row_takes_only_its_block_off_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK_BYTES", 2 * VOCAB * 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    slow: list[int] = []
    original = fused._autograd_

    def recorded(student: Tensor, *rest: Any) -> Tensor:
        slow.append(len(student))
        return original(student, *rest)

    monkeypatch.setattr(fused, "_autograd_", recorded)
    pair = Pair(shape=(6,))
    pair.teacher_hidden[3] = math.inf
    drkl.fused_distillation_loss(pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher)
    assert slow == [2]


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


ROWS, WIDE, DEEP = 64, 400, 48


def realistic(dtype: torch.dtype) -> list[Tensor]:
    hidden, teacher_hidden = tensor(ROWS, DEEP, seed=0), tensor(ROWS, DEEP, seed=1)
    weight, teacher_weight = tensor(WIDE, DEEP, seed=2, scale=0.4), tensor(WIDE, DEEP, seed=3, scale=0.4)
    return [x.float().to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)]


def measure(which: str, inputs: list[Tensor], words: dict[str, Any]) -> list[Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    if which == "fused":
        loss = drkl.fused_distillation_loss(hidden, weight, inputs[2], inputs[3], **words)
    else:
        loss = drkl.distillation_loss(LMHead(weight).logits(hidden), LMHead(inputs[3]).logits(inputs[2]), **words)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


def errors(found: list[Tensor], gold: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, gold, strict=True)]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@every
def test_error_budget(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, the fused loss is as exact as the naive one, in every precision it runs in."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 20 * WIDE * 4)
    inputs = realistic(torch.bfloat16 if mode == "bf16" else torch.float32)
    drawn = torch.randint(0, WIDE, (ROWS,), generator=torch.Generator().manual_seed(7))
    words: dict[str, Any] = {"labels": drawn, "objective": case.objective, "kd_weight": 0.8, "temperature": 1.5}
    gold = measure("dense", [x.double() for x in inputs], words)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        naive, fast = (errors(measure(which, inputs, words), gold) for which in ("dense", "fused"))
    # A logit is a sum of DEEP terms, in either path in an order of its own; bf16 rounds a result once.
    slack = DEEP * 2.0**-24 if mode == "fp32" else 2 * 2.0**-9
    for fused_error, naive_error in zip(fast, naive, strict=True):
        assert fused_error <= naive_error + slack, (fast, naive)


# A loss in fp32: logits that are sums of DEEP terms, normalised over WIDE classes, summed over ROWS positions.
FP32_LOSS = rounding(DEEP + WIDE + ROWS, 1.0, torch.float32)


def on_a_grid(shift: float = 0.0) -> list[Tensor]:
    """Inputs whose products bf16 has whole, so that every order of a sum gives the same logits.

    Every position picks one column of a head of multiples of 1/8 below 16. ``shift`` is a share of the hidden states
    that bf16 rounds away.
    """
    picked = torch.eye(DEEP)[torch.arange(ROWS) % DEEP] * (1 + shift)
    heads = [(8 * tensor(WIDE, DEEP, seed=seed, scale=2.0)).round().clamp(-127, 127).float() / 8 for seed in (2, 3)]
    return [picked, heads[0], picked.clone(), heads[1]]


@pytest.mark.usefixtures("autocast")
def test_values_without_a_graph_are_those_of_the_loss_under_autocast() -> None:
    inputs = on_a_grid()
    values = drkl.fused_distillation_loss(*inputs, reduction="none")
    total = drkl.fused_distillation_loss(inputs[0].requires_grad_(), *inputs[1:], reduction="sum")
    assert values.dtype == total.dtype == torch.float32
    assert float(total.detach()) == pytest.approx(float(values.sum()), rel=FP32_LOSS)


@registered
def test_autocast_makes_the_products_of_the_naive_lines(objective: str) -> None:
    words = {"labels": torch.arange(ROWS), "objective": objective}
    shift = 2.0**-10  # under half a unit in the last place of bf16
    plain, whole = measure("fused", on_a_grid(shift), words)[0], measure("fused", on_a_grid(), words)[0]
    with torch.autocast("cpu", torch.bfloat16):
        naive, fast = (measure(which, on_a_grid(shift), words)[0] for which in ("dense", "fused"))
    for exact in (naive, whole):
        assert float(fast) == pytest.approx(float(exact), rel=FP32_LOSS)
    assert abs(float(plain - whole)) > 2 * FP32_LOSS * float(whole)


@pytest.mark.usefixtures("autocast")
def test_autocast_leaves_float64_alone() -> None:
    assert_equal(Pair().run("fused", labels=labels()), Pair().run("dense", labels=labels()))


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_teacher_keeps_its_own_precision(teacher_dtype: torch.dtype) -> None:
    inputs = on_a_grid()
    inputs[:2] = [x.bfloat16() for x in inputs[:2]]
    inputs[2:] = [x.to(teacher_dtype) for x in inputs[2:]]
    inputs[3] = inputs[3] * (1 + 2.0**-10)  # which a teacher in fp32 keeps
    found = drkl.fused_distillation_loss(*inputs, objective="rkl")
    student, teacher = LMHead(inputs[1]).logits(inputs[0]), LMHead(inputs[3]).logits(inputs[2])
    expected = float(drkl.distillation_loss(student, teacher, objective="rkl"))
    assert float(found) == pytest.approx(expected, rel=FP32_LOSS)


def test_sums_over_chunks_are_kept_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.bfloat16() for x in (torch.ones(600, 2), torch.zeros(4, 2))]
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)
    weight = inputs[1].requires_grad_()
    drawn = torch.zeros(600, dtype=torch.long)
    drkl.fused_distillation_loss(inputs[0], weight, None, None, drawn, objective="ce", reduction="sum").backward()
    assert weight.grad is not None
    # 600 times -3/4: in bf16 a sum of such steps stops growing at 192.
    assert weight.grad[0].tolist() == [-450.0, -450.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.zeros(3, 5)}, "The student's hidden states have 5 columns and its head 4."),
        ({"teacher_hidden": torch.zeros(3, 5)}, "The teacher's hidden states have 5 columns and its head 6."),
        (
            {"teacher_hidden": torch.zeros(2, 6)},
            "The teacher's hidden states cover positions [2] and the student's [3].",
        ),
        (
            {"teacher_hidden": None},
            "Objective 'drkl' compares with a teacher, but teacher_hidden or teacher_head is None.",
        ),
        (
            {"teacher_head": None},
            "Objective 'drkl' compares with a teacher, but teacher_hidden or teacher_head is None.",
        ),
        (
            {"teacher_head": torch.zeros(9, 6)},
            "The teacher scores 9 tokens and the student 7. Every objective compares the two over one vocabulary. "
            "If the tokenizers agree up to padding, vocab_size (at most 7, the ids they share) cuts both before the "
            "softmax; if they differ, the two cannot be compared.",
        ),
        ({"student_head": torch.zeros(7)}, "A head's weight is [vocab, hidden]; got shape [7]."),
    ],
    ids=str,
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    words: dict[str, Any] = {
        "student_hidden": torch.zeros(3, 4),
        "student_head": torch.zeros(7, 4),
        "teacher_hidden": torch.zeros(3, 6),
        "teacher_head": torch.zeros(7, 6),
        **change,
    }
    with pytest.raises(DrklError) as caught:
        drkl.fused_distillation_loss(**words)
    assert str(caught.value) == message


def test_no_teacher_where_none_is_read() -> None:
    pair = Pair()
    alone = drkl.fused_distillation_loss(pair.hidden, pair.weight, None, None, labels(), objective="ce")
    same = drkl.fused_distillation_loss(pair.hidden, pair.weight, None, None, labels(), kd_weight=0.0)
    assert_equal([alone], [same])
    assert_equal([alone], [Pair().run("dense", labels=labels(), objective="ce")[0]])


@pytest.mark.parametrize(("chunk_bytes", "rows"), [(4 * VOCAB * 8, 4), (1, 1)])
def test_no_tensor_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, rows: int) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", chunk_bytes)
    largest = 0
    original = fused._Side.logits

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        out = original(*args)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(fused._Side, "logits", measured)
    Pair().run("fused")
    assert largest == rows * VOCAB
