"""The fused loss by the row kernel: heads, merged ids, sparse teachers, observers, and what the kernel does not do."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import drkl
from drkl import LMHead
from drkl.losses import LogitChunk, TopK, compiled, fused, kernel_steps
from drkl.objectives.divergences import ReverseKL
from drkl.training.forward import StatisticsSums
from tests.losses.interpreter import patched_once
from tests.rounding import rounding

FP32 = torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS, VOCAB, STUDENT, TEACHER = 7, 19, 6, 9
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_kernel  # noqa: E402

# The interpreter's, of what is infinite on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")


@pytest.fixture(autouse=True)
def kernel_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in its interpreter too, chunks of 3 rows, and no warning taken for said."""
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    for name in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(fused, name, 3 * VOCAB * 4)
    fused._say_once.cache_clear()
    kernel_steps._runs.cache_clear()
    compiled._made.clear()
    with patched_once():
        yield


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.tensor([3, 7, -100, 11, 18, 3, 2], device=DEVICE)


@dataclass(frozen=True)
class Inputs:
    """Both models, and what a teacher is known by."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    k: int | None = None
    excluded: tuple[int, ...] = ()
    """Ids whose logit is -inf, by both models' biases."""

    def side(self, seed: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = drawn(VOCAB, seed=seed + 2) if self.bias or self.excluded else None
        if bias is not None:
            bias[list(self.excluded)] = -math.inf
        parts = drawn(POSITIONS, size, seed=seed), drawn(VOCAB, size, seed=seed + 1), bias
        hidden, weight, bias = (None if x is None else x.to(DEVICE, dtype, copy=True) for x in parts)
        assert hidden is not None and weight is not None
        return hidden, weight, bias

    def run(self, which: str, dtype: torch.dtype, **words: Any) -> list[Tensor | None]:
        """The loss, the observed logits, and the gradients on hidden states, weight and bias, in float64."""
        hidden, weight, bias = self.side(0, STUDENT, dtype)
        leaves = [x for x in (hidden, weight, bias) if x is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        head = LMHead(weight, bias, self.scale, self.softcap)
        teacher_hidden, *rest = self.side(10, TEACHER, dtype)
        teacher_head = LMHead(rest[0], rest[1], self.scale, self.softcap)
        teacher_logits = teacher_head.logits(teacher_hidden)
        known = None if self.k is None else TopK.of_logits(teacher_logits, self.k, (1.0, 2.0), labels().clamp(min=0))
        seen: list[LogitChunk] = []

        def observe(chunk: LogitChunk) -> None:
            seen.append(LogitChunk(*(x.clone() if isinstance(x, Tensor) else x for x in chunk)))

        words = {"labels": labels(), "observe": observe} | words
        if which == "dense":
            loss = drkl.distillation_loss(head.logits(hidden), teacher_logits if known is None else known, **words)
        elif known is None:
            loss = drkl.fused_distillation_loss(hidden, head, teacher_hidden, teacher_head, **words)
        else:
            loss = drkl.fused_distillation_loss(hidden, head, known, None, **words)
        if words.get("reduction") != "none":
            (3 * loss).backward()
        shown = [torch.cat([chunk.student for chunk in seen])]
        shown += [torch.cat([c.teacher for c in seen if isinstance(c.teacher, Tensor)])] if known is None else []
        grads = [leaf.grad for leaf in leaves]
        return [None if x is None else x.detach().double().cpu() for x in (loss, *shown, *grads)]


def assert_like_dense(inputs: Inputs, **words: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = inputs.run("fused", FP32, **words)
    expected = inputs.run("dense", torch.float64, **words)
    largest = max([1.0, *(float(y.abs()) for x in expected if x is not None for y in x[x.isfinite()].view(-1))])
    bound = rounding(TEACHER + VOCAB + POSITIONS, TEACHER * largest, FP32)
    for a, b in zip(found, expected, strict=True):
        if words.get("reduction") == "none" and (a is None or b is None):
            continue
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=0.0, atol=bound, equal_nan=True)  # where a loss is infinite


HEADS = [Inputs(), Inputs(bias=True), Inputs(scale=0.5), Inputs(bias=True, scale=2.0, softcap=3.0)]
WORDS: list[dict[str, Any]] = [
    {},
    {"kd_weight": 0.6},
    {"temperature": 2.0, "kd_weight": 0.6, "t2_scaling": True},
    {"kd_weight": 0.0, "temperature": 2.0},
    {"temperature": 2.0, "reduction": "none", "kd_weight": 0.3},
    {"token_weights": torch.tensor([1.0, 0.0, 1.0, 0.3, 2.0, 0.0, 1.0], device=DEVICE)},
]
MERGED = [None, (3, 7, VOCAB - 1), (2, VOCAB - 2)]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (Inputs(bias=True, scale=2.0, softcap=3.0), {"objective": "drkl", "kd_weight": 0.6}),
        (Inputs(scale=0.5), {"objective": "rkl", "merged_ids": (3, 7, 18), "kd_weight": 0.6, "temperature": 2.0}),
        (Inputs(k=4), {"objective": "drkl", "kd_weight": 0.6, "temperature": 2.0, "t2_scaling": True}),
        (Inputs(bias=True, softcap=3.0, k=2), {"objective": "gjs", "merged_ids": (3, 7, 18), "kd_weight": 0.6}),
    ],
    ids=["head", "merged", "top-k", "all"],
)
def test_equals_dense(inputs: Inputs, words: dict[str, Any]) -> None:
    assert_like_dense(inputs, **words)


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 1, 4, VOCAB - 1])
@pytest.mark.parametrize("merged", MERGED, ids=str)
@pytest.mark.parametrize("inputs", HEADS, ids=str)
def test_equals_dense_in_every_way(inputs: Inputs, merged: tuple[int, ...] | None, k: int | None) -> None:
    inputs = Inputs(inputs.bias, inputs.scale, inputs.softcap, k)
    for words, objective in itertools.product(WORDS, ("drkl", "akl", drkl.make_objective("drkl", target="label"))):
        assert_like_dense(inputs, objective=objective, **words, **({"merged_ids": merged} if merged else {}))


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("merged", [None, (3, 7), (4, 5)], ids=str)
@pytest.mark.parametrize("objective", ["drkl", "rkl", "fkl", "gjs"])
def test_ids_that_both_models_exclude(objective: str, merged: tuple[int, ...] | None, k: int | None) -> None:
    inputs = Inputs(k=k, excluded=(4, 5))
    words: dict[str, Any] = {"merged_ids": merged} if merged else {}
    assert_like_dense(inputs, objective=objective, kd_weight=0.6, **words)


