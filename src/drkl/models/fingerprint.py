"""Hashes by which the same weights, and the same tokenizer, are known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase


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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary and special ids: two that agree in it give the same ids a meaning."""
    specials = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _specials(tokenizer)}
    text = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(specials.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _specials(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            yield name, token
