"""Models whose weights are spread over processes as DTensors, as `torch.distributed.fsdp.fully_shard` leaves them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.losses.head import gather


def is_sharded(model: nn.Module) -> bool:
    """Whether a process has a part of the model's weights only, though it may have gathered them just now."""
    return any(map(is_fully_sharded, model.modules())) or any(map(is_shard, model.parameters()))


def runs_together(model: nn.Module) -> bool:
    """Whether a forward pass is one of all processes, as each has a part of the weights (FSDP, DeepSpeed's ZeRO-3)."""
    return is_sharded(model) or any(hasattr(weight, "ds_id") for weight in model.parameters())


def is_shard(value: Any) -> bool:
    """Whether a tensor is one process's part of a tensor of all."""
    return hasattr(value, "full_tensor")  # importing DTensor to ask takes a second


def is_fully_sharded(module: Any) -> bool:
    """Whether a module itself was given to `torch.distributed.fsdp.fully_shard`, so that its own call gathers."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return cls is not None and isinstance(module, cls)


def reshard(model: nn.Module) -> None:
    """Free what a forward has gathered and left so, as the outermost module's does.

    An optimiser made of the weights as they are then would not train them.
    """
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def own_class(module: nn.Module) -> type[Any]:
    """The class that a module had before `torch.distributed.fsdp.fully_shard` gave it one of its own."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, fsdp))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process; an ordinary tensor is all of it. No process waits for another."""
    value: Any = tensor
    part: Tensor = value.to_local() if is_shard(tensor) else tensor
    return part


@torch.no_grad()
def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather the state dict of a sharded module as ordinary tensors on the CPU, one weight at a time.

    Every process has to call it.

    Args:
        module: its weights are left as they are.
        keep: whether this process wants the result.

    Returns:
        By name, weights that are one in the model sharing their memory; empty without ``keep``.
    """
    return gathered_values(module.state_dict(keep_vars=True), keep=keep)


@torch.no_grad()
def gathered_values(values: Any, *, keep: bool, _seen: dict[int, Tensor] | None = None) -> Any:
    """Gather every tensor in nested dicts and lists; the arguments are those of `whole_state`.

    Other values stay what they are. Without ``keep`` the tensors are left out of the dicts.
    """
    seen = {} if _seen is None else _seen
    if isinstance(values, dict):
        pairs = [(key, gathered_values(value, keep=keep, _seen=seen)) for key, value in values.items()]
        return {key: value for key, value in pairs if value is not None or values[key] is None}
    if isinstance(values, list):
        return [gathered_values(value, keep=keep, _seen=seen) for value in values]
    if not isinstance(values, Tensor):
        return values
    if id(values) not in seen:
        whole = gather(values.detach())
        seen[id(values)] = whole.cpu() if keep else torch.empty(0)
    return seen[id(values)] if keep else None


def as_shard(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, cut as ``like`` is; no process waits for another."""
    if not is_shard(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device=local(like).device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Any:
    """Load whole weights into a module that may be sharded; returns what ``load_state_dict`` does, not strict.

    Args:
        module: a weight that it ties may be given under one of its names.
        weights: names and tensors, each read by every process.
    """
    own = module.state_dict(keep_vars=True)
    return module.load_state_dict({name: as_shard(value, own.get(name)) for name, value in weights}, strict=False)


def shard_frozen(model: PreTrainedModel, device: torch.device) -> None:
    """Spread a model that is never trained over all processes, in place: each layer by itself, then the rest.

    Args:
        model: in main memory or on the device; its weights stop asking for gradients.
        device: where its parts go.

    Raises:
        DrklError: weights that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "hf_device_map", None) is not None:
        raise DrklError(
            f"teacher_shard: the teacher, a {type(model).__name__}, is quantised or lies on several devices already "
            "(device_map), and only whole floating-point weights can be cut. Load it without that, or leave "
            "teacher_shard out."
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = tuple(getattr(model, "_no_split_modules", None) or ())
    for module in [*(module for module in model.modules() if type(module).__name__ in layers), model]:
        # The outermost too: without a backward pass nothing else would free what it gathers.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
