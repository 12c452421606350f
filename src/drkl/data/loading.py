"""Rows of sources from the cache of tokenised rows, or made and kept there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drkl.data.classification import label_chunk, labelled_texts, no_text_left
from drkl.data.examples import Example, each_example
from drkl.data.lengths import NO_LIMIT, Lengths, Room
from drkl.data.making import Chosen, Settings, make
from drkl.data.sources import Source, tokenizer_identity
from drkl.data.split import Reader, Scan, scan
from drkl.data.store import READING, Made, Parts, Watch, key_of, made
from drkl.data.tokenize import Chunk, tokenize_chunk
from drkl.data.tokenized import class_name
from drkl.data.views import view_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.files import Rows


class Wanted(NamedTuple):
    """Rows of a source that are wanted, as `load` takes them.

    Args:
        source: the rows.
        row_format: as ``data.format``.
        choose: from all rows those that are tokenised, and those that are given back as examples; None for either is
            all of them, and none.
        facts: what ``choose`` depends on besides the rows.
        prefix: stands before every id.
        weight: how often an epoch takes the rows.
    """

    source: Source
    row_format: str = "auto"
    choose: Callable[[Scan], tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]] = lambda rows: (None, None)
    facts: Sequence[Any] = ()
    prefix: str = ""
    weight: float = 1.0


def settings_of(
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    *,
    classes: Sequence[str] | None = None,
    encoder_decoder: bool = False,
    turns: str = "last",
    template: str = "auto",
    room: Room = NO_LIMIT,
    ends: Sequence[int] = (),
    needs_responses: bool = True,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Settings, dict[str, Any] | None]:
    """Return how examples become rows, and as json all that this depends on; None where that cannot be told.

    The arguments are those of `drkl.data.rows.rows_from`.
    """
    facts: dict[str, Any] = {
        "tokenizer": (known := tokenizer_identity(tokenizer)), "lengths": list(lengths), "classes": classes,
        "encoder_decoder": encoder_decoder, "turns": turns, "template": template, "room": list(room),
        "ends": list(ends), "needs_responses": needs_responses, "teacher": None,
    }  # fmt: skip
    if classes is not None:

        def label(examples: list[Example]) -> Chunk:
            labelled = labelled_texts(examples)
            rows, report = label_chunk(labelled, tokenizer, classes, max_tokens=lengths.max_tokens)
            made_of: list[Any] = list(rows)
            return Chunk(made_of, report=report)

        settings = Settings(label, tokenizer, lengths, room, nothing_left=no_text_left)
        return settings, facts if known else None
    teacher = view_of(teacher_tokenizer, tokenizer, template, encoder_decoder=encoder_decoder)
    if teacher is not None:
        facts["teacher"] = tokenizer_identity(teacher_tokenizer)
        known = known and facts["teacher"]
    tokenize = partial(
        tokenize_chunk, tokenizer=tokenizer, **lengths._asdict(), turns=turns, template=template, room=room, ends=ends,
        encoder_decoder=encoder_decoder, needs_responses=needs_responses, teacher=teacher,
    )  # fmt: skip
    settings = Settings(tokenize, tokenizer, lengths, room, encoder_decoder, template, teacher)
    return settings, facts if known else None


def load(wanted: Sequence[Wanted], tokenizer: Any, lengths: Lengths, watch: Watch | None = None, **kind: Any) -> Made:
    """Return the rows of some sources, one after the other, from the cache or made anew.

    Args:
        wanted: the sources.
        tokenizer: as `settings_of` takes it, and so are the next and ``kind``.
        lengths: the limits of prompts and rows.
        watch: hooks for a front end.
        **kind: the model and how examples become rows.

    Raises:
        DrklError: a bad row, or no row is left.
        NotStorable: the rows cannot be written into files; they are to be made in memory.
    """
    watch = watch or Watch()
    settings, facts = settings_of(tokenizer, lengths, **kind)
    identities = [one.source.identity() for one in wanted]
    kept = facts is not None and None not in identities
    described = [
        [identity, one.row_format, one.facts, one.prefix, one.weight]
        for identity, one in zip(identities, wanted, strict=True)
    ]
    needs_responses = kind.get("needs_responses", True)
    classes = kind.get("classes")
    # A number of its own for rows that no later run could know again.
    key = key_of({"sources": described, "rows": facts} if kept else {"of": id(wanted), "at": np.random.rand()})

    def make_all(parts: Parts) -> dict[str, Any]:
        chosen = []
        for one in wanted:
            read = reader(one.row_format, classes, needs_responses=needs_responses)
            found = scan(one.source, read, one.prefix, lambda rows: watch.on_rows(READING, rows, 0))
            train, heldout = one.choose(found)
            size = len(found)
            train = np.ones(size, np.bool_) if train is None else train
            heldout = np.zeros(size, np.bool_) if heldout is None else heldout
            chosen.append(Chosen(found, read, train, heldout, one.weight))
        return make(chosen, settings, parts, watch)

    return made(key, make_all, watch, kept=kept)


def reader(row_format: str, classes: Sequence[str] | None, *, needs_responses: bool) -> Reader:
    """What makes examples of rows; for a classifier of texts, whose labels may be numbers of classes."""
    wanted = row_format if classes is None else "text_label"

    def read(rows: Rows) -> Iterator[tuple[str, str | None, Example]]:
        return each_example(with_class_names(rows, classes), wanted, needs_responses=needs_responses)

    return read


def with_class_names(items: Any, classes: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Yield rows whose labels are the names of classes, where they were numbers of some."""
    for place, row in items:
        if classes is not None and isinstance(row, Mapping) and "label" in row:
            row = {**row, "label": class_name(row["label"], classes)}
        yield place, row
