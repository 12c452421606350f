"""A tiny model of each kind of cache and forward: states, windows, shared keys, no cache, other positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FalconH1Config,
    FSMTConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    LEDConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniCPM3Config,
    MiniMaxConfig,
    MptConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
    RwkvConfig,
    SwitchTransformersConfig,
    Zamba2Config,
    xLSTMConfig,
)

VOCAB, PAD, BOS, EOS = 64, 0, 1, 4
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SSD = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
BOTH_STACKS: dict[str, Any] = {
    **TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
}  # fmt: skip


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights large enough that a wrong state shows in the most probable tokens."""
    torch.manual_seed(0)
    family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = EncoderDecoderModel(config) if "encoder" in vars(config) else family.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def _bert_to_bert() -> PreTrainedModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SIZES), BertConfig(**SIZES))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = BOS, PAD, EOS
    return _made(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _made(LlamaConfig(**GROUPED)),
    "mpt": lambda: _made(MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "mamba": lambda: _made(MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "mamba2": lambda: _made(
        Mamba2Config(
            **TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1,
            chunk_size=4,
        )
    ),
    "lfm2": lambda: _made(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])),
    "jamba": lambda: _made(
        JambaConfig(
            **SIZES, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=2,
            expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
        )
    ),
    "granite hybrid": lambda: _made(
        GraniteMoeHybridConfig(
            **SIZES, **SSD, num_key_value_heads=2, layer_types=["linear_attention", "full_attention"],
            num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=32, logits_scaling=2.0,
        )
    ),
    "falcon h1": lambda: _made(
        FalconH1Config(**SIZES, **SSD, num_key_value_heads=2, mamba_d_ssm=64, lm_head_multiplier=0.5)
    ),
    "zamba2": lambda: _made(
        Zamba2Config(
            **SIZES, num_key_value_heads=4, layers_block_type=["linear_attention", "hybrid"], mamba_d_state=8,
            mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=4, num_mem_blocks=1,
        )
    ),
    "qwen3 next": lambda: _made(
        Qwen3NextConfig(
            **GROUPED, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )
    ),
    "gemma3": lambda: _made(
        Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma3n": lambda: _made(
        Gemma3nTextConfig(
            **(GROUPED | {"num_hidden_layers": 4, "intermediate_size": [32] * 4}), sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
            activation_sparsity_pattern=[0.0] * 4, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
            laurel_rank=4,
        )
    ),
    "minimax": lambda: _made(
        MiniMaxConfig(
            **GROUPED, layer_types=["linear_attention", "full_attention"], block_size=4, num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
    "minicpm3": lambda: _made(
        MiniCPM3Config(
            **SIZES, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=8, dim_model_base=16,
        )
    ),
    "recurrent gemma": lambda: _made(
        RecurrentGemmaConfig(
            **(SIZES | {"num_hidden_layers": 3}), num_key_value_heads=2, attention_window_size=4, lru_width=32,
            logits_soft_cap=2.0,
        )
    ),
    "rwkv": lambda: _made(
        RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, intermediate_size=32, context_length=64)
    ),
    "xlstm": lambda: _made(
        xLSTMConfig(
            **TOKENS, hidden_size=32, num_blocks=2, num_heads=4, ffn_round_up_to_multiple_of=8, chunk_size=4,
            qk_dim_factor=0.5, v_dim_factor=1.0,
        )
    ),
    "gpt": lambda: _made(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "roberta": lambda: _made(RobertaConfig(**(SIZES | {"pad_token_id": 2}), is_decoder=True)),
    "bert": lambda: _made(BertConfig(**SIZES, is_decoder=True)),
    "bart": lambda: _made(BartConfig(**BOTH_STACKS)),
    "led": lambda: _made(
        LEDConfig(
            **BOTH_STACKS, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4
        )
    ),
    "switch": lambda: _made(
        SwitchTransformersConfig(
            **TOKENS, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=PAD, expert_capacity=8,
        )
    ),
    "fsmt": lambda: _made(
        FSMTConfig(
            **{name: value for name, value in BOTH_STACKS.items() if name != "vocab_size"}, langs=["en", "de"],
            src_vocab_size=VOCAB, tgt_vocab_size=VOCAB,
        )
    ),
    "bert to bert": _bert_to_bert,
}  # fmt: skip
