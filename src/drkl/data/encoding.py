"""Encode the texts of many examples in one call of the tokenizer, and no text twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from drkl.data.cuts import NO_CUTS, Cuts, is_of_bytes, safe_tokens, words_are_apart
from drkl.data.ends import as_ids, special_tokens
from drkl.data.limits import no_panic
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Item = TypeVar("Item")
AT_ONCE = 256
"""The texts or examples that a tokenizer is given at once, at most."""
CHARACTERS_AT_ONCE = 1_000_000
"""With an item that brings those of a batch to more characters, the batch ends: all of their tokens are in memory."""


def batched(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield some items at a time for a tokenizer, fewer where they are long."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if len(batch) == AT_ONCE or size > CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
        self._cuts = NO_CUTS
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
        # Bytes without a token are left out, and what is left of a letter then reads as the mark of a bad one.
        no_normalizer = self._keeps_bytes and self.tokenizer.backend_tokenizer.normalizer is None
        return self._keeps_bytes and (text.isascii() or (no_normalizer and "\ufffd" not in text))

    @cached_property
    def _keeps_bytes(self) -> bool:
        return is_of_bytes(self.tokenizer)

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
            self._known = dict(zip(parts, self._ids_of_all(parts), strict=True))
        for target, group in ((False, list(dict.fromkeys(sources))), (True, list(dict.fromkeys(targets)))):
            if group:
                keys = ((target, text) for text in group)
                self._framed.update(zip(keys, self._frame(group, target=target), strict=True))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens of the tokenizer's own.

        Raises:
            DrklError: the tokenizer cannot encode the text.
        """
        parts = [text] if text in self._known else self.parts(text)
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
    def _safe_cuts(self) -> Cuts:
        templates = self.tokenizer.chat_template or ""
        templates = "".join(templates.values()) if isinstance(templates, Mapping) else templates
        return Cuts(safe_tokens(self.tokenizer, self._template + templates), words_are_apart(self.tokenizer))

    def parts(self, text: str) -> list[str]:
        """Return a text cut where its ids are cut too; what is added to it changes the ids of the last part alone."""
        return self._cuts.parts(text)

    def _parts_of_all(self, pieces: Sequence[str]) -> Iterator[str]:
        if len(pieces) == 1:  # nothing to share
            yield pieces[0]
            return
        last = ""
        for piece in pieces:
            parts = self.parts(last + piece)
            yield from parts
            last = parts[-1]

    @no_panic("Encoding texts")
    def _ids_of_all(self, texts: list[str]) -> list[list[int]]:
        from transformers import PreTrainedTokenizerFast

        tokenizer = self.tokenizer
        kind, backend = type(tokenizer), tokenizer.backend_tokenizer
        is_plain = kind.__call__ is PreTrainedTokenizerFast.__call__
        is_plain = is_plain and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        is_plain = is_plain and backend.truncation is None and backend.padding is None
        if is_plain and backend.encode_special_tokens == tokenizer.split_special_tokens:
            # Where in the text each token is, and masks, are not needed.
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    def _part(self, part: str) -> list[int]:
        known = self._known.get(part)
        if known is None:
            # verbose=False: over-long prompts are dropped and counted by us, not warned about by the tokenizer.
            with no_panic(f"Encoding {part[:60]!r}"):
                ids = self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            known = self._known[part] = list(ids)
        return known

    @no_panic("Encoding texts")
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
