"""The questions people ask of the numbers, and their answers: the only place that turns numbers into sentences.

Each finding is decided by a 95 % interval: ``yes`` or ``no`` where the interval lies on one side of the bar,
``undecided`` where it holds the bar, ``not_applicable`` where the question has no meaning for what was measured.

There are two yardsticks of overconfidence, and a page shows both by name. ``overconfident_by_teacher``: at its own top
token the student gives more probability than its teacher does (metric ``overconfidence``). ``overconfident_by_data``:
its confidence is above its accuracy (metric ``calibration_gap``). ``drkl evaluate`` and ``drkl analyze`` both decide
them with `sureness`, from the same rows and the same resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from drkl.evaluation.bootstrap import Estimate, Interval

Answer = Literal["yes", "no", "undecided", "not_applicable"]

QUESTIONS: dict[str, str] = {
    # Of an evaluation and of an analysis.
    "overconfident_by_teacher": "Is the student overconfident, measured against its teacher?",
    "overconfident_by_data": "Is the student overconfident, measured against the data?",
    "target_too_high": "Does the student give the teacher's top token too much probability?",
    # Of an evaluation.
    "closer": "Is the student closer to its teacher than before training?",
    "closer_than_warmup": "Did the last stage bring the student closer to its teacher?",
    "better_on_data": "Does the student predict the held-out data better than before training?",
    "as_good": "Does the student answer as well as its teacher?",
    "varied": "Are the student's answers as varied as its teacher's?",
    "as_good_when_as_varied": "Does the student answer as well as its teacher where it is as varied?",
    # Of an analysis.
    "pushed_when_matched": "Where its target already matches the teacher's, would reverse KL push it further up?",
    "tail_dominates": "Do student and teacher differ mostly in the tail?",
    "drkl_strengthens_tail": "Would DRKL supervise the tail harder than reverse KL at most positions?",
    "sure_positions_dominate": "Does most of the DRKL loss come from positions where the teacher is almost certain?",
}
"""Every id of a finding about one student, with its question. A comparison of two has ``b_better_METRIC`` as well."""
IDS: tuple[str, ...] = tuple(QUESTIONS)
SHARED: tuple[str, ...] = IDS[:3]
"""The ids that stand in ``eval.json`` and in ``analysis.json``."""


@dataclass(frozen=True)
class Finding:
    """A question, its answer, the numbers that decide it, and a sentence that says so."""

    id: str
    question: str
    answer: Answer
    numbers: Mapping[str, Estimate] = field(default_factory=dict)
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``eval.json`` and ``analysis.json``."""
        numbers = {name: estimate.to_json() for name, estimate in self.numbers.items()}
        return {"id": self.id, "question": self.question, "answer": self.answer, "numbers": numbers, "text": self.text}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Finding:
        """The finding that ``to_json`` gave."""
        numbers = {}
        for name, entry in found["numbers"].items():
            ends = entry["interval"]
            numbers[name] = Estimate(entry["value"], None if ends is None else (ends[0], ends[1]))
        return cls(found["id"], found["question"], found["answer"], numbers, found["text"])


class Measured(Protocol):
    """The numbers that findings are made of; `drkl.evaluation.result.Evaluation` has them."""

    task: str
    classes: Sequence[str]

    @property
    def models(self) -> list[str]: ...

    def value(self, model: str, key: str) -> float | None: ...

    def interval(self, model: str, key: str) -> Interval | None: ...


Differences = Mapping[tuple[str, str], Mapping[str, Estimate]]
"""By (model, other) and metric: the model's number minus the other's, resampled together."""


def of_evaluation(evaluation: Measured, differences: Differences | None = None) -> list[Finding]:
    """Every finding of an evaluation, in the order of `QUESTIONS`.

    Args:
        evaluation: the numbers of all models.
        differences: paired differences between models. Where one is missing, two models differ if their own intervals
            have no number in common.
    """
    raise NotImplementedError


def of_analysis(tables: Mapping[str, Any], *, shared: bool = True) -> list[Finding]:
    """Every finding of an analysis, in the order of `QUESTIONS`.

    Args:
        tables: ``totals``, ``counts`` and ``settings`` of ``analysis.json``. The totals behind `SHARED` have to be
            resampled with the seed of the evaluation (0, or the run's ``evaluation.seed``), so that both files agree.
        shared: whether to decide the ids in `SHARED`; False where an evaluation beside it measured other rows.
    """
    raise NotImplementedError
