"""Whether student and teacher mean the same by a finished answer, asked before training on the student's answers.

Where the student stops with one token and the teacher with another, the student is taught never to stop: at the end of
each of its answers the teacher gives the student's token next to nothing. ``rollouts.stop_map`` makes the two tokens
one event, of which both models have the summed probability.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.rollouts.config import RolloutsConfig
from drkl.teachers.stops import Stops

RARE = 1e-4
"""A stop token with a smaller probability than this at the ends of rows is none of the teacher's."""
TIMES = 100.0
"""The teacher stops with another token where it gives that one so many times as much."""


class Agreement(NamedTuple):
    """What two models agree on, and what the user is told of it."""

    merged_ids: tuple[int, ...] = ()
    """The ids that count as one event in the loss; empty where none do."""
    note: str | None = None
    warning: str | None = None
    learnt: tuple[int, ...] = ()
    """The ids that end the answers that the student learns from, where the teacher writes them."""


def agree_on_stops(
    stops: Stops, tokenizer: Any, rollouts: RolloutsConfig, *, vocab_size: int | None = None
) -> Agreement:
    """Judge, by what the teacher gives it at the ends of finished rows, the token that the student stops with.

    Args:
        stops: of both models.
        tokenizer: the run's.
        rollouts: its ``stop_map`` has the tokens that mean the same. Where the teacher writes, nothing is refused: its
            own answers end as it ends them.
        vocab_size: the number of ids, from 0, that are compared; None for all.

    Raises:
        DrklError: the teacher stops with another token, or ``stop_map`` has an entry that is no such pair.
    """
    own, theirs = stops.student, stops.teacher
    merged = merged_ids(rollouts.stop_map, tokenizer, own, theirs, vocab_size)
    if rollouts.source == "teacher":
        return Agreement(merged, learnt=tuple(i for i in theirs if vocab_size is None or i < vocab_size))
    event = list(dict.fromkeys([*own, *merged]))
    asked = " or ".join(map(repr, _texts(tokenizer, event)))
    if not stops.num_rows:
        return Agreement(merged, warning=_not_asked(tokenizer, own, theirs, event, asked))
    logp = stops.logp[:, :vocab_size].double().log_softmax(-1)
    size = logp.shape[1]
    inside = [token for token in event if token < size]
    if not inside:
        return Agreement(
            merged,
            warning=f"The student stops with {asked}, beyond the ids 0 to {size - 1} on which the models are compared, "
            "so none of its answers ends with that. It learns to stop as the teacher does.",
        )
    probability = _mean(torch.logsumexp(logp[:, inside], -1))
    others = {token: _mean(logp[:, token]) for token in theirs if token < size and token not in event}
    other = max(others, key=others.__getitem__, default=None)
    found = (
        f"at the ends of {stops.num_rows} finished rows the teacher gives {asked} a probability of {probability:.2g}"
    )
    if probability >= RARE:
        return Agreement(merged, note=f"The student stops with {asked}: {found}.")
    if other is None or others[other] < TIMES * probability:
        return Agreement(
            merged,
            warning=f"The student stops with {asked}: {found}, and no other stop token of its own much more. The "
            "student learns that from it: look at the share of answers that finish.",
        )
    raise _refusal(tokenizer, own, other, others[other], found, asked)


def _not_asked(tokenizer: Any, own: Sequence[int], theirs: Sequence[int], event: Sequence[int], asked: str) -> str:
    nothing = "no row has a whole response, at whose end the teacher could be asked for that"
    if not theirs or set(theirs) & set(event):
        return (
            f"The student stops with {asked}, and {nothing}. If answers never finish, see rollouts.stop_map (in Python "
            "rollout_stop_map)."
        )
    named = " or ".join(map(repr, _texts(tokenizer, theirs)))
    return (
        f"The student stops with {asked}, the teacher with {named}, and {nothing}. If both tokens mean that an answer "
        f"is over, {_way_out(tokenizer, own, theirs[0])}."
    )


