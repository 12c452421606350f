"""The ``evaluation`` section of a run's configuration."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator

SWEEP = (0.5, 0.7, 1.0, 1.2, 1.5)


class EvaluationConfig(BaseModel):
    """How many answers are sampled, and how. The teacher-forced metrics use every held-out row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int | None = Field(
        24, ge=0, description="Held-out prompts to answer, picked by a hash of their ids; 0 for none, null for all."
    )
    samples_per_prompt: int = Field(
        4, ge=1, description="Answers per prompt and seed; with one in all there is no self_bleu, which compares them."
    )
    sampling_temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Divides the logits in sampling; the teacher-forced metrics are at 1.",
    )
    sweep: tuple[float, ...] = Field(
        SWEEP,
        description="Further sampling temperatures, of the teacher and the trained student: fidelity against "
        "diversity; [] for none.",
    )
    max_new_tokens: int = Field(64, ge=1, description="An answer is cut here if it has not ended.")
    seed: int = Field(
        0, ge=0, description="Of the sampling and the intervals; the same random numbers for every model."
    )
    seeds: tuple[int, ...] = Field(
        (), description="Several seeds of the sampling, each with its samples_per_prompt answers; [] is the one seed."
    )
    batch_size: int = Field(96, ge=1, description="Answers decoded at once; changes memory and speed, not the answers.")

    @field_validator("sweep")
    @classmethod
    def _check_sweep(cls, sweep: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < temperature < math.inf for temperature in sweep):
            raise ValueError(f"sampling temperatures are finite numbers above 0; got {list(sweep)}")
        return tuple(sorted(set(sweep)))

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds are different whole numbers, at least 0; got {list(seeds)}")
        return seeds

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the sampling."""
        return self.seeds or (self.seed,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Every sampling temperature, the main one first."""
        return (self.sampling_temperature, *(t for t in self.sweep if t != self.sampling_temperature))


MINILLM = {
    "prompts": None, "samples_per_prompt": 1, "sampling_temperature": 1.0, "sweep": (), "max_new_tokens": 256,
    "seeds": (10, 20, 30, 40, 50),
}  # fmt: skip
"""The decoding of MiniLLM's evaluation: temperature 1, top-p 1, at most 256 new tokens, five seeds, every prompt."""
MINILLM_DATA = {"template": "minillm", "max_prompt_tokens": 256, "max_tokens": 512}
"""Its prompt format and lengths."""
