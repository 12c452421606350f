"""The `objective` section of a config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from drkl.objectives.base import Objective
from drkl.objectives.registry import make_objective


class ObjectiveConfig(BaseModel):
    """The objective's name and, beside it, its parameters (`drkl objectives` lists them)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("drkl", description="Name of the objective; its parameters are further keys (`drkl objectives`).")
    _objective: Objective = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        self._objective = make_objective(self.name, **self.params)
        return self

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def make(self) -> Objective:
        """The objective itself, which was made and checked with this section."""
        return self._objective
