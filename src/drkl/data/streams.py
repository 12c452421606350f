"""Rows of what has no end: read and tokenised as they are needed, shuffled window by window, resumed at any window."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drkl.data.batching import plan_epochs
from drkl.data.config import SHUFFLE_BUFFER, DataConfig
from drkl.data.cursors import Cursor, Open, counted, open_dataset, open_file, open_path, open_stream
from drkl.data.examples import free_id, written_id
from drkl.data.rows import Placed, dataset_items, rows_from
from drkl.data.seq2seq import set_languages
from drkl.data.tokenize import DropReport, NothingLeft
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 4_000_000
"""Rows that are tokenised at once, at most, and the text in them: a chunk ends with the row that reaches it."""
PATIENCE = 100_000
"""So many rows without a usable one end the run where there never was one; later they are told."""
SAMPLE_ROWS = 1000
"""The first rows, by which models and rows are checked before the first step."""
_log = logging.getLogger("drkl")

Tokenize = Callable[[Placed, str, str], tuple[Any, DropReport]]
"""From rows, what errors call their source, and their format, to tokenised rows and the account of the others."""


@dataclass(frozen=True)
class Source:
    """One of the sources of a stream.

    Args:
        name: what errors call it.
        open: opens it.
        weight: its share of the rows is this in the sum of all weights.
        row_format: as `DataConfig.format`.
        max_rows: it ends after so many rows; None for all.
    """

    name: str
    open: Open
    weight: float = 1.0
    row_format: str = "auto"
    max_rows: int | None = None


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled among each other, and the optimiser steps that they are divided into.

    Args:
        number: of the window, from 0.
        first_step: the number of its first step.
        rows: tokenised rows.
        steps: for each step the places of its rows.
        begin: the state of the stream before the window, as json: `RowStream.windows` goes on from it.
        rows_read: rows of all sources that were read up to here.
        dropped: how many of them could not be used, by reason.
        responses_cut: how many were cut at their end.
        digest: a hash of the tokens of the rows.
    """

    number: int
    first_step: int
    rows: Sequence[Any]
    steps: Sequence[Sequence[int]]
    begin: dict[str, Any]
    rows_read: int
    dropped: dict[str, int]
    responses_cut: int
    digest: str

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.first_step + len(self.steps)

    def rows_of(self, step: int) -> list[Any]:
        """The rows of a step, by its number in the run."""
        return [self.rows[place] for place in self.steps[step - self.first_step]]


