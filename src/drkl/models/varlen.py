"""Attention over packed rows by torch's own FlashAttention, `torch.nn.attention.varlen`, which needs no mask."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drkl.models.forward import VARLEN

_HALF = (torch.bfloat16, torch.float16)


def has_varlen(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a model can take torch's FlashAttention in place of its SDPA where it computes in ``dtype``."""
    config = model.config.get_text_config()
    return (
        importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and model.device.type == "cuda"
        and dtype in _HALF
        and config._attn_implementation == "sdpa"
        and "chunked_attention" not in (getattr(config, "layer_types", None) or ())  # which only a mask can say
        and bool(getattr(model, "_supports_flash_attn", False))  # it then says what window its layers have
    )


@contextmanager
def with_varlen(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Inside, models read packed rows by it, and all others by SDPA as before.

    Layers that are computed again in the backward pass have to be inside, too.
    """
    configs: list[Any] = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = VARLEN
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **words: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention: `[batch, heads, tokens, size]` to `[batch, tokens, heads, size]`."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **words
        )
    if dropout or any(words.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("torch's varlen attention has no dropout, soft-cap, sink or bias")
    from torch.nn.attention.varlen import varlen_attn

    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)  # rotary positions make float32 of it
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    attended: Any = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=window, enable_gqa=True)
    return attended.unsqueeze(0), None


def _mask(*args: Any, **words: Any) -> Tensor | None:
    """SDPA's mask; none of packed rows, which transformers alone marks so where there is no padding."""
    if words.get("attention_mask") is None and not words.get("allow_is_causal_skip", True):
        return None
    mask: Tensor | None = sdpa_mask(*args, **words)
    return mask


AttentionInterface.register(VARLEN, _attend)
AttentionMaskInterface.register(VARLEN, _mask)
