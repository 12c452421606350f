"""Losses compute an objective on a batch: mask, vocabulary, temperature, dtype, reduction and memory."""

from drkl.losses.buffers import release_buffers
from drkl.losses.common import IGNORE_INDEX, LogitChunk, Observer
from drkl.losses.dense import distillation_loss
from drkl.losses.fused import fused_distillation_loss
from drkl.losses.gkd import as_gkd_loss
from drkl.losses.head import LMHead
from drkl.losses.topk import TopK

__all__ = [
    "IGNORE_INDEX",
    "LMHead",
    "LogitChunk",
    "Observer",
    "TopK",
    "as_gkd_loss",
    "distillation_loss",
    "fused_distillation_loss",
    "release_buffers",
]
