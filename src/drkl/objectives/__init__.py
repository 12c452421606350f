"""Objectives: functions of log-probabilities that return one number per position."""

from drkl.objectives.adaptive import AdaptiveKL, TokenWiseKL
from drkl.objectives.alpha_beta import AlphaBeta
from drkl.objectives.base import FunctionObjective, Objective
from drkl.objectives.decoupled import (
    Decoupled,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
)
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
from drkl.objectives.registry import OBJECTIVES, ObjectiveLike, decoupled, make_objective

__all__ = [
    "OBJECTIVES",
    "AdaptiveKL",
    "AlphaBeta",
    "CrossEntropy",
    "Decoupled",
    "DecoupledKnowledgeDistillation",
    "DecoupledReverseKL",
    "ForwardKL",
    "FunctionObjective",
    "GeneralizedJensenShannon",
    "Objective",
    "ObjectiveLike",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TokenWiseKL",
    "TotalVariation",
    "decoupled",
    "make_objective",
]
