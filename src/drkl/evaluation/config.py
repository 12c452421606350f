"""The ``evaluation`` section of a run's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationConfig(BaseModel):
    """How many answers are sampled, and how. The teacher-forced metrics use every held-out row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(24, ge=0, description="Held-out prompts to answer, picked by a hash of their ids; 0 for none.")
    samples_per_prompt: int = Field(
        4, ge=1, description="Answers per prompt; with 1 there is no self_bleu, which compares answers to one prompt."
    )
    sampling_temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Divides the logits in sampling; the teacher-forced metrics are at 1.",
    )
    max_new_tokens: int = Field(64, ge=1, description="An answer is cut here if it has not ended.")
    seed: int = Field(0, ge=0, description="Of the sampling; the same random numbers for every model.")
    batch_size: int = Field(96, ge=1, description="Answers decoded at once; changes memory and speed, not the answers.")
