"""The public registry: every objective by its name."""

from __future__ import annotations

from drkl.objectives.adaptive import AdaptiveKL, TokenWiseKL
from drkl.objectives.alpha_beta import AlphaBeta
from drkl.objectives.base import Objective
from drkl.objectives.decoupled import DecoupledKnowledgeDistillation, DecoupledReverseKL
from drkl.objectives.divergences import (
    CrossEntropy,
    ForwardKL,
    GeneralizedJensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)

_CLASSES: tuple[type[Objective], ...] = (
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    SymmetricKL,
    GeneralizedJensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    DecoupledKnowledgeDistillation,
    AdaptiveKL,
    AlphaBeta,
    TokenWiseKL,
    DecoupledReverseKL,
)
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in _CLASSES}
