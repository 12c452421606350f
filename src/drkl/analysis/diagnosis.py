"""The questions a practitioner asks, answered from the tables: yes, no, or that the data do not decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drkl.analysis.ratios import MIN_ROWS
from drkl.display import number

OVER = 0.01
"""In probability: so much surer than it should be is overconfident."""
OVER_SHARE = 0.05
"""Of the teacher's confidence, where that makes a lower bar: among many tokens that are all unlikely."""
PUSHED = 0.02
"""In probability: so far above a matched target reverse KL comes to rest, on the mean, where its push matters."""
PUSHED_SHARE = 0.1
"""Of the mean matched p_t, where that makes a lower bar."""
HALF = 0.5

Value = Mapping[str, Any]


def decide(found: Value, bar: float) -> str:
    """``yes`` where all of the interval is above the bar, ``no`` where none of it is, else ``undecided``."""
    if found["value"] is None or found["interval"] is None:
        return "undecided"
    low, high = found["interval"]
    return "yes" if low > bar else "no" if high <= bar else "undecided"


def diagnosis(tables: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The headline, and by name each question with its ``answer``, the sentence, and the numbers it rests on."""
    totals, gamma, temperature = tables["totals"], tables["settings"]["gamma"], tables["settings"]["temperature"]
    over = _overconfident(totals)
    at_temperature = {
        "pushed": _pushed(totals, tables["counts"], tables["settings"]["positions"]),
        "tail": _tail(totals),
        "strengthens": _strengthens(totals, gamma),
        "sure": _sure(totals, gamma),
    }
    infinite = tables["counts"]["infinite_K"]
    for found in at_temperature.values():
        if temperature != 1:
            found["text"] = f"At temperature {temperature:g}: {found['text']}"
        if infinite:
            found["text"] += (
                f" K is infinite at {number(infinite, 0)} of the positions, where the teacher excludes a token that "
                "the student does not; a dash stands for what is infinite with it."
            )
    found = {"overconfident": over, "target": _target(totals), **at_temperature}
    for one in found.values():
        if one["answer"] == "undecided" and tables["settings"]["rows"] < MIN_ROWS:
            one["text"] += f" Fewer than {MIN_ROWS} rows decide nothing."
    return _headline(over, found["pushed"]["answer"]), found


def _answer(question: str, answer: str, text: str, totals: Value, *names: str, **others: Any) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "text": text,
        "numbers": {name: totals[name] for name in names} | others,
    }


def _bar(totals: Value) -> float:
    teacher = totals["teacher_confidence"]["value"]
    return OVER if teacher is None else min(OVER, OVER_SHARE * float(teacher))


def _overconfident(totals: Value) -> dict[str, Any]:
    bar = _bar(totals)
    by_teacher = decide(totals["own_gap"], bar)
    # By the data a student is overconfident that is surer than right, and more so than its teacher.
    both = {decide(totals[name], bar) for name in ("calibration_gap", "excess")}
    by_data = "no" if "no" in both else "undecided" if "undecided" in both else "yes"
    answer = _either(by_teacher, by_data)
    text = (
        f"By its teacher{_judged(by_teacher)}: at its own top token q - p is {_points(totals['own_gap'])} on the mean. "
        f"By the data{_judged(by_data)}: its confidence ({_share(totals['confidence'])}) minus its accuracy "
        f"({_share(totals['accuracy'])}) is {_points(totals['calibration_gap'])}, the teacher's "
        f"{_points(totals['teacher_calibration_gap'])}; the student's excess is {_points(totals['excess'])}."
    )
    if answer == "no" and _is_below(totals["excess"], bar):
        text += " It is less sure than its teacher would be in its place."
    elif by_data == "no" and decide(totals["calibration_gap"], bar) == "yes":
        text += " So it is too sure, but no more than its teacher."
    numbers = ("own_gap", "calibration_gap", "teacher_calibration_gap", "excess", "confidence", "accuracy",
               "teacher_confidence", "teacher_accuracy")  # fmt: skip
    question = "Is the student overconfident?"
    return _answer(question, answer, text, totals, *numbers, bar=bar, by_teacher=by_teacher, by_data=by_data)


def _is_below(found: Value, bar: float) -> bool:
    """Whether all of the interval is below -bar."""
    return found["interval"] is not None and bool(found["interval"][1] < -bar)


def _either(first: str, second: str) -> str:
    """``yes`` where both are; ``no`` where neither is yes and one is no; ``partly`` where only one is yes."""
    said = [first, second]
    if "yes" in said:
        return "yes" if first == second else "partly"
    return "no" if "no" in said else "undecided"


def _target(totals: Value) -> dict[str, Any]:
    bar = _bar(totals)
    answer = decide(totals["target_gap"], bar)
    text = (
        f"q_t - p_t is {_points(totals['target_gap'])} on the mean, and above 0 at "
        f"{_share(totals['target_above'])} of the positions."
    )
    if answer == "no" and decide(totals["own_gap"], bar) == "yes":
        text += " Where it is too sure, it is so of other tokens, which the teacher does not put first."
    question = "Does it give the teacher's top token, the target, too much?"
    return _answer(question, answer, text, totals, "target_gap", "target_above", bar=bar)


def _pushed(totals: Value, counts: Value, positions: int) -> dict[str, Any]:
    question = "Where its target already matches the teacher's, would reverse KL push it on up?"
    names = ("matched", "matched_p_t", "matched_K", "matched_outweighs", "matched_force", "matched_overshoot")
    mean = totals["matched_p_t"]["value"]
    if mean is None:
        text = f"At none of the {number(positions, 0)} positions the target matches, so there is nothing to say."
        return _answer(question, "undecided", text, totals, *names, bar=PUSHED)
    bar = min(PUSHED, PUSHED_SHARE * mean)
    answer = decide(totals["matched_overshoot"], bar)
    text = (
        f"The target matches at {_share(totals['matched'])} of the positions. There the tail pushes its logit up with "
        f"a force of {_shown(totals['matched_force'], 4)} on the mean, more than the target's own push at "
        f"{_share(totals['matched_outweighs'])} of them; with the tail held as it is (K {_shown(totals['matched_K'])} "
        f"nats), reverse KL comes to rest {_points(totals['matched_overshoot'])} above the teacher's "
        f"{_share(totals['matched_p_t'])}. DRKL's push there is 0 from the tail, whatever K."
    )
    if totals["matched_overshoot"]["interval"] is None:
        where = f"{number(counts['matched'], 0)} positions in {number(counts['matched_rows'], 0)} rows"
        text += f" There is no interval: the target matches at {where}."
    return _answer(question, answer, text, totals, *names, bar=bar)


def _tail(totals: Value) -> dict[str, Any]:
    share = totals["tail_share"]
    text = (
        f"Of reverse KL, {_share(share)} lies in the tail, (1-q_t) K, and the rest in the target; K is "
        f"{_shown(totals['K'])} nats on the mean."
    )
    if share["value"] is None:
        text = "Reverse KL is 0 or infinite here, so no share of it can be said."
    question = "Is it the tail in which the two differ?"
    return _answer(question, decide(share, HALF), text, totals, "tail_share", "K")


def _strengthens(totals: Value, gamma: float) -> dict[str, Any]:
    answer = decide(totals["stronger"], HALF)
    text = (
        f"At gamma = {gamma:g} its force on the tail is stronger than reverse KL's at {_share(totals['stronger'])} of "
        f"the positions, where 1-q_t < gamma, and weaker at {_share(totals['weaker'])}; summed over all it is "
        f"{_shown(totals['tail_force_ratio'])} times reverse KL's."
    )
    if answer != "yes":
        text += ' `weight="floor"` strengthens everywhere and weakens nowhere.'
    question = "Would DRKL supervise the tail harder than reverse KL at most positions?"
    names = ("stronger", "weaker", "tail_force_ratio")
    return _answer(question, answer, text, totals, *names, gamma=gamma)


def _sure(totals: Value, gamma: float) -> dict[str, Any]:
    answer = decide(totals["sure_drkl"], HALF)
    text = (
        f"The teacher is that sure at {_share(totals['sure'])} of the positions; they make "
        f"{_share(totals['sure_drkl'])} of the DRKL loss (gamma = {gamma:g}) and "
        f"{_share(totals['sure_rkl'])} of reverse KL's."
    )
    if answer == "yes" and (totals["sure_drkl"]["value"] > (totals["sure_rkl"]["value"] or 0.0)):
        text += (
            " There it is a mismatch over next to no probability: noise of a low precision counts. A lower gamma helps."
        )
    question = "Does most of the DRKL loss come from positions where the teacher's p_t is above .99?"
    return _answer(question, answer, text, totals, "sure", "sure_drkl", "sure_rkl")


def _headline(over: Mapping[str, Any], pushed: str) -> str:
    answer, by = over["answer"], over["numbers"]
    if answer == "partly":
        sees, other = ("its teacher", "by_data") if by["by_teacher"] == "yes" else ("the data", "by_teacher")
        name = "the data" if other == "by_data" else "its teacher"
        said = f"by {name} it is not decided" if by[other] == "undecided" else f"not by {name}"
        first = f"In part: the student is overconfident by {sees}, {said}"
    elif (
        answer == by["by_data"] == "no"
        and decide(by["calibration_gap"], by["bar"]) == "yes"
        and not _is_below(by["excess"], by["bar"])
    ):
        first = "No: the student is not overconfident beyond what its teacher is"
    else:
        first = {
            "yes": "Yes: the student is overconfident",
            "no": "No: the student is not overconfident",
            "undecided": "Undecided: these rows do not say whether the student is overconfident",
        }[answer]
    joined = "and" if (answer in ("yes", "partly")) == (pushed == "yes") else "but"
    second = {
        "yes": "reverse KL would push matched targets on up",
        "no": "reverse KL would hardly push matched targets up here",
        "undecided": "whether reverse KL would push matched targets up is not decided",
    }[pushed]
    return f"{first}, {joined} {second}."


def _judged(answer: str) -> str:
    return {"yes": ", yes", "no": ", no", "undecided": ", not decided"}[answer]


def _shown(found: Value, digits: int = 2) -> str:
    return number(found["value"], digits) + _between(found, 1.0, digits)


def _share(found: Value) -> str:
    value = found["value"]
    return f"{number(None if value is None else 100 * value, 1)} %"


def _points(found: Value) -> str:
    value = found["value"]
    return f"{number(None if value is None else 100 * value, 1, signed=True)} points" + _between(found, 100.0, 1)


def _between(found: Value, scale: float, digits: int) -> str:
    ends = found["interval"]
    if ends is None:
        return ""
    return f" [{number(scale * ends[0], digits)}, {number(scale * ends[1], digits)}]"
