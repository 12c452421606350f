"""How an objective becomes a loss: mask, vocabulary, temperature, dtype, reduction, memory; once, for all."""

from drkl.losses.common import IGNORE_INDEX
from drkl.losses.dense import distillation_loss
from drkl.losses.fused import fused_distillation_loss
from drkl.losses.gkd import as_gkd_loss
from drkl.losses.head import LMHead
from drkl.losses.position import PositionStatistics

__all__ = [
    "IGNORE_INDEX",
    "LMHead",
    "PositionStatistics",
    "as_gkd_loss",
    "distillation_loss",
    "fused_distillation_loss",
]
