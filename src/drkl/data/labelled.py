"""Texts with labels, for classification."""

from __future__ import annotations

from drkl.data.config import DataConfig
from drkl.data.examples import Example, load_examples, parse_rows, read_examples
from drkl.data.files import dataset_rows
from drkl.errors import DrklError

Labelled = tuple[str, str, str]
"""id, text, label"""


def read_labelled(path: str | None = None, dataset: str | None = None) -> list[Labelled]:
    """Read ``(id, text, label)`` of every row of a file or of a data set; whole-number labels become text.

    Raises:
        DrklError: a file or data set that is missing or unreadable, or a bad row (with file:line).
    """
    if (path is None) == (dataset is None):
        raise DrklError("Expected exactly one of path and dataset for rows with text and label.")
    if path is not None:
        return _labelled(read_examples(path, "text_label"))
    assert dataset is not None
    return _labelled(parse_rows(dataset_rows(dataset), dataset, "text_label"))


def load_labelled(config: DataConfig) -> tuple[list[Labelled], list[Labelled]]:
    """Return the training rows and the held-out rows of a data section, by the same rules as ``load_examples``.

    Raises:
        DrklError: as ``read_labelled``.
    """
    train, held_out = load_examples(config.model_copy(update={"format": "text_label"}))
    return _labelled(train), _labelled(held_out)


def _labelled(examples: list[Example]) -> list[Labelled]:
    return [(example.id, example.prompt_text, example.label or "") for example in examples]
