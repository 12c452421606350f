"""The rows of each optimiser step, those among them answered that the settings select."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drkl.data.batching import bucket_by_length, split_by_cost
from drkl.data.examples import hash_of_id
from drkl.data.stored import column
from drkl.data.tokenize import Row
from drkl.rollouts.answers import Request
from drkl.rollouts.asking import Asker, answered_row
from drkl.rollouts.config import RolloutsConfig

_DECIDING = (
    "share", "source", "teacher_share", "sampling_temperature", "top_p", "refresh_every", "replay", "replay_memory",
    "generator",
)  # fmt: skip
"""Settings without which the same rows would have other answers."""


@dataclass(frozen=True)
class Written:
    """An answer to the prompt of a training row."""

    row: int
    """The row's number."""
    token_ids: tuple[int, ...]


class AnsweredSteps:
    """Gives the rows of one optimiser step after the other.

    Which rows are answered, which take an earlier answer and which, and every answer's random numbers follow from the
    seed, the row's id and the pass over the rows: the same whatever the micro-batches, processes or interruptions.

    Args:
        rows: the training rows.
        steps: the numbers of the rows of every step.
        ends: the steps after which a pass over the rows ends.
        config: the section `rollouts`.
        asker: has the answers written, with the weights of now.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        steps: Sequence[Sequence[int]],
        ends: Sequence[int],
        config: RolloutsConfig,
        asker: Asker,
    ) -> None:
        self._rows, self._steps, self._ends = rows, steps, list(ends)
        self._config, self._asker = config, asker
        self._pending: dict[tuple[int, int], Written] = {}
        self._written_to = 0
        """The first step whose answers are not written yet."""
        self._memory: deque[Written] = deque(maxlen=config.replay_memory)
        self.seconds = 0.0
        """Spent on writing answers."""
        self.before_writing: Callable[[int], None] = lambda step: None
        """Called where this process is about to write, with the steps that the weights have taken."""

    def rows_of(self, step: int) -> list[Row]:
        """The rows of a step (counted from 0), of all processes; answers are written first where they are due."""
        if step >= self._written_to:
            started = time.monotonic()
            self._write(step)
            self.seconds += time.monotonic() - started
        written = {number: self._pending.pop((step, number), None) for number in self._steps[step]}
        return [
            self._rows[number] if answer is None else answered_row(self._rows[answer.row], answer.token_ids)
            for number, answer in written.items()
        ]

    def moment(self) -> Callable[[], None]:
        """Note which answers there are, and return what goes back to them."""
        written_to, pending, memory = self._written_to, dict(self._pending), self._memory.copy()

        def undo() -> None:
            self._written_to, self._pending, self._memory = written_to, pending, memory

        return undo

    def state(self, step: int) -> dict[str, Any]:
        """What a run needs that goes on before a step, as json: the answers not trained on yet, and the memory."""
        return {
            "written_to": self._written_to,
            "pending": [[at, number, asdict(written)] for (at, number), written in self._pending.items()],
            "memory": [asdict(written) for written in self._memory],
            "settings": self._settings(),
            "plan": self._plan(step, self._written_to),
            "rows": self._digest([*self._pending.values(), *self._memory]),
        }

    def clear(self) -> None:
        """Forget all answers, for the first step to come."""
        self._written_to = 0
        self._pending.clear()
        self._memory.clear()

    def load_state(self, state: dict[str, Any], step: int) -> str | None:
        """Go on where `state` was taken, before a step.

        Returns:
            Why its answers are not those of this run, which then writes them anew; None where they are.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is no state.
        """
        self.clear()
        settings = self._settings()
        for name, value in state["settings"].items():
            if value != settings.get(name):
                return f"{name} was {value!r} when they were written, and is {settings.get(name)!r} now"
        written_to = int(state["written_to"])
        pending = {(int(at), int(number)): _as_written(values) for at, number, values in state["pending"]}
        memory = [_as_written(values) for values in state["memory"]]
        plan = self._plan(step, written_to)
        if state["plan"][: len(plan)] != plan or self._digest([*pending.values(), *memory]) != state["rows"]:
            return "they belong to other rows, or to other steps"
        self._written_to = max(written_to, step)
        self._pending = pending
        self._memory.extend(memory)
        return None

    def _settings(self) -> dict[str, Any]:
        config = self._config.model_dump(mode="json")
        own = {"seed": self._asker.seed, "max_new_tokens": self._asker.max_new_tokens}
        return {name: config[name] for name in _DECIDING} | own

    def _plan(self, first: int, last: int) -> list[list[int]]:
        return [list(numbers) for numbers in self._steps[first:last]]

    def _digest(self, answers: Sequence[Written]) -> str | None:
        """A digest of the rows that were answered; None where there are not so many rows."""
        numbers = sorted({answer.row for answer in answers})
        if numbers and not 0 <= numbers[0] <= numbers[-1] < len(self._rows):
            return None
        rows = (self._rows[number] for number in numbers)
        return hash_of_id(" ".join(f"{row.id} {row.sampling_ids}" for row in rows)).hex()

    def _write(self, first: int) -> None:
        """Write the answers of the steps that one set serves."""
        every = self._config.refresh_every
        last = min(first - first % every + every, len(self._steps))
        places: list[tuple[int, int]] = []
        requests: list[Request] = []
        replayed: dict[tuple[int, int], Written] = {}
        for step in range(first, last):
            number_of_pass = bisect.bisect_right(self._ends, step)
            for number in self._steps[step]:
                row = self._rows[number]
                draw = _Draw(self._asker.seed, row.id, number_of_pass)
                if row.response_ids and draw("share") >= self._config.share_at(step):
                    continue
                if self._memory and draw("replay") < self._config.replay:
                    replayed[step, number] = self._memory[int(draw("memory") * len(self._memory))]
                    continue
                request = self._asker.request(row, number_of_pass)
                if request is not None:
                    places.append((step, number))
                    requests.append(request)
        answers = self._asker.answers(requests, before=lambda: self.before_writing(first))
        written = {place: Written(place[1], answer.token_ids) for place, answer in zip(places, answers, strict=True)}
        self._pending |= written | replayed
        if self._config.replay > 0:
            self._memory.extend(written.values())
        self._written_to = last


def _as_written(values: Any) -> Written:
    return Written(int(values["row"]), tuple(int(token) for token in values["token_ids"]))


class _Draw:
    """Numbers in [0, 1) of one row in one pass, one for each purpose."""

    def __init__(self, seed: int, row_id: str, number_of_pass: int) -> None:
        self._key = f"{seed} {number_of_pass} {row_id}"

    def __call__(self, purpose: str) -> float:
        return int.from_bytes(hash_of_id(f"{purpose} {self._key}")[:6], "big") / 2**48  # 56 bits may round to 1


def planned_length(row: Row, max_new_tokens: int) -> int:
    """Positions that a row is planned with: prompt and response, or the longest answer where there is no response.

    >>> planned_length(Row("a", (1, 2, 3), (), example=None), 5)
    7
    """
    if row.response_ids:
        return row.length
    prompt = len(row.sampling_ids)
    return max(prompt, max_new_tokens) if row.encoder_decoder else prompt + max_new_tokens - 1


def planned_lengths(rows: Sequence[Row], max_new_tokens: int) -> NDArray[np.int32]:
    """`planned_length` of every row, `[rows]`."""
    prompts = column(rows, "sampling")
    separate = len(rows) > 0 and rows[0].encoder_decoder
    alone = np.maximum(prompts, max_new_tokens) if separate else prompts + max_new_tokens - 1
    return np.where(column(rows, "response") > 0, column(rows, "length"), alone)


def cut(
    rows: Sequence[Row],
    slots: int,
    *,
    tokens: int | None,
    rows_per_part: int | None,
    padding: int,
    side_by_side: bool = False,
    packed: bool = False,
) -> list[list[list[Row]]]:
    """Cut the rows of a step into parts by their real lengths, and deal these out to slots.

    Args:
        rows: of all processes.
        slots: micro-steps of all processes together.
        tokens: positions of a part at most, padding included; a longer row is alone.
        rows_per_part: rows of a part at most, where rows are counted.
        padding: positions of padding that cost as much as another part.
        side_by_side: slots work at the same time, in several processes: the n-th parts of all are then of like cost,
            and none is empty where there are rows enough.
        packed: parts have no padding.

    Returns:
        For each slot its parts, the same number for all; some have no rows.

    >>> a, b = (Row(name, (1,) * 3, (2,) * 2, example=None) for name in "ab")
    >>> slots = cut([a, b], 2, tokens=100, rows_per_part=None, padding=64)
    >>> [[[row.id for row in part] for part in slot] for slot in slots]
    [[['a']], [['b']]]
    """
    lengths = [row.length for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    if rows_per_part is not None:
        groups = [order[i : i + rows_per_part] for i in range(0, len(order), rows_per_part)]
    else:
        assert tokens is not None, "one of the two limits is given"
        groups = bucket_by_length(lengths, tokens, packed=packed)
    if not packed:
        groups = [part for group in groups for part in _alike(group, lengths, padding)]
    while len(groups) < slots and any(len(group) > 1 for group in groups):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[largest]
        groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    if side_by_side:
        groups = _in_rounds(groups, lengths, slots, packed)
    parts = [[rows[i] for i in group] for group in groups]
    deep = -(-len(parts) // slots)
    return [[*parts[slot::slots], *[[]] * deep][: max(1, deep)] for slot in range(slots)]


def _in_rounds(
    groups: Sequence[list[int]], lengths: Sequence[int], slots: int, packed: bool = False
) -> list[list[int]]:
    """Parts for whole rounds over the slots, those of a round of like cost.

    >>> _in_rounds([[0, 1], [2], [3]], [2, 2, 9, 9], slots=2)
    [[2], [3], [1], [0]]
    """

    def cost(group: Sequence[int]) -> int:
        return sum(lengths[i] for i in group) if packed else len(group) * max(lengths[i] for i in group)

    groups = list(groups)
    while len(groups) % slots and any(len(group) > 1 for group in groups):
        costliest = max((i for i, group in enumerate(groups) if len(group) > 1), key=lambda i: cost(groups[i]))
        group = groups[costliest]
        halves = split_by_cost([lengths[i] for i in group], 2, packed=packed)
        groups[costliest : costliest + 1] = [[group[i] for i in half] for half in halves]
    groups.sort(key=cost, reverse=True)
    rounds = [groups[first : first + slots] for first in range(0, len(groups), slots)]
    # To and fro, so that a slot with more in one round has less in the next.
    return [group for number, one in enumerate(rounds) for group in (one[::-1] if number % 2 else one)]


def _alike(group: Sequence[int], lengths: Sequence[int], padding: int) -> list[list[int]]:
    """Cut a batch, its shortest row first, into the parts that cost least: padding, and ``padding`` for each part.

    >>> _alike([0, 1, 2], [10, 11, 90], padding=64)
    [[0, 1], [2]]
    """
    best: list[tuple[int, int]] = [(0, 0)]
    """Up to each row: what it costs, and where the last part begins."""
    for end in range(1, len(group) + 1):
        longest = lengths[group[end - 1]]
        options = []
        wasted = 0
        for start in range(end - 1, -1, -1):
            wasted += longest - lengths[group[start]]
            options.append((best[start][0] + wasted + padding, start))
        best.append(min(options))
    parts: list[list[int]] = []
    end = len(group)
    while end:
        start = best[end][1]
        parts.append(list(group[start:end]))
        end = start
    return parts[::-1]
