"""The loss, computed inside the student's own forward.

A classifier takes the same path as a language model: a text is one position, its "hidden states" are its class logits,
and it has no head.

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

from drkl.losses import IGNORE_INDEX, LMHead, LogitChunk, distillation_loss, fused_distillation_loss
from drkl.losses.config import LossConfig
from drkl.models.forward import hidden_states, output_head
from drkl.objectives import Objective
from drkl.positions import token_statistics

STATISTICS_POSITIONS = 256
"""At most this many positions of a micro-batch, evenly spread, give the logged entropies and KLs."""
KEY = "distillation"


class Distillation(NamedTuple):
    """What the student's forward needs besides its inputs to return a loss."""

    labels: Tensor
    """`[batch, tokens]`, aligned, -100 where a position does not count."""
    teacher_hidden: Tensor | None
    """`[positions that count, hidden]`; of a classifier `[texts, classes]`."""
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
        request = kwargs.pop(KEY, None)
        if request is None:
            return original(*args, **kwargs)
        return _distil(model, kwargs, Distillation(*request), objective, loss, vocab_size)

    model.forward = forward


def detach_loss(model: PreTrainedModel) -> None:
    """Undo `attach_loss`, and any other replacement of the class's forward."""
    model.__dict__.pop("forward", None)


def _distil(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    request: Distillation,
    objective: Objective,
    loss: LossConfig,
    vocab_size: int | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    keep = request.labels != IGNORE_INDEX
    hidden, labels, head = hidden_states(model, inputs)[keep], request.labels[keep], output_head(model)
    every = -(-labels.numel() // STATISTICS_POSITIONS)
    statistics = StatisticsSums(every) if request.with_statistics and every else None
    value = loss_of(
        hidden,
        head,
        request.teacher_hidden,
        request.teacher_head,
        labels,
        loss,
        objective=objective,
        num_tokens=request.num_tokens,
        vocab_size=vocab_size,
        observe=statistics,
    )
    return value, {} if statistics is None else statistics.sums, hidden.detach()


def loss_of(
    hidden: Tensor,
    head: LMHead | None,
    teacher_hidden: Tensor | None,
    teacher_head: LMHead | None,
    labels: Tensor,
    loss: LossConfig,
    **settings: Any,
) -> Tensor:
    """The fused loss of hidden states and heads; where there is no head, the dense one of class logits.

    ``settings`` are further keyword arguments of both losses.
    """
    settings |= {"temperature": loss.temperature, "kd_weight": loss.kd_weight, "t2_scaling": loss.t2_scaling}
    if head is None:
        return distillation_loss(hidden, teacher_hidden, labels, **settings)
    return fused_distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, **settings)


def logits_of(hidden: Tensor, head: LMHead | None, vocab_size: int | None = None) -> Tensor:
    """The logits `[n, ids]` of states `[n, hidden]`; states without a head are logits already."""
    if head is None:
        return hidden
    return (head if vocab_size is None else head.trimmed(vocab_size)).logits(hidden)


class StatisticsSums:
    """Sums of token statistics over every ``every``-th position of a loss: an observer of its logits.

    ``sums`` has those that training logs, by the names it logs them under, and the number of ``positions``.
    """

    def __init__(self, every: int = 1) -> None:
        self.sums: dict[str, Tensor] = {"positions": torch.tensor(0)}
        self._every = every

    def __call__(self, chunk: LogitChunk) -> None:
        assert chunk.labels is not None
        some = slice(-chunk.start % self._every, None, self._every)
        labels, teacher = chunk.labels[some], None if chunk.teacher is None else chunk.teacher[some]
        if not labels.numel():
            return
        values = token_statistics(chunk.student[some], teacher, labels)
        columns = {
            "nll": values.nll,
            "student_entropy": values.entropy,
            "fkl": values.fkl,
            "rkl": values.rkl,
            "agreement": values.agreement,
            "teacher_entropy": values.teacher_entropy,
            "positions": torch.tensor(labels.numel()),
        }
        for name, value in columns.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value.sum()
