"""The ``evaluation`` section of a run's configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SWEEP = (0.5, 0.7, 1.0, 1.2, 1.5)
FITS = ("fit", "fit_to_teacher")
"""What is fitted in place of a given temperature on the logits."""


class EvaluationConfig(BaseModel):
    """The number of sampled answers and the sampling settings; teacher-forced metrics use every held-out row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int | None = Field(
        24,
        ge=0,
        description="Number of held-out prompts to answer, selected by a hash of their ids; 0 for none, null for all.",
    )
    samples_per_prompt: int = Field(
        4,
        ge=1,
        description="Number of answers per prompt and seed. A single answer has no self_bleu, which compares answers.",
    )
    sampling_temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Sampling temperature: divides the logits. Teacher-forced metrics are always at temperature 1.",
    )
    sweep: tuple[float, ...] = Field(
        SWEEP,
        description="Further sampling temperatures for teacher and student, to compare fidelity at equal diversity; [] "
        "for none.",
    )
    max_new_tokens: int = Field(
        64,
        ge=1,
        description="Maximum number of tokens in an answer; longer answers are cut. Where it is left out it fits the "
        "models: half of a shorter context, and prompts that leave no room for that are not answered.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed for sampling and bootstrap intervals. Every model gets the same random numbers.",
    )
    seeds: tuple[int, ...] = Field(
        (),
        description="Several random seeds for sampling, each with samples_per_prompt answers; [] uses seed alone.",
    )
    batch_size: int = Field(
        96, ge=1, description="Number of answers decoded at once. Changes memory and speed, not the answers."
    )
    logit_temperature: float | Literal["fit", "fit_to_teacher"] | None = Field(
        None,
        description="Measure the student once more with its logits divided by this number, as the model `scaled`; null "
        "for not at all. fit finds the number with the least negative log-likelihood of the held-out tokens or labels, "
        "fit_to_teacher the one with the least forward KL to the teacher: on either half of the rows, for the other.",
    )

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

    @field_validator("logit_temperature", mode="before")
    @classmethod
    def _check_logit_temperature(cls, given: Any) -> Any:
        number = given if isinstance(given, int | float) and not isinstance(given, bool) else None
        if given is None or given in FITS or (number is not None and 0 < number < math.inf):
            return given
        raise ValueError(f"expected a finite number above 0, {', '.join(FITS)} or null")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The random seeds for sampling."""
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
