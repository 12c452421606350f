"""Students that are sharded over processes: by accelerate (FSDP2), or by the caller with ``fully_shard``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.environment import parse_flag_from_env
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.at_head import Wrapped
from drkl.models.pair_loss import data_parallel
from drkl.models.sharded import as_shard, gathered_values, is_sharded
from drkl.models.weights import weight_files

if TYPE_CHECKING:
    from drkl.training.arguments import DistillationConfig

_log = logging.getLogger("drkl")
FSDP_WEIGHTS = "pytorch_model_fsdp"
"""What the names of accelerate's own weights in a checkpoint begin with."""


def asks_for_fsdp(args: DistillationConfig) -> bool:
    """Whether accelerate is to shard the student, by ``fsdp`` or by the environment of ``accelerate launch``."""
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_fsdp(args: DistillationConfig) -> None:
    """Raise DrklError where accelerate is asked to shard and would not, or would in its older way.

    Args:
        args: with accelerate's settings made, from ``fsdp`` or from the environment of ``accelerate launch``.
    """
    if not asks_for_fsdp(args):
        return
    plugin = args.fsdp_plugin_args
    name = "ACCELERATE_USE_FSDP (accelerate launch --use_fsdp)" if plugin is None else "fsdp"
    kind = args.distributed_state.distributed_type
    if kind == DistributedType.MULTI_CPU or (kind == DistributedType.NO and args.device.type == "cpu"):
        raise DrklError(
            f"{name} is set and the device is the CPU, where accelerate does not shard: every process would have the "
            "whole student, as with plain DistributedDataParallel. Leave it out, or pass DistillationTrainer a model "
            "that torch.distributed.fsdp.fully_shard has sharded."
        )
    if kind == DistributedType.NO:
        raise DrklError(
            f"{name} is set and there is one process, started without a launcher, so nothing is sharded. Start it with "
            "torchrun or accelerate launch, or leave it out."
        )
    version = int(os.environ.get("FSDP_VERSION", "1")) if plugin is None else plugin["fsdp_version"]
    if version != 2:
        raise DrklError(
            f"{name} asks for FSDP version {version}, which keeps a layer's weights in one flat vector that the loss "
            "cannot read the head from. Set fsdp_version: 2 (in fsdp_config, or in accelerate's config file)."
        )
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # transformers would load weights in the first process alone, those of the teacher too.
        disable_fsdp_ram_efficient_loading()
        if plugin is not None:
            plugin["cpu_ram_efficient_loading"] = False
        if args.process_index == 0:
            _log.warning(
                "Warning: cpu_ram_efficient_loading is turned off: teacher and student are tried before they are "
                "sharded, and need their weights in every process for that."
            )


def check_deepspeed(plugin: Any) -> None:
    """Raise DrklError where DeepSpeed is asked to cut the weights; ``plugin`` is accelerate's, or None."""
    if plugin is not None and plugin.zero_stage == 3:
        raise DrklError(
            "deepspeed asks for ZeRO stage 3, which leaves no process a whole head, and the loss reads the head's "
            "weights. Use stage 1 or 2, or FSDP2 (fsdp and fsdp_config), which cuts a student's weights too."
        )


def check_sharded(student: PreTrainedModel, world_size: int) -> None:
    """Raise DrklError for a student that the caller has sharded, and not over the processes that train it.

    Args:
        student: as it was passed; an ordinary one is right.
        world_size: number of processes.
    """
    if not is_sharded(student):
        return
    parallel = data_parallel(Wrapped(student, ()))
    if parallel is None:
        raise DrklError(
            "The student's weights are cut over processes, and not by torch.distributed.fsdp.fully_shard (tensor "
            "parallelism?). Each process trains on rows of its own here. Shard the model with fully_shard alone."
        )
    if parallel.size != world_size:
        raise DrklError(
            f"The student is sharded over {parallel.size} of {world_size} processes, so the gradients of the others "
            "would be left out. Call fully_shard with a device mesh of all processes."
        )


def weights_in(checkpoint: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The whole weights of a checkpoint by name, one at a time, in main memory."""
    for path in weight_files(Path(checkpoint)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield name, file.get_tensor(name)


def save_optimizer(optimizer: Any, schedule: Any, folder: Path, *, writes: bool) -> None:
    """Write the states of a sharded student's optimiser and schedule as one process with the whole student does.

    Any number of processes can go on from there. Every process has to call it.

    Args:
        optimizer: of DTensors.
        schedule: of the learning rate.
        folder: a checkpoint.
        writes: whether this process writes.
    """
    state = gathered_values(optimizer.state_dict(), keep=writes)
    if writes:
        torch.save(state, folder / "optimizer.pt")
        torch.save(schedule.state_dict(), folder / "scheduler.pt")


def load_optimizer(optimizer: Any, schedule: Any, folder: Path) -> None:
    """Read what `save_optimizer` wrote, or a process with a whole student, and keep this process's parts of it.

    Args:
        optimizer: of DTensors.
        schedule: of the learning rate.
        folder: a checkpoint.
    """
    state = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, weights, strict=True))
    for number, values in state["state"].items():
        for name, value in values.items():
            values[name] = as_shard(value, own[number]) if isinstance(value, Tensor) else value
    optimizer.load_state_dict(state)
    schedule.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def check_kind(checkpoint: Path, *, by_accelerate: bool) -> None:
    """Raise DrklError where accelerate's FSDP wrote a checkpoint and does not read it, or the other way round.

    Args:
        checkpoint: its folder.
        by_accelerate: whether accelerate shards the student of this run.
    """
    written = any(path.name.startswith(FSDP_WEIGHTS) for path in checkpoint.iterdir())
    if written and not by_accelerate:
        raise DrklError(
            f"{str(checkpoint)!r} was written by a run that accelerate sharded (fsdp), and this one is not, so its "
            "optimiser's state cannot be read here. Resume with fsdp, on any number of processes, or start a new run "
            "with the model in it."
        )
    if by_accelerate and not written:
        raise DrklError(
            f"{str(checkpoint)!r} was written by a run without fsdp, whose optimiser's state accelerate does not read "
            "into a sharded student. Resume without fsdp, or start a new run with the model in it."
        )
