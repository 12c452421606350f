"""Findings: questions, and the answers that the numbers give. Only this module turns numbers into sentences.

Each finding is decided by a 95 % interval: ``yes`` or ``no`` where the interval lies on one side of the bar,
``undecided`` where it holds the bar, ``not_applicable`` where the question has no meaning for what was measured.

There are two yardsticks of overconfidence, and a page shows both by name. ``overconfident_by_teacher``: at its own top
token the student gives more probability than its teacher does (metric ``overconfidence``). ``overconfident_by_data``:
its confidence is above its accuracy (metric ``calibration_gap``). ``drkl evaluate`` and ``drkl analyze`` both decide
them with `sureness`, from the same rows and the same resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from drkl.display import number
from drkl.evaluation.bootstrap import Estimate, Interval
from drkl.evaluation.declared import Metric, metrics_of
from drkl.evaluation.paired import MATCHED, MIN_UNITS, Curve, Difference, mostly, when_as_varied

Answer = Literal["yes", "no", "undecided", "not_applicable"]

ROUNDING = 1e-5
"""Two passes of one model over the same rows agree to this. It is the bar in place of 0: rounding is no finding."""
PUSHED = 0.02
"""In probability. Any tail pushes a matched target up by something, so a bar of 0 would always be passed."""
PUSHED_SHARE = 0.1
"""Share of the mean matched p_t that is the bar where it is lower: .02 is no small push for a target of .05."""
HALF = 0.5
"""The bar of questions that ask about the greater part."""

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
    "as_good_when_as_varied": "Does the student answer as well as its teacher when both are equally varied?",
    "calibrated_by_temperature": "Is the student better calibrated with a temperature on its logits?",
    # Of an analysis.
    "pushed_when_matched": "Where its target already matches the teacher's, would reverse KL push it further up?",
    "tail_dominates": "Do student and teacher differ mostly in the tail?",
    "drkl_strengthens_tail": "Would DRKL supervise the tail harder than reverse KL at most positions?",
    "sure_positions_dominate": "Does most of the DRKL loss come from positions where the teacher is almost certain?",
}
"""Every id of a finding about one student, with its question."""
BETTER = "b_better_"
"""Before a metric's key: the id of a finding of ``drkl compare``, whether B is nearer to ideal than A."""
IDS: tuple[str, ...] = (
    *QUESTIONS,
    *dict.fromkeys(
        f"{BETTER}{key}"
        for task in ("generation", "classification")
        for key, metric in metrics_of(task).items()
        if metric.better != "none"
    ),
    *(f"{BETTER}{key}" for key in MATCHED),
)
"""Every id that there is."""
RENAMED = {"own_gap": "overconfidence"}
"""Means of the first format of ``analysis.json``, by their present names."""
SHARED = ("overconfident_by_teacher", "overconfident_by_data", "target_too_high")
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
        """Return the entry for ``eval.json`` and ``analysis.json``."""
        numbers = {name: estimate.to_json() for name, estimate in self.numbers.items()}
        return {"id": self.id, "question": self.question, "answer": self.answer, "numbers": numbers, "text": self.text}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Finding:
        """The finding that ``to_json`` gave."""
        numbers = {name: Estimate.from_json(entry) for name, entry in raw["numbers"].items()}
        return cls(raw["id"], raw["question"], raw["answer"], numbers, raw["text"])


