"""Hashes by which the same weights, and the same tokenizer, are known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from drkl.losses.head import gather


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights, their dtype, and its config apart from where it came from."""
    digest = hashlib.sha256()
    config = model.config.to_dict()  # type: ignore[union-attr,operator]
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.data_ptr() not in seen:  # tied weights once
            seen.add(tensor.data_ptr())
            digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


@torch.no_grad()
def describe_model(model: torch.nn.Module, *, keep: bool = True) -> dict[str, str]:
    """Hashes of a model's ``weights`` with their dtype, and of its ``config`` apart from where it came from.

    Of a model that is spread over processes every process has to call it.

    Args:
        model: anywhere.
        keep: whether this process wants the result; it is empty otherwise.
    """
    weights, seen = xxhash.xxh3_128(), set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's own note
        is_new = id(tensor) not in seen  # tied weights once
        seen.add(id(tensor))
        whole = gather(tensor.detach()) if is_new else tensor
        if keep:
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if keep and is_new and not tensor.is_meta:
            values: Any = whole.cpu().contiguous().flatten().view(torch.uint8).numpy()
            weights.update(values)
    if not keep:
        return {}
    text = json.dumps(_own_fields(model.config.to_dict()), sort_keys=True, default=str)  # type: ignore[union-attr,operator]
    return {"weights": weights.hexdigest(), "config": xxhash.xxh3_128_hexdigest(text.encode())}


def _own_fields(config: Any) -> Any:
    """The fields of a model config that say what it computes."""
    if not isinstance(config, dict):
        return config
    others = ("_name_or_path", "transformers_version", "use_cache")
    return {name: _own_fields(value) for name, value in config.items() if name not in others}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary and special ids: two that agree in it give the same ids a meaning."""
    specials = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _specials(tokenizer)}
    text = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(specials.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _specials(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            yield name, token
