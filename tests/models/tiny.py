"""Random models of a few thousand weights in folders, with the tokenizers of tests.data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
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


T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "initializer_factor": 3.0,
    "pad_token_id": 0,
    "eos_token_id": 4,
    "decoder_start_token_id": 0,
}


def t5(seed: int = 0, *, layers: int = 4, encoder_layers: int | None = None, **changes: Any) -> PreTrainedModel:
    """With dropout, as T5 has it."""
    torch.manual_seed(seed)
    depth = {"num_layers": encoder_layers or layers, "num_decoder_layers": layers}
    return T5ForConditionalGeneration(T5Config(**(T5_SIZES | depth | changes))).eval()


def mt5(seed: int = 0, *, layers: int = 4, encoder_layers: int | None = None, **changes: Any) -> PreTrainedModel:
    """Unlike T5 it does not scale the decoder's output; its head is its own here."""
    torch.manual_seed(seed)
    depth = {"num_layers": encoder_layers or layers, "num_decoder_layers": layers}
    model = MT5ForConditionalGeneration(MT5Config(**(T5_SIZES | depth | changes))).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 16))
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model


def bart(seed: int = 0, *, layers: int = 4, encoder_layers: int | None = None, **changes: Any) -> PreTrainedModel:
    """With a bias on its logits."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "encoder_layers": encoder_layers or layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 96,
        "init_std": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": 4,
        "forced_eos_token_id": None,
    }
    model = BartForConditionalGeneration(BartConfig(**(settings | changes))).eval()
    model.final_logits_bias.normal_()
    return model


def save(model: PreTrainedModel, folder: Path, tokens: PreTrainedTokenizerBase | None = None) -> Path:
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def assert_alike(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same function; weights from a file lie elsewhere in memory, where a product may be summed otherwise."""
    torch.testing.assert_close(logits(found), logits(expected))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """On two sequences of six tokens."""
    ids = torch.tensor([[1, 7, 9, 30, 41, 2], [5, 6, 8, 50, 63, 12]]) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids.flip(0)[:, :4]
        out: torch.Tensor = model.eval()(**inputs).logits
    return out
