"""Products whose sums are wider than their factors, added in place."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0, first: bool = False) -> None:
    """Add ``scale * left @ right`` to ``total``, whose dtype may be wider than that of the factors.

    A GPU writes the product of bf16 or fp16 factors into fp32 in the same pass; elsewhere a product in their own dtype
    is made and added.

    Args:
        total: `[a, b]`.
        left: `[a, n]`.
        right: `[n, b]`, of the same dtype.
        scale: a factor on the product.
        first: overwrite ``total``, whose contents have no meaning yet.
    """
    old = 0 if first else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=old, alpha=scale, out=total)
    elif widens(total.dtype, left.dtype, left.device):
        torch.addmm(total, left, right, beta=old, alpha=scale, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(left @ right).mul_(scale)
    else:
        total.add_(left @ right, alpha=scale)


@functools.lru_cache
def widens(wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> bool:
    """Whether a product of narrow factors can be added to wide sums in place: tried once, on small ones."""
    if device.type != "cuda":
        return False
    factor = torch.ones(16, 16, dtype=narrow, device=device)
    total = torch.ones(16, 16, dtype=wide, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=wide, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # PyTorch before 2.9, another backend, or dtypes that do not go together
        return False
    return bool((total == 17.0).all())
