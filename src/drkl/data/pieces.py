"""Encode a text piece by piece: each piece has ids of its own, and all of them read as the text does."""

from __future__ import annotations

import unicodedata
from itertools import product
from typing import TYPE_CHECKING

from drkl.data.ends import as_ids
from drkl.data.rendering import Writer
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_from_start(writer: Writer, text: str) -> list[int]:
    """Return the ids of a text that begins a sequence; some templates and texts write their own bos, or want none.

    Raises:
        DrklError: the tokenizer cannot encode the text, or the template is unknown.
    """
    ids = writer.encoder.ids(text)
    if writer.kind in ("chat", "minillm") or "bos_token" in writer.template:
        return ids
    bos = as_ids(writer.tokenizer.bos_token_id)
    return [*bos, *ids] if ids[:1] != bos and writer.encoder.adds_bos else ids


class Stream:
    """Encodes one text piece by piece, each piece to ids of its own.

    Where the tokenizer would merge the beginning of a piece into the piece before, the piece is encoded by itself.
    """

    def __init__(self, writer: Writer) -> None:
        self.ids: list[int] = []
        self._writer = writer
        self._text = ""
        self._settled = False
        self._open = ""
        self._known: list[int] | None = []
        """The ids of the text that is open, if they are known; what is before it is settled, whatever follows."""

    def add(self, piece: str) -> None:
        """Append the ids of a piece."""
        known = self._ids(self._open) if self._known is None else self._known
        self._text += piece
        self._open += piece
        self._known = self._ids(self._open)
        self.ids += self._known[len(known) :] if self._known[: len(known)] == known else self._apart(piece)
        *ready, last = self._writer.encoder.parts(self._open)
        if ready:
            self._open, self._known, self._settled = last, self._writer.encoder.ids(last), True

    def end(self) -> None:
        """Append eos.

        Raises:
            DrklError: the tokenizer has none.
        """
        self.ids.append(eos_of(self._writer.tokenizer))
        self._text += str(self._writer.tokenizer.eos_token)
        self._open += str(self._writer.tokenizer.eos_token)
        self._known = None

    def _ids(self, text: str) -> list[int]:
        return self._writer.encoder.ids(text) if self._settled else encode_from_start(self._writer, text)

    def _apart(self, piece: str) -> list[int]:
        """The ids of a piece by itself.

        Sentencepiece writes a blank before a text, which the piece does not have, so a context is encoded with it. What
        follows the context is right if the row then reads as the whole text does.
        """
        tokenizer, encode = self._writer.tokenizer, self._writer.encoder.ids
        text = _decode(tokenizer, encode_from_start(self._writer, self._text))
        for context, part in product(("", "\n", "a", "."), (piece, piece.lstrip())):
            start, ids = encode(context), encode(context + part)
            if ids[: len(start)] == start and _decode(tokenizer, self.ids + ids[len(start) :]) == text:
                return ids[len(start) :]
        return encode(piece)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # Composed: an accent may stand in another piece than its letter.
    return unicodedata.normalize("NFC", str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of eos.

    Raises:
        DrklError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise DrklError(
            "The tokenizer has no eos token and its template ends no turn with a special token: the student could "
            "never learn to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)
