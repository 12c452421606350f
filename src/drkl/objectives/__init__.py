"""What is minimised: log-probabilities in, one number per position out."""

from drkl.objectives.adaptive import AdaptiveKL, TokenWiseKL
from drkl.objectives.alpha_beta import AlphaBeta
from drkl.objectives.base import Objective, make_objective
from drkl.objectives.decoupled import (
    Decoupled,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
    decoupled,
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
from drkl.objectives.registry import OBJECTIVES

__all__ = [
    "OBJECTIVES",
    "AdaptiveKL",
    "AlphaBeta",
    "CrossEntropy",
    "Decoupled",
    "DecoupledKnowledgeDistillation",
    "DecoupledReverseKL",
    "ForwardKL",
    "GeneralizedJensenShannon",
    "Objective",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TokenWiseKL",
    "TotalVariation",
    "decoupled",
    "make_objective",
]
