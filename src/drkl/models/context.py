"""How many positions a model has: the only place that knows under which names configs keep their number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from drkl.data.lengths import Room

_BOTH = ("max_position_embeddings", "max_seq_len", "context_length")
_ENCODER = (*_BOTH, "max_encoder_position_embeddings", "max_source_positions")
_DECODER = (*_BOTH, "max_decoder_position_embeddings", "max_target_positions")
_COUNT_AFTER_PAD = (
    *("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Families whose first position is the one after the padding token's id, which leaves so many fewer."""


def context_of(config: Any) -> int | None:
    """The longest row that a model reads: the number of its positions, or None where nothing limits it.

    Args:
        config: a transformers config. For an encoder-decoder the smaller of its two contexts, as a row's length is the
            longer of source and target.
    """
    return min((length for length in contexts_of(config) if length is not None), default=None)


def contexts_of(config: Any) -> tuple[int | None, int | None]:
    """The positions of the encoder, which reads the prompt, and of the decoder, which writes; None where unlimited.

    A decoder-only model gives the same number twice.
    """
    decoder = getattr(config, "decoder", None) or config
    encoder = getattr(config, "encoder", None) or config
    if not getattr(config, "is_encoder_decoder", False):
        context = _positions(config.get_text_config(decoder=True), _DECODER)
        return context, context
    return _positions(encoder.get_text_config(), _ENCODER), _positions(decoder.get_text_config(), _DECODER)


def room_of(configs: Iterable[Any], *, encoder_decoder: bool) -> Room:
    """The room that several models have together.

    Args:
        configs: their transformers configs.
        encoder_decoder: whether an encoder reads the prompt and a decoder writes the response. A classifier reads one
            text, whatever its config says.
    """
    contexts = [contexts_of(config) for config in configs]
    encoder, decoder = (
        min((length for length in side if length is not None), default=None) for side in zip(*contexts, strict=True)
    )
    if encoder_decoder:
        return Room(encoder, decoder, separate=True)
    shortest = min((length for length in (encoder, decoder) if length is not None), default=None)
    return Room(shortest, shortest)


def _positions(config: Any, names: tuple[str, ...]) -> int | None:
    # Some configs hold -1 or None for "any length".
    found = (getattr(config, name, None) for name in names)
    length = next((value for value in found if isinstance(value, int) and value > 0), None)
    if length is None:
        return None
    if (kept := getattr(config, "keep_window_size", None)) is not None:
        length = min(length, kept)  # Doge chooses the tokens that a longer row attends to by looking at all of it
    if config.model_type in _COUNT_AFTER_PAD:
        length -= 1 + (config.pad_token_id or 0)
    window = getattr(config, "attention_window", None)
    if window and names is _ENCODER:
        # LED fills its input up to a whole number of windows.
        width = window if isinstance(window, int) else max(window)
        length -= length % width
    return length
