"""A teacher that runs beside the student."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.losses import LMHead
from drkl.models.classes import is_classifier
from drkl.models.forward import INPUTS, check_head, hidden_states, output_head
from drkl.models.load import load_classifier, load_model
from drkl.models.precision import resolve_dtype
from drkl.teachers.config import TeacherConfig


class LiveTeacher:
    """The teacher's hidden states and head (of a classifier the class logits), on demand and without gradients."""

    def __init__(self, model: PreTrainedModel, remember_mb: int = 0) -> None:
        self.model = model.eval().requires_grad_(False)
        if not is_classifier(model):
            check_head(self.model)
        self._memory: dict[bytes, Tensor] = {}
        self._room = remember_mb * 2**20

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device, *, classifier: bool = False) -> LiveTeacher:
        """Load the teacher of a config onto a device."""
        load = load_classifier if classifier else load_model
        model = load(config.model, resolve_dtype(config.dtype, device))
        return cls(model.to(device), config.remember_mb)  # type: ignore[arg-type]

    @property
    def head(self) -> LMHead | None:
        return output_head(self.model)

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states `[batch, tokens, hidden]`."""
        return hidden_states(self.model, batch)

    def hidden_at(self, batch: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        """The last hidden states `[n, hidden]` at the positions where ``keep`` `[batch, tokens]` is true.

        Those of a batch are remembered as long as there is room: the same batch gives the same bits again, so that
        remembering changes no result.
        """
        if not self._room and not self._memory:
            return self.hidden(batch)[keep]
        key = _digest(*(batch[name] for name in INPUTS if name in batch), keep)
        if (states := self._memory.get(key)) is not None:
            return states.to(keep.device)
        states = self.hidden(batch)[keep]
        size = states.numel() * states.element_size()
        if size <= self._room:
            self._room -= size
            self._memory[key] = states.cpu()
        return states


def _digest(*tensors: Tensor) -> bytes:
    """What tells two batches apart."""
    digest = hashlib.blake2b(str([list(tensor.shape) for tensor in tensors]).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()
