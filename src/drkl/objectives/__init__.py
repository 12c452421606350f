"""What is minimised: log-probabilities in, one number per position out."""

from drkl.objectives.base import Objective, make_objective
from drkl.objectives.decoupled import Decoupled, DecoupledReverseKL, decoupled
from drkl.objectives.divergences import CrossEntropy, ForwardKL, ReverseKL
from drkl.objectives.registry import OBJECTIVES

__all__ = [
    "OBJECTIVES",
    "CrossEntropy",
    "Decoupled",
    "DecoupledReverseKL",
    "ForwardKL",
    "Objective",
    "ReverseKL",
    "decoupled",
    "make_objective",
]
