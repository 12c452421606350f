"""Rows that lie one after the other are read as each is alone, or a model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask

from drkl.data.collate import collate_packed
from drkl.errors import DrklError
from drkl.models.check import check_student
from drkl.models.forward import hidden_states, row_bounds
from drkl.models.packing import packing_fault
from tests.families import builder
from tests.models import tiny, tiny_classifiers

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20], [30, 31], [40, 41, 42, 43, 44], [30, 31]]


def mistral() -> PreTrainedModel:
    """Each position sees the last three."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2, "sliding_window": 3,
    }  # fmt: skip
    return MistralForCausalLM(MistralConfig(**sizes)).eval()


@torch.no_grad()
def packed_states(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    return list(hidden_states(model, collate_packed(rows))[0].split([len(row) for row in rows]))


@torch.no_grad()
def assert_as_alone(model: PreTrainedModel, rows: list[list[int]], **tolerance: float) -> None:
    """The states of packed rows are those of each one read alone, and of no other row."""
    states = packed_states(model, rows)
    for row, own in zip(rows, states, strict=True):
        ids = torch.tensor([row])
        alone = hidden_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        torch.testing.assert_close(own, alone, **tolerance)
    changed = packed_states(model, [[token + 1 for token in rows[0]], *rows[1:]])
    assert not torch.equal(changed[0], states[0])
    assert all(torch.equal(own, before) for own, before in zip(changed[1:], states[1:], strict=True))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, mistral])
def test_packed_rows_are_read_as_each_is_alone(make: Any) -> None:
    model = make()
    assert packing_fault(model, 4096) is None
    assert_as_alone(model.double(), ROWS, rtol=1e-11, atol=1e-11)
    assert_as_alone(model, ROWS[:1] * 2, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    """A layer rounds the states about ten times, each by half an eps; a leak would move them by their own size."""
    model = tiny.llama(layers=2).to(dtype)
    size = float(torch.cat(packed_states(model, ROWS)).abs().max())
    bound = 2 * 10 * torch.finfo(dtype).eps * size
    assert bound < size / 4
    assert_as_alone(model, ROWS, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny.t5(layers=1), "encoder-decoder"),
        (lambda: tiny_classifiers.make(), "classifier"),
        (lambda: builder.build("mamba"), "hands a state from each token"),
        (lambda: builder.build("bloom"), "ALiBi"),
        (lambda: builder.build("bart"), "takes no position_ids"),
        (lambda: builder.build("opt"), "other logits there than alone"),
        (lambda: builder.build("gpt_neo"), "fails on them (RuntimeError"),
    ],
)
def test_what_cannot_be_packed_is_found_by_kind_or_by_its_numbers(make: Any, reason: str) -> None:
    fault = packing_fault(make().eval(), 4096)
    assert fault is not None and reason in fault


def test_a_table_of_positions_is_no_fault_where_batches_are_shorter() -> None:
    assert packing_fault(builder.build("gpt_neo").eval(), 200) is None


@pytest.fixture
def flash() -> Iterator[list[list[int]]]:
    """A FlashAttention in a few lines, for a CPU; the row bounds that its layers were given."""
    given: list[list[int]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **words: Any) -> tuple[Tensor, None]:
        assert mask is None and words["max_length_q"] == words["max_length_k"] == max(map(len, ROWS))
        given.append(words["cu_seq_lens_q"].tolist())
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        parts = []
        for start, end in zip(given[-1], given[-1][1:], strict=False):
            own = (tensor[:, :, start:end] for tensor in (query, key, value))
            parts.append(torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True))
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_in_test", attend)
    AttentionMaskInterface.register("flash_in_test", flash_attention_mask)
    yield given
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["flash_in_test"]


def test_a_flash_attention_is_told_where_the_rows_begin(flash: list[list[int]]) -> None:
    model = tiny.llama(layers=2).double()
    expected = torch.cat(packed_states(model, ROWS))
    assert row_bounds(model, collate_packed(ROWS)) == {} and not flash
    model.config._attn_implementation = "flash_in_test"
    found = torch.cat(packed_states(model, ROWS))
    assert flash == [[0, 8, 9, 11, 16, 18]] * 2
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    padded = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    assert row_bounds(model, padded) == row_bounds(model, collate_packed(ROWS) | {"cu_seq_lens_q": 0}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name for name, (kind, *_) in builder.ARCHITECTURES.items() if kind == builder.CAUSAL]
)
def test_every_family_is_read_as_alone_or_refused(family: str) -> None:
    try:
        model = builder.build(family).eval()
    except Exception as error:  # what a family makes of small sizes
        pytest.skip(f"it cannot be built: {error}")
    try:
        check_student(model)
    except DrklError as error:
        pytest.skip(f"it cannot be trained: {error}")
    if (fault := packing_fault(model, 4096)) is not None:
        assert len(fault) > 10 and fault[0].islower()
        return
    longer = [row * 12 for row in ROWS]  # past every window and block of such a model
    states = packed_states(model, longer)
    for row, own in zip(longer, states, strict=True):
        ids = torch.tensor([row])
        alone = hidden_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].detach()
        error = (own - alone).abs().amax(-1)
        assert float(error.median()) < 1e-4 * float(alone.abs().max())  # a router may send a token elsewhere