def test_what_has_no_weight_may_be_infinite() -> None:
    weights = torch.tensor([1.0, 0.0, 1.0, 0.3, 2.0, 0.0, 1.0], device=DEVICE)
    hidden, weight = (x.requires_grad_() for x in Inputs().side(0, STUDENT, FP32)[:2])
    teacher_hidden, teacher_weight, _ = Inputs().side(10, TEACHER, FP32)
    teacher_hidden[1] = math.inf
    loss = drkl.fused_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, labels(), objective="rkl", token_weights=weights
    )
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and (hidden.grad[1] == 0).all()


class Waits(TorchDispatchMode):
    """Notes each operation whose result a processor would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [x for x in (args[1] if name == "index" else ()) if x is not None and x.dtype == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [None, 3])
def test_no_chunk_waits_for_the_device(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(student: Tensor, *_: Any, **__: Any) -> Tensor:
        return student.new_zeros(len(student))

    monkeypatch.setattr(row_kernel, "row_step_", step)
    monkeypatch.setattr(row_kernel, "rest_log_sum_exp", lambda product, temperatures, **_: product[:, :1].float())
    monkeypatch.setattr(row_kernel, "spread_rest_", lambda *_, **__: None)
    inputs, words = Inputs(k=k, bias=True), {"merged_ids": (3, 7), "kd_weight": 0.6, "observe": StatisticsSums(2)}
    hidden, weight, bias = inputs.side(0, STUDENT, FP32)
    teacher_hidden, teacher_weight, _ = inputs.side(10, TEACHER, FP32)
    known = TopK.of_logits(teacher_hidden @ teacher_weight.T, 3) if k else None
    theirs = (teacher_hidden, teacher_weight) if known is None else (known, None)
    head = LMHead(weight.requires_grad_(), bias)
    drkl.fused_distillation_loss(hidden.requires_grad_(), head, *theirs, labels(), **words)  # what is done but once
    with Waits() as waits:
        drkl.fused_distillation_loss(hidden, head, *theirs, labels(), **words)
    assert waits.seen == []


@dataclass
class Stream:
    """A stream that notes what it is told."""

    name: str
    notes: list[str] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")


class FakeSide:
    """Products that say when they are made."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.head = LMHead(torch.zeros(4, 2))
        self.weight, self.dtype, self._name, self._notes = self.head.weight, FP32, name, notes

    def product(self, rows: slice, turn: int) -> Tensor:
        self._notes.append(f"{self._name} {rows.start} in {turn}")
        return torch.zeros(rows.stop - rows.start, 4)


