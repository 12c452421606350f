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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, vocab]` of hidden states `[n, hidden]`, in fp32 or wider."""
        product = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        out = product.to(torch.promote_types(torch.float32, product.dtype))
        if self.scale != 1.0:
            out = out * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


def as_head(head: Tensor | LMHead) -> LMHead:
    """Take a weight `[vocab, hidden]` for a head without bias, scale or soft-cap."""
    return head if isinstance(head, LMHead) else LMHead(head)
