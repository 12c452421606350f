"""Where a text may be cut so that its ids are cut there too: they are those of the parts, one after the other."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 256
"""The fewest characters of a part that ends with a word."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = tuple(rf"{_WORDS}|{number}|{_SPACES}" for number in (r"\p{N}{1,3}", r"\p{N}"))
"""How Llama 3 and Qwen split texts; as in GPT-2, nothing holds a letter and a blank after it together."""


class Cuts(NamedTuple):
    """Where texts are cut: before tokens, and after words. What is added to a text changes its last part alone."""

    tokens: re.Pattern[str] | None = None
    after_words: bool = False

    def parts(self, text: str) -> list[str]:
        """Return the parts of a text; a text that is not cut is one."""
        parts = [text]
        if self.tokens is not None:
            first, *rest = self.tokens.split(text)
            parts = [token + following for token, following in zip(rest[::2], rest[1::2], strict=True)]
            parts = [first, *parts] if first or not parts else parts
        if self.after_words and len(text) > BLOCK:
            parts = [block for part in parts for block in (_blocks().findall(part) if len(part) > BLOCK else [part])]
        return parts


NO_CUTS = Cuts()


@cache
def _blocks() -> re.Pattern[str]:
    return re.compile(f"(?s:.{{{BLOCK}}}.*?[A-Za-z](?= )|.+)")


def words_are_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the ids of a text are cut wherever an ascii letter stands before a blank.

    Known of byte-level BPE that splits texts by one of the usual expressions: none of them has a letter and then a
    blank, or looks back, so what is before the blank and what begins with it are split alike by themselves.
    """
    if not is_of_bytes(tokenizer) or tokenizer.backend_tokenizer.model.dropout:
        return False
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip or token.rstrip or token.single_word or " " in token.content:
            return False
    split = json.loads(tokenizer.backend_tokenizer.pre_tokenizer.__getstate__())
    steps = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    by_words = [step["use_regex"] if step["type"] == "ByteLevel" else step["type"] == "Split" for step in steps]
    return any(by_words) and all(
        step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["pattern"].get("Regex") in SPLITS)
        for step in steps
    )


def is_of_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokens of an ascii text read as its bytes, or some of them, but for a blank before it.

    Without a normalizer, which composes accents, those of any text do.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    steps = repr(backend.pre_tokenizer)
    return (
        isinstance(backend.decoder, decoders.ByteLevel)
        and isinstance(backend.model, models.BPE)
        and isinstance(backend.normalizer, normalizers.NFC | None)
        and "ByteLevel(" in steps
        and "Metaspace(" not in steps
        and (backend.model.unk_token is None or None not in map(backend.token_to_id, alphabet))
    )


def safe_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str] | None:
    """Return what matches the tokens of a template before which a text may be cut; None if there are none.

    A fast tokenizer finds its added tokens in the text as it is, from left to right and of those that begin at one
    place the longest, and encodes what is between two of them by itself. A text is cut at those tokens that are found
    wherever they stand, whatever is around them: no other token overlaps them, and they take no blanks from the left.
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return None
    added = list(tokenizer.added_tokens_decoder.values())
    if any(token.single_word for token in added):  # it depends on what is around it
        return None
    found = [token.content for token in added if not token.normalized]
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    wanted = {token.content for token in added if not token.normalized and not token.lstrip}
    wanted = {text for text in wanted if text == text.strip() and (text in ends or text in template)}
    safe = sorted(text for text in wanted if not any(_overlaps(other, text) for other in found))
    parts = ["a b", *(f"{text}a b" for text in safe)]
    try:
        *apart, whole = tokenizer([*parts, "".join(parts)], add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # a tokenizer without an unknown token, perhaps
        return None
    if not safe or list(chain(*apart)) != whole:  # its class may do something of its own with a text
        return None
    return re.compile(f"({'|'.join(map(re.escape, safe))})")


def _overlaps(other: str, token: str) -> bool:
    """Whether a token of a text may be hidden by another that begins before it, or with it and is longer."""
    if token[0] not in other[1:] and not other.startswith(token):
        return False
    return (other != token and token in other) or any(token.startswith(other[i:]) for i in range(1, len(other)))
