"""Memory that a step on a processor has freed, kept for the next one."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The names and numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20
"""What glibc comes to by itself, once tensors of that size have been freed."""
_NEVER = 2**31 - 1


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Let the C library keep what is freed inside the block, and give it back at the end.

    The end of a step frees its activations and gradients at once. glibc hands them to the system, which clears every
    page anew when the next step asks for it. Nothing happens on a GPU, with another C library, or where the environment
    says how memory is to be allocated.

    Args:
        device: where the training runs.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device.type != "cpu" or told or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    # Setting one of the two ends the adaptation of both.
    library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)
