"""A chunk of positions whose teacher is known on k tokens and the rest, by the Triton kernel.

The rest is one sweep over the products; the k + 1 classes are short rows, and a last sweep gives the rest its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drkl.losses.common import LossSettings
from drkl.losses.head import LMHead
from drkl.losses.merged import MergedIds, ids_on, log_sum_exp, shares
from drkl.losses.topk import TopK, class_labels, objective_on_classes
from drkl.objectives import Objective
from drkl.objectives.base import check_values


def top_k_step_(
    product: Tensor, teacher: TopK, labels: Tensor | None, settings: LossSettings, head: LMHead, needs_grad: bool
) -> Tensor:
    """Values `[n]`; ``product`` is overwritten, with their gradient on it where that is needed.

    Args:
        product: `[n, vocab]`, the student's ``hidden @ weight.T``.
        teacher: of the same positions.
        labels: `[n]`, classes where ids are merged.
        settings: of the loss, with an objective that compares.
        head: the student's.
        needs_grad: whether the gradient is needed.
    """
    from drkl.losses import row_kernel

    temperature, share = settings.temperature, 1.0 - settings.kd_weight
    known, numbers = class_labels(settings.objective, teacher.merged(settings.merged, temperature), labels)
    listed = _take_out_(product, known, labels if settings.uses_cross_entropy else None, settings.merged, head)
    both = settings.uses_cross_entropy and temperature != 1.0
    rest = row_kernel.rest_log_sum_exp(product, (temperature, 1.0) if both else (temperature,), head=head)
    classes = torch.cat([listed.over(temperature), rest[:, :1]], -1)
    values = _class_step_(settings.objective, classes, known.classes(temperature), numbers) * settings.kd_factor
    kd = classes.mul_(settings.kd_factor / temperature) if needs_grad else classes
    parts = [(temperature, rest[:, 0], kd[:, -1])]
    ce = None
    if listed.observed is not None and listed.at_observed is not None:
        at_one = listed.over(1.0)
        log_norm = log_sum_exp(torch.cat([at_one, rest[:, -1:]], -1))
        values = values + share * (log_norm - listed.at_observed).squeeze(-1)
        ce = share * ((at_one - log_norm).exp() - listed.hit.to(at_one.dtype))
        parts.append((1.0, log_norm.squeeze(-1), torch.full_like(values, share)))
    if needs_grad:
        alone = None if ce is None else listed.observed_alone
        row_kernel.spread_rest_(product, parts, labels=alone, label_share=0.0 if ce is None else share, head=head)
        _put_in_(product, listed, kd[:, :-1], ce, temperature, share, head)
    return values


@dataclass(frozen=True)
class _Listed:
    """What a student's products hold at the k tokens, at each of `[n]` positions."""

    places: Tensor
    """`[n, k]`, their columns."""
    unused: Tensor
    """`[n, k]`, which of them are none."""
    logits: Tensor
    """`[n, k]`."""
    observed: Tensor | None
    """`[n]`, the column of the label, for a cross-entropy."""
    at_observed: Tensor | None
    """`[n, 1]`, its logit, or that of the class it belongs to."""
    event: int = -1
    """The column of ids that count as one class; -1 for none."""
    ids: Tensor | None = None
    """`[m]`, those ids."""
    members: Tensor | None = None
    """`[n, m]`, their logits."""

    @property
    def is_event(self) -> Tensor:
        """`[n, k]`, which of the tokens is the class of several ids."""
        return (self.places == self.event) & ~self.unused

    @property
    def hit(self) -> Tensor:
        """`[n, k]`, which of them is the label."""
        assert self.observed is not None
        return (self.places == self.observed.unsqueeze(-1)) & ~self.unused

    @property
    def observed_alone(self) -> Tensor:
        """`[n]`, the column of the label where it is that of one id; else -1."""
        assert self.observed is not None
        return self.observed.masked_fill(self.observed == self.event, -1)

    def over(self, temperature: float) -> Tensor:
        """The logits `[n, k]` over a temperature, -inf for what is none."""
        over = self.logits / temperature
        if self.members is not None:
            over = torch.where(self.is_event, log_sum_exp(self.members / temperature), over)
        return over.masked_fill(self.unused, -math.inf)


