"""The `loss` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LossConfig(BaseModel):
    """How the objective becomes the loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="divides both models' logits")
    kd_weight: float = Field(1.0, ge=0, le=1, description="share of the objective; the rest is cross-entropy at 1")
    t2_scaling: bool = Field(False, description="multiply the objective by temperature squared")
