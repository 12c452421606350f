"""Memory that is kept between losses is never had by two tensors, and is given back when asked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import drkl
from drkl.losses import buffers, release_buffers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(buffers, "SMALL_BYTES", 0)
    release_buffers()
    yield
    release_buffers()


def take(rows: int, columns: int = 8) -> Tensor:
    return buffers.empty((rows, columns), torch.float32, CPU)


def gradient(head: Tensor) -> Tensor:
    assert head.grad is not None
    return head.grad


def test_memory_comes_back_when_no_tensor_has_it() -> None:
    first = take(4)
    place, view = first.data_ptr(), first[1:]
    del first
    assert take(4).data_ptr() != place, "a view still has it"
    del view
    assert take(4).data_ptr() == place


def test_a_gradient_keeps_its_memory_as_long_as_it_is_there() -> None:
    hidden, head = torch.randn(5, 6), torch.nn.Parameter(torch.randn(30, 6))
    teacher = torch.randn(5, 8), torch.randn(30, 8)
    drkl.fused_distillation_loss(hidden, head, *teacher).backward()
    kept = gradient(head)
    copy, place = kept.clone(), kept.data_ptr()
    head.grad = None
    drkl.fused_distillation_loss(hidden, head, *teacher, objective="rkl").backward()
    assert gradient(head).data_ptr() != place
    torch.testing.assert_close(kept, copy, rtol=0, atol=0)
    del kept
    head.grad = None
    gc.collect()
    drkl.fused_distillation_loss(hidden, head, *teacher).backward()
    torch.testing.assert_close(gradient(head), copy, rtol=0, atol=0)


def test_gradients_accumulate() -> None:
    hidden, teacher = torch.randn(5, 6), (torch.randn(5, 8), torch.randn(30, 8))
    head = torch.nn.Parameter(torch.randn(30, 6))
    drkl.fused_distillation_loss(hidden, head, *teacher).backward()
    once = gradient(head).clone()
    drkl.fused_distillation_loss(hidden, head, *teacher).backward()
    torch.testing.assert_close(gradient(head), 2 * once)


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT_BYTES", 3 * 4 * 32)
    lent = [take(4), take(4)]
    kept = take(4).data_ptr()
    assert take(4).data_ptr() == kept
    beyond = [take(5), take(5)]  # there is room for one of them, once the free one is dropped
    assert sum(block.size for block in buffers._blocks) <= 3 * 4 * 32
    places = {tensor.data_ptr() for tensor in lent + beyond}
    assert len(places) == 4
    too_large = take(13)
    too_large.fill_(1.0)
    assert all(block.size != 13 * 32 for block in buffers._blocks)


def test_release_gives_back_what_is_not_lent_and_leaves_the_rest_alone() -> None:
    lent = take(4).fill_(3.0)
    take(6)
    release_buffers()
    assert not buffers._blocks
    take(4).fill_(5.0)
    assert bool((lent == 3.0).all())


def test_memory_is_aligned_and_typed() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        made = buffers.empty((3, 7), dtype, CPU)
        assert made.shape == (3, 7) and made.dtype == dtype and made.data_ptr() % 64 == 0


def test_small_tensors_and_other_devices_do_not_come_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert buffers.empty((3, 7), torch.float32, torch.device("meta")).is_meta
    monkeypatch.setattr(buffers, "SMALL_BYTES", 1000)
    take(4)
    assert not buffers._blocks
