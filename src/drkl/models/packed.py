"""Matrix products of few rows on a CPU, with weights laid out for them.

A decoding step multiplies a few rows by every weight of a model. In fp32 torch has MKL do that, which lays each weight
out anew at every call. oneDNN takes a weight that was laid out once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drkl.models.forward import replaced

MOST_BYTES = 2 * 2**30
"""A model whose weights take more than this is left as it is: the memory of what is laid out comes on top."""
LEAST_STEPS = 8
"""Decoding steps that are worth the laying out, which costs about as much as one."""
_SMALLEST = 2**16
"""Weights of a matrix from which on its layout matters."""
_ROWS = 8
"""For how many rows a weight is laid out; others are right too."""


@contextmanager
def packed_products(model: nn.Module, steps: int) -> Iterator[None]:
    """Faster fp32 products of a model on a CPU inside the block, which must not change its weights.

    The numbers are those of the plain product up to rounding. Where it would not pay, or cannot be, the model is left
    as it is: few steps, another device or dtype, autocast, a torch without oneDNN, more than `MOST_BYTES`.

    Args:
        model: without gradients.
        steps: decoding steps to come.
    """
    with ExitStack() as stack:
        if steps >= LEAST_STEPS and not torch.is_autocast_enabled("cpu") and _is_right():
            layers = {module: weight for module in model.modules() if (weight := _weight(module)) is not None}
            if sum(weight.numel() * weight.element_size() for weight in layers.values()) <= MOST_BYTES:
                for module, weight in layers.items():
                    layer: Any = module
                    forward = partial(_product, layer.forward, _laid_out(weight), layer.bias)
                    stack.enter_context(replaced(layer, forward))
        yield


def _weight(module: nn.Module) -> Tensor | None:
    """The weight `[out, in]` of a layer that can be laid out; None of any other module."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return None
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if weight.numel() < _SMALLEST:
        return None
    return weight.detach() if type(module) is nn.Linear else weight.detach().t()


def _laid_out(weight: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return laid_out


def _product(plain: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """``rows`` times a weight that is laid out; ``plain`` is for whatever else a layer may be given."""
    if rows.dtype != torch.float32 or rows.numel() == 0 or torch.is_grad_enabled():
        return plain(rows)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


@cache
def _is_right() -> bool:
    """Whether this torch has the product and it is right: its name has an underscore, so that it may go."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (torch.randn(shape, generator=generator) for shape in ((96, 64), (96,), (3, 64)))
    with torch.no_grad():
        try:
            found = _product(lambda rows: rows, _laid_out(weight), bias, rows)
        except (AttributeError, RuntimeError):
            return False
        wanted = nn.functional.linear(rows, weight, bias)
        return found.shape == wanted.shape and bool(torch.allclose(found, wanted, rtol=1e-5, atol=1e-4))
