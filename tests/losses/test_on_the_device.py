"""The fused loss beside float64, on a GPU where there is one: there at the size of a real model's head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import drkl
from benchmarks.fused_loss import Case
from tests.rounding import rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS, VOCAB, HIDDEN = (40, 151_936, 896) if DEVICE == "cuda" else (20, 600, 24)
pytestmark = pytest.mark.slow  # on a processor tests/losses/test_fused.py says the same, and more


def run(case: Case, objective: str, dtype: torch.dtype, *, is_fused: bool) -> list[Tensor]:
    """The loss of each position, and the gradients of their mean on the hidden states and the head, in float64."""
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (case.student_hidden, case.student_head))
    teacher_hidden, teacher_head = case.teacher_hidden.to(dtype), case.teacher_head.to(dtype)

    def loss(reduction: str) -> Tensor:
        words = {"objective": objective, "reduction": reduction}
        if is_fused:
            return drkl.fused_distillation_loss(hidden, head, teacher_hidden, teacher_head, case.labels, **words)
        return drkl.distillation_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, case.labels, **words)

    values = loss("none").detach()
    loss("mean").backward()
    assert hidden.grad is not None and head.grad is not None
    return [x.double() for x in (values, hidden.grad, head.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", list(drkl.OBJECTIVES))
def test_the_error_is_that_of_the_naive_lines_on_the_device(objective: str, dtype: torch.dtype) -> None:
    case = Case(POSITIONS, VOCAB, HIDDEN, dtype, DEVICE)
    gold = run(case, objective, torch.float64, is_fused=False)
    naive = run(case, objective, dtype, is_fused=False)
    found = run(case, objective, dtype, is_fused=True)
    for ours, plain, exact in zip(found, naive, gold, strict=True):
        size = float(exact.norm())
        # A norm of many errors is no lucky one; what is rounded once more, to the dtype, is off by that.
        budget = 2 * float((plain - exact).norm()) + rounding(1, size, dtype)
        assert float((ours - exact).norm()) <= budget
