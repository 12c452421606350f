"""A hash by which the same weights are known again."""

from __future__ import annotations

import hashlib
import json

import torch


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
