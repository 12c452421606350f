"""torch's FlashAttention over packed rows, with a loop in place of its kernel, which runs on GPUs alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.models.forward import VARLEN, hidden_states, right_padded
from drkl.models.packing import packing_fault
from drkl.models.varlen import has_varlen, with_varlen
from tests.models import tiny
from tests.models.test_packing import ROWS, mistral, packed_states


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _starts: Tensor, longest: int, _longest: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn`, row by row: `[tokens, heads, size]`."""
    assert enable_gqa and window_size[1] == 0 and longest == int(starts.diff().max()) and starts[-1] == len(query)
    groups = query.shape[1] // key.shape[1]
    found = []
    for start, end in pairwise(starts.tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        scores = q @ k.repeat_interleave(groups, 0).mT * (scale or q.shape[-1] ** -0.5)
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0))
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The longest rows that the kernel was called with."""
    calls: list[int] = []

    def attend(*args: Any, **settings: Any) -> Tensor:
        calls.append(args[5])
        return varlen_reference(*args, **settings)

    monkeypatch.setattr(pytest.importorskip("torch.nn.attention.varlen"), "varlen_attn", attend)
    return calls


@pytest.mark.parametrize("make", [lambda: tiny.llama(layers=2), mistral])
def test_packed_rows_need_no_mask_and_padded_ones_are_read_as_before(kernel: list[int], make: Any) -> None:
    model: PreTrainedModel = make().double()
    expected = torch.cat(packed_states(model, ROWS))
    padded = right_padded(model, ROWS)
    before = hidden_states(model, padded)
    with with_varlen([model]):
        assert torch.equal(hidden_states(model, padded), before) and not kernel
        torch.testing.assert_close(torch.cat(packed_states(model, ROWS)), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(packed_states(model, ROWS[:1])[0], expected[: len(ROWS[0])], rtol=1e-11, atol=1e-11)
        assert kernel == [8] * 2 * model.config.num_hidden_layers
        assert packing_fault(model, 4096) is None and model.config._attn_implementation == VARLEN
    assert model.config._attn_implementation == "sdpa"


def test_autocast_gives_the_kernel_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
        seen.update(states.dtype for states in (query, key, value))
        return varlen_reference(query, key, value, *args, **settings)

    monkeypatch.setattr(pytest.importorskip("torch.nn.attention.varlen"), "varlen_attn", attend)
    model = tiny.llama(layers=2)
    with with_varlen([model]):
        assert packing_fault(model, 4096, torch.bfloat16) is None
    assert seen == {torch.bfloat16}


def test_dropout_in_an_attention_is_a_fault_though_nothing_drops_in_eval_mode(kernel: list[int]) -> None:
    model = tiny.llama(layers=1, attention_dropout=0.1)
    with with_varlen([model]):
        fault = packing_fault(model, 4096)
    assert fault is not None and "has no dropout" in fault and not model.training
    assert packing_fault(model, 4096) is None


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"device": torch.device("cpu")}, False),
        ({"_attn_implementation": "eager"}, False),
        ({"layer_types": ["chunked_attention"]}, False),
        ({"_supports_flash_attn": False}, False),
    ],
)
def test_who_can_take_torchs_flash_attention(changes: dict[str, Any], has: bool) -> None:
    class Model:
        device = changes.get("device", torch.device("cuda"))
        _supports_flash_attn = changes.get("_supports_flash_attn", True)
        config = tiny.llama(layers=1).config

    Model.config._attn_implementation = changes.get("_attn_implementation", "sdpa")
    Model.config.layer_types = changes.get("layer_types", ["full_attention"])
    assert has_varlen(Model(), changes.get("dtype", torch.bfloat16)) is has  # type: ignore[arg-type]
