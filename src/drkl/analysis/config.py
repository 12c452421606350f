"""The `analysis` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class AnalysisConfig(BaseModel):
    """Measurements during training that leave the student as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    watch_every: int | None = Field(
        None,
        ge=1,
        description="Optimiser steps between two measurements of the pushes on the target, logged as watch_* in "
        "train.jsonl; the first and the last step are measured too. Default: off.",
    )
    watch_positions: int = Field(
        256,
        ge=1,
        description="Maximum number of response positions to measure at, evenly spread over training.eval_rows.",
    )
