"""Tokenise prompts and responses for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drkl.data.encoding import TextEncoder
from drkl.data.rendering import instruction_text
from drkl.errors import DrklError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_source(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the encoder's input: the user's text with the tokenizer's own special tokens (T5's eos at the end).

    A longer conversation is written as `instruction_text` does.
    """
    return TextEncoder(tokenizer).framed(instruction_text(messages)).ids


def encode_target(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the decoder's target: the text as the tokenizer encodes targets by itself, up to and including eos.

    Where the tokenizer writes more after eos (mBART's language), that is left out: an answer is over at eos, and the
    decoder of mBART is fed its language before the first token.

    Raises:
        DrklError: the tokenizer has no eos token, or needs a target language.
    """
    return target_ids(TextEncoder(tokenizer), text)


def target_ids(encoder: TextEncoder, text: str) -> list[int]:
    """Return the decoder's target as `encode_target` does, from a shared encoder.

    Raises:
        DrklError: as `encode_target`.
    """
    eos = encoder.tokenizer.eos_token_id
    if eos is None:
        raise DrklError(
            "The tokenizer has no eos token, so the student could never learn to stop. Set the tokenizer's eos_token."
        )
    ids, special = encoder.framed(text, target=True)
    after = len(special) - special[::-1].index(0) if 0 in special else len(special)
    if eos in ids[after:]:
        return ids[: ids.index(eos, after) + 1]
    return ids if ids[-1:] == [eos] else [*ids, int(eos)]


def tokens_around(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before a text, and those after it."""
    ids, special = TextEncoder(tokenizer).framed("a", target=target)
    return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]


def set_languages(tokenizer: Any, src_lang: str | None, tgt_lang: str | None) -> None:
    """Set the languages of a translation tokenizer (mBART, NLLB, M2M-100, PLBart), which it is saved with.

    Args:
        tokenizer: changed in place.
        src_lang: the source language's code, as the tokenizer spells it; None leaves it as it is.
        tgt_lang: the target's.

    Raises:
        DrklError: a tokenizer without languages, or a code that it does not know.
    """
    for name, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
        if code is None:
            continue
        if not hasattr(tokenizer, name):
            raise DrklError(
                f"data.{name} is {code!r}, but the {type(tokenizer).__name__} has no languages; leave it out."
            )
        known = languages(tokenizer)
        if code not in known:
            raise DrklError(
                f"data.{name} is {code!r}, which the {type(tokenizer).__name__} does not know; for instance "
                f"{', '.join(list(known)[:4])}.{did_you_mean(code, known)}"
            )
        setattr(tokenizer, name, code)


def take_languages(tokenizer: Any, source: Any) -> None:
    """Set the languages of a translation tokenizer to those of another, as far as it knows them.

    Args:
        tokenizer: changed in place.
        source: the tokenizer whose languages are taken.
    """
    codes = [getattr(source, name, None) for name in ("src_lang", "tgt_lang")]
    known = languages(tokenizer)
    set_languages(tokenizer, *(code if code in known else None for code in codes))


def languages(tokenizer: Any) -> dict[str, int]:
    """The ids of a translation tokenizer's languages, by their codes; empty for any other tokenizer."""
    if not hasattr(tokenizer, "tgt_lang"):
        return {}
    known = getattr(tokenizer, "lang_code_to_id", None)
    if known is None:  # NLLB's: every special token that has no other part
        parts = set(map(str, tokenizer.special_tokens_map.values()))
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = {code: number for code, number in added.items() if code not in parts}
    plain = {code.strip("_"): number for code, number in known.items() if code.startswith("__")}  # PLBart's __java__
    return {**{str(code): int(number) for code, number in known.items()}, **plain}
