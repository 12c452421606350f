from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.check import check_forward
from drkl.models.forward import hidden_states, lm_head, without_mask
from tests.models import tiny, tiny_classifiers

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
ROWS = [Row("a", (5, 6, 7), (8, 9, 4), None), Row("b", (10,), (11, 4), None)]  # type: ignore[arg-type]


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


CONFIGS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gemma2": lambda: made(Gemma2Config(**GROUPED, final_logit_softcapping=2.0, initializer_range=0.5)),
    "cohere": lambda: made(CohereConfig(**SIZES, num_key_value_heads=1, logit_scale=0.25, pad_token_id=0)),
    "granite": lambda: made(GraniteConfig(**SIZES, num_key_value_heads=1, logits_scaling=8.0, embedding_multiplier=12)),
    "neox": lambda: made(GPTNeoXConfig(**SIZES)),
    "opt": lambda: made(
        OPTConfig(vocab_size=64, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=2,
                  num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
    ),
    "bloom": lambda: made(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_hidden_states_is_the_models_logits(name: str) -> None:
    model = CONFIGS[name]()
    batch = collate(ROWS, pad_id=0)
    ours = lm_head(model).logits(hidden_states(model, batch))
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    keep = batch["labels"] != -100
    torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-5, atol=1e-5)
    check_forward(model)


def test_scale_and_softcap_are_read_from_the_config() -> None:
    assert lm_head(CONFIGS["gemma2"]()).softcap == 2.0
    assert lm_head(CONFIGS["cohere"]()).scale == 0.25
    assert lm_head(CONFIGS["granite"]()).scale == pytest.approx(1 / 8)
    head = lm_head(tiny.llama())
    assert (head.scale, head.softcap, head.bias) == (1.0, None, None)


def test_padding_changes_nothing() -> None:
    model = tiny.gpt2().double()  # a batch of two is summed in another order than one of one
    together = hidden_states(model, collate(ROWS, pad_id=0))
    alone = hidden_states(model, collate(ROWS[1:], pad_id=0))
    torch.testing.assert_close(together[1, :2], alone[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])  # two of them count positions by the mask
def test_padding_that_is_read_as_tokens_changes_nothing(name: str) -> None:
    model = CONFIGS[name]().double().eval()
    batch = collate(ROWS, pad_id=9)
    unmasked = without_mask(model, batch)
    own = batch["attention_mask"] == 1
    assert not own.all() and unmasked["attention_mask"].all() and unmasked["input_ids"] is batch["input_ids"]
    torch.testing.assert_close(hidden_states(model, unmasked)[own], hidden_states(model, batch)[own])


@pytest.mark.parametrize("model", [tiny.t5, tiny_classifiers.make], ids=["an encoder", "a classifier"])
def test_a_mask_that_is_needed_stays(model: Callable[[], PreTrainedModel]) -> None:
    batch = {"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}
    assert without_mask(model(), batch)["attention_mask"] is batch["attention_mask"]


def test_check_forward_leaves_the_mode_alone() -> None:
    model = tiny.gpt2().train()
    check_forward(model)
    assert model.training
    check_forward(model.eval())
    assert not model.training


class Shifted(LlamaForCausalLM):
    """Its logits are not what its head makes of its hidden states."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


def test_other_logits_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(DrklError, match=r"Shifted does not compute its logits as softcap"):
        check_forward(Shifted(tiny.llama().config))


def test_a_model_without_a_head_is_refused() -> None:
    model = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(DrklError, match=r"T5EncoderModel has no output head"):
        lm_head(model)
