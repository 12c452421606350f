"""A teacher that runs beside the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.losses import LMHead
from drkl.models.forward import check_head, hidden_states, lm_head
from drkl.models.load import load_model
from drkl.models.precision import resolve_dtype
from drkl.teachers.config import TeacherConfig


class LiveTeacher:
    """The teacher's hidden states and head, computed on demand and without gradients."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        check_head(self.model)

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device) -> LiveTeacher:
        """Load the teacher of a config onto a device."""
        model = load_model(config.model, resolve_dtype(config.dtype, device))
        return cls(model.to(device))  # type: ignore[arg-type]

    @property
    def head(self) -> LMHead:
        return lm_head(self.model)

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states `[batch, tokens, hidden]`."""
        return hidden_states(self.model, batch)
