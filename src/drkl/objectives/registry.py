"""The public registry: every objective by its name."""

from __future__ import annotations

from drkl.objectives.base import Objective
from drkl.objectives.decoupled import DIVERGENCES, DecoupledKnowledgeDistillation, DecoupledReverseKL
from drkl.objectives.divergences import CrossEntropy

_CLASSES: tuple[type[Objective], ...] = (
    CrossEntropy,
    *DIVERGENCES,
    DecoupledKnowledgeDistillation,
    DecoupledReverseKL,
)
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in _CLASSES}
