"""Bytes of tensors without numbers, against those that autograd keeps of real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.models.forward import hidden_states
from drkl.models.load import without_weights
from drkl.training.tracing import LiveBytes, backward, traced
from tests.models import tiny

ROWS, TOKENS, DECODER_TOKENS = 3, 12, 5


def batch(model: PreTrainedModel, device: str) -> dict[str, Tensor]:
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        ids = torch.ones(ROWS, DECODER_TOKENS, dtype=torch.long, device=device)
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    return inputs


def kept_by_autograd(model: PreTrainedModel) -> int:
    """Bytes of the storages that the graph of a real forward pass keeps, and of its result; weights are not its own."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    inputs = batch(model, "cpu")
    weights |= {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = hidden_states(model, inputs)
    pack(hidden)
    return sum(kept.values())


def found(model: PreTrainedModel, autocast: torch.dtype | None = None) -> LiveBytes:
    empty = without_weights(model.config, torch.float32, "").train()
    for name, parameter in empty.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    live = LiveBytes()
    live.watch(empty)
    inputs = batch(empty, "meta")
    live.leave_out(inputs.values())
    with traced(live, "cpu", autocast):
        live.result = hidden_states(empty, inputs)  # type: ignore[attr-defined]
    return live


@pytest.mark.parametrize(
    "make",
    [
        tiny.llama,
        pytest.param(lambda: tiny.llama(attn_implementation="eager"), marks=pytest.mark.slow),
        pytest.param(tiny.gpt2, marks=pytest.mark.slow),
        pytest.param(lambda: tiny.gpt2(attn_pdrop=0.0, embd_pdrop=0.0), marks=pytest.mark.slow),
        pytest.param(tiny.t5, marks=pytest.mark.slow),
        pytest.param(tiny.bart, marks=pytest.mark.slow),
    ],
)
def test_what_a_forward_pass_keeps_is_what_autograd_keeps(make: Callable[[], Any]) -> None:
    model = make().train()
    assert found(model).now == kept_by_autograd(model)


@pytest.mark.slow
def test_frozen_weights_keep_less() -> None:
    model = tiny.llama().train()
    model.get_input_embeddings().requires_grad_(False)
    assert found(model).now == kept_by_autograd(model) < found(tiny.llama().train()).now
    model.requires_grad_(False)
    assert found(model).now == ROWS * TOKENS * 16 * 4  # the result alone


@pytest.mark.slow
def test_eager_attention_keeps_the_scores() -> None:
    heads, layers = 2, 4
    fused, eager = (tiny.llama(attn_implementation=name).train() for name in ("sdpa", "eager"))
    more = found(eager).now - found(fused).now
    scores = ROWS * heads * TOKENS * TOKENS * 4 * layers
    sums = ROWS * heads * TOKENS * 4 * layers
    assert more >= scores - sums


@pytest.mark.slow
def test_a_layer_that_is_computed_again_keeps_its_input_alone() -> None:
    empty = without_weights(tiny.llama().config, torch.float32, "").train()
    empty.activation_checkpointing_enable({"use_reentrant": False})
    live = LiveBytes()
    live.watch(empty)
    with traced(live, "cpu"):
        hidden = hidden_states(empty, batch(empty, "meta"))
        inputs_of_layers = 4 * ROWS * TOKENS * 16 * 4
        assert inputs_of_layers <= live.now < 2.5 * inputs_of_layers
        live.restart()
        backward(hidden.sum())
    assert live.gradients == sum(parameter.numel() * 4 for parameter in empty.parameters())


@pytest.mark.slow
def test_autocast_keeps_halves_of_what_it_multiplies() -> None:
    model = tiny.llama().train()
    whole, half = found(model), found(model, torch.bfloat16)
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert half.now < whole.now + 2 * weights
    assert half.now > whole.now / 2


def test_bytes_of_real_tensors_come_and_go() -> None:
    with (live := LiveBytes()):
        first = torch.zeros(10)
        view = first[2:]
        second = torch.zeros(5, dtype=torch.float64)
        assert live.now == live.peak == 80
        del first
        assert live.now == 80, "a view keeps its storage"
        del view, second
        assert (live.now, live.peak) == (0, 80)
        live.restart()
        assert live.peak == 0


def test_numbers_that_are_not_there_are_made_up() -> None:
    with LiveBytes():
        numbers = torch.empty(4, 2, device="meta")
        mask = torch.empty(4, 2, dtype=torch.bool, device="meta")
        assert bool(mask.all()) and not bool(mask.any())
        assert float(numbers.max()) == 1.0
        assert numbers[mask].shape == (8,) and mask.nonzero().shape == (8, 2)


@pytest.mark.slow
def test_two_gradients_of_one_weight_are_added_up_in_place() -> None:
    empty = without_weights(tiny.llama(vocab=4096).config, torch.float32, "").train()
    embeddings = 4096 * 16 * 4
    live = LiveBytes()
    live.watch(empty)
    with traced(live, "cpu"):
        hidden = hidden_states(empty, batch(empty, "meta"))
        logits = hidden @ empty.get_output_embeddings().weight.T
        live.restart()
        backward(logits.sum())
    others = ROWS * TOKENS * 4096 * 4
    assert 2 * embeddings < live.peak < 3 * embeddings + 2 * others
