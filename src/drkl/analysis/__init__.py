"""Why a student becomes what it becomes: the pushes that an objective gives to the target and to the tail."""

from drkl.analysis.gradients import Decomposition, closed_form, decompose, terms

__all__ = ["Decomposition", "closed_form", "decompose", "terms"]
