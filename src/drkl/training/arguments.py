"""From a run's config to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import TrainingArguments

from drkl.errors import DrklError
from drkl.models.precision import resolve_dtype
from drkl.training.spec import RunSpec


def checkpointing_field() -> str:
    """What this transformers calls it; the older name is deprecated where there is a newer one."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def training_arguments(spec: RunSpec, device: torch.device) -> TrainingArguments:
    """The `TrainingArguments` of a run; ``training.arguments`` has the last word where it may speak at all.

    Raises:
        DrklError: a value that transformers refuses.
    """
    training = spec.training
    precision = resolve_dtype(training.precision, device)
    if precision == "fp16" and device.type != "cuda":
        raise DrklError(f"training.precision is fp16, which needs CUDA, but the device is {device.type}; use bf16.")
    arguments: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, training.max_steps // 20),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
    } | training.arguments
    if training.gradient_checkpointing:
        name = checkpointing_field()
        # The reentrant kind asks that the first layer's input needs a gradient, which frozen embeddings do not give.
        arguments = {f"{name}_kwargs": {"use_reentrant": False}} | arguments | {name: True}
    try:
        made = TrainingArguments(
            output_dir=str(spec.folder.checkpoints_path),
            seed=spec.run.seed,
            use_cpu=device.type == "cpu",
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            eval_strategy="steps",
            eval_steps=training.eval_every,
            save_strategy="steps",
            save_steps=training.save_every,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **arguments,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise DrklError(f"training.arguments: {' '.join(str(error).split())}") from error
    # Several cards in one process would be nn.DataParallel, which cuts batches by itself; torchrun uses them all.
    made._n_gpu = min(made.n_gpu, 1)
    if not isinstance(made.gradient_accumulation_steps, int) or made.gradient_accumulation_steps < 1:
        raise DrklError("training.arguments: gradient_accumulation_steps has to be a whole number of at least 1.")
    return made
