"""Random models of a few thousand weights in folders, with the tokenizers of tests.data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.data.tiny_tokenizers import build

VOCAB = 64


def tokenizer(words: int = VOCAB - 30) -> PreTrainedTokenizerBase:
    return build(extra=[f"w{i}" for i in range(words)])


def llama(seed: int = 0, *, vocab: int = VOCAB, layers: int = 4, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 96,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def gpt2(seed: int = 0, *, layers: int = 4, **changes: Any) -> PreTrainedModel:
    """With dropout, as GPT-2 has it: a run of it also needs its random state back."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "n_positions": 96,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 4,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()


def save(model: PreTrainedModel, folder: Path, tokens: PreTrainedTokenizerBase | None = None) -> Path:
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    """On two sequences of six tokens."""
    ids = torch.tensor([[1, 7, 9, 30, 41, 2], [5, 6, 8, 50, 63, 12]]) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return out
