"""How an objective becomes a loss: mask, vocabulary, temperature, dtype, reduction, memory; once, for all."""

from drkl.losses.common import IGNORE_INDEX
from drkl.losses.dense import distillation_loss
from drkl.losses.fused import fused_distillation_loss
from drkl.losses.gkd import as_gkd_loss
from drkl.losses.head import LMHead
from drkl.losses.position import PositionStatistics
from drkl.losses.statistics import ComparisonStatistics, TokenStatistics, comparison_statistics, token_statistics

__all__ = [
    "IGNORE_INDEX",
    "ComparisonStatistics",
    "LMHead",
    "PositionStatistics",
    "TokenStatistics",
    "as_gkd_loss",
    "comparison_statistics",
    "distillation_loss",
    "fused_distillation_loss",
    "token_statistics",
]
