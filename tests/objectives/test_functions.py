"""A plain function as an objective: in both losses, decoupled, in TRL's trainer; and what is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drkl
from drkl import DrklError
from drkl.objectives import FunctionObjective, Objective
from tests.objectives import tensors
from tests.rounding import assert_near


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def renyi(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None, order: float) -> Tensor:
    return torch.logsumexp(order * teacher_logp + (1 - order) * student_logp, -1) / (order - 1)


def observed(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor) -> Tensor:
    return -student_logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class Weighted(nn.Module):
    """A module with a parameter of its own, which is learnt with the student."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return self.weight * reverse_kl(student_logp, teacher_logp, labels)


class Callme:
    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return reverse_kl(student_logp, teacher_logp, labels)


@dataclass(frozen=True)
class Plain(Objective):
    """A class that gives what it must and nothing else."""

    name = "plain"
    scale: float = 1.0

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.scale * reverse_kl(student_logp, teacher_logp, labels)


FUNCTIONS: list[tuple[str, Any]] = [
    ("reverse_kl", reverse_kl),
    ("<lambda>", lambda q, p, labels: reverse_kl(q, p, labels)),
    ("<lambda>", lambda *rows: reverse_kl(*rows)),
    ("reverse_kl", functools.partial(reverse_kl)),
    ("Callme", Callme()),
    ("plain", Plain()),
]
every = pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[type(f).__name__ + n for n, f in FUNCTIONS])


def loss_and_grads(objective: Any, which: str, **words: Any) -> list[Tensor]:
    student, teacher, labels = tensors.logits(rows=7, vocab=11)
    hidden, head = student.clone().requires_grad_(), torch.eye(11, dtype=torch.float64).requires_grad_()
    if which == "fused":
        loss = drkl.fused_distillation_loss(
            hidden, head, teacher, torch.eye(11, dtype=torch.float64), labels, objective=objective, **words
        )
    else:
        loss = drkl.distillation_loss(hidden @ head.T, teacher, labels, objective=objective, **words)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head))]


@every
@pytest.mark.parametrize("which", ["fused", "dense"])
def test_a_function_is_the_objective_that_it_computes(name: str, function: Any, which: str) -> None:
    words: dict[str, Any] = {"temperature": 2.0, "kd_weight": 0.8}
    found, expected = loss_and_grads(function, which, **words), loss_and_grads("rkl", which, **words)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    made = drkl.make_objective(function)
    assert isinstance(made, Objective) and made.name == name
    assert made.needs_teacher and not made.needs_labels and not made.has_closed_form
    assert drkl.make_objective(made) is made
    assert made == drkl.make_objective(function) and hash(made) == hash(drkl.make_objective(function))


@every
def test_a_function_in_the_decoupling_operator_and_in_trls_place(name: str, function: Any) -> None:
    rows = tensors.logits(rows=7, vocab=11)
    found = tensors.value_and_grad(drkl.decoupled(function, function, gamma=0.3), *rows)
    expected = tensors.value_and_grad(drkl.decoupled("rkl", "rkl", gamma=0.3), *rows)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    losses = [drkl.as_gkd_loss(objective)(*rows) for objective in (function, "rkl")]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_partial_function_has_its_parameters() -> None:
    def by_hand(q: Tensor, p: Tensor) -> Tensor:
        return torch.log((p**3 / q**2).sum(-1)) / 2

    student, teacher, _ = tensors.logits(rows=7, vocab=11)
    found = drkl.distillation_loss(student, teacher, objective=functools.partial(renyi, order=3.0), reduction="none")
    torch.testing.assert_close(found, by_hand(student.softmax(-1), teacher.softmax(-1)))


def test_the_labels_are_those_of_the_loss_or_none() -> None:
    rows = tensors.logits(rows=7, vocab=11)
    by_function, by_name = (drkl.distillation_loss(*rows, objective=one) for one in (observed, "ce"))
    assert_near(by_function, by_name, terms=11, scale=40.0)  # log-probabilities of at most 40
    got: list[Any] = []

    def watch(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        got.append(labels)
        assert not teacher_logp.requires_grad
        return student_logp.sum(-1)

    drkl.distillation_loss(rows[0], rows[1].requires_grad_(), objective=watch)
    drkl.decoupled(watch, "rkl")(rows[0].log_softmax(-1), rows[1].log_softmax(-1))
    assert got == [None, None]


def test_a_function_says_by_attributes_that_it_reads_other_things() -> None:
    def entropy(student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None) -> Tensor:
        return (student_logp.exp() * student_logp).sum(-1)

    entropy.needs_teacher = False  # type: ignore[attr-defined]
    student = tensors.logits()[0]
    assert drkl.distillation_loss(student, None, objective=entropy).shape == ()
    entropy.needs_labels = True  # type: ignore[attr-defined]
    with pytest.raises(DrklError, match="'entropy' needs labels here"):
        drkl.distillation_loss(student, None, objective=entropy)


def test_a_module_is_a_function_too() -> None:
    module = Weighted()
    for which in ("fused", "dense"):
        found, expected = loss_and_grads(module, which), loss_and_grads("rkl", which)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, 2 * b, rtol=1e-10, atol=1e-12)
    assert drkl.make_objective(module).name == "Weighted"


def no_position(**words: Any) -> Tensor:
    empty = torch.zeros(0, 11, requires_grad=True)
    return drkl.distillation_loss(empty, torch.zeros(0, 11), **words)


def test_a_function_of_no_position() -> None:
    assert float(no_position(objective=reverse_kl).detach()) == 0.0


