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


def _plain(objective: str, **params: Any) -> Case:
    name = objective + "".join(f"-{value}" for value in params.values())
    by_hand = reference.PARTS[objective]
    return Case(name, drkl.make_objective(objective, **params), lambda q, p, t, y: by_hand(q, p, **params))


def _dkd(target: str = "teacher", alpha: float = 1.0, beta: float = 0.5) -> Case:
    words = {"on_target": "fkl", "on_tail": "fkl", "gamma": beta, "target_weight": alpha}
    objective = drkl.make_objective("dkd", alpha=alpha, beta=beta, target=target)
    return Case(f"dkd-{alpha}-{beta}-{target}", objective, lambda q, p, t, y: reference.decoupled(q, p, t, **words))


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
    *map(_plain, reference.PARTS),
    _plain("symmetric_kl", forward_weight=0.9),
    _plain("symmetric_kl", forward_weight=0.0),
    _plain("symmetric_kl", forward_weight=1.0),
    _plain("gjs", beta=0.1),
    _plain("gjs", beta=0.97),
    _plain("sfkl", skew=0.0),
    _plain("sfkl", skew=0.8),
    _plain("srkl", skew=0.0),
    _plain("srkl", skew=0.8),
    _plain("akl", mu=0.05),
    _plain("akl", mu=0.9),
    _plain("akl", mu=1.0),
    _plain("ab", alpha=1.0, beta=0.0),
    _plain("ab", alpha=0.0, beta=1.0),
    _plain("ab", alpha=0.0, beta=0.4),
    _plain("ab", alpha=0.5, beta=0.5),
    _plain("ab", alpha=1.0, beta=1.0),
    _plain("ab", alpha=3.0, beta=0.25),
    _plain("ab", alpha=0.01, beta=0.02),
    _plain("ab", alpha=1e-7, beta=0.6),
    _dkd(),
    _dkd("label"),
    _dkd(alpha=0.0, beta=8.0),
    _dkd(alpha=2.0, beta=0.0),
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
    _decoupled(on_target="srkl", on_tail="srkl"),
    _decoupled(on_target="tvd", on_tail="todi", gamma=0.3),
    _decoupled(on_target="ab", on_tail="akl", weight="student"),
    _decoupled(on_target="akl", on_tail="ab", target="label"),
    _decoupled(on_target="symmetric_kl", on_tail="sfkl"),
]
# At alpha = -beta every class counts, however little mass it has: the hazards that follow from mass do not hold.
LIMITS = [_plain("ab", alpha=0.0, beta=0.0), _plain("ab", alpha=0.3, beta=-0.3), _plain("ab", alpha=-0.3, beta=0.3)]
DIVERGENCES = [case for case in CASES if case.is_divergence]
# One of each class, and all of the two whose paths differ with their parameters: enough where the objective is not what
# is tested.
FEW = [case for case in CASES if case.objective.name in ("drkl", "decoupled")]
FEW += {case.objective.name: case for case in reversed(CASES) if case not in FEW}.values()
CLOSED_FORMS = [case for case in CASES if case.objective.has_closed_form]


def name(case: Case) -> str:
    return case.id
