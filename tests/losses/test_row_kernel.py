"""The Triton kernel against the definition: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl.losses import fused, kernel_steps
from drkl.losses.common import LossSettings, make_settings
from tests.objectives import reference, tensors
from tests.rounding import rounding

FP32 = torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_kernel  # noqa: E402

OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("fkl", {}),
    ("rkl", {}),
    ("srkl", {}),
    ("srkl", {"skew": 0.0}),
    ("srkl", {"skew": 0.8}),
    ("drkl", {}),
    ("drkl", {"target": "label", "gamma": 2.0}),
    ("drkl", {"weight": "student"}),
    ("drkl", {"weight": "teacher", "target": "label"}),
    ("drkl", {"weight": "floor", "gamma": 0.3}),
]
every = pytest.mark.parametrize(("name", "params"), OBJECTIVES, ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernel, "BLOCK", 16)


def loss_settings(
    name: str, params: dict[str, Any], temperature: float = 1.0, t2_scaling: bool = False
) -> LossSettings:
    return make_settings(drkl.make_objective(name, **params), temperature, 1.0, t2_scaling, "mean")


def by_kernel(settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    grad = student.clone().to(DEVICE)
    values = row_kernel.row_step_(grad, teacher.to(DEVICE), labels.to(DEVICE), settings)
    return values.cpu().double(), grad.cpu().double()


def by_definition(
    settings: LossSettings, student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    leaf = student.to(dtype, copy=True).requires_grad_()
    values = drkl.distillation_loss(
        leaf,
        teacher.to(dtype),
        labels,
        objective=settings.objective,
        temperature=settings.temperature,
        t2_scaling=settings.t2_scaling,
        reduction="none",
    )
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad


def coarse(student: Tensor, teacher: Tensor) -> float:
    """A difference of logits is rounded to the last bit of the larger one; the kernel forms it before it normalises."""
    return rounding(0, float(student[student.isfinite()].abs().max() + teacher[teacher.isfinite()].abs().max()), FP32)


@every
@pytest.mark.parametrize("vocab", [2, 53])
@pytest.mark.parametrize(("temperature", "t2_scaling"), [(2.0, True), pytest.param(1.0, False, marks=pytest.mark.slow)])
def test_value_and_gradient(
    name: str, params: dict[str, Any], vocab: int, temperature: float, t2_scaling: bool
) -> None:
    settings = loss_settings(name, params, temperature, t2_scaling)
    student, teacher, labels = tensors.logits(rows=5, vocab=vocab, seed=vocab)
    student, teacher = student.float(), teacher.float()
    gold = by_definition(settings, student, teacher, labels)
    naive = by_definition(settings, student, teacher, labels, torch.float32)
    close = coarse(student, teacher) / temperature
    for found, plain, exact in zip(by_kernel(settings, student, teacher, labels), naive, gold, strict=True):
        naive_error = float((plain.detach().double() - exact).abs().max())
        assert float((found - exact).abs().max()) <= 2 * naive_error + close * settings.kd_factor


@every
def test_logits_in_bf16(name: str, params: dict[str, Any]) -> None:
    settings = loss_settings(name, params)
    student, teacher, labels = tensors.logits(rows=5, vocab=40, seed=21)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    values, grad = by_kernel(settings, student, teacher, labels)
    expected, expected_grad = by_definition(settings, student, teacher, labels)
    close = coarse(student, teacher)
    torch.testing.assert_close(values, expected, rtol=close, atol=close)
    # The interpreter cuts to 8 bits, it does not round.
    torch.testing.assert_close(grad, expected_grad, rtol=2**-7 + close, atol=close)


@pytest.mark.parametrize(("log_odds_q", "log_odds_p"), [(15.0, 15.0), (22.0, 22.0), (3.0, 22.0), (60.0, 80.0)])
def test_the_tail_of_a_confident_position(log_odds_q: float, log_odds_p: float) -> None:
    pair = [tensors.confident(x, vocab=40, seed=i)[None] for i, x in ((2, log_odds_q), (1, log_odds_p))]
    student, teacher = (torch.from_numpy(x).float() for x in pair)
    settings = loss_settings("drkl", {"gamma": 1.0})
    values, _ = by_kernel(settings, student, teacher, torch.zeros(1, dtype=torch.long))
    b, k, _ = reference.parts(reference.softmax(student[0].tolist()), reference.softmax(teacher[0].tolist()), 0)
    assert float(values) == pytest.approx(float(b + k), rel=coarse(student, teacher))


def test_huge_logits() -> None:
    high, low = 1e4, -1e4
    student = torch.tensor([[high, low, 0, 1], [high, high, low, low], [0, 1, 2, low]])
    teacher = torch.tensor([[low, high, 0, 1], [high, low, low, high], [0, 2, high, 3]])
    labels = torch.tensor([0, 1, 2])
    for name, params in OBJECTIVES:
        settings = loss_settings(name, params)
        values, grad = by_kernel(settings, student, teacher, labels)
        expected, expected_grad = by_definition(settings, student, teacher, labels)
        close = coarse(student, teacher)
        np.testing.assert_allclose(values, expected, rtol=close, atol=close, err_msg=f"{name} {params}")
        np.testing.assert_allclose(grad, expected_grad, rtol=close, atol=close, err_msg=f"{name} {params}")


def test_the_lowest_index_is_the_target_on_ties() -> None:
    student, teacher, _ = tensors.logits(rows=3, vocab=60, seed=22)
    student, teacher = student.float(), teacher.float()
    teacher[:, [7, 23, 39, 58]] = 20.0
    first = by_kernel(loss_settings("drkl", {}), student, teacher, torch.full((3,), 7))
    label = by_kernel(loss_settings("drkl", {"target": "label"}), student, teacher, torch.full((3,), 7))
    close = coarse(student, teacher)
    torch.testing.assert_close(first[1], label[1], rtol=close, atol=close)


@every
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of what is infinite on purpose
def test_an_infinite_logit_never_gives_a_finite_value_that_is_wrong(name: str, params: dict[str, Any]) -> None:
    student, teacher, labels = tensors.logits(rows=4, vocab=20, seed=23)
    student, teacher = student.float(), teacher.float()
    student[0, 3] = teacher[1, 4] = student[2, 5] = teacher[2, 5] = -torch.inf
    settings = loss_settings(name, params)
    values, _ = by_kernel(settings, student, teacher, labels)
    expected, _ = by_definition(settings, student, teacher, labels)
    finite = values.isfinite()
    close = coarse(student, teacher)
    torch.testing.assert_close(values[finite], expected[finite], rtol=close, atol=close)
    assert finite[3]


@every
def test_the_fused_loss_takes_it(name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(fused, "CHUNK_BYTES", 5 * 30 * 4)
    monkeypatch.setattr(fused, "CUDA_CHUNK_BYTES", 5 * 30 * 4)
    calls: list[int] = []
    step = row_kernel.row_step_
    kernel_steps._runs.cache_clear()

    def watch(*args: Any, **words: Any) -> Tensor:
        calls.append(len(args[0]))
        return step(*args, **words)

    monkeypatch.setattr(row_kernel, "row_step_", watch)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(13, 6, generator=generator), torch.randn(30, 6, generator=generator)
    teacher_hidden, teacher_weight = torch.randn(13, 8, generator=generator), torch.randn(30, 8, generator=generator)
    labels = torch.randint(0, 30, (13,), generator=generator)
    labels[[2, 5]] = -100
    weights = torch.rand(13, generator=generator)

    def run(dtype: torch.dtype, device: str) -> list[Tensor]:
        observed: list[Tensor] = []
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        given = [x.to(device, dtype) for x in (teacher_hidden, teacher_weight)]
        loss = drkl.fused_distillation_loss(
            leaves[0],
            leaves[1],
            given[0],
            given[1],
            labels.to(device),
            objective=drkl.make_objective(name, **params),
            token_weights=weights.to(device),
            observe=lambda chunk: observed.extend((chunk.student.clone(), chunk.teacher.clone())),  # type: ignore[union-attr]
        )
        (3 * loss).backward()
        grads = [x.grad for x in leaves if x.grad is not None]
        logits = [torch.cat(observed[side::2]) for side in (0, 1)]
        return [x.detach().cpu().double() for x in (loss, *logits, *grads)]

    found = run(torch.float32, DEVICE)
    assert calls == [1, 4, 4, 3]  # one row to see that it runs
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ())
    close = rounding(8 + 30 + 13, 5.0, FP32)  # sums over the hidden size, the vocabulary and the positions
    for a, b in zip(found, run(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_without_a_compiler_the_loss_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))

    def broken(*args: Any, **words: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(row_kernel, "row_step_", broken)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((5, 6), (30, 6), (5, 8), (30, 8))]
    kernel_steps._runs.cache_clear()
    with pytest.warns(UserWarning, match="goes on without it, slower. Failed to find C compiler"):
        loss = drkl.fused_distillation_loss(*inputs)
    torch.testing.assert_close(loss, drkl.fused_distillation_loss(*inputs))  # without a further warning
    kernel_steps._runs.cache_clear()


def test_a_chunk_that_the_kernel_gives_up_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(fused, "CHUNK_BYTES", 4)
    monkeypatch.setattr(fused, "CUDA_CHUNK_BYTES", 4)
    inputs = [x.to(DEVICE) for x in (torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3))]
    inputs[2][1] = torch.inf
    starts: list[int] = []
    loss = drkl.fused_distillation_loss(*inputs, reduction="none", observe=lambda chunk: starts.append(chunk.start))
    assert starts == [0, 1, 2] and loss[[0, 2]].isfinite().all() and not loss[1].isfinite()


def test_what_the_kernel_does_not_know() -> None:
    def mine(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return -student_logp[:, 0]

    class Mine(drkl.objectives.ReverseKL):
        pass

    for objective in (mine, Mine(), drkl.decoupled(mine, "rkl"), drkl.decoupled("rkl", mine)):
        reason = row_kernel.why_not(make_settings(objective, 1.0, 1.0, False, "mean"))
        assert reason is not None and "has no device function for objective" in reason
        assert row_kernel.supports(make_settings(objective, 1.0, 0.0, False, "mean"))  # cross-entropy alone
