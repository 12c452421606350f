"""The ``data`` section of a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DataConfig(BaseModel):
    """Where the rows come from, and how many tokens of each are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(
        default=None,
        description="Training rows: a jsonl file, or bundled:dolly (ships with drkl). Exactly one of path and dataset.",
    )
    dataset: str | None = Field(
        default=None,
        description="Training rows: a `datasets` id or a local folder, 'id' or 'id:config'; its split 'train' is used.",
    )
    eval_path: str | None = Field(
        default=None,
        description="Held-out rows: a jsonl file, or bundled:dolly-eval; null holds out 5 % of the training rows (at "
        "least 1, at most 100), picked by a hash of their ids.",
    )
    max_rows: int | None = Field(
        default=None, gt=0, description="Use the first so many training rows; all where left out."
    )
    format: Literal["auto", "prompt_response", "messages"] = Field(
        default="auto",
        description="Fields of a row: prompt and response, or messages; auto takes messages where a row has them.",
    )
    max_prompt_tokens: int = Field(
        default=256, gt=0, description="Rows whose prompt has more tokens than this are dropped (counted, never cut)."
    )
    max_tokens: int = Field(
        default=512, gt=1, description="Prompt and response together; a longer response is cut at its end (counted)."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.path is None) == (self.dataset is None):
            came = "neither" if self.path is None else "both"
            raise ValueError(f"Expected exactly one of path (jsonl) and dataset (a `datasets` id); got {came}.")
        if self.max_tokens <= self.max_prompt_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be larger than max_prompt_tokens ({self.max_prompt_tokens}): "
                "it counts prompt and response together, and a row without a response teaches nothing."
            )
        return self
