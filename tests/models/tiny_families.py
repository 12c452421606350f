"""Random models of every architecture of transformers that can be built small: its defaults, with small sizes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

CAUSAL = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ_TO_SEQ = sorted(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
CLASSIFIERS = sorted(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)

VOCAB = 64
DEPTH = 6
_SMALL = {
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_encoder_position_embeddings "
    "max_decoder_position_embeddings n_ctx max_seq_len seq_length context_length max_sequence_length mamba_d_ssm",
    48: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner hidden_dim ffn_hidden_size dff "
    "dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size",
    32: "hidden_size d_model n_embd dim emb_dim n_embed embedding_size embed_dim attention_hidden_size lru_width "
    "conv_dim word_embed_proj_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size qk_head_dim "
    "o_lora_rank",
    8: "head_dim d_kv d_head kv_channels attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "mamba_d_state relative_attention_num_buckets hidden_size_per_layer_input mamba_n_heads mamba_d_head "
    "mamba_num_heads mamba_head_dim ssm_state_size state_size linear_key_head_dim linear_value_head_dim dim_head "
    "index_head_dim",
    6: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks sliding_window attention_chunk_size attention_window local_attention",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads laurel_rank "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts rotary_dim mamba_dt_rank time_step_rank linear_num_value_heads index_topk hash_length num_buckets "
    "global_block_size chunk_size",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k mamba_n_groups n_groups n_mamba_heads "
    "mamba_expand linear_num_key_heads index_n_heads first_k_dense_replace num_dense_layers zero_expert_num "
    "num_sparse_encoder_layers num_sparse_decoder_layers",
    1: "n_group topk_group moe_num_shared_experts",
}
SIZES = {name: size for size, names in _SMALL.items() for name in names.split()}
SIZES["block_auto_adjust_ff_dim"] = False
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}

_LATENT: dict[str, Any] = {"head_dim": 8, "qk_rope_head_dim": 8, "num_key_value_heads": 4}
_SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa kimi_linear "
        "longcat_flash minicpm3 youtu".split(),
        _LATENT,
    ),
    "bailing_hybrid": {**_LATENT, "layer_types": None, "partial_rotary_factor": 1.0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "gemma3n_text": {**_SHARED, "intermediate_size": 48, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 5},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1, 4]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": "linear_attention mlp full_attention moe linear_attention mlp".split()},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"] * 3, "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5],
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
OTHERS["kimi_linear"] = {**_LATENT, "n_group": 1, "topk_group": 1, "num_experts_per_token": 2}


def config(kind: str, **changes: Any) -> Any:
    """The family's default config with small sizes; parts such as ``text_config`` likewise."""
    base = AutoConfig.for_model(kind)
    return type(base)(**_fields(base, OTHERS.get(kind, {}) | changes))


def _fields(base: Any, changes: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: SIZES[name] for name in vars(base) if name in SIZES and _is_size(vars(base)[name])}
    for name, value in vars(base).items():
        if name.endswith("_token_id") and isinstance(value, int):
            fields[name] = TOKENS.get(name, 3 + len(name) % 5)
    for name in base.sub_configs:
        if isinstance(part := getattr(base, name, None), PreTrainedConfig):
            fields[name] = {**_fields(part, changes.get(name, {})), "model_type": part.model_type}
    return fields | {name: value for name, value in changes.items() if name not in base.sub_configs}


def _is_size(value: Any) -> bool:
    return type(value) in (int, bool)


def model(kind: str, task: str = "causal", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """With weights large enough that each layer matters."""
    torch.manual_seed(seed)
    families: dict[str, Any] = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "classifier": AutoModelForSequenceClassification,
    }
    made: PreTrainedModel = families[task].from_config(config(kind, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2 * (parameter.dim() > 1))
    return made.eval()
