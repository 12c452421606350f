"""The `objective` section of a config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from drkl.objectives.base import Objective
from drkl.objectives.registry import make_objective


class ObjectiveConfig(BaseModel):
    """The objective's name and, beside it, its own fields (`drkl objectives` lists them)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("drkl", description="a name that `drkl objectives` lists; its own fields stand beside it")

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        self.make()
        return self

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def make(self) -> Objective:
        """The objective itself.

        Raises:
            DrklError: an unknown name or field, or a value outside its domain.
        """
        return make_objective(self.name, **self.params)
