"""Fields of `TrainingArguments` that drkl does not read, or that need something which is not there: refused by name.

They are checked where the arguments are made: nothing is loaded and nothing is written yet.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import numbers
import os
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging

from drkl.errors import DrklError
from drkl.training.config import default_warmup

if TYPE_CHECKING:
    from drkl.training.arguments import DistillationConfig

_NO_PREDICTIONS = "an evaluation during training returns no predictions; drkl.evaluate measures a student"
_BEST = "the held-out loss, eval_loss, decides which checkpoint is the best"
_NO_HUB = "call save_model(), then upload the folder student/ with huggingface_hub.upload_folder"
_NO_PARTS = "a step is cut into micro-batches and the parts of all processes before accelerate sees it"
_LIGER = "the loss is fused already, and liger's patches replace the forward that it reads"
_OWN_ROWS = "rows are tokenised when the trainer is made, and columns that are not read are left out"
REFUSED = {
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "label_smoothing_factor": "the objective is the whole loss; kd_weight adds a cross-entropy",
    "auto_find_batch_size": "a step's size follows from tokens_per_step; gradient_accumulation_steps cuts it smaller",
    "average_tokens_across_devices": "the loss of a step is divided by the tokens of all processes, always",
    "ignore_data_skip": "a resumed run goes on with the rows that come next, which costs no time",
    "remove_unused_columns": _OWN_ROWS,
    "label_names": _OWN_ROWS,
    "length_column_name": _OWN_ROWS,
    "train_sampling_strategy": "drkl shuffles the rows itself, by the seed; tokens_per_step groups them by length",
    "dataloader_in_order": "the steps are planned, and batches that come in another order would be other steps",
    "push_to_hub": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "prediction_loss_only": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "do_predict": _NO_PREDICTIONS,
    "fp16_full_eval": "held-out losses are computed in the precision of the training",
    "bf16_full_eval": "held-out losses are computed in the precision of the training",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": "training keeps no cache, and the saved config.json has the model's own value",
    "save_on_each_node": "all machines share one run folder, which the first process writes",
    "enable_jit_checkpoint": "a run that is told to end (SIGTERM) saves by itself",
    "resume_from_checkpoint": "it is an argument of train()",
    "local_rank": "the launcher says it in the environment, as LOCAL_RANK",
    "parallelism_config": "each process trains on rows of its own, with the whole student or with FSDP2 (fsdp)",
}
"""Fields in whose place drkl does something else, and what; a value that asks for anything is refused."""
_NOTHING: dict[str, tuple[Any, ...]] = {
    "remove_unused_columns": (False,),
    "metric_for_best_model": ("eval_loss",),
    "greater_is_better": (None, False),
    "hub_token": (None, "<HUB_TOKEN>"),  # as to_dict() has it
    "label_names": (None, []),
    "include_for_metrics": (None, []),
}
"""Values that ask for nothing, where it is not the default alone."""

_OF_TRACKERS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
                "hub_private_repo")  # fmt: skip
"""Fields that trackers alone read."""
OF_LAYERS = ("galore_", "apollo_")
"""Optimisers that are made of a model's own layers, by optim_target_modules."""
_IN_BACKWARD = ("_layerwise", "lomo")
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_LEAST = {
    "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1, "eval_delay": 0, "ddp_timeout": 1, "data_seed": 0,
    "ddp_bucket_cap_mb": 1, "neftune_noise_alpha": 0, "save_total_limit": 1, "torch_empty_cache_steps": 1,
}  # fmt: skip
_LEVELS = ("passive", *logging.log_levels)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "log_level": _LEVELS, "log_level_replica": _LEVELS,
    "include_num_input_tokens_seen": ("no", "all", "non_padding", True, False),
}  # fmt: skip
_MORE_KINDS: dict[str, tuple[Any, ...]] = {
    "fsdp": (bool, list),
    "debug": (list, types.NoneType),
    "accelerator_config": (AcceleratorConfig,),
}
"""Classes of values that transformers takes, or makes of others, beside those of the annotation."""
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Fields whose text is the path of a json file."""


_TYPES = typing.get_type_hints(TrainingArguments)
"""The class's own; HfArgumentParser changes those of its fields."""


def check_values(args: DistillationConfig, checked: tuple[str, ...] = ()) -> None:
    """Raise DrklError for a field of another type than its own, or out of its domain.

    Args:
        args: before transformers settles them.
        checked: fields with a check of their own.
    """
    own = {f.name: f for f in dataclasses.fields(type(args))}
    for field in dataclasses.fields(TrainingArguments):
        value, name = getattr(args, field.name), field.name
        if name in checked or value == own[name].default or (value is None and own[name].default is None):
            continue
        kinds = _kinds(_TYPES[name])
        if not any(_is_a(value, kind) for kind in (*kinds, *_MORE_KINDS.get(name, ()))):
            words = dict.fromkeys(_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
            raise DrklError(f"{name} is {_shown(name, value)}; expected {' or '.join(words)}.")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise DrklError(f"{name} is {value!r}; expected {', '.join(map(str, _CHOICES[name]))}.")
        if name in _LEAST and value is not None and value < _LEAST[name]:
            raise DrklError(f"{name} is {value!r}; expected a number of at least {_LEAST[name]}.")
        if name in _FILES and isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
            raise DrklError(f"{name} is {value!r}, and there is no such file; expected a json file, or its content.")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping",
          types.NoneType: "null", list: "a list of texts"}  # fmt: skip


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The classes of a field's annotation; of a Literal its values."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(annotation) for kind in _kinds(part))
    if origin is typing.Literal:
        return tuple(type(value) for value in typing.get_args(annotation))
    return (origin or annotation,)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str if isinstance(kind, type) and issubclass(kind, enum.Enum) else kind)


