"""A tiny random model of every architecture that transformers registers as a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCAB, PAD, BOS, EOS = 262, 0, 1, 5
LAYERS = 4

CAUSAL, SEQ2SEQ = "causal", "seq2seq"
ARCHITECTURES: dict[str, tuple[str, str, str]] = {
    f"{model_type}-{kind}" if model_type in other else model_type: (kind, model_type, name)
    for kind, registry, other in (
        (CAUSAL, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {}),
        (SEQ2SEQ, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    )
    for model_type, name in registry.items()
}
"""By the name of its row: the registry, the model type, the class."""

_WIDTHS = """hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size
    word_embed_proj_dim lru_width backbone_hidden_size projection_dim vision_output_dim output_channels
    cross_attention_hidden_size encoder_hidden_size hidden_dim out_hidden_size adapter_in_dim adapter_out_dim
    adapter_input_size projector_input_dim projector_output_dim pronunciation_embed_dim shape_embed_dim lang_embed_dim
    unit_embed_dim spkr_embed_dim hidden_size_global audio_hidden_size ple_embed_dim"""
_INNER = """intermediate_size moe_intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff dim_ff d_inner
    n_inner ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
    shared_experts_intermediate_size expert_ffn_hidden_size dense_intermediate_size mlp_dim feed_forward_size
    moe_shared_expert_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"""
_DEPTHS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers max_window_layers"""
_OTHER_DEPTHS = """depth speech_encoder_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers
    num_blocks num_global_layers"""
_HEADS = """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
    attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads linear_num_value_heads
    swa_num_attention_heads num_query_groups speech_encoder_attention_heads t2u_encoder_attention_heads
    t2u_decoder_attention_heads conf_num_attention_heads"""
_KV_HEADS = """num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads kv_n_heads"""
_HEAD_SIZES = """head_dim d_kv d_head dim_head linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim
    swa_head_dim kv_channels attention_head_size v_head_dim qk_rope_head_dim qk_nope_head_dim global_head_dim
    rotary_dim query_pre_attn_scalar mamba_d_head mamba_head_dim swa_v_head_dim"""
_RANKS = "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank laurel_rank adapter_rank d_rel hc_lowrank"
_STATES = "state_size mamba_d_state ssm_state_size mamba_dt_rank time_step_rank hidden_size_per_layer_input"
_WINDOWS = """sliding_window window_size attention_window sliding_window_size attention_window_size
    attention_chunk_size local_attention keep_window_size local_attention_window_len local_radius index_topk"""
_VOCABULARIES = """vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size
    unpadded_vocab_size"""
_EXPERTS = """num_experts num_local_experts n_routed_experts moe_num_experts"""

