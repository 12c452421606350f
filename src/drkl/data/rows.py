"""The rows of a data section, for a language model or for a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drkl.data.classification import LabelledRow, load_labelled, tokenize_labelled
from drkl.data.config import DataConfig
from drkl.data.examples import load_examples
from drkl.data.tokenize import DropReport, Row, tokenize_examples

Rows = list[Row] | list[LabelledRow]


def read_shares(config: DataConfig, *, classifier: bool) -> tuple[Any, Any]:
    """Read the training and the held-out examples; of a classifier labelled texts."""
    return load_labelled(config) if classifier else load_examples(config)


def make_rows(
    examples: Any,
    config: DataConfig,
    tokenizer: Any,
    *,
    classes: Sequence[str] | None,
    encoder_decoder: bool = False,
) -> tuple[Rows, DropReport]:
    """Tokenise one share of `read_shares` as the section says.

    Args:
        examples: the share.
        config: its section.
        tokenizer: the run's.
        classes: of a classifier, by number; None for a language model.
        encoder_decoder: which kind of language model.
    """
    if classes is not None:
        return tokenize_labelled(examples, tokenizer, classes, max_tokens=config.max_tokens)
    return tokenize_examples(examples, tokenizer, **config.row_settings, encoder_decoder=encoder_decoder)
