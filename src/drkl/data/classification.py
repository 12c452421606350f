"""Rows for classification: texts with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drkl.data.encoding import batched
from drkl.data.examples import Example
from drkl.data.tokenize import DropReport, NothingLeft
from drkl.errors import DrklError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labelled = tuple[str, str, str]
"""id, text, label"""


@dataclass(frozen=True)
class LabelledRow:
    """A tokenised text with the id of its class."""

    id: str
    ids: tuple[int, ...]
    label: int
    text: str

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every token of the row."""
        return self.ids

    @property
    def num_trained(self) -> int:
        """Number of positions that have a loss: one, the text's class."""
        return 1

    @property
    def length(self) -> int:
        """Number of positions the model is fed."""
        return len(self.ids)


def labelled_texts(examples: Iterable[Example]) -> list[Labelled]:
    """Return ``(id, text, label)`` of examples that have a label."""
    return list(each_labelled(examples))


def each_labelled(examples: Iterable[Example]) -> Iterator[Labelled]:
    """Yield ``(id, text, label)`` of examples that have a label."""
    return ((example.id, example.prompt_text, example.label or "") for example in examples)


def label_set(labelled: Iterable[Labelled]) -> tuple[str, ...]:
    """Return the labels of rows as class names, sorted: the order of the rows does not matter.

    Raises:
        DrklError: fewer than two labels.
    """
    labels = tuple(sorted({label for _, text, label in labelled if text.strip() and label.strip()}))
    if len(labels) < 2:
        only = f"only {labels[0]!r}" if labels else "none"
        raise DrklError(f"Classification needs at least two labels; the training rows have {only}.")
    return labels


def tokenize_labelled(
    labelled: Iterable[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    *,
    max_tokens: int,
) -> tuple[list[LabelledRow], DropReport]:
    """Return the usable rows, in order, and the account of the others.

    A text is encoded with the tokenizer's special tokens. A text longer than ``max_tokens``, or than the tokenizer's
    own limit, is cut at its end and counted. Rows with an empty text or label are dropped.

    Raises:
        DrklError: an unknown label, or no row left.
    """
    rows, report = label_chunk(labelled, tokenizer, classes, max_tokens=max_tokens)
    report.kept = len(rows)
    if not rows:
        raise NothingLeft(report, no_text_left(report))
    return rows, report


def no_text_left(report: DropReport) -> str:
    """The error for a data set of which no row is left."""
    return f"None of the {sum(report.dropped.values())} rows has both a text and a label."


def label_chunk(
    labelled: Iterable[Labelled], tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], *, max_tokens: int
) -> tuple[list[LabelledRow], DropReport]:
    """Return the rows of some texts and the account of the others, by the rules of `tokenize_labelled`."""
    ids_of = {name: number for number, name in enumerate(classes)}
    limit = min(max_tokens, tokenizer.model_max_length)
    rows: list[LabelledRow] = []
    report = DropReport(what_is_cut="texts")
    for batch in batched(labelled, lambda row: len(row[1])):
        usable: list[Labelled] = []
        for row_id, text, label in batch:
            reason = None if text.strip() else "empty_text"
            reason = reason or (None if label.strip() else "empty_label")
            if reason is not None:
                report.dropped[reason] = report.dropped.get(reason, 0) + 1
                continue
            if label not in ids_of:
                raise _unknown_label(row_id, label, classes)
            usable.append((row_id, text, label))
        encoded = tokenizer([text for _, text, _ in usable], verbose=False)["input_ids"] if usable else []
        for (row_id, text, label), ids in zip(usable, encoded, strict=True):
            if len(ids) > limit:
                ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
                report.responses_cut += 1
            rows.append(LabelledRow(row_id, tuple(ids), ids_of[label], text))
    return rows, report


def _unknown_label(row_id: str, label: str, classes: Sequence[str]) -> DrklError:
    known = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    return DrklError(
        f"Row {row_id!r} has the label {label!r}, which is none of the {len(classes)} classes: {known}."
        f"{did_you_mean(label, classes)} A teacher brings the classes (id2label of its config.json); without one they "
        "are the labels of the training rows. Rename the label, or take such rows out."
    )
