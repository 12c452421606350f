from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from drkl.models.dropout import disable_dropout
from tests.models import tiny

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "attention of llama": lambda: tiny.llama(attention_dropout=0.5),
    "gpt2": tiny.gpt2,
    "t5": lambda: tiny.t5(dropout_rate=0.5),
    "bart": lambda: tiny.bart(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, encoder_layerdrop=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_dropped_in_training(name: str) -> None:
    model = MODELS[name]()
    published = model.config.to_dict()
    ids = torch.tensor([[7, 9, 30, 41, 2]])
    inputs = {"input_ids": ids, "use_cache": False} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.equal(model.train()(**inputs).logits, expected)
        disable_dropout(model)
        assert torch.equal(model(**inputs).logits, expected)
    assert model.config.to_dict() == published
