"""The `analysis` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class AnalysisConfig(BaseModel):
    """What is measured beside the training that it is not needed for; the student is the same with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    watch_every: int | None = Field(
        None,
        ge=1,
        description="optimiser steps between two looks at what pushes the target (and at the first step and the last): "
        "watch_* in train.jsonl; off where left out",
    )
    watch_positions: int = Field(
        256, ge=1, description="response positions of training.eval_rows for that, at most, evenly spread"
    )