def _take_out_(product: Tensor, known: TopK, labels: Tensor | None, merged: MergedIds | None, head: LMHead) -> _Listed:
    """Look at the k tokens, whose products are -inf afterwards."""
    places, unused = known.places
    if merged is not None:
        places, labels = merged.columns(places), None if labels is None else merged.columns(labels)
    logits = head.of_products(product.gather(-1, places), places)
    at_label = None
    if labels is not None:
        column = labels.unsqueeze(-1)
        at_label = head.of_products(product.gather(-1, column), column)
    if merged is None:
        product.scatter_(-1, places, -math.inf)
        return _Listed(places, unused, logits, labels, at_label)
    ids = ids_on(merged, product.device)
    raw = product.index_select(1, ids)
    members = head.of_products(raw, ids)
    if labels is not None and at_label is not None:
        at_label = torch.where((labels == merged.event).unsqueeze(-1), log_sum_exp(members), at_label)
    listed = _Listed(places, unused, logits, labels, at_label, merged.event, ids, members)
    product.scatter_(-1, places, -math.inf)
    product.index_copy_(1, ids, raw.masked_fill(listed.is_event.any(-1, keepdim=True), -math.inf))
    return listed


def _class_step_(objective: Objective, classes: Tensor, theirs: Tensor, numbers: Tensor | None) -> Tensor:
    """Values of an objective on the classes, whose logits are over the temperature; the gradient in their place.

    What the kernel does not know is differentiated: it is small.
    """
    from drkl.losses import row_kernel

    objective, theirs = objective_on_classes(objective), theirs.to(classes.dtype)
    settings = LossSettings(objective, 1.0, 1.0, False, "none")
    if row_kernel.supports(settings):
        values: Tensor = row_kernel.row_step_(classes, theirs, numbers if settings.uses_labels else None, settings)
        return values
    with torch.enable_grad():
        leaf = classes.clone().requires_grad_()
        found = objective(torch.log_softmax(leaf, -1), torch.log_softmax(theirs, -1), numbers)
        (grad,) = torch.autograd.grad(check_values(objective, found, len(classes)).sum(), leaf)
    classes.copy_(grad)
    return found.detach()


def _put_in_(
    product: Tensor,
    listed: _Listed,
    kd: Tensor,
    ce: Tensor | None,
    temperature: float,
    share: float,
    head: LMHead,
) -> None:
    """Write the gradient at the k tokens, where that of the rest has 0.

    Args:
        product: `[n, vocab]`, the gradient on the products.
        listed: the tokens.
        kd: `[n, k]`, the gradient of the objective on their logits.
        ce: likewise of the cross-entropy.
        temperature: of the objective.
        share: of the cross-entropy.
        head: the student's.
    """
    own = (kd if ce is None else kd + ce).masked_fill(listed.unused, 0.0)
    if listed.members is not None and listed.ids is not None:
        is_event = listed.is_event
        own = own.masked_fill(is_event, 0.0)
        of_event = kd.masked_fill(~is_event, 0.0).sum(-1, keepdim=True)
        given = shares(listed.members / temperature) * of_event
        if ce is not None and listed.observed is not None:
            of_event = ce.masked_fill(~is_event, 0.0).sum(-1, keepdim=True)
            in_rest = (listed.observed == listed.event).unsqueeze(-1) & ~is_event.any(-1, keepdim=True)
            given = given + shares(listed.members) * (of_event - share * in_rest.to(of_event.dtype))
        whole = product.index_select(1, listed.ids) + given * head.slope(listed.members)
        product.index_copy_(1, listed.ids, whole.to(product.dtype))
    product.scatter_add_(-1, listed.places, (own * head.slope(listed.logits)).to(product.dtype))
