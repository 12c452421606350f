"""What a cache of a teacher's k most probable tokens would lose: the result of `drkl.probe_top_k`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from drkl.evaluation.bootstrap import Estimate
from drkl.objectives.base import OnClasses

ENOUGH, CLOSE = 0.95, 5.0
"""The share of an objective's value that a k has to keep, and the degrees that its gradient may turn, to be advised."""


ROUNDING = 2.0**-22
"""Where a share is nearer to 1, the digits of fp32 do not tell it from 1."""


class KeptMass(NamedTuple):
    """What k tokens hold of the teacher's distributions; means over positions."""

    k: int
    temperature: float
    bytes_per_position: int
    """Those of a cache with this k, for all temperatures."""
    mass: Estimate
    tail_mass: Estimate
    """The share of the mass that the tokens beside the most probable one have."""


class KeptLoss(NamedTuple):
    """What the k + 1 classes leave of an objective."""

    share: Estimate
    """The sum of its values on the classes over the sum of the exact ones; None where there is nothing to lose."""
    angle: Estimate
    """Degrees between its gradient and the exact one: both on the student's logits, all positions as one vector."""


@dataclass(frozen=True)
class ProbedObjective:
    """An objective at a temperature, and what is left of it with each k."""

    name: str
    temperature: float
    own: bool
    """Whether the run minimises it."""
    on_classes: OnClasses | None
    """``bound`` or ``approximation``; None where it cannot be had from k + 1 classes."""
    reason: str | None
    """The reason for that, as the end of a sentence."""
    value: Estimate
    """The exact value, in nats for each position."""
    kept: Mapping[int, KeptLoss]
    """By k; empty where it cannot be had."""


@dataclass(frozen=True)
class TopKProbe:
    """The result of `drkl.probe_top_k`. Intervals are 95 % bootstrap intervals over the rows."""

    teacher: str
    student: str
    """The student that was compared with it; a trained one loses something else."""
    rows: int
    positions: int
    vocab_size: int
    hidden_bytes: int
    """Bytes for each position of a cache of hidden states, which is exact."""
    masses: Sequence[KeptMass]
    objectives: Sequence[ProbedObjective]
    """Those of the run first."""

    def advice(self) -> list[str]:
        """For each objective of the run a sentence: which k keeps enough of it, and what hidden states take."""
        sizes = {mass.k: mass.bytes_per_position for mass in self.masses}
        return [self._advice(objective, sizes) for objective in self.objectives if objective.own]

    def _advice(self, objective: ProbedObjective, sizes: Mapping[int, int]) -> str:
        name, hidden = objective.name, f"{self.hidden_bytes:,}"
        if len({one.temperature for one in self.objectives}) > 1:
            name += f" at temperature {objective.temperature:g}"
        if objective.reason is not None:
            return (
                f"{name} cannot be had from k tokens and the rest: {objective.reason} Keep hidden states, at {hidden} "
                "bytes a position."
            )
        if objective.value.value is None or any(loss.share.value is None for loss in objective.kept.values()):
            return (
                f"The value of {name} is 0 here, or not finite: there is no share of it. Hidden states are exact, at "
                f"{hidden} bytes a position."
            )
        for k, loss in objective.kept.items():
            share, angle = loss.share.value, loss.angle.value
            if share is None or angle is None or abs(1 - share) > 1 - ENOUGH or angle > CLOSE:
                continue
            exact = "Hidden states are exact, at"
            if self.hidden_bytes <= sizes[k]:
                exact = "Hidden states are exact and no larger:"
            return (
                f"k = {k} keeps {percent(share)} of the value of {name} and turns its gradient by {angle:.1f} degrees, "
                f"at {sizes[k]:,} bytes a position. {exact} {hidden}."
            )
        tried = ", ".join(map(str, objective.kept))
        return (
            f"No k of those tried ({tried}) keeps 95 % of the value of {name} and its gradient within 5 degrees: keep "
            f"hidden states, which are exact, at {hidden} bytes a position."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as json can hold it."""
        names = ("teacher", "student", "rows", "positions", "vocab_size", "hidden_bytes")
        return {
            **{name: getattr(self, name) for name in names},
            "masses": [_json(mass._asdict()) for mass in self.masses],
            "objectives": [
                _json({name: value for name, value in vars(objective).items() if name != "kept"})
                | {"kept": [{"k": k, **_json(loss._asdict())} for k, loss in objective.kept.items()]}
                for objective in self.objectives
            ],
            "advice": self.advice(),
        }


def percent(share: float) -> str:
    """A share as "99.8 %"; what is not all is not rounded to it, rounding of fp32 aside."""
    whole = share > 1 - ROUNDING
    digits = next((digits for digits in range(1, 5) if whole or round(100 * share, digits) < 100), 5)
    return f"{100 * share:.{digits}f} %"


def _json(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to_json() if isinstance(value, Estimate) else value for name, value in fields.items()}
