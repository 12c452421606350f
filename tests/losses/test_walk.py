"""One walk over objectives, variants, dtypes and hazards: definition, closed forms and row kernel, against numpy.

Each of the three has to be as near the truth as rounding lets it, from the equations' own sensitivity to an error in
the last bits of the log-probabilities. It is +inf where the truth is, and nowhere else; nothing is ever NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import drkl
from drkl import TopK
from drkl.losses import fused
from drkl.losses.common import LossSettings, make_settings
from drkl.losses.merged import make_merged
from drkl.objectives.base import on_classes
from tests.losses import walk_inputs
from tests.losses.walk_inputs import VARIANTS, Rows, Variant
from tests.objectives import answers
from tests.objectives.answers import Answer
from tests.objectives.vectors import Array, wide

Found = tuple[Tensor, Tensor]
pytest.importorskip("triton", reason="no Triton for this system")
from drkl.losses import row_kernel  # noqa: E402
from tests.losses.interpreter import patched_once  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def in_interpreter() -> Iterator[None]:
    """The interpreter at its best speed; numpy's warnings there are of what is infinite on purpose."""
    with patched_once(), np.errstate(all="ignore"):
        yield


class Words(NamedTuple):
    """What a loss is told besides its objective."""

    temperature: float = 1.0
    kd_weight: float = 1.0
    t2_scaling: bool = False

    def settings(self, variant: Variant) -> LossSettings:
        return make_settings(variant.objective, self.temperature, self.kd_weight, self.t2_scaling, "mean")


PLAIN, MIXED, HOT, ALONE = Words(), Words(2.0, 0.5, True), Words(0.7), Words(1.0, 0.0)


def unit(rows: Rows, words: Words, dtype: torch.dtype) -> Array:
    """How far off a log-probability may be `[n, 1]`: the last bit of the logits, a few times, and a sum's rounding."""
    sizes = [np.where(np.isfinite(x), abs(x), 0).max(-1, keepdims=True) for x in (rows.student, rows.teacher)]
    scale = (sizes[0] + sizes[1]) * max(1.0, 1.0 / words.temperature)
    return wide((2 * scale + rows.student.shape[-1] + 8) * torch.finfo(dtype).eps)