def test_the_sweeps_of_a_chunk_run_beside_the_next_products(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        notes.append(f"on {stream.name}")
        yield
        notes.append("off")

    def step(*_: Any, **__: Any) -> Tensor:
        notes.append("sweeps")
        return torch.zeros(2)

    monkeypatch.setattr(row_kernel, "row_step_", step)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: notes.append("values are the first's"))
    settings = fused.make_settings("rkl", 1.0, 1.0, False, "mean")
    student, teacher = FakeSide("student", notes), FakeSide("teacher", notes)
    steps = kernel_steps.KernelSteps(student, teacher, settings, True, None)
    chunks = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for rows, _, _ in steps.overlapped(chunks, None, Stream("first", notes), Stream("second", notes), on):
        notes.append(f"done {rows.start}")
    sweeps = ["second waits for first", "on second", "sweeps", "off"]
    end = ["first waits for second", "values are the first's"]
    assert notes == [
        *("student 0 in 0", "teacher 0 in 0"),
        *(*sweeps, "student 2 in 1", "teacher 2 in 1", *end, "done 0"),
        *(*sweeps, "student 4 in 0", "teacher 4 in 0", *end, "done 2"),
        *(*sweeps, *end, "done 4"),
    ]


def test_an_observer_is_given_what_it_has_chosen() -> None:
    words: dict[str, Any] = {"temperature": 2.0, "merged_ids": (3, 7)}
    sums, all_sums = StatisticsSums(2), StatisticsSums(2)
    seen: list[int] = []

    class Watched(StatisticsSums):
        def __call__(self, chunk: LogitChunk) -> None:
            seen.append(len(chunk.student))
            super().__call__(chunk)

    inputs = Inputs(bias=True, softcap=3.0)
    watched = Watched(2)
    for which, observe in (("dense", all_sums), ("fused", watched)):
        hidden, weight, bias = inputs.side(0, STUDENT, FP32)
        teacher_hidden, teacher_weight, teacher_bias = inputs.side(10, TEACHER, FP32)
        head, teacher = LMHead(weight, bias, softcap=3.0), LMHead(teacher_weight, teacher_bias, softcap=3.0)
        if which == "dense":
            both = head.logits(hidden), teacher.logits(teacher_hidden)
            drkl.distillation_loss(*both, labels(), observe=observe, **words)
        else:
            drkl.fused_distillation_loss(hidden, head, teacher_hidden, teacher, labels(), observe=observe, **words)
    assert seen == [2, 1] and int(watched.sums["positions"]) == 3
    for name, value in all_sums.sums.items():
        torch.testing.assert_close(watched.sums[name], value, rtol=1e-5, atol=1e-5)
    assert sums.chosen(3, 4, torch.device("cpu")) == slice(1, 4, 2)


@dataclass(frozen=True)
class OwnReverseKL(ReverseKL):
    """An objective of a user's own with a closed form."""

    name = "own"
    scale: list[float] = field(default_factory=lambda: [1.0])  # which has no hash


def no_compiler(*_: Any, **__: Any) -> Callable[..., Tensor]:
    def run(*_: Any) -> Tensor:
        raise RuntimeError("no\ncompiler")

    return run