def _shown(name: str, value: Any) -> str:
    return "given" if name.endswith("token") else repr(value)


def check_refused(args: DistillationConfig) -> None:
    """Raise DrklError for a field that means nothing here; `REFUSED` has the reasons."""
    for field in dataclasses.fields(TrainingArguments):
        if (why := REFUSED.get(field.name)) is None:
            continue
        value = getattr(args, field.name)
        of_launcher = field.name == "local_rank" and str(value) == os.environ.get("LOCAL_RANK")
        if of_launcher or value in _NOTHING.get(field.name, (field.default,)):
            continue
        given = field.name if field.name.endswith("token") else f"{field.name}={value!r}"
        raise DrklError(f"{given} means nothing here: {why}. Leave it out.")


def check_together(args: DistillationConfig) -> None:
    """Raise DrklError for a field that has an effect only beside another one, which is not given."""
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    trackers = names_in(args.report_to)
    alone = [name for name in _OF_TRACKERS if getattr(args, name) != default_of(name)]
    checks = [
        (args.deepspeed == {}, "deepspeed is an empty mapping, which asks for nothing"),
        (bool(args.fsdp_config) and not args.fsdp, "fsdp_config is given, and fsdp is not: nothing would be sharded"),
        (args.do_eval and not evaluates, "do_eval is true, and eval_strategy is 'no'"),
        (bool(alone) and not trackers, f"{', '.join(alone)}: trackers alone read it, and report_to names none"),
        (
            bool(_checkpointing_options(args)) and not (args.activation_checkpointing or args.gradient_checkpointing),
            "activation_checkpointing_kwargs are given, and activation_checkpointing is off",
        ),
        (
            args.ddp_backend is not None and "RANK" not in os.environ,
            "ddp_backend connects several processes, and this one was started without a launcher (torchrun, or "
            "accelerate launch)",
        ),
        (args.dataloader_persistent_workers and not args.dataloader_num_workers,
         "dataloader_persistent_workers is true, and dataloader_num_workers is 0"),
        (args.dataloader_multiprocessing_context is not None and not args.dataloader_num_workers,
         "dataloader_multiprocessing_context is given, and dataloader_num_workers is 0"),
        (args.ddp_timeout != default_of("ddp_timeout") and args.use_cpu,
         "ddp_timeout is not read on the CPU, where processes wait for each other without an end"),
        (args.optim_target_modules is not None and not optim_of(args).startswith(OF_LAYERS),
         f"optim_target_modules goes with the optimisers of GaLore and APOLLO, and optim is {optim_of(args)!r}"),
    ]  # fmt: skip
    for wrong, why in checks:
        if wrong:
            raise DrklError(f"{why}. Leave it out.")
    _check_backward(args)
    _check_warmup(args)


def default_of(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == name)


def optim_of(args: DistillationConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def schedule_of(args: DistillationConfig) -> str:
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def names_in(value: Any) -> list[str]:
    return [name for name in ([value] if isinstance(value, str) else value or []) if name != "none"]


def _checkpointing_options(args: DistillationConfig) -> Any:
    return args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs


def _check_backward(args: DistillationConfig) -> None:
    known = [name for name in inspect.signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]
    options = _checkpointing_options(args)
    foreign = [name for name in options if name not in known] if isinstance(options, dict) else []
    if foreign:
        raise DrklError(
            f"activation_checkpointing_kwargs has {foreign[0]!r}, which torch.utils.checkpoint.checkpoint does not "
            f"take; it takes {', '.join(known)}."
        )
    if optim_of(args).endswith(_IN_BACKWARD):
        raise DrklError(
            f"optim is {optim_of(args)!r}, which changes the weights while the gradients are computed: they could be "
            "neither clipped nor checked, and a checkpoint would hold nothing to go on from. Choose another optimiser."
        )


def _check_warmup(args: DistillationConfig) -> None:
    if args.warmup_steps is not None and args.warmup_steps > 1 and args.warmup_steps != int(args.warmup_steps):
        raise DrklError(f"warmup_steps is {args.warmup_steps}; expected a whole number, or a share below 1.")
    usual = default_warmup(args.max_steps) if args.max_steps > 0 else 0  # written out by a run that asked for none
    if schedule_of(args) in _NO_WARMUP and args.warmup_steps not in (None, 0, usual):
        other = "constant_with_warmup" if schedule_of(args) == "constant" else "cosine"
        raise DrklError(
            f"warmup_steps is {args.warmup_steps}, and the schedule {schedule_of(args)!r} has no warm-up. Set "
            f"lr_scheduler_type: {other}, which has one, or leave warmup_steps out."
        )


def has_warmup(args: DistillationConfig) -> bool:
    """Whether the schedule begins with a warm-up."""
    return schedule_of(args) not in _NO_WARMUP


def check_accelerator(args: DistillationConfig) -> None:
    """Raise DrklError for a field of accelerator_config that has no effect, once transformers has read it."""
    for field in dataclasses.fields(AcceleratorConfig):
        takes = field.name in ("non_blocking", "use_configured_state")
        if not takes and getattr(args.accelerator_config, field.name) != field.default:
            raise DrklError(f"accelerator_config: {field.name} means nothing here: {_NO_PARTS}. Leave it out.")
