"""The output head of a language model, as the fused loss takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.errors import DrklError


@dataclass(frozen=True)
class LMHead:
    """logits = softcap(scale * (hidden @ weight.T + bias)).

    Args:
        weight: `[vocab, hidden]`.
        bias: `[vocab]` or None.
        scale: a factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: None, or c in c * tanh(x / c) (Gemma 2's ``final_logit_softcapping``).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise DrklError(f"A head's weight is [vocab, hidden]; got shape {list(self.weight.shape)}.")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise DrklError(f"A head's bias is [vocab] = [{self.weight.shape[0]}]; got shape {list(self.bias.shape)}.")
        if self.softcap is not None and not self.softcap > 0:
            raise DrklError(f"A head's softcap is None or a number above 0; got {self.softcap}.")

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    @property
    def is_plain(self) -> bool:
        """Whether the logits are ``hidden @ weight.T`` itself."""
        return self.bias is None and self.scale == 1.0 and self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, vocab]` of hidden states `[n, hidden]`, in fp32 or wider."""
        product = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self._scaled(product.to(torch.promote_types(torch.float32, product.dtype)))

    def of_products(self, products: Tensor, columns: Tensor | None = None) -> Tensor:
        """The logits, in fp32 or wider, of ``hidden @ weight.T`` `[n, vocab]`, or of some columns of it `[n, k]`.

        Args:
            products: left as they are.
            columns: `[k]` or `[n, k]`, which columns they are; None for all.
        """
        out = products.to(torch.promote_types(torch.float32, products.dtype))
        if self.bias is not None:
            out = out + (self.bias if columns is None else self.bias[columns])
        return self._scaled(out)

    def _scaled(self, out: Tensor) -> Tensor:
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of each logit by its ``hidden @ weight.T``."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (logits / self.softcap) ** 2)

    def trimmed(self, vocab_size: int) -> LMHead:
        """The head of the first ``vocab_size`` tokens; the gradient reaches the full head."""
        if vocab_size == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return LMHead(self.weight[:vocab_size], bias, self.scale, self.softcap)

    def detached(self) -> LMHead:
        """The head without its history."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.weight.detach(), bias, self.scale, self.softcap)

    def to(self, device: torch.device | str) -> LMHead:
        """The head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return LMHead(self.weight.to(device), bias, self.scale, self.softcap)

    def gathered(self) -> LMHead:
        """The head as ordinary tensors: parameters that are sharded over processes (DTensor) are gathered once.

        The gradient goes back to the shards, summed over the processes.
        """
        bias = None if self.bias is None else gather(self.bias)
        return LMHead(gather(self.weight), bias, self.scale, self.softcap)


def gather(tensor: Tensor) -> Tensor:
    """Return a DTensor as one ordinary tensor, and any other tensor as it is."""
    if not hasattr(tensor, "full_tensor"):  # what it takes to import torch.distributed is not paid for a plain tensor
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    full: Tensor = tensor.full_tensor(grad_placements=[Partial("sum")] * tensor.device_mesh.ndim)
    return full


def as_head(head: Tensor | LMHead) -> LMHead:
    """Take a weight `[vocab, hidden]` for a head without bias, scale or soft-cap."""
    return head if isinstance(head, LMHead) else LMHead(head)
