"""Computing the loss inside the student's own forward.

The model stays the `PreTrainedModel` it is (a wrapper around it would break the saving of tied heads), and DDP or FSDP
see one ordinary forward call, with all of its hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.losses import IGNORE_INDEX, LMHead, fused_distillation_loss, token_statistics
from drkl.losses.config import LossConfig
from drkl.models.forward import hidden_states, lm_head
from drkl.objectives import Objective

STATISTICS_POSITIONS = 256
"""Positions of a micro-batch, evenly spread, from which the logged entropies and KLs are taken."""
KEY = "distillation"


class Distillation(NamedTuple):
    """What the student's forward needs besides its inputs to return a loss."""

    labels: Tensor
    """`[batch, tokens]`, aligned, -100 where a position does not count."""
    teacher_hidden: Tensor | None
    """`[positions that count, hidden]`."""
    teacher_head: LMHead | None
    num_tokens: Tensor | float
    with_statistics: bool


def attach_loss(model: PreTrainedModel, objective: Objective, loss: LossConfig, vocab_size: int | None = None) -> None:
    """Let ``model(..., distillation=Distillation(...))`` return ``(loss, statistics, hidden)``.

    ``vocab_size`` is the number of ids, from 0, on which the two models are compared; None for all.
    """
    original: Callable[..., Any] = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop(KEY, None)
        if wanted is None:
            return original(*args, **kwargs)
        return _distil(model, kwargs, Distillation(*wanted), objective, loss, vocab_size)

    model.forward = forward


def detach_loss(model: PreTrainedModel) -> None:
    """Undo `attach_loss` (and whatever else was laid over the class's forward)."""
    model.__dict__.pop("forward", None)


def _distil(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    wanted: Distillation,
    objective: Objective,
    loss: LossConfig,
    vocab_size: int | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    keep = wanted.labels != IGNORE_INDEX
    hidden, labels, head = hidden_states(model, inputs)[keep], wanted.labels[keep], lm_head(model)
    value = fused_distillation_loss(
        hidden,
        head,
        wanted.teacher_hidden,
        wanted.teacher_head,
        labels,
        objective=objective,
        temperature=loss.temperature,
        kd_weight=loss.kd_weight,
        t2_scaling=loss.t2_scaling,
        num_tokens=wanted.num_tokens,
        vocab_size=vocab_size,
    )
    statistics = _statistics(hidden, head, labels, wanted, vocab_size) if wanted.with_statistics else {}
    return value, statistics, hidden.detach()


@torch.no_grad()
def _statistics(
    hidden: Tensor, head: LMHead, labels: Tensor, wanted: Distillation, vocab_size: int | None
) -> dict[str, Tensor]:
    if labels.numel() == 0:
        return {}
    few = slice(None, None, -(-labels.numel() // STATISTICS_POSITIONS))
    teacher = None
    if wanted.teacher_hidden is not None and wanted.teacher_head is not None:
        teacher = _trimmed(wanted.teacher_head, vocab_size).logits(wanted.teacher_hidden[few])
    values = token_statistics(_trimmed(head, vocab_size).logits(hidden[few]), teacher, labels[few])
    count = torch.tensor(labels[few].numel())
    return {name: value.sum() for name, value in summed(values).items()} | {"positions": count}


def _trimmed(head: LMHead, vocab_size: int | None) -> LMHead:
    return head if vocab_size is None else head.trimmed(vocab_size)


def summed(values: Any) -> dict[str, Tensor]:
    """The statistics that training logs, by the names it logs them under."""
    names = {
        "nll": values.nll,
        "student_entropy": values.entropy,
        "fkl": values.fkl,
        "rkl": values.rkl,
        "agreement": values.agreement,
        "teacher_entropy": values.teacher_entropy,
    }
    return {name: value for name, value in names.items() if value is not None}