def _way_out(tokenizer: Any, own: Sequence[int], other: int) -> str:
    """What to set, as a file, a shell and Python each take it."""
    (theirs,) = _texts(tokenizer, [other])
    pairs = json.dumps(dict.fromkeys(_texts(tokenizer, own), theirs), ensure_ascii=False)
    word = shlex.quote(f"rollouts.stop_map={pairs}")
    return f"set rollouts.stop_map: {pairs} (in a command {word}, in Python rollout_stop_map={pairs})"


def _refusal(tokenizer: Any, own: Sequence[int], other: int, probability: float, found: str, asked: str) -> DrklError:
    (theirs,) = _texts(tokenizer, [other])
    return DrklError(
        f"The student stops with {asked}, and the teacher with {theirs!r}: {found}, and {theirs!r} {probability:.2g} "
        "(geometric means). On its own answers the student would be taught never to stop. If both tokens mean that an "
        f"answer is over, {_way_out(tokenizer, own, other)}: the models are then compared "
        "on the event of stopping, the summed probability of these tokens."
    )


def merged_ids(
    stop_map: Mapping[str, str], tokenizer: Any, own: Sequence[int], theirs: Sequence[int], vocab_size: int | None
) -> tuple[int, ...]:
    """Return the ids of ``rollouts.stop_map``, ascending: all of them mean that an answer is over.

    Args:
        stop_map: tokens of the student to tokens of the teacher, by text or id.
        tokenizer: the run's.
        own: the student's stop tokens.
        theirs: the teacher's.
        vocab_size: the number of ids, from 0, that are compared; None for all.

    Raises:
        DrklError: an unknown token, several tokens, a token that is no stop token, one that is mapped to itself or
            twice, or one beyond the shared vocabulary.
    """
    pairs: dict[int, int] = {}
    for key, value in stop_map.items():
        token, meant = _stop(key, "student", tokenizer, own), _stop(value, "teacher", tokenizer, theirs)
        if token == meant:
            raise DrklError(f"rollout_stop_map has {key!r}: {value!r}, one token to both models; leave it out.")
        if pairs.setdefault(token, meant) != meant:
            first, second = _texts(tokenizer, [pairs[token], meant])
            raise DrklError(f"rollout_stop_map maps {key!r} to {first!r} and to {second!r}; expected one of them.")
        for number, text in ((token, key), (meant, value)):
            if vocab_size is not None and number >= vocab_size:
                raise DrklError(
                    f"rollout_stop_map has {text!r} (id {number}), but student and teacher are compared on the ids 0 "
                    f"to {vocab_size - 1}, which both have. Choose stop tokens among those."
                )
    return tuple(sorted({*pairs.keys(), *pairs.values()}))


def _stop(text: str, whose: str, tokenizer: Any, stops: Sequence[int]) -> int:
    """The id of an entry of the map, which is a token's text, or an id."""
    valid = ", ".join(f"{name!r} (id {number})" for name, number in zip(_texts(tokenizer, stops), stops, strict=True))
    expected = f"expected a stop token of the {whose}: {valid}"
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in found and text != tokenizer.unk_token
    number = int(text) if text.isascii() and text.isdigit() else None
    for candidate in (*(found if len(found) == 1 and not unknown else ()), number):
        if candidate in stops:
            assert candidate is not None
            return int(candidate)
    if number is None and (unknown or len(found) != 1):
        what = "which the tokenizer does not know" if unknown or not found else f"which is {len(found)} tokens"
        raise DrklError(f"rollout_stop_map has {text!r}, {what}; {expected}.")
    raise DrklError(f"rollout_stop_map has {text!r}, with which the {whose} does not stop; {expected}.")


def _texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ids]


def _mean(logp: Tensor) -> float:
    """The geometric mean of probabilities `[n]`."""
    return float(logp.mean().exp())