@dataclass
class RowStream:
    """The rows of one or several sources without end.

    A window has ``shuffle_buffer`` usable rows; of a single source it ends where the source ends, and the next one
    begins with the source again. Several sources take turns by their weights, and each begins again by itself. Within
    a window rows are shuffled and grouped by length as those of a run without a stream are in an epoch.

    Args:
        sources: where rows come from.
        tokenize: makes rows of rows.
        shuffle_buffer: usable rows in a window.
    """

    sources: Sequence[Source]
    tokenize: Tokenize
    shuffle_buffer: int = SHUFFLE_BUFFER

    @property
    def name(self) -> str:
        """The sources in a few words."""
        return ", ".join(source.name for source in self.sources)

    def sample(self) -> tuple[list[Any], DropReport]:
        """Return the first rows of the stream, in order, and the account of them.

        Raises:
            DrklError: a source cannot be read, or nothing of it can be used.
        """
        mixed = _Mixed(self, None)
        rows = mixed.take(min(SAMPLE_ROWS, self.shuffle_buffer))
        report = DropReport()
        for source in mixed.sources:
            _add(report, source.report)
        return rows, report

    def windows(
        self,
        state: Mapping[str, Any] | None = None,
        *,
        seed: int,
        tokens_per_step: int | None = None,
        rows_per_step: int | None = None,
        drop_last: bool = False,
    ) -> Iterator[Window]:
        """Yield window after window, without end.

        Args:
            state: where to begin, a `Window.begin`; None for the begin of the stream.
            seed: of the shuffles.
            tokens_per_step: as `plan_epochs` takes it, and so are the others.
            rows_per_step: see ``tokens_per_step``. A window is filled up to a whole step, unless a source ends in it.
            drop_last: see ``tokens_per_step``.

        Raises:
            DrklError: a row that cannot be used (with its place), or none can.
        """
        mixed = _Mixed(self, state)
        first, step = (0, 0) if state is None else (int(state["window"]), int(state["step"]))
        size = self.shuffle_buffer
        if rows_per_step is not None:
            size = rows_per_step * -(-size // rows_per_step)
        was_short = False
        for number in itertools.count(first):
            begin = {"window": number, "step": step, **mixed.state()}
            rows = mixed.take(size)
            is_short = drop_last and len(rows) < (rows_per_step or 0)
            if is_short and not was_short:
                was_short = True  # the end of a source, left out; two of them are the whole of it
                continue
            was_short = False
            lengths = [row.length for row in rows]
            plan = plan_epochs(
                lengths, tokens_per_step=tokens_per_step, rows_per_step=rows_per_step, seed=seed, drop_last=drop_last,
                first=number,
            )  # fmt: skip
            window = Window(number, step, rows, next(plan), begin, **mixed.account(), digest=_digest(rows))
            step = window.end
            yield window


class _Mixed:
    """The sources of a stream, taking turns."""

    def __init__(self, stream: RowStream, state: Mapping[str, Any] | None) -> None:
        several = len(stream.sources) > 1
        places: Sequence[Any] = [None] * len(stream.sources) if state is None else state["sources"]
        self.sources = [
            _Chunks(source, stream, place, f"{number}:" if several else "")
            for number, (source, place) in enumerate(zip(stream.sources, places, strict=True), start=1)
        ]
        self._given = [0] * len(self.sources) if state is None else [int(count) for count in state["given"]]

    def state(self) -> dict[str, Any]:
        return {"given": list(self._given), "sources": [source.state() for source in self.sources]}

    def account(self) -> dict[str, Any]:
        """What `Window` says of the rows that were read."""
        return {
            "rows_read": sum(source.rows_read for source in self.sources),
            "dropped": dict(sum((Counter(source.dropped) for source in self.sources), Counter[str]())),
            "responses_cut": sum(source.responses_cut for source in self.sources),
        }

    def take(self, count: int) -> list[Any]:
        """So many rows; fewer where a single source ends."""
        rows: list[Any] = []
        while len(rows) < count:
            # The source that would be furthest behind its share; the first of several.
            turn = min(
                range(len(self.sources)), key=lambda i: ((self._given[i] + 1) / self.sources[i].source.weight, i)
            )
            row = self.sources[turn].next_row()
            if row is not None:
                rows.append(row)
                self._given[turn] += 1
            elif len(self.sources) == 1 and rows:
                break
        return rows


class _Chunks:
    """The usable rows of one source, tokenised chunk by chunk, pass after pass.

    Its state is where the present chunk begins, and how many of the chunk's usable rows were given away.
    """

    def __init__(self, source: Source, stream: RowStream, state: Mapping[str, Any] | None, prefix: str) -> None:
        self.source, self._tokenize, self._prefix = source, stream.tokenize, prefix
        self._chunk_rows = min(CHUNK_ROWS, stream.shuffle_buffer)
        start: Mapping[str, Any] = {} if state is None else state
        self._begin: dict[str, Any] = {"position": start.get("position"), "dropped": dict(start.get("dropped", {}))}
        self._begin |= {name: int(start.get(name, 0)) for name in ("row", "read", "cut")}
        self.rows_read, self.responses_cut = self._begin["read"], self._begin["cut"]
        self.dropped = Counter[str](self._begin["dropped"])
        """By reason; in all passes, as the other two."""
        self.report = DropReport()
        """The account of the rows that were read here."""
        self._row = self._begin["row"]
        """Rows of the pass that were read."""
        self._rows: Sequence[Any] = []
        self._taken = 0
        self._has_kept = self.rows_read > self.dropped.total()
        self._unused = 0
        """Rows since the last usable one."""
        self._has_warned = False
        self._why = ""
        """The reason of those."""
        self._open(self._begin["position"])
        if start.get("taken"):
            self._read_chunk()
            self._taken = int(start["taken"])

    def state(self) -> dict[str, Any]:
        return {**self._begin, "taken": self._taken}

    def next_row(self) -> Any | None:
        """The next row; None once where a pass ends, after which the source begins again."""
        while self._taken >= len(self._rows):
            self._begin |= {"position": self._cursor.position(), "row": self._row}
            self._begin |= {"read": self.rows_read, "dropped": dict(self.dropped), "cut": self.responses_cut}
            if not self._read_chunk():
                self._next_pass()
                return None
        self._taken += 1
        return self._rows[self._taken - 1]

    def _open(self, position: Any) -> None:
        self._cursor: Cursor = self.source.open(position)
        self._items = iter(self._cursor)

    def _next_pass(self) -> None:
        if not self._has_kept:
            raise DrklError(f"{self.source.name} has no rows." if not self.rows_read else self._nothing())
        self._row = 0
        self._begin |= {"position": None, "row": 0}
        self._rows, self._taken = [], 0
        self._open(None)

    def _read_chunk(self) -> bool:
        """Tokenise the next rows; whether there were any."""
        items = list(self._next_items())
        self._rows, self._taken = [], 0
        if not items:
            return False
        self._row += len(items)
        self.rows_read += len(items)
        try:
            self._rows, report = self._tokenize(Placed(items), self.source.name, self.source.row_format)
        except NothingLeft as error:
            report, self._why = error.report, str(error)
        _add(self.report, report)
        self.dropped.update(report.dropped)
        self.responses_cut += report.responses_cut
        self._has_kept |= bool(self._rows)
        self._see_unused(0 if self._rows else len(items), items[-1][0])
        return True

    def _nothing(self) -> str:
        return (
            f"{self.source.name}: nothing is left of its first {self.rows_read:,} rows. Of the last ones: {self._why}"
        )

    def _see_unused(self, count: int, place: str) -> None:
        self._unused = self._unused + count if count else 0
        if self._unused < PATIENCE or self._has_warned:
            return
        if not self._has_kept:
            raise DrklError(self._nothing())
        self._has_warned = True
        _log.warning(
            "Warning: up to %s, %s rows in a row could not be used; the stream is read on. %s",
            place, f"{self._unused:,}", self._why,
        )  # fmt: skip

    def _next_items(self) -> Iterator[tuple[str, Any]]:
        """Rows of the next chunk, each with an id that is its own in there."""
        limit = self._chunk_rows
        if self.source.max_rows is not None:
            limit = min(limit, self.source.max_rows - self._row)
        characters, taken = 0, set[str]()
        for number, (place, row) in enumerate(itertools.islice(self._items, max(0, limit)), start=self._row + 1):
            if isinstance(row, Mapping):
                own = free_id(self._prefix + (written_id(place, row) or f"row-{number}"), taken)
                taken.add(own)
                row = {**row, "id": own}
                characters += sum(len(value) for value in row.values() if isinstance(value, str))
            yield place, row
            if characters >= CHUNK_CHARACTERS:
                return


def stream_of(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: Sequence[str] | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    **kind: Any,
) -> RowStream:
    """Return the training rows of a data section as a stream; arguments as for `rows_from`.

    Raises:
        DrklError: a source that cannot be opened.
    """
    for reader in (tokenizer, teacher_tokenizer):
        if reader is not None:
            set_languages(reader, config.src_lang, config.tgt_lang)
    kind |= {"classes": classes, "teacher_tokenizer": teacher_tokenizer, **config.row_settings}
    sources = []
    for source in config.all_sources():
        row_format = source.format or "auto"
        opens = open_dataset(source.dataset) if source.dataset else open_file(str(source.path), row_format)
        sources.append(Source(source.name, opens, source.weight, row_format, source.max_rows))
    return RowStream(sources, tokenizing(tokenizer, **kind), config.shuffle_buffer)


def stream_from(dataset: Any, name: str, tokenize: Tokenize, shuffle_buffer: int) -> RowStream:
    """Return a data set, as `rows_from` takes it, or a ``datasets.IterableDataset``, as a stream.

    Raises:
        DrklError: a data set of another kind, or one that cannot be opened.
    """
    dataset = _only_split(dataset)
    if isinstance(dataset, str | os.PathLike):
        opens, name = open_path(dataset), os.fspath(dataset)
    elif has_no_end(dataset):
        opens = open_stream(dataset, name)
    else:
        opens = counted(lambda count: itertools.islice(iter(dataset_items(dataset, name)), count, None))
    return RowStream([Source(name, opens)], tokenize, shuffle_buffer)


def has_no_end(dataset: Any) -> bool:
    """Whether a data set is a ``datasets.IterableDataset``, or holds one as its only split."""
    datasets = sys.modules.get("datasets")  # before it is imported nothing is of its classes
    return datasets is not None and isinstance(_only_split(dataset), datasets.IterableDataset)


def _only_split(dataset: Any) -> Any:
    datasets = sys.modules.get("datasets")
    is_one = datasets is not None and isinstance(dataset, datasets.IterableDatasetDict) and len(dataset) == 1
    return next(iter(dataset.values())) if is_one else dataset


def tokenizing(
    tokenizer: PreTrainedTokenizerBase, *, teacher_tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> Tokenize:
    """Return what tokenises parts of a stream with the settings of `rows_from`, beside whatever else goes on.

    The tokenizers are copied: one may be used by one thread at a time.
    """
    own, theirs = copy.deepcopy(tokenizer), copy.deepcopy(teacher_tokenizer)

    def tokenize(part: Placed, name: str, row_format: str) -> tuple[Any, DropReport]:
        return rows_from(part, own, name=name, row_format=row_format, teacher_tokenizer=theirs, **settings)

    return tokenize


def _add(report: DropReport, more: DropReport) -> None:
    """Add the account of other rows, each of which was finished for itself."""
    report.add(more)
    report.kept += more.kept
    report.documents += more.documents
    report.what_is_cut = more.what_is_cut
    report.date = report.date or more.date
    report.difference = report.difference or more.difference


def _digest(rows: Iterable[Any]) -> str:
    """A hash of the tokens of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.id, row.all_ids, row.length)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
