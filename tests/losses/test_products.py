"""Products that are added to wider sums."""

from __future__ import annotations

import pytest
import torch

from drkl.losses.products import add_product_, widens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_is_added_to_wide_sums(narrow: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, shape, generator=generator).to(DEVICE, narrow) for shape in ((7, 5), (7, 6)))
    total = torch.randint(0, 9, (5, 6), generator=generator).to(DEVICE, torch.float32) + 2.0**-12
    expected = total.double().cpu() + left.double().cpu().T @ right.double().cpu()
    add_product_(total, left.T, right)
    assert torch.equal(total.double().cpu(), expected)  # small whole numbers: nothing is rounded
    total.fill_(torch.nan)
    add_product_(total, left.T, right, scale=0.5, first=True)
    add_product_(total, left.T, right, scale=2.0)
    assert torch.equal(total.double().cpu(), 2.5 * (left.double().cpu().T @ right.double().cpu()))


def test_only_a_gpu_widens_in_the_product_itself() -> None:
    assert not widens(torch.float32, torch.bfloat16, torch.device("cpu"))
    assert not widens(torch.float32, torch.bfloat16, torch.device("meta"))
    if DEVICE == "cuda":
        assert widens(torch.float32, torch.bfloat16, torch.device("cuda", 0))
