"""What transformers' training loop is given: arguments with every number settled, and an optimiser that trains."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training.arguments import DistillationConfig


def check_optimizer(optimizer: Any, student: nn.Module) -> None:
    """Raise DrklError for an optimiser that would train nothing of the student."""
    if optimizer is None:
        return
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise DrklError(
            "optimizers: the optimiser holds no parameter of the student that is trained, so nothing would change. "
            "Make it from the model that is passed, and with peft_config pass a model that peft has wrapped already."
        )


def loop_arguments(args: DistillationConfig, run: RunFolder, num_steps: int, *, heldout: bool) -> DistillationConfig:
    """The arguments as transformers' loop takes them: every number settled, and checkpoints in their own folder."""
    inner = copy.copy(args)
    inner.output_dir = str(run.checkpoints_path)
    inner.max_steps = num_steps
    inner.train_sampling_strategy = "sequential"  # the plan is the order
    inner.warmup_steps = args.get_warmup_steps(num_steps)  # a number for optimisers with a schedule of their own
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        setattr(inner, name, getattr(args, name) or 1)  # transformers writes them to its log
    if not heldout:
        no: Any = "no"
        inner.eval_strategy = type(args.eval_strategy)(no)
        inner.load_best_model_at_end = False
    # An epoch is many steps of one long data set here; `Epochs` says when one ends.
    never = num_steps + 1
    for name in ("eval", "save", "logging"):
        strategy = getattr(inner, f"{name}_strategy")
        if strategy.value == "epoch":
            setattr(inner, f"{name}_strategy", type(strategy)("steps"))
            setattr(inner, f"{name}_steps", never)
    if inner.activation_checkpointing and not inner.activation_checkpointing_kwargs:
        # The reentrant kind asks that the first layer's input needs a gradient, which frozen embeddings do not give.
        inner.activation_checkpointing_kwargs = inner.gradient_checkpointing_kwargs = {"use_reentrant": False}
    # Several cards in one process would be nn.DataParallel, which cuts batches by itself; torchrun uses them all.
    inner._n_gpu = min(inner.n_gpu, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner.dataloader_pin_memory = bool(args.dataloader_pin_memory) and args.device.type == "cuda"
    return inner
