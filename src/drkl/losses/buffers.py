"""Memory of a processor that is kept from one loss to the next.

A processor takes fresh memory page by page, which costs as much time as a pass over it: of a loss at few positions more
than the objective. So the large tensors that every call needs come from here, and so does the head's gradient: what is
lent is free again when no tensor is left that has it.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 2 * 2**30
"""At most this much is kept, what is lent included; beyond it memory is taken and given back as usual."""
SMALL_BYTES = 2**20
"""Smaller tensors are not worth it: the allocator keeps their pages itself."""
ALIGNMENT = 64


class _Block:
    """Some memory, and whether it is lent."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = np.empty(size + ALIGNMENT, np.uint8)
        self._lent: weakref.ref[Any] | None = None

    @property
    def is_lent(self) -> bool:
        return self._lent is not None and self._lent() is not None

    def lend(self) -> Tensor:
        """All of it, as bytes. The tensor's storage holds on to the array that the block has a weak reference of."""
        start = -self._memory.ctypes.data % ALIGNMENT
        lent = self._memory[start : start + self.size]
        self._lent = weakref.ref(lent)
        return torch.from_numpy(lent)


_blocks: list[_Block] = []
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with arbitrary contents, of memory that is kept where it is large and a processor's."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < SMALL_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        block = next((block for block in _blocks if block.size == size and not block.is_lent), None)
        if block is None:
            _make_room(size)
            block = _Block(size)
        else:
            _blocks.remove(block)
        if size + sum(other.size for other in _blocks) <= KEPT_BYTES:
            _blocks.append(block)  # the last one is that which was used last
        return block.lend().view(dtype).view(shape)


def release_buffers() -> None:
    """Give back the memory that the fused loss keeps between calls on a processor, at most `KEPT_BYTES`.

    What a tensor still has, such as the gradient of a head, goes with the tensor. The next loss takes fresh memory.
    """
    with _lock:
        _blocks.clear()


def _make_room(size: int) -> None:
    """Drop blocks that are not lent, those that were used longest ago first, until ``size`` bytes more are allowed."""
    for block in list(_blocks):
        if size + sum(other.size for other in _blocks) <= KEPT_BYTES:
            return
        if not block.is_lent:
            _blocks.remove(block)
