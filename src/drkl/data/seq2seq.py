"""Tokenise prompts and responses for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drkl.data.rendering import instruction_text
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_source(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the encoder's input: the user's text with the tokenizer's own special tokens (T5's eos at the end).

    A longer conversation is written as `instruction_text` does.
    """
    # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
    return list(tokenizer(instruction_text(messages), verbose=False)["input_ids"])


def encode_target(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the decoder's target: the text as the tokenizer encodes targets by itself, ended by eos.

    Raises:
        DrklError: the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise DrklError(
            "The tokenizer has no eos token, so the student could never learn to stop. Set the tokenizer's eos_token."
        )
    ids = list(tokenizer(text_target=text, verbose=False)["input_ids"])
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, int(tokenizer.eos_token_id)]


def tokens_around(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before a text, and those after it."""
    text = {"text_target" if target else "text": "a"}
    encoded = tokenizer(**text, return_special_tokens_mask=True, verbose=False)
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]
