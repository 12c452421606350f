"""akl's head inside the row kernel: the definition's, at ties too, however flat the teacher is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import drkl
from drkl.losses.common import make_settings
from tests.objectives import tensors
from tests.rounding import rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_kernel  # noqa: E402
from tests.losses.interpreter import patched_once  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_kernel, "BLOCK", 16)
    with patched_once():
        yield


def assert_same_share(student: Tensor, teacher: Tensor, mu: float) -> None:
    """The value tells the share of forward KL: w FKL + (1 - w) RKL."""
    objective = drkl.make_objective("akl", mu=mu)
    labels = torch.zeros(len(student), dtype=torch.long)
    found = row_kernel.row_step_(
        student.clone().to(DEVICE),
        teacher.to(DEVICE),
        None,
        make_settings(objective, 1.0, 1.0, False, "mean"),
        needs_grad=False,
    )
    expected = tensors.value(objective, student.double(), teacher.double(), labels)
    close = rounding(student.shape[1], float(student.abs().max() + teacher.abs().max()), torch.float32)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=close, atol=close)


def student_of(teacher: Tensor, seed: int) -> Tensor:
    return torch.randn(teacher.shape, generator=torch.Generator().manual_seed(seed)) * 2


TIED = {
    "all": (torch.zeros(1, 40), 0.5),
    "all, a part of them": (torch.zeros(1, 40), 0.3),
    "half each": (torch.tensor([[0.0, 0.0]]), 0.5),
    "around 0": (torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]]), 0.4),
    "below the top": (torch.tensor([[3.0] + [1.0] * 30 + [0.0] * 9]), 0.6),
    "a part below the top": (torch.tensor([[3.0] + [1.0] * 30 + [0.0] * 9]), 0.25),
}


@pytest.mark.parametrize("which", TIED)
def test_ties(which: str) -> None:
    teacher, mu = TIED[which]
    assert_same_share(student_of(teacher, 1), teacher, mu)


@pytest.mark.parametrize("mu", [0.02, 0.5, pytest.param(0.99, marks=pytest.mark.slow)])
def test_a_head_that_is_longer_than_the_lanes(mu: float) -> None:
    teacher = torch.randn(1, 150, generator=torch.Generator().manual_seed(3)) * 0.3
    assert_same_share(student_of(teacher, 4), teacher, mu)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mu", [0.05, 0.3, 0.5, 0.8, 0.999])
def test_ties_of_whole_numbers(seed: int, mu: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randint(-3, 4, (3, 61), generator=generator).float() * (0.2 + seed % 3)
    teacher -= 50.0 * (seed % 2)
    assert_same_share(student_of(teacher, seed), teacher, mu)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9])
def test_from_flat_to_peaked(scale: float, mu: float) -> None:
    teacher = torch.randn(2, 700, generator=torch.Generator().manual_seed(9)) * scale
    assert_same_share(student_of(teacher, 8), teacher, mu)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_search_ends_where_a_logit_is_no_number(bad: float) -> None:
    teacher = torch.zeros(1, 40)
    teacher[0, 3] = bad
    settings = make_settings("akl", 1.0, 1.0, False, "mean")
    values = row_kernel.row_step_(student_of(teacher, 2).to(DEVICE), teacher.to(DEVICE), None, settings)
    assert values.isnan().all()
