"""Which number format is worth using where."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def has_device(name: str) -> bool:
    """Whether this machine, and this build of torch, has the device."""
    if name == "cuda":
        return torch.cuda.is_available()
    return name != "mps" or torch.backends.mps.is_available()


def cpu_capabilities() -> dict[str, Any]:
    """What the processor can do, as far as torch tells."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is several times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = cpu_capabilities()
        return any(bool(able.get(flag)) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_dtype(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the device has it in hardware, else fp32."""
    if name != "auto":
        return name
    return "bf16" if has_fast_bf16(device) else "fp32"
