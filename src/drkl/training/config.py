"""The `run` and `training` sections of a config."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drkl.errors import did_you_mean
from drkl.models.config import Dtype

DEFAULT_TOKENS_PER_STEP = 1024
DEFAULT_STEPS = 200
OWN_ARGUMENTS = ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps")
"""Fields of transformers.TrainingArguments that `TrainingConfig` has too."""
EXCLUSIVE = (("max_steps", "num_train_epochs"), ("tokens_per_step", "per_device_train_batch_size"))
"""Pairs of which one may be given."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
OWNED = {
    "output_dir": "run.dir and run.name",
    "seed": "run.seed",
    "use_cpu": "run.device",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "metric_for_best_model": "the held-out loss",
    "greater_is_better": "the held-out loss",
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "per_device_eval_batch_size": "training.tokens_per_step",
    "train_sampling_strategy": "training.tokens_per_step",
    "auto_find_batch_size": "training.tokens_per_step",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "remove_unused_columns": "the batches themselves",
    "label_smoothing_factor": "the objective",
    "resume_from_checkpoint": "resuming the run",
    "save_only_model": "the checkpoints, which hold the optimiser's state to resume from",
}


def as_name(text: str) -> str:
    """A name of a run for a folder's name, which may be anything; a name stays as it is.

    >>> as_name("warm-up"), as_name("mein Lauf"), as_name("...")
    ('warm-up', 'mein-Lauf', 'run')
    """
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-") or "run"


def default_warmup(num_steps: int) -> int:
    """Warm-up steps of a run of ``num_steps``: a twentieth, at least 1."""
    return max(1, num_steps // 20)


def choose_one(values: dict[str, Any], chosen: Iterable[str]) -> list[str]:
    """Set the other of each `EXCLUSIVE` pair to null in a training section; return the names that had a value."""
    dropped = []
    for pair in EXCLUSIVE:
        for key, other in (pair, pair[::-1]):
            if key in chosen and values.get(key) is not None and other not in chosen and values.get(other) is not None:
                values[other] = None
                dropped.append(other)
    return dropped


class RunConfig(BaseModel):
    """The run's name, folder, seed and device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("run", description="Name of the run folder.", pattern=NAME_PATTERN)
    dir: str = Field("runs", description="Folder that holds the run folder.")
    seed: int = Field(0, ge=0, lt=2**32, description="Random seed for data order and weight initialisation.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device to train on. auto = CUDA if there is one, else MPS, else the CPU."
    )

    @field_validator("dir")
    @classmethod
    def _find_home(cls, folder: str) -> str:
        return os.path.expanduser(folder)


class TrainingConfig(BaseModel):
    """The settings of training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int | None = Field(
        DEFAULT_STEPS, ge=1, description="Number of optimiser steps; left out where num_train_epochs is given."
    )
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Number of passes over the training rows, in place of max_steps."
    )
    tokens_per_step: int | None = Field(
        DEFAULT_TOKENS_PER_STEP,
        ge=1,
        description="Input positions, padding included, in one optimiser step over all processes, at most.",
    )
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="Rows in a micro-batch of one process, in place of tokens_per_step."
    )
    same_batches: bool = Field(
        False,
        description="Give every epoch the batches of the first one, in another order. With teacher.remember_mb the "
        "teacher then runs in the first epoch only.",
    )
    learning_rate: float = Field(5e-4, gt=0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    lr_scheduler_type: str = Field("cosine", description="Learning rate schedule, by transformers' name.")
    warmup_steps: int | float | None = Field(
        None,
        ge=0,
        description="Warm-up: number of steps, or a share of them below 1. Default: a twentieth of the steps, at "
        "least 1.",
    )
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Gradients are clipped to this norm; 0 turns clipping off."
    )
    logging_steps: int | float = Field(10, gt=0, description="Optimiser steps between two lines of train.jsonl.")
    nan: Literal["stop", "skip"] = Field(
        "stop",
        description="What follows where a step's loss or gradient is not finite: stop the run, or skip the step. "
        "A skipped step counts as a step, and changes nothing; the learning rate's schedule waits. Weights that are "
        "not finite stop every run.",
    )
    nan_skips: int = Field(
        3,
        ge=1,
        description="Number of steps in a row that may be skipped. Those that fp16 skips count too, once it has found "
        "its scale.",
    )
    precision: Dtype = Field(
        "auto", description="Compute precision of the student. auto = bf16 if the hardware supports it, else fp32."
    )
    eval_every: int = Field(50, ge=1, description="Steps between held-out losses; there is one after the last step.")
    eval_rows: int = Field(48, ge=1, description="Number of held-out rows for these losses, at most.")
    save_every: int = Field(100, ge=1, description="Steps between checkpoints; a multiple of eval_every.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input and compute the rest again in the backward pass, to save memory.",
    )
    padding_free: Literal["auto", True, False] = Field(
        "auto",
        description="Lay the rows of a batch one after the other, without padding. auto = on a GPU, where both models "
        "have a FlashAttention for it; true elsewhere keeps the rows apart by a mask of tokens x tokens.",
    )
    early_stop_patience: int | None = Field(
        None, ge=1, description="Early-stopping patience, counted in evaluations. Default: off."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of transformers.TrainingArguments."
    )

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        """Let ``arguments`` have the last word on fields of their own, and take one of each exclusive pair."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        arguments = values.get("arguments")
        if isinstance(arguments, dict) and any(name in arguments for name in OWN_ARGUMENTS):
            values |= {name: arguments[name] for name in OWN_ARGUMENTS if name in arguments}
            values["arguments"] = {k: v for k, v in arguments.items() if k not in OWN_ARGUMENTS}
        for usual, other in EXCLUSIVE:
            if values.get(other) is not None:
                values.setdefault(usual, None)
            elif usual in values and values[usual] is None:
                del values[usual]  # neither is given: the default
        return values

    @model_validator(mode="after")
    def _check_steps(self) -> TrainingConfig:
        by_steps = all(self.arguments.get(f"{name}_strategy", "steps") == "steps" for name in ("eval", "save"))
        keeps_best = by_steps and self.arguments.get("load_best_model_at_end") is not False
        if keeps_best and self.save_every % self.eval_every:
            raise ValueError(
                f"save_every is {self.save_every} and eval_every {self.eval_every}; save_every has to be a multiple of "
                "eval_every, so that the best checkpoint is known"
            )
        for name, other in EXCLUSIVE:
            if getattr(self, name) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and {other} {getattr(self, other)}: give one of the two"
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """The section with its defaults written out, as far as they do not depend on the rows or the device."""
        values = self.model_dump(mode="json")
        if self.warmup_steps is None and self.max_steps is not None:
            values["warmup_steps"] = default_warmup(self.max_steps)
        return values

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
