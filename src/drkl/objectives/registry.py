"""The public registry: every objective by its name."""

from __future__ import annotations

from drkl.objectives.base import Objective
from drkl.objectives.decoupled import DecoupledReverseKL
from drkl.objectives.divergences import CrossEntropy, ForwardKL, ReverseKL

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (CrossEntropy, ForwardKL, ReverseKL, DecoupledReverseKL)
}
