"""The base class of objectives, plain functions as objectives, and the checks that objectives share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from drkl.errors import DrklError, did_you_mean

OnClasses = Literal["bound", "approximation"]


@runtime_checkable
class Objective(Protocol):
    """A function to minimise at one position. A subclass has a ``name`` and a ``__call__``; the rest has defaults.

    A subclass is a frozen dataclass whose fields are its hyper-parameters. It never masks, shifts, casts, scales or
    reduces: `drkl.losses` does, once for all objectives. Two more methods are optional: `value_and_grad_`, and
    ``terms``, which takes the arguments of ``__call__`` and returns a target term and a tail term, each `[n]`, that add
    up to the value; `drkl.analysis` splits the gradient into theirs. So is an attribute, ``on_classes``.
    """

    name: str
    formula: str = ""
    source: str = ""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distribution is read; where False, ``teacher_logp`` may be None."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether the observed next token is read; where False, ``labels`` may be None."""
        return getattr(self, "target", None) == "label"

    @property
    def has_closed_form(self) -> bool:
        """Whether `value_and_grad_` may be called; otherwise the fused loss differentiates ``__call__``."""
        return type(self).value_and_grad_ is not Objective.value_and_grad_

    # Subclasses narrow Any to what they read: a Tensor where they need it, Tensor | None where they do not.
    def __call__(self, student_logp: Tensor, teacher_logp: Any, labels: Any = None) -> Tensor:
        """Return the value at each position.

        Args:
            student_logp: `[n, vocab]`, log-probabilities in fp32 or wider.
            teacher_logp: `[n, vocab]`, likewise; gets no gradient.
            labels: `[n]`, the observed next token's id.

        Returns:
            `[n]`, in nats.
        """
        raise NotImplementedError

    def value_and_grad_(self, student_logits: Tensor, teacher_logits: Any, labels: Any) -> Tensor:
        """Return the values `[n]` and overwrite ``student_logits`` with d value / d student_logits.

        The same numbers as ``__call__`` on the log-softmax of both, without a graph. Both logits `[n, vocab]` are
        finite, fp32 or wider; ``teacher_logits`` may be overwritten too.
        """
        message = f"Objective {self.name!r} has no closed form; has_closed_form says so."
        raise NotImplementedError(message)


class FunctionObjective(Objective):
    """A plain function ``(student_logp, teacher_logp, labels) -> [n]`` as an objective.

    ``labels`` is None where the loss is given none. Attributes ``needs_teacher``, ``needs_labels`` and ``on_classes``
    of the callable are honoured; by default it needs the teacher and not the labels.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """Wrap any callable; raises DrklError where it does not take the three arguments."""
        bare = function.func if isinstance(function, functools.partial) else function
        self.function, self.name = function, getattr(bare, "__name__", type(bare).__name__)
        self.on_classes = getattr(function, "on_classes", None)
        called = function.forward if isinstance(function, torch.nn.Module) else function
        try:
            signature = inspect.signature(called)
        except ValueError:  # a built-in that does not tell
            return
        try:
            signature.bind(None, None, None)
        except TypeError as error:
            raise DrklError(
                f"Objective {self.name!r} has the signature {signature}; expected a function of three positional "
                f"arguments (student_logp, teacher_logp, labels) ({error})."
            ) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionObjective) and self.function == other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"FunctionObjective({self.name})"

    @property
    def needs_teacher(self) -> bool:
        return bool(getattr(self.function, "needs_teacher", True))

    @property
    def needs_labels(self) -> bool:
        return bool(getattr(self.function, "needs_labels", False))

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        try:
            values = self.function(student_logp, teacher_logp, labels)
        except (TypeError, AttributeError) as error:
            if labels is not None:
                raise
            raise DrklError(
                f"Objective {self.name!r} failed, and it was given no labels ({error}). Pass labels, or, if it has to "
                "have them, set its attribute needs_labels = True; as a part of a decoupled objective it has none."
            ) from error
        values = check_values(self, values, student_logp.shape[0])
        if torch.is_grad_enabled() and student_logp.requires_grad and not values.requires_grad:
            raise DrklError(
                f"Objective {self.name!r} returned values that do not depend on student_logp through differentiable "
                "operations, so there is nothing to minimise."
            )
        return values


def on_classes(objective: Objective) -> OnClasses | None:
    """What an objective's value is on a coarser list of classes, some tokens and all the rest as one.

    Returns:
        ``bound`` where it is a lower bound of the value on all tokens, ``approximation`` where it is near it; None
        where it is neither, or where the objective does not say so by an attribute of this name.
    """
    return getattr(objective, "on_classes", None)


def why_not_on_classes(objective: Objective) -> str:
    """The reason where `on_classes` is None, as the end of a sentence."""
    unsaid = "it does not say that all classes are alike to it (its attribute on_classes)."
    return str(getattr(objective, "why_not_on_classes", unsaid))


def check_values(objective: Objective, values: object, count: int) -> Tensor:
    """Return ``values``; raises DrklError unless they are a tensor `[count]`."""
    if isinstance(values, Tensor) and values.shape == (count,):
        return values
    came = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise DrklError(
        f"Objective {objective.name!r} returned {came}; expected a tensor [{count}], one value per position (sum over "
        "the vocabulary; the loss averages over positions)."
    )


def check_choice(owner: str, field: str, value: object, choices: Iterable[str] | Mapping[str, Any]) -> None:
    """Raise DrklError unless ``value`` is one of ``choices``."""
    known = list(choices)
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise DrklError(f"{owner}.{field} is {value!r}; expected one of {', '.join(known)}.{hint}")


def check_number(
    owner: str, field: str, value: object, domain: str, inside: Callable[[float], bool] | None = None
) -> None:
    """Raise DrklError unless ``value`` is a finite number for which ``inside`` is true; ``domain`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DrklError(f"{owner}.{field} is {value!r}; expected a number {domain}.")
    if value != value or abs(value) == float("inf") or (inside is not None and not inside(value)):
        raise DrklError(f"{owner}.{field} is {value}; expected {domain}.")


def help_text(text: str) -> dict[str, str]:
    """The metadata of an objective's field, which `drkl objectives` prints."""
    return {"help": text}