def test_what_the_kernel_does_not_know_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)
    expected, own = Inputs().run("dense", torch.float64, objective="rkl"), OwnReverseKL()
    with pytest.warns(UserWarning) as caught:
        found = Inputs().run("fused", FP32, objective=own)
    said = [str(one.message) for one in caught]
    assert len(said) == 2 and "'own'" in said[0] and said[0].endswith("The loss goes on without it, slower.")
    assert "closed form of objective 'own'; the loss goes on without it, slower. no compiler" in said[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Inputs().run("fused", FP32, objective=own)
    for a, b, c in zip(found, again, expected, strict=True):
        assert a is not None and b is not None and c is not None
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_float64_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(UserWarning) as caught:
        found = Inputs().run("fused", torch.float64, objective="rkl")
    assert "these products are in float64. The loss goes on without it, slower." in str(caught[0].message)
    for a, b in zip(found, Inputs().run("dense", torch.float64, objective="rkl"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_plain_function_is_differentiated_without_a_word() -> None:
    def own(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)

    own.on_classes = "bound"  # type: ignore[attr-defined]
    assert_like_dense(Inputs(), objective=own, kd_weight=0.6)
    assert_like_dense(Inputs(k=4), objective=own, kd_weight=0.6)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # shape checks are nothing that is compiled
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (OwnReverseKL(), {}),
        (OwnReverseKL(), {"temperature": 2.0, "kd_weight": 0.6, "merged_ids": (3, 7)}),
        (drkl.decoupled(OwnReverseKL(), OwnReverseKL()), {"kd_weight": 0.6}),
    ],
    ids=["alone", "merged", "parts"],
)
def test_what_the_kernel_does_not_know_is_compiled(
    objective: Any, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    original = compiled._tried

    def watched(*args: Any) -> Any:
        step = original(*args)
        assert step is not args[0]

        def counted(student: Tensor, *rest: Any) -> Tensor:
            steps.append(len(student))
            return step(student, *rest)

        return counted

    monkeypatch.setattr(compiled, "_tried", watched)
    with pytest.warns(UserWarning, match="The loss goes on without it, slower.") as caught:
        found = Inputs(scale=0.5).run("fused", FP32, objective=objective, **words)
    assert sum(issubclass(one.category, UserWarning) for one in caught) == 1 and sum(steps) == POSITIONS - 1
    expected = Inputs(scale=0.5).run("dense", torch.float64, objective=objective, **words)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["drkl", "akl"])
def test_a_tie_goes_to_the_first_class_of_the_merged_vocabulary(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last column stands in the place of the second of the ids, before the other one."""
    student, teacher = drawn(2, VOCAB, seed=1).to(DEVICE), drawn(2, VOCAB, seed=2).to(DEVICE)
    teacher[:, [3, VOCAB - 1]] = 5.0
    whole = torch.eye(VOCAB, device=DEVICE)

    def values(dtype: torch.dtype) -> Tensor:
        heads = [LMHead(whole.to(dtype), drawn(VOCAB, seed=3).to(DEVICE, dtype)), whole.to(dtype)]
        words: dict[str, Any] = {"objective": objective, "merged_ids": [0, 1], "reduction": "none"}
        return drkl.fused_distillation_loss(
            student.to(dtype), heads[0], teacher.to(dtype), heads[1], labels()[:2], **words
        ).double()

    found = values(FP32)
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ())
    close = rounding(VOCAB, 10.0, FP32)
    torch.testing.assert_close(found, values(torch.float64), rtol=close, atol=close)


def test_an_infinite_value_of_merged_ids_stays_infinite() -> None:
    logits, one = torch.zeros(1, 4, device=DEVICE), torch.eye(4, device=DEVICE)
    excluded = LMHead(one, torch.tensor([0.0, 0.0, 0.0, -math.inf], device=DEVICE))
    words: dict[str, Any] = {"objective": "rkl", "temperature": 2.0, "kd_weight": 0.5, "merged_ids": [0, 1]}
    seen = torch.tensor([2], device=DEVICE)
    loss = drkl.fused_distillation_loss(logits.requires_grad_(), one, logits.detach(), excluded, seen, **words)
    loss.backward()
    assert float(loss.detach()) == math.inf and logits.grad is not None and not logits.grad.isnan().any()
