"""The `run` and `training` sections of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drkl.errors import did_you_mean
from drkl.models.config import Dtype

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
OWNED = {
    "output_dir": "run.dir and run.name",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "use_cpu": "run.device",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "eval_strategy": "training.eval_every",
    "eval_steps": "training.eval_every",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "load_best_model_at_end": "the best checkpoint, which is always kept",
    "metric_for_best_model": "the best checkpoint, which is always kept",
    "greater_is_better": "the best checkpoint, which is always kept",
    "per_device_train_batch_size": "training.tokens_per_step",
    "per_device_eval_batch_size": "training.tokens_per_step",
    "train_sampling_strategy": "training.tokens_per_step",
    "auto_find_batch_size": "training.tokens_per_step",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "remove_unused_columns": "the batches themselves",
    "label_smoothing_factor": "the objective",
    "resume_from_checkpoint": "--resume",
    "save_only_model": "--resume, which needs the optimiser's state",
}


class RunConfig(BaseModel):
    """Which run this is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("run", description="the run folder's name", pattern=NAME_PATTERN)
    dir: str = Field("runs", description="the folder that holds the run folder")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of the data and of a random init")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA, then MPS, then the CPU")


class TrainingConfig(BaseModel):
    """How the student is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int = Field(200, ge=1, description="optimiser steps")
    tokens_per_step: int = Field(
        1024, ge=1, description="input positions, padding included, in one optimiser step over all processes"
    )
    same_batches: bool = Field(
        False,
        description="every epoch has the first one's batches, in another order; with teacher.remember_mb the teacher "
        "runs in the first epoch only",
    )
    learning_rate: float = Field(5e-4, gt=0, allow_inf_nan=False, description="peak; AdamW, cosine to 0")
    precision: Dtype = Field("auto", description="of the student's matrix products; auto: bf16 where it is fast")
    eval_every: int = Field(50, ge=1, description="steps between losses on held-out rows (and after the last)")
    eval_rows: int = Field(48, ge=1, description="held-out rows for that, at most")
    save_every: int = Field(100, ge=1, description="steps between checkpoints; a multiple of eval_every")
    gradient_checkpointing: bool = Field(
        False, description="keep each layer's input alone and compute the rest again in the backward pass: less memory"
    )
    early_stop_patience: int | None = Field(
        None, ge=1, description="stop after so many held-out losses without a new best; off where left out"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="any other field of transformers.TrainingArguments"
    )

    @model_validator(mode="after")
    def _check_steps(self) -> TrainingConfig:
        if self.save_every % self.eval_every:
            raise ValueError(
                f"save_every is {self.save_every} and eval_every {self.eval_every}; save_every has to be a multiple of "
                "eval_every, so that the best checkpoint is known"
            )
        return self

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if not arguments:
            return arguments
        import dataclasses

        from transformers import TrainingArguments

        known = [f.name for f in dataclasses.fields(TrainingArguments)]
        for key, value in arguments.items():
            if key in OWNED:
                raise ValueError(f"{key} is set by {OWNED[key]}")
            if key not in known:
                raise ValueError(f"transformers.TrainingArguments has no field {key!r}.{did_you_mean(key, known)}")
            if key == "save_total_limit" and (not isinstance(value, int) or value < 2):
                raise ValueError("save_total_limit has to be at least 2: the best checkpoint and the newest")
        return arguments
