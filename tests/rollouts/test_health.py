"""The numbers of sets of answers, against plain loops, and what is said of runs that go well and that go wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest

from drkl.rollouts.answers import Answer
from drkl.rollouts.health import DRAWN, Concern, Detector, RolloutLog, concerns_of, distinct_bigrams, numbers_of

STOP = 9


def answer(*tokens: int, finished: bool | None = None) -> Answer:
    return Answer(tokens, STOP in tokens if finished is None else finished)


def test_the_numbers_of_three_answers() -> None:
    answers = [answer(1, 2, 1, 2, 1, 2, STOP), answer(3, 4, 5), answer(STOP)]
    # 4-grams of the first: 1212 2121 1212 212*: one of four was there before; the others have none.
    assert numbers_of(answers, {STOP, 77}) == {
        "answers": 3,
        "finished": 2 / 3,
        "length": 11 / 3,
        "ends_per_1000": 1000 * 2 / 11,
        "distinct2": 5 / 8,  # 12 12 12 21 21 2* 34 45
        "repeated4": 1 / 4,
    }


def test_numbers_that_a_set_has_not_are_left_out() -> None:
    assert numbers_of([], {STOP}) == {}
    assert numbers_of([answer(STOP), answer(3)], {STOP}).keys() == {"answers", "finished", "length", "ends_per_1000"}
    assert "repeated4" not in numbers_of([answer(1, 2, 3)], {STOP})


@pytest.mark.parametrize("drawn", [1, 2, 3, 5, 8, 100])
def test_distinct_bigrams_are_the_mean_over_every_choice(drawn: int) -> None:
    texts = [(1, 2, 1, 2, 1), (2, 1), (), (4,), (5, 5, 5)]
    bigrams = [(1, 2), (2, 1), (1, 2), (2, 1), (2, 1), (5, 5), (5, 5)]
    size = min(drawn, len(bigrams))
    every = [len(set(choice)) / size for choice in combinations(bigrams, size)]
    assert distinct_bigrams(texts, drawn) == pytest.approx(sum(every) / len(every), rel=1e-12)


def test_distinct_bigrams_do_not_fall_with_the_amount_of_text() -> None:
    """Ten times as much of the same text: a plain share of different bigrams would be a tenth."""
    source = random.Random(1)
    texts = [[source.randrange(1000) for _ in range(41)] for _ in range(10)]
    once, often = distinct_bigrams(texts), distinct_bigrams(texts * 10)
    assert once is not None and often is not None
    assert 0.75 < often < once <= 1  # of 4,000 bigrams 400 are different, and 200 are drawn


def test_a_long_loop_takes_no_time() -> None:
    assert distinct_bigrams([[1, 2] * 200_000]) == pytest.approx(2 / DRAWN)


def test_the_log_takes_the_steps_since_its_last_line() -> None:
    log = RolloutLog()
    assert log.pop() == {}
    log.add([answer(1, 2, STOP)], {STOP})
    log.add([answer(1, 2, 3, 4, 5)], {STOP})
    assert log.pop() == {
        "rollout_answers": 2,
        "rollout_finished": 0.5,
        "rollout_length": 4,
        "rollout_ends_per_1000": 125,
        "rollout_distinct2": 5 / 6,
        "rollout_repeated4": 0,
    }
    assert log.pop() == {}
    log.add([], {STOP})
    assert log.pop() == {}


def test_distinct_bigrams_of_short_lines_look_back() -> None:
    """Lines of 3 answers with 21 tokens, all alike but for the first: over one line alone the share stays the same."""
    log, plain = RolloutLog(), []
    texts = [[60 * line + 20 * k + place for place in range(21)] for line in range(20) for k in range(3)]
    found = []
    for line in range(20):
        answers = [answer(*tokens) for tokens in texts[3 * line : 3 * line + 3]]
        log.add(answers if line < 10 else [answer(*range(21))] * 3, {STOP})
        numbers = log.pop()
        plain.append(numbers["rollout_length"])
        found.append(numbers["rollout_distinct2"])
    assert set(plain) == {21}
    assert found[:10] == [1.0] * 10
    assert found[10:14] == sorted(found[10:14], reverse=True)
    assert found[14:] == pytest.approx([0.1] * 6)  # 20 different ones among the last 200


def test_a_line_with_enough_text_takes_its_own_alone() -> None:
    log = RolloutLog()
    log.add([answer(*range(300))], {STOP})
    log.pop()
    log.add([answer(*[1, 2] * 110)], {STOP})
    assert log.pop()["rollout_distinct2"] == pytest.approx(2 / DRAWN)


def test_empty_answers_are_not_kept_for_ever() -> None:
    log = RolloutLog()
    for _ in range(1000):
        log.add([answer(STOP)] * 4, {STOP})
        log.pop()
    assert len(json.dumps(log.state())) < 100


def test_a_log_goes_on_from_its_state() -> None:
    source = random.Random(2)

    def some() -> list[Answer]:
        return [answer(*(source.randrange(30) for _ in range(source.randrange(1, 30)))) for _ in range(3)]

    first = RolloutLog()
    for step in range(40):
        first.add(some(), {STOP, 3})
        if step % 7 == 5:
            first.pop()
    second = RolloutLog()
    second.add(some(), {1})
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    more = some()
    for log in (first, second):
        log.add(more, {STOP, 3})
    assert first.pop() == second.pop()


# Runs that are written down line by line.

Change = Callable[[int], dict[str, float]]


def run(change: Change, *, steps: int = 200, answers: int = 3, seed: int = 0, prefix: str = "rollout_") -> list[dict]:
    """Lines of a run; shares are drawn anew, as a few answers give them. ``change(step)`` has the true numbers."""
    source = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        true = {"finished": 0.95, "length": 40.0, "distinct2": 0.95, "repeated4": 0.02} | change(step)
        drawn = {
            "answers": answers,
            "finished": sum(source.random() < true["finished"] for _ in range(answers)) / answers,
            "length": max(1.0, true["length"] * source.uniform(0.7, 1.3)) if true["length"] > 1 else 1.0,
            "distinct2": min(1.0, true["distinct2"] * source.uniform(0.85, 1.1)),
            "repeated4": min(1.0, true["repeated4"] * source.uniform(0, 2)),
        }
        lines.append({"step": step, "loss": 1.0} | {prefix + name: value for name, value in drawn.items()})
        lines.append({"step": step, "eval_loss": 1.0})
    return lines


def lengths_in_turn(step: int) -> dict[str, float]:
    """As batches of rows of like length are: in some steps long answers, of which many are cut."""
    kind = random.Random(step).randrange(3)
    return [{}, {"finished": 0.4, "length": 60.0}, {"length": 4.0, "distinct2": 0.4, "finished": 1.0}][kind]


def ramp(step: int, start: float, end: float, first: int, last: int) -> float:
    return start + (end - start) * min(1.0, max(0.0, (step - first) / (last - first)))


GOOD: dict[str, Change] = {
    "steady": lambda step: {},
    "a quarter unfinished throughout": lambda step: {"finished": 0.75},
    "cut throughout": lambda step: {"finished": 0.0},
    "learns to end": lambda step: {"finished": ramp(step, 0, 0.97, 0, 100)},
    "some more unfinished, below a fifth": lambda step: {"finished": ramp(step, 0.99, 0.88, 0, 200)},
    "a little less varied": lambda step: {"distinct2": ramp(step, 0.99, 0.7, 0, 200)},
    "repeats less": lambda step: {"repeated4": ramp(step, 0.5, 0.02, 0, 50)},
    "repeated from the start": lambda step: {"repeated4": 0.35},
    "short answers": lambda step: {"length": 3.0},
    "rows of one length in a step": lengths_in_turn,
}
BAD: dict[str, tuple[str, Change]] = {
    "slowly unlearns to end": ("unfinished", lambda step: {"finished": ramp(step, 0.95, 0.3, 50, 200)}),
    "suddenly unlearns to end": ("unfinished", lambda step: {"finished": 0.95 if step < 60 else 0.0}),
    "unlearns to end at once and early": ("unfinished", lambda step: {"finished": 0.95 if step < 18 else 0.0}),
    "unlearns to end in its first steps": ("unfinished", lambda step: {"finished": 1.0 if step < 7 else 0.0}),
    "half of it becomes endless": ("unfinished", lambda step: {"finished": 0.9 if step < 100 else 0.5}),
    "one text for every prompt": ("alike", lambda step: {"distinct2": ramp(step, 0.95, 0.1, 30, 80)}),
    "loops": ("repeated", lambda step: {"repeated4": ramp(step, 0.02, 0.8, 30, 150)}),
    "stops at once": ("empty", lambda step: {"length": 1.0 if step > 100 else 40.0}),
}


@pytest.mark.parametrize("answers", [1, 3, 16, 64])
@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_said_of_a_good_run(name: str, answers: int) -> None:
    for seed in range(4):
        assert concerns_of(run(GOOD[name], answers=answers, seed=seed)) == []


@pytest.mark.parametrize("answers", [3, 16, 64])
@pytest.mark.parametrize("name", BAD)
def test_one_sentence_names_what_goes_wrong(name: str, answers: int) -> None:
    kind, change = BAD[name]
    for seed in range(4):
        [concern] = concerns_of(run(change, answers=answers, seed=seed))
        assert concern.kind == kind
        assert concern.text.startswith(f"Step {concern.step}: ") and "lower learning rate" in concern.text


def test_the_sentences_have_the_numbers_and_the_way_out() -> None:
    def found(first: dict[str, float], then: dict[str, float]) -> str:
        usual = {"answers": 16, "finished": 1.0, "length": 50, "distinct2": 0.9, "repeated4": 0.1}
        lines = [
            {"step": 10 * k} | {f"rollout_{n}": v for n, v in (usual | (first if k < 3 else then)).items()}
            for k in range(1, 6)
        ]
        [concern] = concerns_of(lines)
        return concern.text.replace("\N{NO-BREAK SPACE}", " ")

    remedy = (
        "A lower learning rate, more steps on data before the student's own answers (a stage, or a ramp of the share), "
        "a lower share, or an objective with more forward KL help"
    )
    assert found({"finished": 0.875}, {"finished": 0.125}) == (
        "Step 40: 88 % of the newest 32 answers in training were cut at max_new_tokens, and 12 % before: "
        f"the student is unlearning where to end. {remedy}; so does a larger max_new_tokens where whole answers need "
        "it. If the two models end an answer with different tokens, name them in rollouts.stop_map (in Python "
        "rollout_stop_map)."
    )
    assert found({}, {"distinct2": 0.44}) == (
        "Step 40: answers in training became alike: among 200 bigrams of them 44 % differ, and 90 % did at first. "
        f"{remedy}."
    )
    assert found({}, {"repeated4": 0.5}) == (
        "Step 40: answers in training repeat themselves: 50 % of the 4-grams of an answer occurred in it before, and "
        f"10 % did at first. {remedy}."
    )
    assert found({}, {"length": 1}) == (
        "Step 40: the newest answers in training have 1 tokens on average, their end included: most are empty. "
        f"{remedy}."
    )


def test_answers_to_held_out_prompts_are_compared_with_their_own_past() -> None:
    lines = run(BAD["loops"][1], steps=150, answers=16, prefix="eval_rollout_")
    [concern] = concerns_of(run(GOOD["steady"], steps=150) + lines)
    assert concern.kind == "repeated" and "answers to held-out prompts repeat themselves" in concern.text


def test_a_kind_is_said_once_though_both_kinds_of_answers_have_it() -> None:
    change = BAD["one text for every prompt"][1]
    both = [line for pair in zip(run(change), run(change, prefix="eval_rollout_"), strict=True) for line in pair]
    assert [concern.kind for concern in concerns_of(both)] == ["alike"]


def test_answers_like_those_of_the_data_are_no_concern() -> None:
    """A student that starts with noise and learns to answer yes or no."""
    lines = run(lambda step: {"distinct2": ramp(step, 1.0, 0.1, 10, 60), "repeated4": 0.0}, answers=16)
    assert [concern.kind for concern in concerns_of(lines)] == ["alike"]
    assert concerns_of([{"step": 0, "eval_response_distinct2": 0.15}, *lines]) == []
    lines = run(lambda step: {"repeated4": ramp(step, 0.0, 0.5, 10, 60)}, answers=16)
    assert [concern.kind for concern in concerns_of(lines)] == ["repeated"]
    assert concerns_of([{"step": 0, "eval_response_repeated4": 0.4}, *lines]) == []


def test_few_bigrams_are_not_compared_with_many() -> None:
    """At first there are fewer than are drawn later, so that all of them differ."""
    lines: list[dict[str, Any]] = [
        {"step": step, "rollout_answers": 8, "rollout_finished": 1, "rollout_length": 5}
        | {"rollout_distinct2": 1.0 if step < 7 else 0.4}
        for step in range(1, 20)
    ]
    assert concerns_of(lines) == []
    for line in lines:
        line["rollout_length"] = 50
    assert [concern.kind for concern in concerns_of(lines)] == ["alike"]


@pytest.mark.parametrize("cut", [1, 37, 120, 399])
def test_a_detector_that_has_seen_a_part_says_the_rest(cut: int) -> None:
    lines = run(lambda step: BAD["loops"][1](step) | BAD["slowly unlearns to end"][1](step))
    detector = Detector()
    found = [concern for line in lines[:cut] for concern in detector.see(line)]
    assert found == concerns_of(lines[:cut])
    found += [concern for line in lines[cut:] for concern in detector.see(line)]
    assert found == concerns_of(lines)
    assert {concern.kind for concern in found} == {"repeated", "unfinished"}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{}],
        [{"step": 1, "loss": 2.0}],
        [{"step": None, "rollout_answers": 4, "rollout_finished": 1, "rollout_length": 3}],
        [{"step": 1, "rollout_answers": 4}],
        [{"step": 1, "rollout_answers": "x", "rollout_finished": None, "rollout_length": []}] * 50,
        [{"step": 1, "rollout_answers": 0, "rollout_finished": 0, "rollout_length": 0}] * 50,
    ],
)
def test_lines_without_numbers_of_answers_say_nothing(lines: Sequence[dict[str, Any]]) -> None:
    assert concerns_of(lines) == []


def test_concerns_are_in_the_order_they_were_seen() -> None:
    lines = run(lambda step: BAD["loops"][1](step) | BAD["suddenly unlearns to end"][1](step))
    steps = [concern.step for concern in concerns_of(lines)]
    assert len(steps) == 2 and steps == sorted(steps)
    assert Concern("unfinished", 60, "x").step == 60
