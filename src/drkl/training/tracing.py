"""Run parts of a step on tensors without numbers, and count the bytes that are alive meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drkl.losses import fused

_VALUE, _ANY = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.any
_GROUPED = torch.ops.aten._grouped_mm.default if hasattr(torch.ops.aten, "_grouped_mm") else None
_ADD = torch.ops.aten.add.Tensor
_INDEX, _NONZERO = torch.ops.aten.index.Tensor, torch.ops.aten.nonzero.default
_PRODUCTS = (
    F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.addmm, torch.baddbmm,
    torch.einsum, F.conv1d, F.scaled_dot_product_attention,
)  # fmt: skip
"""What autocast computes in its own dtype."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the block and are still alive.

    Tensors on the meta device count what they would take. A number that is asked of one is made up: ``any`` is false,
    every other truth is true, a mask takes all, and a number is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        """At most, since `restart`."""
        self.gradients = 0
        """What of ``now`` belongs to parameters that `watch` was given."""
        self.gradients_at_peak = 0
        self._sizes: dict[int, int] = {}
        self._never: set[int] = set()
        self._shapes: set[torch.Size] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors that are there already."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def watch(self, model: nn.Module) -> None:
        """Leave a model's own weights out, and tell the gradients that they get from what else is alive."""
        self.leave_out((*model.parameters(), *model.buffers()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._shapes.add(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._hook())

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    @property
    def others(self) -> int:
        """All of ``now`` but gradients."""
        return self.now - self.gradients

    def _hook(self) -> Callable[[Tensor], None]:
        counted = False

        def count(parameter: Tensor) -> None:
            nonlocal counted
            if not counted and parameter.grad is not None:
                counted = True
                self.gradients += _bytes_of(parameter.grad)

        return count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _VALUE and args[0].is_meta:
            return self._made_up(args[0])
        if func is _NONZERO and args[0].is_meta:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is _ADD and self._sums_gradients(*args[:2]):
            return args[0]
        if func is _GROUPED and args[0].is_meta:  # which the meta device has in bf16 alone
            return args[0].new_empty(_grouped_shape(args[0], args[1], args[2] if len(args) > 2 else None))
        if func is _INDEX and args[0].is_meta:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if func.overloadpacket is _ANY:
            self._never.add(id(out))
            weakref.finalize(out, self._never.discard, id(out))
        return out

    def _sums_gradients(self, first: Any, second: Any) -> bool:
        """Whether two gradients of one weight are added up: autograd does so in place, unless a mode such as this one
        looks on."""
        if torch.is_grad_enabled() or not (isinstance(second, Tensor) and first.is_meta):
            return False
        return first.shape == second.shape and first.shape in self._shapes

    def _made_up(self, tensor: Tensor) -> Any:
        if tensor.dtype == torch.bool:
            return id(tensor) not in self._never
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _grouped_shape(left: Tensor, right: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """The shape of the products of experts: rows in groups that end where ``ends`` says, or a batch of them."""
    inner = () if left.dim() == 2 or right.dim() == 2 else (left.shape[0],)
    if left.dim() == right.dim() == 2:
        assert ends is not None
        inner = (ends.numel(),)
    return (*inner, left.shape[-2], right.shape[-1])


def _places(index: Tensor | None) -> list[Tensor | None]:
    """The numbers of the places that a mask takes, for each of its dimensions; all of them."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in index.shape]


class _Attention(torch.autograd.Function):
    """The memory of a fused attention: it keeps its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _AsOn(TorchFunctionMode):
    """What the meta device does otherwise than the device of a run: fused attention, dropout, and autocast."""

    def __init__(self, device: str, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._device, self._autocast = device, autocast
        self.kept: dict[int, Tensor] = {}
        """Weights in autocast's dtype, which it keeps to the end of the forward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and self._autocast is not None:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and not (self._device == "cpu" and kwargs.get("dropout_p")):
            query, key, value = args[:3]
            return _Attention.apply(query, key, value, kwargs.get("attn_mask"))
        if func is F.dropout and self._device == "cpu":
            return _cpu_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._cast, value))
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype not in (torch.float32, torch.bfloat16):
            return value
        if value.dtype == self._autocast:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self._autocast)
        if id(value) not in self.kept:
            self.kept[id(value)] = value.to(self._autocast)
        return self.kept[id(value)]


def _cpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A processor's dropout keeps a factor for each number, and not a bit."""
    return input * torch.empty_like(input, requires_grad=False) if training and p > 0 else input


@contextmanager
def traced(live: LiveBytes, device: str, autocast: torch.dtype | None = None) -> Iterator[dict[int, Tensor]]:
    """Count inside the block what a device would need.

    Args:
        live: where it is counted.
        device: ``cpu`` or ``cuda``, for example.
        autocast: dtype of the matrix products; None is that of their inputs.

    Yields:
        What autocast keeps to the end of the forward pass; clear it there.
    """
    sizes = fused.CHUNK_BYTES, fused.BLOCK_BYTES
    if device == "cuda":
        fused.CHUNK_BYTES, fused.BLOCK_BYTES = fused.CUDA_CHUNK_BYTES, fused.CUDA_BLOCK_BYTES
    as_on = _AsOn(device, autocast)
    try:
        with live, as_on, torch.autocast("cpu", autocast, enabled=autocast is not None):
            yield as_on.kept
    finally:
        fused.CHUNK_BYTES, fused.BLOCK_BYTES = sizes


def backward(loss: Tensor) -> None:
    """The backward pass, with what `traced` puts in the place of a function also where a layer is computed again."""
    # torch.autograd.backward would leave the mode first.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(_bytes_of(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
