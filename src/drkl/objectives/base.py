"""The protocol of an objective, and making one by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from drkl.errors import DrklError, did_you_mean
from drkl.objectives.closed_form import Moments


@runtime_checkable
class Objective(Protocol):
    """What is minimised at one position; a frozen dataclass whose fields are its hyper-parameters.

    It never masks, shifts, casts, scales or reduces: `drkl.losses` does, once for all objectives.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distribution is read; where False, ``teacher_logp`` may be None."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether the observed next token is read; where False, ``labels`` may be None."""
        ...

    @property
    def has_closed_form(self) -> bool:
        """Whether `value_and_grad_` may be called; otherwise the fused loss differentiates ``__call__``."""
        ...

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """Return the value at each position.

        Args:
            student_logp: `[n, vocab]`, log-probabilities in fp32 or wider.
            teacher_logp: `[n, vocab]`, likewise; gets no gradient.
            labels: `[n]`, the observed next token's id.

        Returns:
            `[n]`, in nats.
        """
        ...

    def value_and_grad_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        seen: Moments | None = None,
    ) -> Tensor:
        """Return the values `[n]` and overwrite ``student_logits`` with d value / d student_logits.

        The same numbers as ``__call__`` on the log-softmax of both, without a graph. Both logits `[n, vocab]` must be
        finite, fp32 or wider; ``teacher_logits`` is left with arbitrary contents. ``seen``, where given, is filled on
        the way; an objective may do without this argument, and the loss then looks at the rows itself.
        """
        ...


def make_objective(name: str | Objective, **params: Any) -> Objective:
    """Make an objective by its registered name.

    Args:
        name: a key of `drkl.OBJECTIVES`; an objective is returned as it is.
        **params: its hyper-parameters; those left out take the default.

    Raises:
        DrklError: an unknown name or parameter, or a value outside its domain.

    >>> make_objective("drkl", gamma=0.25).gamma
    0.25
    """
    from drkl.objectives.registry import OBJECTIVES

    if not isinstance(name, str):
        if params:
            raise DrklError(f"Parameters {sorted(params)} were given beside an objective that is already made.")
        if isinstance(name, type) or not isinstance(name, Objective):
            raise DrklError(f"objective is {name!r}; expected a name in drkl.OBJECTIVES, or an objective made of one.")
        return name
    if name not in OBJECTIVES:
        known = ", ".join(OBJECTIVES)
        raise DrklError(f"There is no objective {name!r}.{did_you_mean(name, OBJECTIVES)} Known: {known}.")
    cls: Any = OBJECTIVES[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in params:
        if key not in fields:
            has = f"it has {', '.join(fields)}" if fields else "it has none"
            raise DrklError(f"Objective {name!r} has no parameter {key!r}; {has}.{did_you_mean(key, fields)}")
    made: Objective = cls(**params)
    return made


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
