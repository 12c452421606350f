"""Floating-point formats: their names, and which of them is fast on which device."""

from __future__ import annotations

from typing import Any

import torch

from drkl.errors import DrklError, did_you_mean
from drkl.models.config import DTYPE_NAMES, short_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

DtypeLike = str | torch.dtype
"""``auto``, a name (``fp32``, ``float32``, ``bf16``, ``bfloat16``, ...) or a ``torch.dtype``."""


def pick_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA if there is one, else Apple's MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def has_device(name: str) -> bool:
    """Whether this machine and this build of torch have the device."""
    if name == "cuda":
        return torch.cuda.is_available()
    return name != "mps" or torch.backends.mps.is_available()


def cpu_capabilities() -> dict[str, Any]:
    """Return the instruction sets that torch reports for the processor."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; otherwise bf16 is several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = cpu_capabilities()
        return any(bool(capabilities.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_dtype(dtype: DtypeLike, device: torch.device | None = None) -> str:
    """Return the short name of a dtype: ``fp32``, ``bf16``, ``fp16`` or ``fp64``.

    Args:
        dtype: a name or a ``torch.dtype``; ``auto`` is bf16 where the device multiplies it in hardware, else fp32.
        device: decides ``auto``; None is the device that ``pick_device("auto")`` gives.

    Raises:
        DrklError: an unknown name, or a dtype that no weights are trained or run in here.

    >>> resolve_dtype(torch.float32), resolve_dtype("bfloat16")
    ('fp32', 'bf16')
    """
    name = short_dtype(dtype)
    if name == "auto":
        return "bf16" if has_fast_bf16(pick_device("auto") if device is None else device) else "fp32"
    if name not in DTYPES:
        known = sorted({*DTYPE_NAMES, *DTYPES})
        raise DrklError(
            f"The dtype {dtype!r} is not one that models are loaded in; expected auto, {', '.join(known)}, or the "
            f"torch.dtype of that name.{did_you_mean(str(dtype), known)}"
        )
    return str(name)


def torch_dtype(dtype: DtypeLike, device: torch.device | None = None) -> torch.dtype:
    """Return the ``torch.dtype`` of a name, as `resolve_dtype` reads it."""
    return DTYPES[resolve_dtype(dtype, device)]
