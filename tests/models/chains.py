"""Models made by hand that write a given token after each token, and the words they are asked with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

STRENGTH = 12.0
"""The logit of the given token; the others' is 0 (its probability among 64 is 0.9996)."""


def chain(tokenizer: Any, following: Mapping[str, str], *, layers: int = 1, **changes: Any) -> PreTrainedModel:
    """A Llama that writes ``following[token]`` after ``token``; its layers add nothing.

    Its embeddings are one-hot, so that the head's weights are a table of what comes next.
    """
    size = len(tokenizer)
    width = size + size % 2
    settings: dict[str, Any] = {
        "vocab_size": size, "hidden_size": width, "intermediate_size": 4, "num_hidden_layers": layers,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "rms_norm_eps": 0.0, "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.model.norm.weight.fill_(1.0)
        for before, after in following.items():
            row, column = tokenizer.convert_tokens_to_ids([after, before])
            # The norm makes a one-hot state the square root of its width.
            model.lm_head.weight[row, column] = STRENGTH / width**0.5
    return model.eval()
