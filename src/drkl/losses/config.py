"""The `loss` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LossConfig(BaseModel):
    """Settings of the loss around the objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Temperature of the loss; divides both models' logits."
    )
    kd_weight: float = Field(
        1.0, ge=0, le=1, description="Weight of the objective; cross-entropy with the labels has 1 - kd_weight."
    )
    t2_scaling: bool = Field(False, description="Multiply the objective by temperature squared.")
