"""Encode the texts of many examples in one call of the tokenizer, and no text twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import decoders, models, normalizers, pre_tokenizers

from drkl.data.ends import as_ids, special_tokens
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Framed(NamedTuple):
    """The ids of a text with the special tokens that the tokenizer puts around it, and which are those (1)."""

    ids: list[int]
    special: list[int]


class TextEncoder:
    """Encodes texts with one tokenizer, and knows what it has encoded. The lists that it returns are not changed.

    Args:
        tokenizer: must not change as long as this is used.
        template: jinja text that writes the texts, if it is not the tokenizer's chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._cuts: re.Pattern[str] | None = None
        self._known: dict[str, list[int]] = {}
        self._framed: dict[tuple[bool, str], Framed] = {}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokenizer's special tokens, by their text."""
        return special_tokens(self.tokenizer)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins a text with its bos."""
        bos = as_ids(self.tokenizer.bos_token_id)
        return bool(bos) and self.tokenizer("a", verbose=False)["input_ids"][:1] == bos

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """The tokenizer's special tokens, by their ids."""
        return {number: text for text, number in self.special_tokens.items()}

    def keeps_bytes(self, text: str) -> bool:
        """Whether the ids of a text read as no more bytes than it has, but for a blank before it."""
        return self._keeps_bytes and (text.isascii() or self.tokenizer.backend_tokenizer.normalizer is None)

    @cached_property
    def _keeps_bytes(self) -> bool:
        if not self.tokenizer.is_fast:
            return False
        backend = self.tokenizer.backend_tokenizer
        steps = repr(backend.pre_tokenizer)
        return (
            isinstance(backend.decoder, decoders.ByteLevel)
            and isinstance(backend.model, models.BPE)
            and isinstance(backend.normalizer, normalizers.NFC | None)  # leaves what is ascii
            and "ByteLevel(" in steps
            and "Metaspace(" not in steps
            and all(backend.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
        )

    def read(self, texts: Iterable[Sequence[str]], *, sources: Iterable[str] = (), targets: Iterable[str] = ()) -> None:
        """Encode texts at once, so that `ids` and `framed` have them; those of the call before are forgotten.

        Args:
            texts: each as pieces, of which the first one, the first two and so on are encoded.
            sources: texts that an encoder reads.
            targets: texts that a decoder writes.
        """
        self._known, self._framed = {}, {}
        if not self.tokenizer.is_fast:  # another is not faster at once
            return
        self._cuts = self._safe_cuts
        if parts := list(dict.fromkeys(part for pieces in texts for part in self._parts_of_all(pieces))):
            encoded = self.tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]
            self._known = dict(zip(parts, encoded, strict=True))
        for target, group in ((False, list(dict.fromkeys(sources))), (True, list(dict.fromkeys(targets)))):
            if group:
                keys = ((target, text) for text in group)
                self._framed.update(zip(keys, self._frame(group, target=target), strict=True))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens of the tokenizer's own.

        Raises:
            DrklError: the tokenizer cannot encode the text.
        """
        parts = self.parts(text)
        try:
            if len(parts) == 1:
                return self._part(text)
            return [token for part in parts for token in self._part(part)]
        except Exception as error:
            if type(error) is not Exception:  # what tokenizers raises, for instance for a word without an unknown token
                raise
            raise DrklError(f"The tokenizer cannot encode {text[:60]!r}: {error}.") from error

    def framed(self, text: str, *, target: bool = False) -> Framed:
        """Return a text's ids as the tokenizer encodes it by itself, as a source or as a target.

        Raises:
            DrklError: a target, and the tokenizer has no language for it.
        """
        key = (target, text)
        if key not in self._framed:
            self._framed[key] = self._frame([text], target=target)[0]
        return self._framed[key]

    @cached_property
    def _safe_cuts(self) -> re.Pattern[str] | None:
        templates = self.tokenizer.chat_template or ""
        templates = "".join(templates.values()) if isinstance(templates, Mapping) else templates
        return _cuts(self.tokenizer, self._template + templates)

    def parts(self, text: str) -> list[str]:
        """Return a text cut where its ids are cut too; what is added to it changes the ids of the last part alone."""
        if self._cuts is None:
            return [text]
        first, *rest = self._cuts.split(text)
        parts = [token + following for token, following in zip(rest[::2], rest[1::2], strict=True)]
        return [first, *parts] if first or not parts else parts

    def _parts_of_all(self, pieces: Sequence[str]) -> Iterator[str]:
        last = ""
        for piece in pieces:
            parts = self.parts(last + piece)
            yield from parts
            last = parts[-1]

    def _part(self, part: str) -> list[int]:
        known = self._known.get(part)
        if known is None:
            # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
            known = self._known[part] = list(self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        return known

    def _frame(self, texts: list[str], *, target: bool) -> list[Framed]:
        tokenizer = self.tokenizer
        try:
            given = {"text_target" if target else "text": texts}
            encoded = tokenizer(**given, return_special_tokens_mask=True, verbose=False)
        except KeyError as error:
            if not target or getattr(tokenizer, "tgt_lang", "") is not None:
                raise
            raise DrklError(
                f"The {type(tokenizer).__name__} writes the language before each text, and has no target language: set "
                "data.tgt_lang (and data.src_lang), or in Python tokenizer.tgt_lang."
            ) from error
        return list(map(Framed, encoded["input_ids"], encoded["special_tokens_mask"]))


def _cuts(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str] | None:
    """Matches (and has as its group) the tokens of a template before which a text may be cut; None if there are none.

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
