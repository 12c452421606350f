"""Any objective in place of TRL's generalized Jensen-Shannon loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from drkl.errors import DrklError
from drkl.losses.common import IGNORE_INDEX
from drkl.losses.dense import distillation_loss
from drkl.objectives import ObjectiveLike, make_objective


def as_gkd_loss(
    objective: ObjectiveLike = "drkl", *, temperature: float | None = None, **params: Any
) -> Callable[..., Tensor]:
    """Return a function with the signature of TRL's ``GKDTrainer.generalized_jsd_loss`` that computes ``objective``.

    Two lines train with it::

        class Trainer(GKDTrainer):
            generalized_jsd_loss = staticmethod(drkl.as_gkd_loss("drkl", gamma=0.5))

    ``beta`` of the trainer's config is ignored: it belongs to the loss that is replaced. What else the function takes
    means what it means there: labels are aligned with the logits, -100 does not count, ``batchmean`` is the mean over
    the positions that count, ``num_items_in_batch`` divides the sum instead. ``mean`` is that mean too (there it
    also divides by the vocabulary), and ``none`` gives one number per position that counts (there, one per token id).

    Args:
        objective: a name in `drkl.OBJECTIVES`, an objective, or a function
            ``(student_logp, teacher_logp, labels) -> [n]``.
        temperature: None takes the caller's.
        **params: the hyper-parameters of a named objective.

    Raises:
        DrklError: an unknown name or parameter, a value outside its domain, an unknown reduction.

    >>> loss = as_gkd_loss("rkl")
    >>> import torch
    >>> float(loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, -100]])))
    0.0
    """
    minimised = make_objective(objective, **params)
    ours = temperature

    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        if reduction not in ("batchmean", "mean", "sum", "none"):
            raise DrklError(f"reduction is {reduction!r}; expected 'batchmean', 'mean', 'sum' or 'none'.")
        divided = num_items_in_batch is not None or reduction in ("batchmean", "mean")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(student_logits.device)
        values = distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            objective=minimised,
            temperature=temperature if ours is None else ours,
            num_tokens=num_items_in_batch,
            reduction="mean" if divided else "sum" if reduction == "sum" else "none",
        )
        return values if divided or reduction == "sum" or labels is None else values[labels != IGNORE_INDEX]

    return generalized_jsd_loss
