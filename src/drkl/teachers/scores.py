"""Distributions in the answer of a server that was asked for the prompt's log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from drkl.losses.topk import TopK

RESOLUTION = float(np.finfo(np.float32).eps)
"""A server's probabilities are of fp32, so 1 less their sum has no digits below this. Where less is left, this much is
taken for the rest."""
NOTHING = -9999.0
"""vLLM's word for the logarithm of no probability, which json cannot write."""
_HIGHEST = 2**31 - 1
"""The highest token id that any vocabulary can have; that of the served model is not always known."""
_SLACK = 1e-3
"""Rounding that makes a log-probability larger than 0, or a sum of probabilities larger than 1."""


class Odd(ValueError):
    """An answer is not what was asked for; the message says in what."""


class Scores(NamedTuple):
    """The k most probable tokens at some positions of a row."""

    ids: np.ndarray
    """`[n, k]` int32, -1 where a token is beyond the vocabulary."""
    logp: np.ndarray
    """`[n, k]` fp32."""
    log_rest: np.ndarray
    """`[n]` fp32, the log-probability of all others together."""
    observed: np.ndarray
    """`[n]` fp32, the log-probability of the token that follows."""

    @property
    def num_bytes(self) -> int:
        """Memory of all."""
        return sum(part.nbytes for part in self)


def as_topk(parts: Sequence[Scores], k: int, vocab_size: int, *, labelled: bool) -> TopK:
    """Join what is known of several rows.

    Args:
        parts: of the rows, in order.
        k: tokens at a position.
        vocab_size: the ids that it is over.
        labelled: whether the tokens that follow are the observed ones at every position.
    """
    empty = Scores(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), *np.zeros((2, 0), np.float32))
    ids, logp, rest, observed = (torch.from_numpy(np.concatenate(column)) for column in zip(empty, *parts, strict=True))
    return TopK(ids.long(), logp, rest[:, None], vocab_size, (1.0,), observed if labelled else None)


def read_scores(
    body: Any, prompt: Sequence[int], positions: Sequence[int], *, k: int, vocab_size: int, served_ids: int | None
) -> Scores:
    """Read the distributions that predict some tokens of a prompt.

    Args:
        body: what ``/v1/completions`` answers to a prompt with ``prompt_logprobs`` of k.
        prompt: the token ids that were sent.
        positions: from 0; the distribution at one predicts the token after it.
        k: how many tokens are known at each.
        vocab_size: ids from this one on are not shared by both models, and count as rest.
        served_ids: the number of ids that the served model has; None where it is not known.

    Raises:
        Odd: it is no such answer.
    """
    entries = _entries(body, prompt)
    ids = np.full((len(positions), k), -1, np.int32)
    logp = np.full((len(positions), k), -np.inf, np.float32)
    rest, observed = np.empty(len(positions), np.float32), np.empty(len(positions), np.float32)
    for place, position in enumerate(positions):
        found = _entry(entries[position + 1], position + 1, served_ids)
        token = prompt[position + 1]
        if token not in found:
            raise Odd(f"entry {position + 1} has no log-probability of the token that stands there, {token}")
        if len(found) < k:
            raise Odd(f"entry {position + 1} has {len(found)} of {k} tokens; start it with --max-logprobs {k}")
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:k]
        shared = [(number, value) for number, value in best if number < vocab_size]
        if not shared:
            raise Odd(
                f"none of the {k} tokens in entry {position + 1} is among the {vocab_size} that both models have; a "
                "larger top_k finds one"
            )
        ids[place, : len(shared)] = [number for number, _ in shared]
        logp[place, : len(shared)] = [value for _, value in shared]
        rest[place] = _log_rest(shared, vocab_size)
        observed[place] = found[token]
    return Scores(ids, logp, rest, observed)


def choice_of(body: Any, prompt: Sequence[int]) -> Mapping[str, Any]:
    """The one choice of a completion.

    Raises:
        Odd: there are others, or it is of another prompt.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Odd("it has not the one choice that was asked for")
    choice: dict[str, Any] = choices[0]
    if choice.get("index", 0) != 0:
        raise Odd("its choice is not the first")
    read = choice.get("prompt_token_ids")
    if read is not None and read != list(prompt):
        raise Odd("it read another prompt than it was asked; it puts tokens before prompts or cuts them")
    return choice


def _entries(body: Any, prompt: Sequence[int]) -> list[Any]:
    entries = choice_of(body, prompt).get("prompt_logprobs")
    if not isinstance(entries, list):
        raise Odd("it has no prompt_logprobs; the server does not give the log-probabilities of a prompt")
    if len(entries) != len(prompt):
        raise Odd(f"its prompt_logprobs have {len(entries)} entries, and the prompt {len(prompt)} tokens")
    return entries


def _entry(entry: Any, number: int, served_ids: int | None) -> dict[int, float]:
    """The log-probabilities by id."""
    if not isinstance(entry, dict):
        raise Odd(f"entry {number} has no log-probabilities")
    found: dict[int, float] = {}
    for key, value in entry.items():
        logp = value.get("logprob") if isinstance(value, dict) else value
        if (token := _token(key)) is None:
            raise Odd(f"entry {number} has {key[:40]!r} where a token id was expected")
        if served_ids is not None and token >= served_ids:
            raise Odd(f"entry {number} has the token {token}, and the teacher's vocabulary {served_ids}")
        if isinstance(logp, bool) or not isinstance(logp, (int, float)) or logp != logp:
            raise Odd(f"entry {number} has a log-probability that is no number")
        if logp > _SLACK:
            raise Odd(
                f"entry {number} has the log-probability {logp:g}, above 0; does the server run with --logprobs-mode "
                "raw_logprobs?"
            )
        found[token] = float(min(0.0, max(NOTHING, logp)))
    if (total := math.fsum(map(math.exp, found.values()))) > 1 + _SLACK:
        raise Odd(f"entry {number} has probabilities that add up to {total:.4g}")
    return found


def _token(key: str) -> int | None:
    """The token id that is written as a key; None where it is none, or written as no server writes it, such as 007."""
    if not key.isascii() or not key.isdecimal() or len(key) > len(str(_HIGHEST)):
        return None
    token = int(key)
    return token if token <= _HIGHEST and str(token) == key else None


def _log_rest(shared: Sequence[tuple[int, float]], vocab_size: int) -> float:
    if len(shared) == vocab_size:
        return -math.inf
    return math.log(max(RESOLUTION, 1.0 - math.fsum(math.exp(value) for _, value in shared)))
