"""Gradients of objectives, split into pushes of target and tail, and the analysis of a trained student with them."""

from drkl.analysis.gradients import Decomposition, decompose
from drkl.analysis.splits import terms

__all__ = ["Decomposition", "decompose", "terms"]
