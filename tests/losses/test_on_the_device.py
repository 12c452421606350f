"""The fused loss by its kernel beside float64, on a GPU where there is one: there with the head of a real model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import drkl
from benchmarks.fused_loss import Case
from drkl import LMHead
from drkl.losses import TopK, fused, kernel_steps
from drkl.objectives.divergences import ReverseKL
from drkl.training.forward import StatisticsSums
from tests.losses.interpreter import patched_once
from tests.rounding import rounding

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
POSITIONS, VOCAB, HIDDEN = (40, 151_936, 896) if ON_GPU else (12, 600, 24)
DTYPES = (
    [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
)  # the interpreter cuts to bf16, it does not round
K = 64 if ON_GPU else 5
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch.compile's own
]


@pytest.fixture(autouse=True)
def kernel_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in its interpreter too; chunks with a shorter one at the end."""
    pytest.importorskip("triton", reason="no Triton for this system")
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    for name in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(fused, name, 5 * VOCAB * 4)
    with patched_once():
        yield


@dataclass(frozen=True)
class OwnReverseKL(ReverseKL):
    """An objective that the kernel does not know."""

    name = "own"


@dataclass(frozen=True)
class Variant:
    """A loss, and the heads and the teacher that it has."""

    objective: Any
    words: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    k: int | None = None
    is_compiled: bool = False

    def run(self, case: Case, dtype: torch.dtype, *, is_fused: bool) -> list[Tensor]:
        """The loss, and its gradients on the hidden states, the head and its bias, in float64."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (case.student_hidden, case.student_head)]
        biases = [torch.linspace(-1, 1, VOCAB, device=DEVICE).roll(shift).to(dtype) for shift in (0, VOCAB // 3)]
        if self.bias:
            for bias in biases:
                bias[-3:] = -torch.inf  # what both models exclude
            leaves.append(biases[0].requires_grad_())
        head = LMHead(leaves[1], biases[0] if self.bias else None, self.scale, self.softcap)
        theirs = LMHead(case.teacher_head.to(dtype), biases[1] if self.bias else None, self.scale, self.softcap)
        states, labels = case.teacher_hidden.to(dtype), case.labels.clamp(max=VOCAB - 9)
        known = None
        if self.k is not None:
            # From logits in float64, so that no rounding of its own gives it another list.
            exact = LMHead(case.teacher_head.double(), None, self.scale, self.softcap)
            known = TopK.of_logits(exact.logits(case.teacher_hidden.double()), self.k, (1.0, 2.0))

        words = {"objective": self.objective, **self.words}
        if is_fused:
            teacher = (states, theirs) if known is None else (known, None)
            loss = drkl.fused_distillation_loss(leaves[0], head, *teacher, labels, **words)
        else:
            logits = theirs.logits(states) if known is None else known
            loss = drkl.distillation_loss(head.logits(leaves[0]), logits, labels, **words)
        if loss.requires_grad:
            loss.sum().backward()
        return [x.detach().double() for x in (loss, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def drkl_with(**params: Any) -> Any:
    return drkl.make_objective("drkl", **params)


WARM = {"temperature": 2.0, "kd_weight": 0.7, "t2_scaling": True}
MERGED = {"merged_ids": (3, 7, VOCAB - 1)}
WEIGHTS = {"token_weights": torch.arange(POSITIONS, device=DEVICE) % 3 / 2}
VARIANTS = {name: Variant(name) for name in drkl.OBJECTIVES} | {
    "drkl, skew": Variant(drkl_with(skew=0.1)),
    "drkl, tail fkl": Variant(drkl_with(tail="fkl")),
    "drkl, tail gjs": Variant(drkl_with(tail="gjs")),
    "drkl, weight student, label": Variant(drkl_with(weight="student", target="label")),
    "drkl, ce": Variant("drkl", {"kd_weight": 0.7}),
    "drkl, ce, T 2": Variant("drkl", WARM),
    "ce alone": Variant("drkl", {"kd_weight": 0.0}),
    "akl, ce, T 2": Variant("akl", WARM),
    "rkl, bias": Variant("rkl", bias=True),
    "drkl, scale": Variant("drkl", scale=0.3),
    "drkl, soft-cap": Variant("drkl", WARM, softcap=5.0),
    "drkl, every head": Variant("drkl", bias=True, scale=1.5, softcap=5.0),
    "drkl, weights": Variant("drkl", WEIGHTS),
    "drkl, merged": Variant("drkl", MERGED),
    "drkl, values alone": Variant("drkl", {"reduction": "none"}),
    "gjs, merged, ce, T 2": Variant("gjs", {**MERGED, **WARM}),
    "drkl, top-k": Variant("drkl", k=K),
    "drkl, top-k, ce, T 2": Variant("drkl", WARM, k=K),
    "fkl, top-k, merged, soft-cap": Variant("fkl", {**MERGED, "kd_weight": 0.7}, softcap=5.0, k=K),
    "own": Variant(OwnReverseKL(), is_compiled=True),
    "own, ce, merged": Variant(OwnReverseKL(), {**MERGED, "kd_weight": 0.7}, is_compiled=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_error_is_that_of_the_naive_lines_on_the_device(variant: Variant, dtype: torch.dtype) -> None:
    if ON_GPU and dtype == torch.float32 and (variant.words or variant.objective not in drkl.OBJECTIVES):
        pytest.skip("compiled in bf16")
    case = Case(POSITIONS, VOCAB, HIDDEN, dtype, DEVICE)
    gold = variant.run(case, torch.float64, is_fused=False)
    naive = variant.run(case, dtype, is_fused=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if variant.is_compiled else "error", UserWarning)
        found = variant.run(case, dtype, is_fused=True)
    both = (case.student_hidden, case.student_head), (case.teacher_hidden, case.teacher_head)
    largest = max(float((x.detach() @ y.detach().T).abs().max()) for x, y in both)
    for ours, plain, exact in zip(found, naive, gold, strict=len(found) > 1):  # values alone have no gradients
        size = float(exact.norm())
        # A norm of many errors is no lucky one; what is rounded once more, to the dtype, is off by that. And an
        # exponential of a logit is off by the logit's last bits, which the naive lines and the kernel have apart.
        budget = 2 * float((plain - exact).norm()) + rounding(1, size, dtype)
        budget += rounding(1, size * largest, torch.float32)
        assert float((ours - exact).norm()) <= budget


@pytest.mark.skipif(not ON_GPU, reason="a processor has no streams")
@pytest.mark.parametrize("name", ["drkl", "drkl, merged", "drkl, top-k, ce, T 2"])
def test_two_streams_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(POSITIONS, VOCAB, HIDDEN, torch.bfloat16, DEVICE)
    one = VARIANTS[name].run(case, torch.bfloat16, is_fused=True)
    monkeypatch.setattr(kernel_steps, "OVERLAPPED", True)
    for _ in range(3):
        two = VARIANTS[name].run(case, torch.bfloat16, is_fused=True)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.skipif(not ON_GPU, reason="a processor is never waited for")
@pytest.mark.parametrize("name", ["drkl", "drkl, merged", "drkl, top-k, ce, T 2", "drkl, weights"])
def test_the_gpu_is_waited_for_once_or_twice(name: str) -> None:
    """For the labels, and for the ids of a sparse teacher."""
    variant = VARIANTS[name]
    case = Case(POSITIONS, VOCAB, HIDDEN, torch.bfloat16, DEVICE)
    teacher: Any = case.teacher_hidden, case.teacher_head
    if variant.k is not None:
        logits = (case.teacher_hidden @ case.teacher_head.T).float()
        teacher = TopK.of_logits(logits, variant.k, (1.0, 2.0)), None
    inputs = case.student_hidden, case.student_head, *teacher, case.labels
    words = {"objective": variant.objective, "observe": StatisticsSums(2), **variant.words}
    drkl.fused_distillation_loss(*inputs, **words).backward()  # what is compiled and tried but once
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            drkl.fused_distillation_loss(*inputs, **words).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) <= (1 if variant.k is None else 2), waits
