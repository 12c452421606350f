"""The `loss` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LossConfig(BaseModel):
    """Settings of the loss around the objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="temperature that divides both models' logits"
    )
    kd_weight: float = Field(
        1.0, ge=0, le=1, description="weight of the objective; 1 - kd_weight is that of the labels' cross-entropy"
    )
    t2_scaling: bool = Field(False, description="multiply the objective by temperature squared")
