"""The objectives that the contract is tested on, each beside its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import drkl
from drkl.objectives import Objective
from tests.objectives import reference


@dataclass(frozen=True)
class Case:
    """An objective, and its value at one position from student probabilities, teacher probabilities, target, label."""

    id: str
    objective: Objective
    by_hand: Callable[[Any, Any, int, int], Any]

    def expected(self, student: Sequence[float], teacher: Sequence[float], label: int, temperature: float = 1.0) -> Any:
        """The value at one position, from logits."""
        target = label if self.objective.needs_labels else reference.top(teacher)
        q, p = reference.softmax(student, temperature), reference.softmax(teacher, temperature)
        return self.by_hand(q, p, target, label)

    @property
    def is_divergence(self) -> bool:
        return self.objective.needs_teacher


def _drkl(**params: Any) -> Case:
    words = {k: v for k, v in params.items() if k in ("gamma", "weight", "skew")}
    if "tail" in params:
        words["on_tail"] = params["tail"]
    name = "drkl" + "".join(f"-{value}" for value in params.values())
    return Case(name, drkl.make_objective("drkl", **params), lambda q, p, t, y: reference.decoupled(q, p, t, **words))


def _decoupled(**params: Any) -> Case:
    words = {k: v for k, v in params.items() if k != "target"}
    name = "decoupled" + "".join(f"-{value}" for value in params.values())
    return Case(name, drkl.decoupled(**params), lambda q, p, t, y: reference.decoupled(q, p, t, **words))


CASES = [
    Case("ce", drkl.make_objective("ce"), lambda q, p, t, y: reference.cross_entropy(q, y)),
    Case("fkl", drkl.make_objective("fkl"), lambda q, p, t, y: reference.fkl(q, p)),
    Case("rkl", drkl.make_objective("rkl"), lambda q, p, t, y: reference.rkl(q, p)),
    _drkl(),
    _drkl(gamma=2.5),
    _drkl(target="label"),
    _drkl(weight="student"),
    _drkl(weight="teacher"),
    _drkl(weight="floor", gamma=0.3),
    _drkl(tail="fkl"),
    _drkl(tail="fkl", weight="student", target="label"),
    _drkl(tail="gjs"),
    _drkl(tail="gjs", weight="floor"),
    _drkl(skew=0.1),
    _drkl(skew=0.9, weight="student"),
    _drkl(skew=0.3, weight="teacher", target="label"),
    _decoupled(),
    _decoupled(on_target="fkl", on_tail="fkl", gamma=8.0, target_weight=2.0),
    _decoupled(on_target="gjs", on_tail="rkl", weight="teacher"),
    _decoupled(on_target="rkl", on_tail="gjs", target="label", weight="floor"),
    _decoupled(on_target="fkl", on_tail="rkl", target_weight=0.0),
]
DIVERGENCES = [case for case in CASES if case.is_divergence]
CLOSED_FORMS = [case for case in CASES if case.objective.has_closed_form]


def name(case: Case) -> str:
    return case.id
