"""The `objective` section of a config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from drkl.errors import DrklError
from drkl.objectives.base import FunctionObjective, Objective
from drkl.objectives.registry import make_objective
from drkl.runs import IN_MEMORY


class ObjectiveConfig(BaseModel):
    """The objective's name and, beside it, its parameters (`drkl objectives` lists them)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("drkl", description="Name of the objective; its parameters are further keys (`drkl objectives`).")
    _objective: Objective = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        # A finished run can still be evaluated: only its loss needs the objective.
        self._objective = FunctionObjective(_not_here) if self.in_memory else make_objective(self.name, **self.params)
        return self

    @property
    def in_memory(self) -> bool:
        """Whether the objective was an object of a Python program, so that it cannot be made again."""
        return self.name.startswith(IN_MEMORY)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def make(self) -> Objective:
        """The objective itself, which was made and checked with this section."""
        return self._objective


def _not_here(student_logp: Any, teacher_logp: Any, labels: Any) -> Any:
    raise DrklError("The objective was passed in memory, so it cannot be made again by a name.")