WRONG_SHAPES: list[tuple[Callable[..., Any], str]] = [
    (lambda q, p, labels: reverse_kl(q, p, labels).mean(), "shape []; expected a tensor [7]"),
    (lambda q, p, labels: q - p, "shape [7, 11]; expected a tensor [7]"),
    (lambda q, p, labels: reverse_kl(q, p, labels)[:, None], "shape [7, 1]; expected a tensor [7]"),
    (lambda q, p, labels: float(q.detach().sum()), "a float; expected a tensor [7]"),
    (lambda q, p, labels: None, "a NoneType; expected a tensor [7]"),
    (lambda q, p, labels: (q.sum(-1), p.sum(-1)), "a tuple; expected a tensor [7]"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "message"), WRONG_SHAPES)
@pytest.mark.parametrize("how", ["fused", "dense", "target", "tail", "class"])
def test_another_result_is_refused(function: Callable[..., Any], message: str, how: str) -> None:
    class Own(Objective):
        name = "own"

        def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Any:
            return function(student_logp, teacher_logp, labels)

    objective: Any = Own() if how == "class" else function
    if how in ("target", "tail"):
        objective = drkl.decoupled(**{f"on_{how}": function})
        message = message.replace("[7, 11]", "[7, 2]") if how == "target" else message
    name = "own" if how == "class" else "<lambda>"
    with pytest.raises(DrklError, match=re.escape(f"Objective {name!r} returned {message}")):
        loss_and_grads(objective, "fused" if how == "fused" else "dense")


@pytest.mark.usefixtures("unchecked")
def test_a_closed_form_with_another_result_is_refused() -> None:
    class Summed(type(drkl.make_objective("rkl"))):  # type: ignore[misc]
        def value_and_grad_(self, *rows: Any) -> Tensor:
            return super().value_and_grad_(*rows).sum()  # type: ignore[no-any-return]

    with pytest.raises(DrklError, match=re.escape("Objective 'rkl' returned shape []; expected a tensor [7]")):
        loss_and_grads(Summed(), "fused")


def test_a_result_without_a_gradient_is_refused() -> None:
    with pytest.raises(DrklError, match="Objective '<lambda>' returned values that do not depend on student_logp"):
        loss_and_grads(lambda q, p, labels: p.sum(-1), "fused")


class TwoInputs(nn.Module):
    def forward(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        return reverse_kl(student_logp, teacher_logp, None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (lambda q, p: q, "(q, p)"),
        (lambda: None, "()"),
        (lambda q, p, labels, weight: q, "(q, p, labels, weight)"),
        (lambda q, p, *, labels: q, "(q, p, *, labels)"),
        (functools.partial(reverse_kl, labels=None), "labels: 'Tensor | None' = None)"),
        (TwoInputs(), "(student_logp: 'Tensor', teacher_logp: 'Tensor')"),
    ],
)
@pytest.mark.parametrize("how", ["make_objective", "distillation_loss", "decoupled", "as_gkd_loss"])
def test_other_arguments_are_refused(function: Any, signature: str, how: str) -> None:
    with pytest.raises(DrklError) as caught:
        if how == "distillation_loss":
            drkl.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), objective=function)
        else:
            getattr(drkl, how)(function)
    message = str(caught.value)
    assert signature in message and "three positional arguments (student_logp, teacher_logp, labels)" in message


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["make_objective", "distillation_loss", "fused", "decoupled", "as_gkd_loss"])
@pytest.mark.parametrize("cls", [Plain, Weighted, Callme, type(drkl.make_objective("rkl"))])
def test_a_class_in_place_of_an_instance_is_refused(how: str, cls: Any) -> None:
    name = cls.__name__
    with pytest.raises(DrklError, match=re.escape(f"objective is the class {name}; expected an instance, {name}(...)")):
        if how == "fused":
            drkl.fused_distillation_loss(*(torch.zeros(2, 2) for _ in range(4)), objective=cls)
        elif how == "distillation_loss":
            drkl.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), objective=cls)
        else:
            getattr(drkl, how)(cls)


def test_an_objective_that_inherits_nothing_is_taken_as_it_is() -> None:
    class Whole:
        name, formula, source = "whole", "", ""
        needs_teacher, needs_labels, has_closed_form = True, False, False

        def __call__(self, student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None = None) -> Tensor:
            return reverse_kl(student_logp, teacher_logp, labels)

        def value_and_grad_(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
            raise NotImplementedError

    made = Whole()
    assert drkl.make_objective(made) is made  # type: ignore[arg-type]
    assert not isinstance(drkl.make_objective(Callme()), Callme)
    assert isinstance(drkl.make_objective(Callme()), FunctionObjective)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_function_that_lacks_its_labels_says_so(decoupled: bool) -> None:
    logits = torch.zeros(2, 5)
    chosen = drkl.decoupled(observed, "rkl") if decoupled else observed
    with pytest.raises(DrklError, match=r"Objective 'observed' failed, and it was given no labels"):
        drkl.distillation_loss(logits, logits, None, objective=chosen)


@pytest.mark.parametrize("decoupled", [False, True])
def test_values_without_a_gradient_are_refused_where_one_is_asked_for(decoupled: bool) -> None:
    def detached(student_logp: Tensor, teacher_logp: Tensor, labels: Tensor | None) -> Tensor:
        return reverse_kl(student_logp, teacher_logp, labels).detach()

    chosen = drkl.decoupled(detached, "rkl") if decoupled else detached
    logits, teacher = torch.randn(2, 5, requires_grad=True), torch.zeros(2, 5)
    with pytest.raises(DrklError, match=r"Objective 'detached' returned values that do not depend on student_logp"):
        drkl.distillation_loss(logits, teacher, objective=chosen)
    with torch.no_grad():
        assert drkl.distillation_loss(logits, teacher, objective=chosen).isfinite()
