"""Where an answer ends: one definition for rows, samples, metrics and saved models.

A turn ends with the first special token that the template writes after its content. That need not be eos: Phi-3 writes
``<|end|>`` after every turn and eos once, after the whole conversation; a model that waits for eos runs on into a turn
of the user's. Where a template writes no end, the tag of the user's next turn is it, if models of that template list
it as one (GLM-4's ``<|user|>``); else eos is put there, as in every template that is no chat template.

An answer is over at the first of these: the end that is taught, the end of a turn in the tokenizer's chat template,
eos, and what a model's own generation_config lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.encoding import TextEncoder
    from drkl.data.tokenize import Row

RARE = 0.1
"""A special token that ends fewer of the rows than this is where a row was cut, and no end."""


def as_ids(value: Any) -> list[int]:
    """The token ids of a setting that is one id, several, or None; -1, which some configs write for none, is left out.

    >>> as_ids(2), as_ids([2, 5, -1]), as_ids(None)
    ([2], [2, 5], [])
    """
    ids = [] if value is None else [value] if isinstance(value, int) else list(value)
    return [int(token) for token in ids if token >= 0]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer, by their text."""
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {str(text): int(number) for text, number in (tokens | added).items() if text}


def end_of_turn(encoder: TextEncoder, suffix: str, continued: Callable[[], str | None]) -> int:
    """Return the offset in ``suffix`` just past the end of the turn; 0 where the template writes none.

    Special tokens right after the first belong to the end as far as the template also writes them before a next turn:
    Command R7B closes a turn with two, where Phi-4-mini writes ``<|end|>`` and then, once, eos.

    Args:
        encoder: its tokenizer names the special tokens; other added tokens count where there is no special one.
        suffix: what the template writes after the content of the last message.
        continued: returns what it writes there before a next turn, or None; asked only where it matters.
    """
    specials = encoder.special_tokens
    _, end = _next_token(specials, suffix)
    if not end:
        others = {str(token): number for number, token in encoder.tokenizer.added_tokens_decoder.items()}
        return _next_token(others, suffix)[1]
    following = None
    while (more := _next_token(specials, suffix[end:])) and more[1] and more[0] == 0:
        following = (continued() or "") if following is None else following
        if not following.startswith(suffix[: end + more[1]]):
            break
        end += more[1]
    return end


def _next_token(tokens: Iterable[str], text: str) -> tuple[int, int]:
    """The place of the first of some tokens in a text, (start, end); (0, 0) if there is none."""
    hits = [(text.index(token), -len(token)) for token in tokens if token in text]
    if not hits:
        return 0, 0
    start, negative_length = min(hits)
    return start, start - negative_length


def opening_tag(tokenizer: PreTrainedTokenizerBase, between: str, ends: Iterable[int]) -> str:
    """What ends an open turn in the text ``between`` it and the next: up to the first token, if that is an end.

    Args:
        tokenizer: spells the ids.
        between: begins where the turn's content ends.
        ends: the ids that end an answer.
    """
    bare = between.lstrip()
    for token in ends:
        text = tokenizer.convert_ids_to_tokens(token)
        if isinstance(text, str) and text and bare.startswith(text):
            return between[: len(between) - len(bare) + len(text)]
    return ""


def end_positions(row: Row) -> list[int]:
    """The places, among the trained tokens of a row, of the last token of each turn."""
    if row.trained is None:
        return [row.num_trained - 1] if row.response_ids else []
    counts, places = 0, []
    for number, trained in enumerate(row.trained):
        counts += trained
        if trained and not (number + 1 < len(row.trained) and row.trained[number + 1]):
            places.append(counts - 1)
    return places


def turn_ends(rows: Sequence[Row]) -> NDArray[np.int32]:
    """The last token of every learnt turn of every row, in order."""
    known: Any = rows
    if hasattr(known, "turn_ends"):  # kept beside the rows
        found: NDArray[np.int32] = known.turn_ends()
        return found
    return np.fromiter((token for row in rows for token in ends_of(row)), np.int32)


def ends_of(row: Row) -> list[int]:
    """The last token of every learnt turn of a row."""
    trained = row.trained_ids
    return [trained[place] for place in end_positions(row)]


def taught_ends(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the turns of these rows end with, the most frequent first."""
    ends = turn_ends(rows)
    ends = ends[np.isin(ends, [*special_tokens(tokenizer).values()])]
    tokens, first, counts = np.unique(ends, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return [int(token) for token, count in zip(tokens[order], counts[order], strict=True) if count >= RARE * len(ends)]
