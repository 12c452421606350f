from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drkl.data.lengths import NO_LIMIT, Room
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.processes import Failure, Place, Share
from drkl.rollouts.answers import Answer, Request
from drkl.rollouts.asking import Asker
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.steps import AnsweredSteps, cut, planned_length

STEPS = [[0, 1, 2], [3, 4], [5, 6, 7], [2, 1, 0], [4, 3], [7, 6, 5]]
ENDS = [3, 6]


class Echo:
    """Answers a prompt with its stream, its length and the number of calls so far."""

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []

    def write(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        self.calls.append(list(requests))
        return [Answer((seed, r.stream, len(self.calls), 4)[: r.max_new_tokens], True) for r in requests]


def rows(count: int = 8, **changes: Any) -> list[Row]:
    return [Row(f"r{i}", (9,) * (i + 1), (8, 4), None, **changes) for i in range(count)]  # type: ignore[arg-type]


def answered(writer: Any, data: list[Row] | None = None, **settings: Any) -> AnsweredSteps:
    asking = asker(writer, share=settings.pop("processes", None))
    return AnsweredSteps(data or rows(), STEPS, ENDS, RolloutsConfig.model_validate({"share": 1.0} | settings), asking)


def asker(writer: Any, **settings: Any) -> Asker:
    return Asker(writer, **{"seed": 5, "max_new_tokens": 4, "room": NO_LIMIT} | settings)


def test_every_row_is_answered_by_the_weights_before_its_step() -> None:
    writer = Echo()
    steps = answered(writer)
    made = [steps.rows_of(step) for step in range(6)]
    assert [[row.id for row in step] for step in made] == [[f"r{i}" for i in step] for step in STEPS]
    assert [[row.response_ids for row in step] for step in made] == [
        [(5, step // 3, step + 1, 4)] * len(STEPS[step]) for step in range(6)
    ]
    assert all(row.sampled and row.trained is None for step in made for row in step)
    assert [[request.key for request in call] for call in writer.calls] == [
        [f"r{i}" for i in sorted(step)] for step in STEPS
    ]


def test_a_set_of_answers_serves_so_many_steps() -> None:
    writer = Echo()
    steps = answered(writer, refresh_every=4)
    made = [steps.rows_of(step) for step in range(6)]
    assert [len(call) for call in writer.calls] == [11, 5]
    assert [step[0].response_ids[2] for step in made] == [1, 1, 1, 1, 2, 2]


def test_the_prompt_is_the_one_that_a_model_is_sampled_from() -> None:
    row = Row("a", (1, 2), (3, 4, 5, 6), None, (False, False, True, True), sampling_context=(1, 2, 3, 4))  # type: ignore[arg-type]
    steps = AnsweredSteps([row], [[0]], [1], RolloutsConfig(share=1.0), asker(Echo()))
    (made,) = steps.rows_of(0)
    assert (made.prompt_ids, made.response_ids, made.trained) == ((1, 2, 3, 4), (5, 0, 1, 4), None)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_share_of_the_rows_is_answered_the_same_in_whatever_steps(share: float) -> None:
    data = rows(400)
    config = RolloutsConfig(share=share)

    def chosen(steps: list[list[int]]) -> set[str]:
        made = AnsweredSteps(data, steps, [len(steps)], config, asker(Echo()))
        return {row.id for step in range(len(steps)) for row in made.rows_of(step) if row.sampled}

    found = chosen([list(range(400))])
    assert abs(len(found) / 400 - share) < 0.08
    assert found == chosen([list(range(i, i + 10)) for i in range(0, 400, 10)])
    unanswered = [row for row in data if row.id not in found]
    made = AnsweredSteps(data, [list(range(400))], [1], config, asker(Echo()))
    assert [row for row in made.rows_of(0) if not row.sampled] == unanswered


def test_another_pass_and_another_seed_answer_other_rows() -> None:
    data, step = rows(60), list(range(60))

    def chosen(seed: int, number_of_pass: int) -> list[bool]:
        config = RolloutsConfig(share=0.5)
        made = AnsweredSteps(data, [step, step], [1, 2], config, asker(Echo(), seed=seed))
        return [row.sampled for row in made.rows_of(number_of_pass)]

    assert chosen(1, 0) == chosen(1, 0)
    assert chosen(1, 0) != chosen(1, 1)
    assert chosen(1, 0) != chosen(2, 0)


def test_a_ramp_goes_in_a_straight_line() -> None:
    config = RolloutsConfig.model_validate({"share": {"from": 0.2, "to": 1.0, "steps": 4}})
    assert [round(config.share_at(step), 9) for step in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert config.needs_responses and config.is_on


def test_rows_without_a_response_are_always_answered() -> None:
    data = [Row("a", (1,), (), None), Row("b", (1,), (3, 4), None)]  # type: ignore[arg-type]
    made = AnsweredSteps(data, [[0, 1]], [1], RolloutsConfig(share=1e-9), asker(Echo()))
    assert [row.sampled for row in made.rows_of(0)] == [True, False]


def test_replayed_answers_come_from_memory_with_their_own_prompts() -> None:
    writer = Echo()
    steps = answered(writer, replay=0.5, replay_memory=4)
    made = [steps.rows_of(step) for step in range(6)]
    written = {(request.prompt_ids, number) for number, call in enumerate(writer.calls, 1) for request in call}
    replayed = 0
    for step, step_rows in enumerate(made):
        for row in step_rows:
            assert (row.prompt_ids, row.response_ids[2]) in written
            replayed += row.response_ids[2] < step + 1
    assert 2 <= replayed < 16
    assert len(steps.state(6)["memory"]) == 4


@pytest.mark.parametrize("at", range(6))
def test_a_resumed_run_has_the_same_rows(at: int) -> None:
    settings = {"share": 0.8, "refresh_every": 4, "replay": 0.4, "replay_memory": 3}
    writers = [Echo() for _ in range(3)]
    whole, first, second = (answered(writer, **settings) for writer in writers)
    expected = [whole.rows_of(step) for step in range(6)]
    made = [first.rows_of(step) for step in range(at)]
    writers[2].calls = [[]] * len(writers[1].calls)
    assert second.load_state(json.loads(json.dumps(first.state(at))), at) is None
    assert made + [second.rows_of(step) for step in range(at, 6)] == expected
    assert second.state(6) == whole.state(6)


@pytest.mark.parametrize(
    "change", [{"pending": [[1, 2]]}, {"memory": [{}]}, {"written_to": None}, {"plan": 3}, {"settings": None}]
)
def test_a_broken_state_is_named(change: dict[str, Any]) -> None:
    state = answered(Echo()).state(1)
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        answered(Echo()).load_state(state | change, 1)


OTHERS: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"source": "teacher"}, "source was 'student' when they were written, and is 'teacher' now"),
    (None, {"refresh_every": 2}, "refresh_every was 4 "),
    (None, {"share": {"from": 0, "to": 1, "steps": 3}}, "share was 1.0 "),
    ([Row(f"r{i}", (9,) * (i + 2), (8, 4), None) for i in range(8)], {}, "other rows, or to other steps"),  # type: ignore[arg-type]
    (rows(8)[::-1], {}, "other rows, or to other steps"),
    (rows(3), {}, "other rows, or to other steps"),
]


@pytest.mark.parametrize(("data", "settings", "reason"), OTHERS)
def test_answers_of_other_settings_or_rows_are_written_anew(
    data: list[Row] | None, settings: dict[str, Any], reason: str
) -> None:
    first = answered(Echo(), refresh_every=4, replay=0.4)
    first.rows_of(0)
    writer = Echo()
    second = answered(writer, data, **{"refresh_every": 4, "replay": 0.4} | settings)
    other = second.load_state(first.state(1), 1)
    assert other is not None and reason in other
    if data is None or len(data) == 8:
        assert second.rows_of(1) and len(writer.calls) == 1


def test_other_steps_and_more_of_them() -> None:
    """Answers are paired with the places that they were written for; a run may be made longer, or shorter."""
    config = RolloutsConfig(share=1.0, refresh_every=4)
    for steps, known in ((STEPS[:2], True), ([*STEPS, [0, 1]], True), ([[3, 4], [0, 1, 2], *STEPS[2:]], False)):
        first = answered(Echo(), refresh_every=4)
        first.rows_of(0)
        second = AnsweredSteps(rows(), steps, [len(steps)], config, asker(Echo()))
        assert (second.load_state(first.state(1), 1) is None) == known


def test_processes_write_a_part_each_and_have_all() -> None:
    alone = answered(Echo())
    expected = [alone.rows_of(step) for step in range(6)]
    writers = [Echo(), Echo()]
    parts: dict[int, list[Any]] = {}

    def gather(own: list[Any], process: int) -> list[Any]:
        parts[process] = own
        return [item for number in sorted(parts) for item in parts[number]]

    # The second runs after the first: each step's first part is there when the second gathers.
    other = answered(writers[0], processes=Share(Place(0, 2), lambda own: _both(own, parts, 0)))
    with pytest.raises(KeyError):  # nothing of the other process yet
        other.rows_of(0)
    both = answered(writers[1], processes=Share(Place(1, 2), lambda own: gather(own, 1)))
    assert both.rows_of(0) == expected[0]
    assert [len(writer.calls[0]) for writer in writers] == [2, 1]


def _both(own: list[Any], parts: dict[int, list[Any]], process: int) -> list[Any]:
    parts[process] = own
    return own


def test_an_error_in_one_process_is_raised_in_all() -> None:
    class Broken:
        def write(self, *args: Any, **words: Any) -> list[Answer]:
            raise DrklError("the logits are not finite")

    for processes in (None, Share(Place(0, 2), lambda own: [*own, (1, Answer((1,), True))])):
        with pytest.raises(DrklError, match="the logits are not finite"):
            answered(Broken(), processes=processes).rows_of(0)
    with pytest.raises(DrklError, match="elsewhere"):
        answered(Echo(), processes=Share(Place(0, 2), lambda own: [*own, Failure(DrklError("elsewhere"))])).rows_of(0)


def test_the_other_processes_are_told_of_any_error() -> None:
    class Full:
        def write(self, *args: Any, **words: Any) -> list[Answer]:
            raise MemoryError("no room")

    told: list[Any] = []
    with pytest.raises(MemoryError, match="no room"):
        answered(Full(), processes=Share(Place(1, 2), lambda own: told.extend(own) or own)).rows_of(0)  # type: ignore[func-returns-value]
    [failure] = told
    assert str(failure.error).startswith("Process 1 of 2, counted from 0, failed:\nTraceback")
    assert str(failure.error).endswith("MemoryError: no room\n")


def test_an_answer_fits_the_context() -> None:
    writer = Echo()
    data = [
        Row("a", (1,) * 5, (), None),  # type: ignore[arg-type]
        Row("b", (1,) * 8, (3, 4), None),  # type: ignore[arg-type]
        Row("c", (1,) * 5, (3, 4), None, teacher_prompt_ids=(1,) * 6),  # type: ignore[arg-type]
    ]
    config = RolloutsConfig(share=1.0)
    made = AnsweredSteps(data, [[0, 1, 2]], [1], config, asker(writer, room=Room(8, 8)))
    assert [row.sampled for row in made.rows_of(0)] == [True, False, True]
    assert [request.max_new_tokens for request in writer.calls[0]] == [3, 2]
    assert writer.calls[0][1].teacher_prompt_ids == (1,) * 6
    full = [Row("d", (1,) * 8, (), None)]  # type: ignore[arg-type]
    made = AnsweredSteps(full, [[0]], [1], config, asker(writer, room=Room(8, 8)))
    with pytest.raises(DrklError, match=r"Row 'd': its prompt of 8 tokens leaves no room .* context of 8"):
        made.rows_of(0)
    made = AnsweredSteps(full, [[0]], [1], config, asker(writer, room=Room(8, 3, separate=True)))
    assert made.rows_of(0)[0].response_ids == (5, 0, 2)


def test_steps_are_planned_by_the_longest_answer_where_there_is_no_response() -> None:
    assert planned_length(Row("a", (1,) * 5, (2,) * 3, None), 9) == 7  # type: ignore[arg-type]
    assert planned_length(Row("a", (1,) * 5, (), None), 9) == 13  # type: ignore[arg-type]
    assert planned_length(Row("a", (1,) * 5, (), None, encoder_decoder=True), 9) == 9  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    slots=st.integers(1, 6),
    tokens=st.integers(1, 80),
    rows_per_part=st.one_of(st.none(), st.integers(1, 5)),
    padding=st.integers(1, 40),
    packed=st.booleans(),
)
def test_parts_hold_every_row_once_within_the_budget(
    lengths: list[int], slots: int, tokens: int, rows_per_part: int | None, padding: int, packed: bool
) -> None:
    data = [Row(str(i), (1,), (2,) * length, None) for i, length in enumerate(lengths)]  # type: ignore[arg-type]
    made = cut(data, slots, tokens=tokens, rows_per_part=rows_per_part, padding=padding, packed=packed)
    assert len(made) == slots
    assert len({len(slot) for slot in made}) == 1 and made[0]
    parts = [part for slot in made for part in slot]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in data)
    for part in parts:
        if rows_per_part is not None:
            assert len(part) <= rows_per_part
        elif len(part) > 1:
            lengths_of_part = [row.length for row in part]
            assert (sum(lengths_of_part) if packed else len(part) * max(lengths_of_part)) <= tokens
    if len(data) >= slots:
        assert all(any(slot) for slot in made)  # nobody idles while another has rows to give


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), padding=st.integers(1, 40))
def test_parts_cost_least(lengths: list[int], padding: int) -> None:
    """Against every way to cut the sorted rows."""
    lengths = sorted(lengths)
    data = [Row(str(i), (1,), (2,) * length, None) for i, length in enumerate(lengths)]  # type: ignore[arg-type]

    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(part) - sum(part) + padding for part in parts)

    def every(rest: list[int]) -> list[list[list[int]]]:
        return [[rest[:n], *more] for n in range(1, len(rest) + 1) for more in every(rest[n:])] if rest else [[]]

    (made,) = cut(data, 1, tokens=10**6, rows_per_part=None, padding=padding)
    assert cost([[row.length for row in part] for part in made]) == min(map(cost, every(lengths)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[9, 9, 1, 1, 1, 1], [30, 2, 2, 2, 3, 3, 9, 9], [5], [4] * 9, [*range(1, 20)]])
def test_parts_side_by_side_have_rows_and_are_of_like_cost(lengths: list[int], slots: int, packed: bool) -> None:
    rows = [Row(str(number), (1,), (2,) * length, example=None) for number, length in enumerate(lengths)]
    dealt = cut(rows, slots, tokens=30, rows_per_part=None, padding=4, side_by_side=True, packed=packed)
    assert len(dealt) == slots and len({len(parts) for parts in dealt}) == 1
    seen = [row.id for parts in dealt for part in parts for row in part]
    assert sorted(seen, key=int) == [row.id for row in rows]
    rounds = list(zip(*dealt, strict=True))
    assert sum(bool(part) for one in rounds for part in one) >= min(len(rows), slots * len(rounds))
    tokens = [[[row.length for row in part] for part in one if part] for one in rounds]
    costs = [[sum(part) if packed else len(part) * max(part) for part in one] for one in tokens]
    for one, after in itertools.pairwise(costs):
        assert min(one) >= max(after)
