"""Why an objective does what it does: its pushes on the target and on the tail, and toys where one sees them."""

from drkl.analysis.gradients import Decomposition, closed_form, decompose
from drkl.analysis.splits import terms

__all__ = ["Decomposition", "closed_form", "decompose", "terms"]
