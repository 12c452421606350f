"""Products with weights that are laid out once: the same numbers, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from drkl.models import packed
from drkl.models.generate import sample_texts
from drkl.models.packed import LEAST_STEPS, packed_products
from tests.evaluation import tiny

pytestmark = pytest.mark.skipif(not packed._is_right(), reason="this torch has no such product")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=600, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=256, n_layer=2, n_head=4, n_positions=64)).eval()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_numbers_are_those_of_the_plain_product(make: type, rows: int) -> None:
    model = make()
    ids = torch.randint(0, 600, (rows, 7))
    wanted = model(ids).logits
    with packed_products(model, LEAST_STEPS):
        assert len(replaced(model)) >= 8
        found = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert replaced(model) == []
    assert torch.equal(model(ids).logits, wanted)


def test_weights_that_changed_since_are_laid_out_anew() -> None:
    model, ids = llama(), torch.arange(12)[None]
    with packed_products(model, LEAST_STEPS):
        before = model(ids).logits
    for parameter in model.parameters():
        parameter.mul_(1.1)
    with packed_products(model, LEAST_STEPS):
        after = model(ids).logits
    torch.testing.assert_close(after, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


def test_what_it_is_not_for_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(model: nn.Module, steps: int = LEAST_STEPS) -> list[str]:
        with packed_products(model, steps):
            return replaced(model)

    assert layers(llama()) != []
    assert layers(llama(), LEAST_STEPS - 1) == []
    assert layers(llama().bfloat16()) == [] and layers(llama().double()) == []
    assert layers(nn.Linear(64, 64)) == []  # too small to matter
    with torch.autocast("cpu", torch.bfloat16):
        assert layers(llama()) == []
    odd = llama()
    odd.lm_head.__dict__["forward"] = odd.lm_head.forward  # as accelerate's hooks do it
    with packed_products(odd, LEAST_STEPS):
        assert odd.lm_head.__dict__["forward"].__self__ is odd.lm_head
    monkeypatch.setattr(packed, "MOST_BYTES", 1000)
    assert layers(llama()) == []
    monkeypatch.undo()
    monkeypatch.setattr(packed, "_is_right", lambda: False)
    assert layers(llama()) == []


def test_a_product_that_is_gone_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(weight: Tensor) -> Tensor:
        raise AttributeError("no such operator")

    packed._is_right.cache_clear()
    monkeypatch.setattr(packed, "_laid_out", gone)
    assert not packed._is_right()
    packed._is_right.cache_clear()
    monkeypatch.setattr(packed, "_laid_out", lambda weight: torch.ops.mkldnn._reorder_linear_weight(2 * weight, 8))
    assert not packed._is_right()
    packed._is_right.cache_clear()


def test_what_is_given_in_other_ways_is_computed_as_before() -> None:
    layer = nn.Linear(256, 512)
    with packed_products(layer, LEAST_STEPS):
        assert layer(torch.empty(0, 256)).shape == (0, 512)
        with torch.enable_grad():
            out = layer(torch.randn(2, 256))
            out.sum().backward()
    assert layer.weight.grad is not None


def test_samples_are_drawn_from_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    prompts = [[7, 9, 11], [5], [8, 8, 20, 31]]

    def tokens() -> list[list[tuple[int, ...]]]:
        pools = sample_texts(model, tiny.tokenizer(), prompts, samples_per_prompt=4, max_new_tokens=12, stop_ids=[599])
        return [[answer.token_ids for answer in pool] for pool in pools]

    drawn = tokens()
    monkeypatch.setattr(packed, "_is_right", lambda: False)
    plain = tokens()
    same = [a == b for one, other in zip(drawn, plain, strict=True) for a, b in zip(one, other, strict=True)]
    assert sum(same) >= 11  # rounding may decide between two tokens
