"""Numbers of the answers that a model writes, and what they say when the answers are going wrong.

A student that learns from its own answers can unlearn where to end, repeat itself or write the same to every prompt
while its loss looks well. Training logs these numbers, and `concerns_of` reads them back from the log.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from drkl.display import as_number
from drkl.rollouts.answers import Answer
from drkl.rollouts.config import PREFIX

DRAWN = 200
"""Bigrams that distinct-2 is over. A share of different bigrams falls as a text grows, so it is taken of as many."""
REPEATED = 4
"""Tokens of the runs that are looked for earlier in the same answer."""


def numbers_of(answers: Sequence[Answer], stops: Collection[int]) -> dict[str, float]:
    """The numbers of a set of answers, by the names they are logged under, without a prefix.

    - ``answers``: how many there are.
    - ``finished``: share that ended with a stop token.
    - ``length``: mean number of tokens, the end included.
    - ``ends_per_1000``: stop tokens per 1,000 tokens.
    - ``distinct2``: different bigrams per bigram, among `DRAWN` bigrams (or all, if fewer) drawn from the answers:
      see `distinct_bigrams`. Not there where no answer has two tokens.
    - ``repeated4``: share of the 4-grams of an answer that it had before, mean over the answers of at least 4 tokens.
      Not there without any.

    Args:
        answers: in any order; none gives no numbers.
        stops: the tokens that end an answer.
    """
    if not answers:
        return {}
    tokens = sum(len(answer.token_ids) for answer in answers)
    ends = sum(token in stops for answer in answers for token in answer.token_ids)
    numbers = {
        "answers": float(len(answers)),
        "finished": sum(answer.finished for answer in answers) / len(answers),
        "length": tokens / len(answers),
        "ends_per_1000": 1000 * ends / max(tokens, 1),
    }
    if (distinct := distinct_bigrams([answer.token_ids for answer in answers])) is not None:
        numbers["distinct2"] = distinct
    repeated = [share for answer in answers if (share := _repeated(answer.token_ids)) is not None]
    return numbers | ({"repeated4": fmean(repeated)} if repeated else {})


def distinct_bigrams(texts: Sequence[Sequence[int]], drawn: int = DRAWN) -> float | None:
    """The expected share of different bigrams among ``drawn`` bigrams of the texts, taken without replacement.

    With N bigrams in all, of which the bigram g makes up N_g, that is ``sum_g (1 - C(N - N_g, m) / C(N, m)) / m``, m
    being the smaller of ``drawn`` and N. No bigram runs across texts. None where there is no bigram.

    >>> distinct_bigrams([[5, 6, 5, 6, 5]]), distinct_bigrams([[5, 6, 5, 6, 5]], drawn=1)
    (0.5, 1.0)
    """
    counts = Counter(pair for text in texts for pair in itertools.pairwise(text))
    total = counts.total()
    if not total:
        return None
    drawn = min(drawn, total)
    # By how often a bigram occurs: few different numbers, however many bigrams.
    seen = (
        bigrams * (1 - math.prod((total - drawn - place) / (total - place) for place in range(count)))
        for count, bigrams in Counter(counts.values()).items()
    )
    return math.fsum(seen) / drawn


def _repeated(tokens: Sequence[int]) -> float | None:
    grams = [tuple(tokens[place : place + REPEATED]) for place in range(len(tokens) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


class RolloutLog:
    """Gathers the answers of the steps between two lines of the log, and gives the numbers of that line.

    ``distinct2`` is over the newest answers that hold `DRAWN` bigrams, some from before the last line where a line has
    too few of its own: over fewer it would be higher.
    """

    def __init__(self) -> None:
        self._new: list[Answer] = []
        self._stops: set[int] = set()
        self._newest: deque[Sequence[int]] = deque()
        self._bigrams = 0

    def add(self, answers: Sequence[Answer], stops: Collection[int]) -> None:
        """Add the answers of a step, those of all processes; ``stops`` are the tokens that end one."""
        self._new += answers
        self._stops |= set(stops)
        for answer in answers:
            self._remember(answer.token_ids)

    def pop(self) -> dict[str, float]:
        """The numbers of the answers since the last call, as `numbers_of` says, with ``rollout_`` before their names.

        Empty where none was added.
        """
        numbers = numbers_of(self._new, self._stops)
        if sum(max(len(answer.token_ids) - 1, 0) for answer in self._new) < DRAWN and "distinct2" in numbers:
            distinct = distinct_bigrams(list(self._newest))
            assert distinct is not None
            numbers["distinct2"] = distinct
        self._new = []
        return {PREFIX + name: value for name, value in numbers.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as json."""
        return {
            "new": [[list(answer.token_ids), answer.finished] for answer in self._new],
            "newest": [list(tokens) for tokens in self._newest],
            "stops": sorted(self._stops),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._new = [Answer(tuple(tokens), finished) for tokens, finished in state["new"]]
        self._stops, self._bigrams = set(state["stops"]), 0
        self._newest.clear()
        for tokens in state["newest"]:
            self._remember(tokens)

    def _remember(self, tokens: Sequence[int]) -> None:
        if len(tokens) < 2:
            return
        self._newest.append(tokens)
        self._bigrams += len(tokens) - 1
        while self._bigrams - (len(self._newest[0]) - 1) >= DRAWN:
            self._bigrams -= len(self._newest.popleft()) - 1


@dataclass(frozen=True)
class Concern:
    """One way in which the answers of a run went wrong."""

    kind: str
    """``unfinished``, ``alike``, ``repeated`` or ``empty``."""
    step: int
    """After which it was seen first."""
    text: str
    """What was seen, with its numbers, and what helps."""


FIRST, NEWEST = 16, 32
"""Answers, at least, that stand for the beginning of a run, and for now: a step has few, and their numbers jump."""
FEW_STEPS = 8
"""Training steps, at least, that stand for either: a step has rows of about one length, and the next of another."""
SMALLEST = 12.0
"""Independent answers in the smallest stretches whose shares are compared; those of a training step count as one."""
UNFINISHED = 0.2
"""More unfinished answers than this share are a concern where they become more."""
SURE = 4.5
"""Standard errors by which a share has to rise: a long run is looked at thousands of times."""
REPEATS = 0.3
"""A share of repeated 4-grams above this is a concern where it was a third of it at first."""
EMPTY = 1.5
"""Below this mean length most answers are their end alone."""
EVALUATED = "eval_"
_OF_DATA = EVALUATED + "response_"
_REMEDY = (
    "A lower learning rate, more steps on data before the student's own answers (a stage, or a ramp of the share), "
    "a lower share, or an objective with more forward KL help"
)


class Detector:
    """Reads the lines of a training log one after the other, and says when the answers go wrong; each kind once.

    Answers in training and answers to held-out prompts are each compared with their own past.
    """

    def __init__(self) -> None:
        training, held_out = _Stream("answers in training", few_steps=FEW_STEPS), _Stream("answers to held-out prompts")
        self._streams = [training, held_out]
        self._known: set[str] = set()
        self._data: dict[str, float] = {}

    def see(self, line: Mapping[str, Any]) -> list[Concern]:
        """The concerns that this line adds; none for a line without numbers of answers."""
        self._data |= _numbers_in(line, _OF_DATA)
        step = as_number(line.get("step"))
        found = []
        for stream, prefix in zip(self._streams, (PREFIX, EVALUATED + PREFIX), strict=True):
            numbers = _numbers_in(line, prefix)
            if step is None or not {"answers", "finished", "length"} <= numbers.keys():
                continue
            stream.append(numbers, step)
            for kind, text in stream.concerns(self._data):
                if kind not in self._known:
                    self._known.add(kind)
                    found.append(Concern(kind, int(step), f"Step {step:,.0f}: {text}"))
        return found


def concerns_of(lines: Sequence[Mapping[str, Any]]) -> list[Concern]:
    """What went wrong with the answers of a run, by the lines of its ``train.jsonl``, in the order it was seen."""
    detector = Detector()
    return [concern for line in lines for concern in detector.see(line)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _numbers_in(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    named = {name.removeprefix(prefix): as_number(value) for name, value in line.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if value is not None}


class _Stream:
    """The numbers of one kind of answers, line by line; ``few_steps`` is 0 where each line has the same prompts."""

    def __init__(self, what: str, few_steps: int = 0) -> None:
        self._what, self._few_steps = what, few_steps
        self._lines: list[dict[str, float]] = []
        self._answers, self._finished, self._independent, self._bigrams = [0.0], [0.0], [0.0], 0.0
        """Sums over the lines so far, with 0 before the first."""
        self._step = 0.0

    def append(self, numbers: dict[str, float], step: float) -> None:
        count, steps = numbers["answers"], max(step - self._step, 1.0)
        self._step, numbers["steps"] = step, steps
        self._independent.append(self._independent[-1] + (min(count, steps) if self._few_steps else count))
        self._bigrams += count * max(numbers["length"] - 1, 0)
        if self._bigrams < DRAWN:
            numbers.pop("distinct2", None)  # of fewer bigrams, so it is not comparable
        self._lines.append(numbers)
        self._answers.append(self._answers[-1] + count)
        self._finished.append(self._finished[-1] + count * numbers["finished"])

    def concerns(self, data: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """The kinds and texts of what is wrong after the newest line, by the same numbers of the data's responses."""
        if (rise := self._rise()) is not None:
            before, now, count = rise
            yield (
                "unfinished",
                f"{_percent(now)} of the newest {count:,.0f} {self._what} were cut at max_new_tokens, and "
                f"{_percent(before)} before: the student is unlearning where to end. {_REMEDY}; so does a "
                "larger max_new_tokens where whole answers need it. If the two models end an answer with different "
                "tokens, name them in rollouts.stop_map (in Python rollout_stop_map).",
            )
        length = self._newest("length")
        if length is not None and length < EMPTY:
            yield (
                "empty",
                f"the newest {self._what} have {length:.2g} tokens on average, their end included: most are empty. "
                f"{_REMEDY}.",
            )
        for name, kind in (("distinct2", "alike"), ("repeated4", "repeated")):
            first, newest = self._first(name), self._newest(name)
            if first is None or newest is None:
                continue
            reference = data.get(name, first)
            if kind == "alike" and newest < min(first, reference) / 2:
                yield (
                    kind,
                    f"{self._what} became alike: among {DRAWN} bigrams of them {_percent(newest)} differ, and "
                    f"{_percent(first)} did at first. {_REMEDY}.",
                )
            if kind == "repeated" and newest > max(REPEATS, 3 * first, 3 * reference):
                yield (
                    kind,
                    f"{self._what} repeat themselves: {_percent(newest)} of the 4-grams of an answer occurred in it "
                    f"before, and {_percent(first)} did at first. {_REMEDY}.",
                )

    def _rise(self) -> tuple[float, float, float] | None:
        """The unfinished shares of two neighbouring stretches between which it rose, and the size of the newer."""
        size, end = SMALLEST, len(self._lines)
        while (middle := self._back(end, size)) is not None and (start := self._back(middle, size)) is not None:
            independent = [self._independent[b] - self._independent[a] for a, b in ((start, middle), (middle, end))]
            before, now, both = (self._cut(a, b) for a, b in ((start, middle), (middle, end), (start, end)))
            error = math.sqrt(both * (1 - both) * (1 / independent[0] + 1 / independent[1]))
            if now > UNFINISHED and now - before > SURE * error:
                return before, now, self._answers[end] - self._answers[middle]
            size *= 1.5
        return self._early_rise()

    def _early_rise(self) -> tuple[float, float, float] | None:
        """The same where nearly all answers are cut after a beginning that was too short to be compared."""
        end, first = len(self._lines), bisect.bisect_left(self._answers, FIRST)
        start = self._back(end, FIRST)
        if self._independent[end] > 3 * FIRST:
            return None  # by now a later rise has two stretches to be seen in
        if start is None or start < first or self._cut(0, first) >= 0.5 or self._cut(start, end) <= 0.9:
            return None
        return self._cut(0, first), self._cut(start, end), self._answers[end] - self._answers[start]

    def _cut(self, start: int, end: int) -> float:
        """The unfinished share of a stretch of lines."""
        count = self._answers[end] - self._answers[start]
        return (count - (self._finished[end] - self._finished[start])) / count

    def _back(self, end: int, size: float) -> int | None:
        """The place of the nearest line so that ``size`` independent answers at least stand between it and ``end``."""
        place = bisect.bisect_right(self._independent, self._independent[end] - size + 1e-9, hi=end + 1) - 1
        return place if place >= 0 else None

    def _first(self, name: str) -> float | None:
        """The mean over the first lines that hold `FIRST` answers."""
        return self._mean(name, self._lines, FIRST)

    def _newest(self, name: str) -> float | None:
        return self._mean(name, reversed(self._lines), NEWEST)

    def _mean(self, name: str, lines: Iterable[Mapping[str, float]], least: float) -> float | None:
        count = total = steps = 0.0
        for line in lines:
            if name in line:
                count += line["answers"]
                total += line["answers"] * line[name]
                steps += line["steps"]
            if count >= least and steps >= self._few_steps:
                return total / count
        return None
