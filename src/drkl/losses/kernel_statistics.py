"""What training logs of each position, by a kernel where one runs."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from drkl.losses import fused


def kernel_statistics(student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor] | None:
    """The numbers of each position `[n]` that training logs, by their names; None where the kernel does not run.

    Args:
        student: `[n, vocab]`, logits.
        teacher: likewise, or None.
        labels: `[n]`.
    """
    dtypes = {x.dtype for x in (student, teacher) if x is not None}
    if (
        student.device.type not in fused.KERNEL_DEVICES
        or torch.float64 in dtypes
        or not _statistics_run(student.device)
    ):
        return None
    from drkl.losses import row_statistics

    found = row_statistics.row_statistics(student, teacher, labels)
    return dict(zip(row_statistics.NAMES, found.unbind(), strict=False))


@functools.lru_cache
def _statistics_run(device: torch.device) -> bool:
    """Try it once; where it fails the loss's own kernel does, and says so."""
    if importlib.util.find_spec("triton") is None:
        return False
    from drkl.losses import row_statistics

    logits = torch.zeros(1, 2, device=device)
    try:
        row_statistics.row_statistics(logits, logits, torch.zeros(1, dtype=torch.long, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return True