SIZES: dict[str, int] = {
    name: size
    for names, size in (
        (_WIDTHS, 32), (_INNER, 48), (_DEPTHS, LAYERS), (_OTHER_DEPTHS, 1), (_HEADS, 4), (_KV_HEADS, 2),
        (_HEAD_SIZES, 8), (_RANKS, 8), (_STATES, 8), (_WINDOWS, 8), (_VOCABULARIES, VOCAB), (_EXPERTS, 4),
        # Of few heads all scores are often 0, and which of equal scores are the highest is anybody's choice.
        ("index_n_heads", 16),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k", 2),
        ("mamba_n_heads mamba_num_heads", 8),
        ("max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length rel_extent", 256),
        ("max_source_positions max_target_positions original_max_position_embeddings", 256),
        ("max_encoder_position_embeddings max_decoder_position_embeddings", 256),
        ("n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
        ("first_k_dense_replace num_dense_layers", 1),
        ("chunk_size mamba_chunk_size block_size index_block_size compress_rate", 8),
        ("image_size crop_size", 32), ("patch_size", 16), ("num_position_embeddings", 16),
        ("num_mel_bins", 16), ("num_nextn_predict_layers", 0),
        ("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS),
    )
    for name in names.split()
}  # fmt: skip
"""Sizes by the name of the config's field, where a family's config has it as a number."""

_NOISE = ("drop", "jitter")
"""Parts of the names of settings that make a forward in training mode random."""

_SLIDING_HEADS = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_GLOBAL_HEADS = {"global_head_dim": 16, "num_global_key_value_heads": 1}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # Longer rows than the window are refused: which tokens a layer attends to there depends on those after it.
    "doge": {"keep_window_size": 128},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"text_config": _SLIDING_HEADS, "vision_config": {"pyramid_num_routed": [-1] * LAYERS}},
    "dots3_note_text": _SLIDING_HEADS,
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "intermediate_size": 48,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": _GLOBAL_HEADS},
    "gemma4_text": _GLOBAL_HEADS | {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "gemma4_unified": {"text_config": _GLOBAL_HEADS},
    "gemma4_unified_text": _GLOBAL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": LAYERS},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
        },
        "word_timestamp_config": {"num_key_value_heads": 4},
    },
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 16}},
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 8, "output_dim": 32}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16), "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "attn_layers": ["local", "lsh", "local", "lsh"], "is_decoder": True,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    # Without a mask it leaves every padding token out, and so the start.
    "t5gemma": {"decoder_start_token_id": BOS},
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config": {"depths": [1, 1], "downsampling_ratios": [2], "num_filters": 4}
        for kind in ("acoustic", "semantic")
    },
    "xlm": {"causal": True},
    "xlstm": {"ffn_round_up_to_multiple_of": 8, "num_blocks": LAYERS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": None,
        "attention_head_dim": None,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What the sizes above do not settle, by model type: None leaves a field to its family."""

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "reads the hidden states and the cache of another model",
    "gemma4_unified_assistant": "reads the hidden states and the cache of another model",
    "musicgen": "writes four codebooks of audio at each position, no tokens of text",
    "musicgen_melody": "writes four codebooks of audio at each position, no tokens of text",
    "voxtral_realtime": "its forward needs audio beside the text",
}
"""Why an architecture has no tiny model here, by the name of its row."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, after six special ones."""
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|stop|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<|stop|>", pad_token="<pad>",
        additional_special_tokens=special,
    )  # fmt: skip


def build(row: str, seed: int = 0) -> PreTrainedModel:
    """Make the tiny model of a row, in eval mode, with weights large enough to tell one token from another."""
    kind, model_type, name = ARCHITECTURES[row]
    config = tiny_config(model_type)
    if kind == CAUSAL and (config.is_encoder_decoder or "is_decoder" in vars(config)):
        config.is_encoder_decoder, config.is_decoder = False, True
    torch.manual_seed(seed)
    family: Any = AutoModelForCausalLM if kind == CAUSAL else AutoModelForSeq2SeqLM
    model: PreTrainedModel = family.from_config(config, dtype=torch.float32)
    assert type(model).__name__ == name
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms too: where they are all 0 or 1, a model may not tell what lies before them apart. What is
            # not trained, such as Marian's positions, is made anew by whoever loads it.
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.1))
    return model.eval()


def tiny_config(model_type: str) -> Any:
    return shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def shrunk(cls: type[PreTrainedConfig], overrides: Mapping[str, Any], default: Any = None) -> Any:
    """The config of a class with every size of `SIZES` made small, those of the configs within it too."""
    default = cls() if default is None else default
    fields: dict[str, Any] = {}
    outside = iter(range(VOCAB - 1, EOS, -1))
    for key, value in vars(default).items():
        own = overrides.get(key)
        if isinstance(value, PreTrainedConfig):
            fields[key] = shrunk(type(value), own or {}, value)
        elif isinstance(value, float) and any(part in key for part in _NOISE):
            fields[key] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            if key in SIZES:
                fields[key] = SIZES[key]
            elif key.endswith(("_token_id", "_token_index")) and value >= VOCAB:
                fields[key] = next(outside)
    if default.is_encoder_decoder:
        starts_with_pad = vars(default).get("decoder_start_token_id") in (None, default.pad_token_id)
        fields["decoder_start_token_id"] = PAD if starts_with_pad else EOS
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= {key: value for key, value in overrides.items() if not isinstance(fields.get(key), PreTrainedConfig)}
    fields = {key: value for key, value in fields.items() if value is not None}
    config = cls(**fields)
    return cls(**(fields | _all_kinds(default, config, overrides)))


def _all_kinds(default: Any, config: Any, overrides: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists with a word for each layer that lack one of the default's words: every word in turn."""
    lists = {}
    for key, value in vars(default).items():
        made = vars(config).get(key)
        if key.endswith(("layer_types", "layers_block_type")) and isinstance(value, list) and key not in overrides:
            kinds = list(dict.fromkeys(value))
            if set(made or ()) != set(kinds) or len(made) != LAYERS:
                lists[key] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    return lists