class Measured(Protocol):
    """The numbers from which findings are computed; `drkl.evaluation.result.Evaluation` has them."""

    @property
    def task(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def models(self) -> list[str]: ...

    def value(self, model: str, key: str) -> float | None: ...

    def interval(self, model: str, key: str) -> Interval | None: ...

    def num_units(self, of: str) -> int | None: ...

    @property
    def sweep(self) -> Mapping[str, Sequence[Any]]: ...


Differences = Mapping[tuple[str, str], Mapping[str, Estimate]]
"""By (model, other) and metric: the model's number minus the other's, resampled together."""


def of_evaluation(
    evaluation: Measured, differences: Differences | None = None, curves: Mapping[str, Curve] | None = None
) -> list[Finding]:
    """Every finding of an evaluation, in the order of `QUESTIONS`.

    Args:
        evaluation: the numbers of all models.
        differences: paired differences between models. Where one is missing, two models differ if their own intervals
            have no number in common.
        curves: student and teacher over their sampling temperatures, resampled together. Default: the numbers of the
            sweep, each with its own interval.
    """
    numbers = _Numbers(evaluation, differences or {})
    sure = {
        key: numbers.estimate("student", key)
        for key in ("overconfidence", "calibration_gap", "target_gap", "confidence", "accuracy")
    }
    sure["teacher_calibration_gap"] = numbers.estimate("teacher", "calibration_gap")
    has_teacher = "teacher" in evaluation.models
    findings = sureness(sure, numbers.units("texts" if numbers.classifies else "tokens"), has_teacher=has_teacher)
    findings += [_closer(numbers, "closer", "before"), _closer(numbers, "closer_than_warmup", "warmup")]
    findings += [_better_on_data(numbers), _as_good(numbers), _varied(numbers)]
    findings.append(_as_good_when_as_varied(numbers, curves))
    if numbers.has("scaled"):
        findings.append(_calibrated_by_temperature(numbers))
    if numbers.classifies and len(evaluation.classes) == 2:
        findings.append(_not_applicable("tail_dominates", TWO_CLASSES))
    return findings


TEACHER_WROTE_NONE = "No answers of the teacher's were sampled."
TWO_CLASSES = (
    "With two classes the tail is a single class and its divergence K is 0: DRKL without a skew equals reverse KL, so "
    "these models cannot show what decoupling does."
)


def sureness(numbers: Mapping[str, Estimate], units: int | None, *, has_teacher: bool = True) -> list[Finding]:
    """The findings with the ids in `SHARED`, which `drkl evaluate` and `drkl analyze` both decide here.

    Args:
        numbers: means over positions: ``overconfidence`` (q - p at the student's own top token), ``calibration_gap``
            (confidence - accuracy), ``target_gap`` (q - p at the teacher's top token), ``confidence``, ``accuracy`` and
            ``teacher_calibration_gap``; what was not measured may be missing.
        units: how many rows (or texts) they are resampled over; None where that is not known.
        has_teacher: whether there is a teacher to compare with.
    """
    known = {key: _settled(estimate, units) for key, estimate in numbers.items() if estimate.value is not None}
    few = f"; fewer than {MIN_UNITS} rows decide nothing" if units is not None and units < MIN_UNITS else ""
    findings = []
    for id, key in zip(SHARED, ("overconfidence", "calibration_gap", "target_gap"), strict=True):
        if key != "calibration_gap" and not has_teacher:
            findings.append(_not_applicable(id, "There is no teacher to compare the student with."))
            continue
        if key not in known:
            findings.append(_not_applicable(id, "An earlier drkl did not measure this; `drkl evaluate` does."))
            continue
        estimate, more = known[key], {}
        if key == "overconfidence":
            text = f"The student gives its own top token {_more(estimate)} its teacher does{few}."
        elif key == "target_gap":
            text = f"The student gives its teacher's top token {_more(estimate)} its teacher does{few}."
            if above(estimate) == "no" and findings[0].answer == "yes":
                text += " It is overconfident about other tokens, which its teacher does not rank first."
        else:
            more = {
                name: known[name] for name in ("confidence", "accuracy", "teacher_calibration_gap") if name in known
            }
            confidence, accuracy = (_share(more[name]) for name in ("confidence", "accuracy"))
            text = f"The student's confidence ({confidence}) is {_above_or_below(estimate)} its accuracy ({accuracy})"
            if "teacher_calibration_gap" in more:
                text += f"; the teacher's is {_above_or_below(more['teacher_calibration_gap'])} the teacher's accuracy"
            text += f"{few}."
        findings.append(_finding(id, above(estimate), text, **{key: estimate}, **more))
    return findings


def of_comparison(differences: Sequence[Difference], place: str = "") -> list[Finding]:
    """A finding for each metric that has a verdict: is B better than A?

    Args:
        differences: of one set and one sampling temperature.
        place: what they were measured on, where that has to be said.
    """
    findings = []
    where = f" ({place})" if place else ""
    for difference in differences:
        metric, verdict = difference.metric, difference.verdict
        if verdict is None:
            continue
        answers: dict[str, Answer] = {"B better": "yes", "A better": "no", "undecided": "undecided"}
        conclusions = {
            "B better": "B is better",
            "A better": "A is better",
            "undecided": "these data do not decide which is better",
        }
        change = Estimate(difference.difference, difference.interval)
        a, b = (_of_metric(metric, value) for value in (difference.a, difference.b))
        text = f"{metric.title}{where}: {a} in A, {b} in B ({_signed(metric, change)}); {conclusions[verdict]}."
        numbers = {"a": Estimate(difference.a), "b": Estimate(difference.b), "difference": change}
        if difference.teacher is not None:
            numbers["teacher"] = Estimate(difference.teacher)
        question = f"Is B better than A by {metric.title}{where}?"
        findings.append(Finding(f"{BETTER}{metric.key}", question, answers[verdict], numbers, text))
    return findings


def of_analysis(tables: Mapping[str, Any], *, shared: bool = True) -> list[Finding]:
    """Every finding of an analysis, in the order of `QUESTIONS`.

    Args:
        tables: ``totals``, ``counts`` and ``settings`` of ``analysis.json``. The totals behind `SHARED`
            (``overconfidence`` and so on, see `sureness`) have to be resampled with the seed of the evaluation (0, or
            the run's ``evaluation.seed``), so that both files agree.
        shared: whether to decide the ids in `SHARED`; False where an evaluation beside it measured other rows.
    """
    settings, counts = tables["settings"], tables["counts"]
    totals = {RENAMED.get(name, name): Estimate.from_json(entry) for name, entry in tables["totals"].items()}
    rows, gamma = settings["rows"], settings["gamma"]
    findings = sureness(totals, rows) if shared else []
    at_temperature = [
        _pushed(totals, counts, settings["positions"]),
        _tail_dominates(totals),
        _strengthens(totals, gamma),
        _sure_positions(totals, gamma),
    ]
    for finding in at_temperature:
        text = finding.text
        if settings["temperature"] != 1:
            text = f"At temperature {settings['temperature']:g}: {text}"
        if counts["infinite_K"]:
            text += (
                f" K is infinite at {number(counts['infinite_K'], 0)} of the positions, where the teacher excludes a "
                "token that the student does not; a dash stands for what is infinite with it."
            )
        if finding.answer == "undecided" and rows < MIN_UNITS:
            text += f" Fewer than {MIN_UNITS} rows decide nothing."
        findings.append(replace(finding, text=text))
    return findings


# Decisions --------------------------------------------------------------------------------------------------------


def above(estimate: Estimate, bar: float = ROUNDING) -> Answer:
    """``yes`` where all of the interval is above the bar, ``no`` where none of it is, else ``undecided``."""
    if estimate.interval is None:
        return "undecided"
    low, high = estimate.interval
    return "yes" if low > bar else "no" if high <= bar else "undecided"


def not_below(estimate: Estimate) -> Answer:
    """``yes`` where none of the interval is below 0, ``no`` where all of it is, else ``undecided``."""
    if estimate.interval is None:
        return "undecided"
    low, high = estimate.interval
    return "yes" if low >= -ROUNDING else "no" if high < -ROUNDING else "undecided"


def together(answers: Sequence[Answer]) -> Answer:
    """The joint answer of several measures: that of those that decide; undecided where they contradict each other."""
    decided = {answer for answer in answers if answer in ("yes", "no")}
    return decided.pop() if len(decided) == 1 else "undecided"


def _settled(estimate: Estimate, units: int | None) -> Estimate:
    """Without an interval where there are too few units for one."""
    return Estimate(estimate.value) if units is not None and units < MIN_UNITS else estimate


class _Numbers:
    """The numbers of an evaluation with the differences between its models."""

    def __init__(self, evaluation: Measured, differences: Differences) -> None:
        self.evaluation, self._differences = evaluation, differences
        self.classifies = evaluation.task == "classification"
        self.metrics = metrics_of(evaluation.task)

    def has(self, model: str) -> bool:
        return model in self.evaluation.models

    def units(self, of: str) -> int | None:
        return self.evaluation.num_units(of)

    def estimate(self, model: str, key: str) -> Estimate:
        return Estimate(self.evaluation.value(model, key), self.evaluation.interval(model, key))

    def difference(self, other: str, key: str) -> Estimate:
        """The student's number minus the other's."""
        units = self.units(self.metrics[key].of)
        paired = self._differences.get(("student", other), {}).get(key)
        if paired is not None:
            return _settled(paired, units)
        return _settled(_unpaired(self.estimate("student", key), self.estimate(other, key)), units)

    def compared(self, other: str, keys: Sequence[str]) -> dict[str, Estimate]:
        """The differences that there are, by key."""
        differences = {key: self.difference(other, key) for key in keys if key in self.metrics}
        return {key: difference for key, difference in differences.items() if difference.value is not None}

    def sentence(self, other: str, name: str, key: str, difference: Estimate) -> str:
        """The student's number, the other's, and how far they are from each other."""
        metric = self.metrics[key]
        ours, theirs = (_of_metric(metric, self.evaluation.value(model, key)) for model in ("student", other))
        return f"{metric.title} {ours}, {name} {theirs} ({_signed(metric, difference)})"


def _compare_models(
    numbers: _Numbers, id: str, other: str, name: str, keys: Sequence[str], better: Callable[[Metric, Estimate], Answer]
) -> Finding:
    """Decide whether the student is better than another model by all of ``keys`` together."""
    differences = numbers.compared(other, keys)
    if not differences:
        return _not_applicable(id, "None of the metrics that decide this was measured, or they are infinite.")
    answers = [better(numbers.metrics[key], difference) for key, difference in differences.items()]
    text = "; ".join(numbers.sentence(other, name, key, difference) for key, difference in differences.items()) + "."
    text = text[:1].upper() + text[1:]
    if "yes" in answers and "no" in answers:
        text += " The measures contradict each other."
    units = numbers.units(numbers.metrics[next(iter(differences))].of)
    if units is not None and units < MIN_UNITS:
        text += f" Fewer than {MIN_UNITS} rows or prompts decide nothing."
    entries: dict[str, Estimate] = {}
    for key, difference in differences.items():
        entries |= {key: numbers.estimate("student", key), f"{other}_{key}": numbers.estimate(other, key)}
        entries[f"{key}_difference"] = difference
    return Finding(id, QUESTIONS[id], together(answers), entries, text)


def _improved(metric: Metric, difference: Estimate) -> Answer:
    """Whether the number moved towards its ideal."""
    return above(difference if metric.better == "higher" else _negative(difference))


def _closer(numbers: _Numbers, id: str, other: str) -> Finding:
    if not numbers.has("teacher"):
        return _not_applicable(id, "There is no teacher to be close to.")
    if not numbers.has(other):
        reasons = {
            "before": "The student before training was not evaluated.",
            "warmup": "No student of an earlier stage was evaluated.",
        }
        return _not_applicable(id, reasons[other])
    name = {"before": "before training", "warmup": "after the warm-up"}[other]
    return _compare_models(numbers, id, other, name, ("rkl", "fkl", "agreement"), _improved)


def _better_on_data(numbers: _Numbers) -> Finding:
    id = "better_on_data"
    if not numbers.has("before"):
        return _not_applicable(id, "The student before training was not evaluated.")
    return _compare_models(
        numbers, id, "before", "before training", ("accuracy",) if numbers.classifies else ("nll",), _improved
    )


def _as_good(numbers: _Numbers) -> Finding:
    id = "as_good"
    if not numbers.has("teacher"):
        return _not_applicable(id, "There is no teacher to compare the student with.")
    key = "accuracy" if numbers.classifies else "rouge_l"
    if numbers.evaluation.value("student", key) is None:
        return _not_applicable(id, "No answers were sampled.")
    if numbers.evaluation.value("teacher", key) is None:
        return _not_applicable(id, TEACHER_WROTE_NONE)
    return _compare_models(numbers, id, "teacher", "the teacher's", (key,), lambda _, difference: not_below(difference))


def _varied(numbers: _Numbers) -> Finding:
    id = "varied"
    reason = _no_answers(numbers)
    if reason:
        return _not_applicable(id, reason)
    keys = ("distinct_2", "self_bleu")

    def more(metric: Metric, difference: Estimate) -> Answer:
        return not_below(difference if metric.key == "distinct_2" else _negative(difference))

    finding = _compare_models(numbers, id, "teacher", "the teacher's", keys, more)
    varied = [
        above(change if key == "distinct_2" else _negative(change))
        for key in keys
        if (change := finding.numbers.get(f"{key}_difference")) is not None
    ]
    if finding.answer == "yes" and "yes" in varied:
        text = f"{finding.text} It is more varied than its teacher; nonsense is more varied too, so read the samples."
        finding = replace(finding, text=text)
    return finding


def _calibrated_by_temperature(numbers: _Numbers) -> Finding:
    """The temperature of a row was fitted on other rows, or given; the resamples hold it fixed."""
    id = "calibrated_by_temperature"
    finding = _compare_models(numbers, id, "scaled", "with the temperature", ("ece",), lambda _, change: above(change))
    gap, scaled = (numbers.estimate(model, "calibration_gap") for model in ("student", "scaled"))
    if gap.value is None or scaled.value is None:
        return finding
    confidence = f"Its confidence is then {_above_or_below(scaled)} its accuracy, without it {_above_or_below(gap)}."
    more = {"calibration_gap": gap, "scaled_calibration_gap": scaled}
    return replace(finding, text=f"{finding.text} {confidence}", numbers={**finding.numbers, **more})


def _as_good_when_as_varied(numbers: _Numbers, curves: Mapping[str, Curve] | None) -> Finding:
    id = "as_good_when_as_varied"
    if reason := _no_answers(numbers):
        return _not_applicable(id, reason)
    paired = curves is not None
    curves = curves or {model: sweep_curve(numbers.evaluation, model) for model in ("student", "teacher")}
    matched = when_as_varied(curves["student"], curves["teacher"])
    if isinstance(matched, str):
        return _not_applicable(id, matched)
    goal, *scores = matched
    if paired:
        ours, theirs, difference = (mostly(values) for values in (*scores, scores[0] - scores[1]))
    else:
        ours, theirs = (_from_ends(values) for values in scores)
        difference = _unpaired(ours, theirs)
    difference = _settled(difference, numbers.units("answers"))
    metric = numbers.metrics["rouge_l"]
    scores_text = [_of_metric(metric, estimate.value) for estimate in (ours, theirs)]
    text = (
        f"Where each is as varied as the teacher at temperature 1 (Distinct-2 {number(float(goal[0]), 3)}), the "
        f"student's ROUGE-L is {scores_text[0]} and the teacher's {scores_text[1]} ({_signed(metric, difference)})."
    )
    return _finding(
        id, not_below(difference), text, student_rouge_l=ours, teacher_rouge_l=theirs, rouge_l_difference=difference
    )


def sweep_curve(evaluation: Measured, model: str, key: str = "rouge_l") -> Curve:
    """The sweep of an evaluation; in place of resamples the ends of the intervals of the quality ``key``."""
    points = [
        (point.sampling_temperature, point.values["distinct_2"], point.values[key], point.intervals)
        for point in evaluation.sweep.get(model, ())
        if point.values.get("distinct_2") is not None and point.values.get(key) is not None
    ]
    variety = np.array([[x] * 3 for _, x, _, _ in points]).reshape(len(points), 3)
    ends = [ends.get(key, (math.nan, math.nan)) for *_, ends in points]
    quality = np.array([[y, *own] for (_, _, y, _), own in zip(points, ends, strict=True)]).reshape(len(points), 3)
    return Curve([temperature for temperature, *_ in points], variety, quality)


def _from_ends(values: np.ndarray) -> Estimate:
    value, low, high = (float(number) for number in values)
    return Estimate(value, None if math.isnan(low) else (low, high))


def _unpaired(ours: Estimate, theirs: Estimate) -> Estimate:
    """The difference of two numbers that were not resampled together: 0 is in it where their intervals overlap."""
    if ours.value is None or theirs.value is None:
        return Estimate(None)
    ends = None
    if ours.interval is not None and theirs.interval is not None:
        ends = (ours.interval[0] - theirs.interval[1], ours.interval[1] - theirs.interval[0])
    return Estimate(ours.value - theirs.value, ends)


def _no_answers(numbers: _Numbers) -> str:
    if numbers.classifies:
        return "A classifier writes no answers."
    if not numbers.has("teacher"):
        return "There is no teacher to compare the student with."
    if numbers.evaluation.value("student", "distinct_2") is None:
        return "No answers were sampled."
    return "" if numbers.evaluation.value("teacher", "distinct_2") is not None else TEACHER_WROTE_NONE


def _pushed(totals: Mapping[str, Estimate], counts: Mapping[str, Any], positions: int) -> Finding:
    id = "pushed_when_matched"
    mean, overshoot = totals["matched_p_t"].value, totals["matched_overshoot"]
    if mean is None:
        return _finding(id, "undecided", f"At none of the {number(positions, 0)} positions the target matches.")
    text = (
        f"The target matches at {_share(totals['matched'])} of the positions. There the tail pushes its logit up with "
        f"a mean force of {_plain(totals['matched_force'], 4)}, more than the target's own push at "
        f"{_share(totals['matched_outweighs'])} of them. With the tail held as it is (K {_plain(totals['matched_K'])} "
        f"nats), reverse KL comes to rest {_points(overshoot)} above the teacher's {_share(totals['matched_p_t'])}. "
        "The tail of DRKL does not push the target there, whatever K is."
    )
    if overshoot.interval is None:
        where = f"{number(counts['matched'], 0)} positions in {number(counts['matched_rows'], 0)} rows"
        text += f" There is no interval: the target matches at {where}."
    names = ("matched", "matched_p_t", "matched_K", "matched_outweighs", "matched_force", "matched_overshoot")
    answer = above(overshoot, min(PUSHED, PUSHED_SHARE * mean))
    return _finding(id, answer, text, **{name: totals[name] for name in names})


def _tail_dominates(totals: Mapping[str, Estimate]) -> Finding:
    share = totals["tail_share"]
    text = (
        f"{_share(share)} of reverse KL lies in the tail, (1-q_t) K, and the rest in the target; K is "
        f"{_plain(totals['K'])} nats on average."
    )
    if share.value is None:
        text = "Reverse KL is 0 or infinite here, so it has no share in the tail."
    return _finding("tail_dominates", above(share, HALF), text, tail_share=share, K=totals["K"])


def _strengthens(totals: Mapping[str, Estimate], gamma: float) -> Finding:
    answer = above(totals["stronger"], HALF)
    text = (
        f"At gamma = {gamma:g} DRKL's force on the tail is stronger than reverse KL's at {_share(totals['stronger'])} "
        f"of the positions, where 1-q_t < gamma, and weaker at {_share(totals['weaker'])}; summed over all positions "
        f"it is {_plain(totals['tail_force_ratio'])} times reverse KL's."
    )
    if answer != "yes":
        text += ' `weight="floor"` strengthens everywhere and weakens nowhere.'
    names = ("stronger", "weaker", "tail_force_ratio")
    return _finding("drkl_strengthens_tail", answer, text, **{name: totals[name] for name in names})


def _sure_positions(totals: Mapping[str, Estimate], gamma: float) -> Finding:
    drkl, rkl = totals["sure_drkl"], totals["sure_rkl"]
    answer = above(drkl, HALF)
    text = (
        f"The teacher's p_t is above .99 at {_share(totals['sure'])} of the positions. They account for {_share(drkl)} "
        f"of the DRKL loss (gamma = {gamma:g}) and {_share(rkl)} of reverse KL's."
    )
    if answer == "yes" and (drkl.value or 0.0) > (rkl.value or 0.0):
        text += " There the tail holds almost no probability, so DRKL also weighs rounding errors. A lower gamma helps."
    return _finding("sure_positions_dominate", answer, text, sure=totals["sure"], sure_drkl=drkl, sure_rkl=rkl)


# Words ------------------------------------------------------------------------------------------------------------


def _finding(id: str, answer: Answer, text: str, **numbers: Estimate) -> Finding:
    return Finding(id, QUESTIONS[id], answer, numbers, text)


def _not_applicable(id: str, reason: str) -> Finding:
    return Finding(id, QUESTIONS[id], "not_applicable", {}, reason)


def _negative(estimate: Estimate) -> Estimate:
    ends = estimate.interval
    value = None if estimate.value is None else -estimate.value
    return Estimate(value, None if ends is None else (-ends[1], -ends[0]))


def _more(estimate: Estimate) -> str:
    """``14.0 points [12.8, 15.2] more probability than``."""
    return _way(estimate, "more probability than", "less probability than", "as much probability as")


def _above_or_below(estimate: Estimate) -> str:
    """``15.4 points [14.1, 16.8] above``."""
    return _way(estimate, "above", "below", "as high as")


def _way(estimate: Estimate, more: str, less: str, same: str) -> str:
    value = estimate.value
    assert value is not None
    if abs(value) <= ROUNDING:
        return same
    return f"{_points(estimate if value > 0 else _negative(estimate))} {more if value > 0 else less}"


def _share(estimate: Estimate) -> str:
    value = estimate.value
    return f"{number(None if value is None else 100 * value, 1)} %"


def _points(estimate: Estimate) -> str:
    value = estimate.value
    return f"{number(None if value is None else 100 * value, 1)} points" + _between(estimate.interval, 100.0, 1)


def _plain(estimate: Estimate, digits: int = 2) -> str:
    return number(estimate.value, digits) + _between(estimate.interval, 1.0, digits)


def _of_metric(metric: Metric, value: float | None) -> str:
    """A value with its unit where that is part of the number."""
    return metric.show(value) + {"%": " %", "nats": " nats"}.get(metric.unit, "")


def _signed(metric: Metric, difference: Estimate) -> str:
    """A difference with its interval, a digit finer than the metric's own: it may be smaller than the last one."""
    value, digits = difference.value, metric.digits + 1
    text = number(None if value is None else metric.scale * value, digits, signed=True)
    return text + _between(difference.interval, metric.scale, digits)


def _between(ends: Interval | None, scale: float, digits: int) -> str:
    return "" if ends is None else f" [{number(scale * ends[0], digits)}, {number(scale * ends[1], digits)}]"