def tensors(rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (torch.from_numpy(x).to(dtype) for x in (rows.student, rows.teacher))
    return student, teacher, torch.from_numpy(rows.labels)


def rounded(rows: Rows, dtype: torch.dtype) -> Rows:
    """The logits that are left of these in ``dtype``."""
    student, teacher, _ = tensors(rows, dtype)
    return rows._replace(student=student.double().numpy(), teacher=teacher.double().numpy())


def by_definition(variant: Variant, rows: Rows, words: Words, dtype: torch.dtype, **known: Any) -> Found:
    student, teacher, labels = tensors(rows, dtype)
    leaf = student.requires_grad_()
    options: dict[str, Any] = {"objective": variant.objective, **words._asdict()}
    k, merged_ids = known.get("k"), known.get("merged_ids")
    compared = teacher if k is None else TopK.of_logits(teacher, k, (words.temperature,), labels)
    values = drkl.distillation_loss(leaf, compared, labels, reduction="none", merged_ids=merged_ids, **options)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad


def by_closed_form(variant: Variant, rows: Rows, words: Words, dtype: torch.dtype, **known: Any) -> Found:
    """The finite rows by themselves: one that is not takes its whole block to the definition."""
    student, teacher, labels = tensors(rows, torch.promote_types(dtype, FP32))
    finite = (student.isfinite() & teacher.isfinite()).all(-1)
    values, grads = student.new_empty(len(student)), torch.empty_like(student)
    merged = make_merged(known.get("merged_ids"), student.shape[-1])
    settings = replace(words.settings(variant), merged=merged)
    for keep in (finite, ~finite):
        grad, theirs, seen = student[keep], teacher[keep], labels[keep]
        compared = TopK.of_logits(theirs, known["k"], (words.temperature,), seen) if "k" in known else theirs
        classes = seen if merged is None else merged.labels(seen)
        values[keep], grads[keep] = fused.values_and_grads_(grad, compared, classes, settings), grad
    return values, grads


def by_fused_loss(variant: Variant, rows: Rows, words: Words, dtype: torch.dtype, **known: Any) -> Found:
    """Through heads that are the identity, whose products are the logits themselves; finite rows only."""
    student, teacher, labels = tensors(rows, dtype)
    one, leaf, k = torch.eye(student.shape[-1], dtype=dtype), student.requires_grad_(), known.pop("k", None)
    theirs = (teacher, one) if k is None else (TopK.of_logits(teacher.float(), k, (words.temperature,), labels), None)
    options: dict[str, Any] = {"objective": variant.objective, **words._asdict(), **known}
    values = drkl.fused_distillation_loss(leaf, one, *theirs, labels, reduction="none", **options)
    total = drkl.fused_distillation_loss(leaf, one, *theirs, labels, reduction="sum", **options)
    (grad,) = torch.autograd.grad(total, leaf)
    return values, grad


def by_kernel(variant: Variant, rows: Rows, words: Words, dtype: torch.dtype) -> Found:
    settings = words.settings(variant)
    grad, teacher, labels = (x.to(DEVICE) for x in tensors(rows, dtype))
    values = row_kernel.row_step_(grad, teacher if settings.uses_teacher else None, labels, settings)
    return values.cpu(), grad.cpu()


def by_fused_kernel(variant: Variant, rows: Rows, words: Words, dtype: torch.dtype, **known: Any) -> Found:
    """The same as `by_fused_loss`, by the kernel: sparse teachers and merged ids have steps of their own there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "KERNEL_DEVICES", ("cuda", "cpu"))
        return by_fused_loss(variant, rows, words, dtype, **known)


def faults(found: Found, expected: Answer, near: Array, names: list[str]) -> list[str]:
    """What is wrong, row by row."""
    values, grads = (x.detach().double().numpy() for x in found)
    value_dtype, dtype = (torch.finfo(x.dtype) for x in found)
    near = near[:, 0]
    with np.errstate(invalid="ignore"):
        value_budget = near * expected.size + expected.slack + value_dtype.tiny * 1e3
        # Twice the last bit of what a gradient is stored in: the interpreter cuts, it does not round.
        least = max(value_dtype.tiny * 1e3, dtype.tiny * 2)
        grad_budget = (near * expected.grad_size + expected.grad_slack + least)[:, None]
        grad_budget = grad_budget + abs(expected.grad) * 2 * dtype.eps
        error, grad_error = abs(values - expected.value), abs(grads - expected.grad)
    list_of_faults = []
    for i, name in enumerate(names):
        value, grad = expected.value[i], expected.grad[i]
        too_large = abs(value) > value_dtype.max
        if np.isnan(values[i]) or (np.isnan(grads[i]).any() and not (too_large and values[i] == np.inf)):
            none = int(np.isnan(grads[i]).sum())
            list_of_faults.append(f"{name}: value {values[i]:.8g}, grad has {none} NaN, expected {value:.8g}")
        elif np.isinf(value) or too_large:
            if values[i] != np.inf and expected.slack[i] < np.inf:
                list_of_faults.append(f"{name}: value {values[i]:.8g}, expected {value:.3g}")
        else:
            if not error[i] <= value_budget[i]:
                list_of_faults.append(
                    f"{name}: value {values[i]:.8g}, expected {value:.8g} within {value_budget[i]:.1e}"
                )
            wrong = ~(grad_error[i] <= grad_budget[i]) & (abs(grad) <= dtype.max)
            if wrong.any():
                j = int(wrong.argmax())
                budget = f"{grad[j]:.8g} within {grad_budget[i, j]:.1e}"
                list_of_faults.append(f"{name}: grad[{j}] {grads[i, j]:.8g}, expected {budget}")
    return list_of_faults


def walk(
    way: Callable[..., Found], variant: Variant, rows: Rows, words: Words, dtype: torch.dtype, **known: Any
) -> list[str]:
    """What is wrong with one way of computing a variant, at all these rows."""
    rows = rounded(rows, dtype)
    arithmetic = torch.promote_types(dtype, FP32)
    groups = None
    if known:
        groups = walk_inputs.groups(rows, words.temperature, label=variant.objective.needs_labels, **known)
    near = unit(rows, words, arithmetic)
    expected = answers.loss(
        variant.name, variant.params, rows.student, rows.teacher, rows.labels, near,
        groups=groups, merged="merged_ids" in known, **words._asdict(),
    )  # fmt: skip
    where = f"{way.__name__} {variant.id} {tuple(words)} {known or ''} V={rows.student.shape[-1]} {dtype}: "
    found = way(variant, rows, words, dtype, **known)
    return [where + fault for fault in faults(found, expected, near, rows.names)]


def each(variants: list[Variant], by_default: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """All of them as slow tests, but for a few."""
    marks = [() if variant.id in by_default else pytest.mark.slow for variant in variants]
    params = [pytest.param(v, marks=mark, id=v.id) for v, mark in zip(variants, marks, strict=True)]
    return pytest.mark.parametrize("variant", params)


def test_every_objective_is_walked() -> None:
    assert {variant.name for variant in VARIANTS} == {*drkl.OBJECTIVES, "decoupled"}
    assert len({variant.id for variant in VARIANTS}) == len(VARIANTS)


FEW = ("fkl", "akl-mu=0.5", "ab-alpha=0.2-beta=0.7", "drkl-skew=0.1-weight=constant-target=label")


@each(VARIANTS, by_default=FEW)
def test_definition_and_closed_form(variant: Variant, request: pytest.FixtureRequest) -> None:
    found = walk(by_closed_form, variant, walk_inputs.rows(33), PLAIN, FP32)
    if request.node.get_closest_marker("slow"):
        for way, vocab, words, dtype in [
            (by_definition, 33, PLAIN, FP64),
            (by_definition, 3, HOT, FP64),
            (by_definition, 33, MIXED, FP32),
            (by_closed_form, 1, PLAIN, FP32),
            (by_closed_form, 2, MIXED, FP32),
            (by_closed_form, 3, HOT, FP32),
            (by_closed_form, 67, HOT, FP32),
            (by_closed_form, 33, MIXED, BF16),
            (by_closed_form, 33, HOT, torch.float16),
            (by_closed_form, 33, MIXED, FP64),
            (by_closed_form, 33, ALONE, FP32),
        ]:
            found += walk(way, variant, walk_inputs.rows(vocab), words, dtype)
        for vocab, words, dtype in [(33, MIXED, FP32), (5, PLAIN, BF16)]:
            found += walk(by_fused_loss, variant, walk_inputs.rows(vocab, finite=True), words, dtype)
    assert not found, "\n".join(found)


AT_BORDERS = (
    "ties",
    "two",
    "top",
    "huge both",
    "confident 60",
    "confident -30",
    "-inf both, at",
    "-inf the student, at",
)
"""Rows whose target, ties or exclusions may stand at the edge of a block."""


@each(VARIANTS, by_default=("todi", "akl-mu=0.5", "drkl-tail=fkl-weight=student-target=label-gamma=0.3"))
def test_row_kernel(
    variant: Variant, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, in_interpreter: None
) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    at_borders = walk_inputs.rows(35).pick(
        lambda name: name.startswith(AT_BORDERS if slow else ("ties at", "-inf both, at"))
    )
    found = []
    if slow:
        found += walk(by_kernel, variant, walk_inputs.rows(33), PLAIN, FP32)
        for vocab, words, dtype in [(1, PLAIN, FP32), (2, MIXED, FP32), (3, HOT, torch.float16)]:
            rows = walk_inputs.rows(vocab).pick(lambda name: not name.startswith(("random", "confident", "hundreds")))
            found += walk(by_kernel, variant, rows, words, dtype)
    monkeypatch.setattr(row_kernel, "BLOCK", 16)
    found += walk(by_kernel, variant, at_borders, MIXED, BF16)
    assert not found, "\n".join(found)


KNOWN_PARTLY = [variant for variant in VARIANTS if on_classes(variant.objective) and variant.name != "ce"]
HARD = ("random 2", "many ties", "ties at", "equal but for a shift", "hundreds", "huge both", "confident 60", "offset")


def hard(vocab: int) -> Rows:
    return walk_inputs.rows(vocab, finite=True).pick(lambda name: name.startswith(HARD))


@each(KNOWN_PARTLY, by_default=("drkl-tail=fkl-weight=student-target=label-gamma=0.3",))
def test_a_teacher_known_on_k_tokens(variant: Variant, request: pytest.FixtureRequest, in_interpreter: None) -> None:
    found = walk(by_closed_form, variant, walk_inputs.rows(9), PLAIN, FP32, k=3)
    if request.node.get_closest_marker("slow"):
        for vocab, k, words in [(9, 1, MIXED), (9, 8, HOT), (9, 9, PLAIN), (2, 1, PLAIN), (1, 1, MIXED), (40, 17, HOT)]:
            found += walk(by_closed_form, variant, walk_inputs.rows(vocab), words, FP32, k=k)
        for vocab, k, words in [(9, 3, MIXED), (2, 1, PLAIN), (9, 9, PLAIN)]:
            found += walk(by_fused_kernel, variant, hard(vocab), words, FP32, k=k)
    assert not found, "\n".join(found)


@each(VARIANTS, by_default=("drkl-tail=gjs-weight=floor-target=label-gamma=0.3",))
def test_ids_that_count_as_one(variant: Variant, request: pytest.FixtureRequest, in_interpreter: None) -> None:
    found = walk(by_closed_form, variant, walk_inputs.rows(9), MIXED, FP32, merged_ids=[7, 2, 8])
    if request.node.get_closest_marker("slow"):
        for vocab, ids, words in [(9, [0, 1], HOT), (9, list(range(9)), PLAIN), (2, [0, 1], MIXED), (34, [3, 16], HOT)]:
            found += walk(by_closed_form, variant, walk_inputs.rows(vocab), words, FP32, merged_ids=ids)
        for vocab, ids, words in [(9, [7, 2, 8], MIXED), (9, [0, 1], HOT)]:
            # The last column is in another's place in the merged vocabulary, and the kernel moves none: of two tied
            # tokens it may take the other one.
            rows = hard(vocab).pick(lambda name: 8 in ids or "ties" not in name)  # noqa: B023
            found += walk(by_fused_kernel, variant, rows, words, FP32, merged_ids=ids)
    assert not found, "\n".join(found)
