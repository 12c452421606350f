"""Make the tokenised rows of sources, part by part, in as many processes as there are cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from drkl.data.examples import Example, free_id
from drkl.data.lengths import Lengths, Room
from drkl.data.rendering import date_told
from drkl.data.split import Reader, Scan
from drkl.data.store import TOKENISING, Parts, Watch, facts_of, manifest_of, merged, order_by_weight
from drkl.data.stored import RowFiles, StoredRows, from_json, to_json, to_record
from drkl.data.tokenize import (
    Chunk,
    DropReport,
    NothingLeft,
    Text,
    around_texts,
    block_rows,
    nothing_left,
    taken_once_more,
)
from drkl.data.views import TeacherView
from drkl.data.workers import in_order, num_cores
from drkl.errors import DrklError

CHUNK_ROWS = 2048
"""Examples that are tokenised, and written, at once."""
PART_ROWS = 4096
"""Rows of a part at least; a part is what a start after a kill does not do again."""
MOST_PARTS = 256
CHUNK_BLOCKS = 1024


class Chosen(NamedTuple):
    """The rows of a source that are wanted."""

    scan: Scan
    read: Reader
    train: NDArray[np.bool_]
    """Which rows are tokenised."""
    heldout: NDArray[np.bool_]
    """Which rows are given back as examples."""
    weight: float


class Task(NamedTuple):
    """The blocks of a part."""

    name: str
    source: int
    first: int
    """The number of the first row."""
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Settings:
    """How examples become rows.

    Args:
        tokenize: tokenises a chunk of examples.
        tokenizer: the one that both models share.
        lengths: the limits of prompts and rows.
        room: the models' context.
        encoder_decoder: whether the language model is one.
        template: as ``data.template``.
        teacher: how a teacher reads the prompts, where that is otherwise.
        nothing_left: the error where no row is left, of a classifier; None for a language model's.
    """

    tokenize: Callable[[list[Example]], Chunk]
    tokenizer: Any
    lengths: Lengths
    room: Room
    encoder_decoder: bool = False
    template: str = "auto"
    teacher: TeacherView | None = None
    nothing_left: Callable[[DropReport], str] | None = None


def make(sources: Sequence[Chosen], settings: Settings, parts: Parts, watch: Watch) -> dict[str, Any]:
    """Tokenise the rows of some sources that are not made yet, and return the manifest of all.

    Raises:
        DrklError: no row is left, or a row that the chat template refuses.
        NotStorable: a row cannot be written.
    """
    total = sum(int(source.train.sum()) for source in sources)
    processes = num_cores() if total > PART_ROWS else 1
    done = 0
    parts.expect(total)
    # Few rows are made before a bar could be read.
    show = watch.on_rows if total > PART_ROWS else Watch().on_rows
    show(TOKENISING, 0, total)
    found: list[dict[str, Any]] = []

    def work(task: Task) -> dict[str, Any]:
        return _make_part(task, sources[task.source], settings, parts)

    tasks = _Tasks(sources, parts, max(PART_ROWS, total // MOST_PARTS))
    for about in _with_known(tasks, in_order(work, tasks, processes)):
        found.append(about)
        done += about["wanted"]
        show(TOKENISING, done, total)
    return _finish(found, settings, parts, processes)


class _Tasks:
    """The parts that are to be made; those that are there already are noted with how many were to be made before."""

    def __init__(self, sources: Sequence[Chosen], parts: Parts, size: int) -> None:
        self._sources, self._parts, self._size = sources, parts, size
        self.known: list[tuple[int, dict[str, Any]]] = []

    def __iter__(self) -> Iterator[Task]:
        given = 0
        for number, task in enumerate(self._all()):
            task = task._replace(name=f"{number:05d}")
            about = self._parts.read(task.name)
            if about is not None:
                self.known.append((given, about))
                continue
            given += 1
            yield task

    def _all(self) -> Iterator[Task]:
        for number, source in enumerate(self._sources):
            wanted = source.train | source.heldout
            start = first = chosen = 0
            blocks: list[Any] = []
            for block, size in source.scan.blocks():
                here = int(wanted[start : start + size].sum())
                if not blocks:
                    first = start
                if here or blocks:
                    blocks.append(block)
                start, chosen = start + size, chosen + here
                if chosen >= self._size:
                    yield Task("", number, first, blocks)
                    blocks, chosen = [], 0
            if chosen:
                yield Task("", number, first, blocks)


def _with_known(tasks: _Tasks, made: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All parts in order: those that are made, and those that were there."""
    for count, about in enumerate(made):
        while tasks.known and tasks.known[0][0] <= count:
            yield tasks.known.pop(0)[1]
        yield about
    for _, about in tasks.known:
        yield about


def _make_part(task: Task, source: Chosen, settings: Settings, parts: Parts) -> dict[str, Any]:
    part = _Part(task, source, settings)
    said: dict[str, Any] = parts.write(task.name, part.batches(), part.about)
    return said


class _Part:
    """The rows of some blocks, and what is said of them once they are made."""

    def __init__(self, task: Task, source: Chosen, settings: Settings) -> None:
        self._task, self._source, self._settings = task, source, settings
        self._report = DropReport()
        self._shortest: list[int] = []
        self._wanted = self._kept = self._texts = 0
        self._heldout: list[tuple[str, str]] = []

    def batches(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        left = self._examples()
        while examples := list(islice(left, CHUNK_ROWS)):
            chunk = self._settings.tokenize(examples)
            self._report.what_is_cut = chunk.report.what_is_cut
            self._report.add(chunk.report)
            self._shortest += [] if chunk.shortest is None else [chunk.shortest]
            self._kept += len(chunk.rows)
            self._texts += len(chunk.texts)
            if chunk.rows:
                yield "rows", to_record(chunk.rows)
            if chunk.texts:
                yield "texts", _text_record(chunk.texts)

    def _examples(self) -> Iterator[Example]:
        scan, source = self._source.scan, self._source
        rows = chain.from_iterable(map(scan.source.read, self._task.blocks))
        for number, (_, own, example) in enumerate(source.read(rows), start=self._task.first):
            if source.heldout[number]:
                name = scan.name(number, own)
                self._heldout.append((name, to_json(replace(example, id=name))))
            if source.train[number]:
                self._wanted += 1
                yield replace(example, id=scan.name(number, own), weight=source.weight)

    def about(self) -> dict[str, Any]:
        return {
            "wanted": self._wanted, "rows": self._kept, "texts": self._texts, "report": asdict(self._report),
            "shortest": min(self._shortest, default=None), "weight": self._source.weight, "heldout": self._heldout,
        }  # fmt: skip


def _text_record(texts: Sequence[Text]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "id": pa.array([text.id for text in texts], pa.string()),
            "weight": pa.array([text.weight for text in texts], pa.float64()),
            "ids": pa.array([list(text.ids) for text in texts], pa.list_(pa.int32())),
        }
    )


def _finish(found: Sequence[dict[str, Any]], settings: Settings, parts: Parts, processes: int) -> dict[str, Any]:
    """Cut the texts into blocks, weigh the rows, and say what there is to say of all."""
    report = DropReport()
    if found:
        report.what_is_cut = found[0]["report"]["what_is_cut"]
    report = merged((about["report"] for about in found), report)
    files = {name: facts for about in found for name, facts in about["files"].items() if name.startswith("rows-")}
    weights = [np.full(about["rows"], about["weight"]) for about in found]
    report.documents = sum(about["texts"] for about in found)
    if sum(map(len, weights)) and not settings.encoder_decoder and settings.nothing_left is None:
        report.date = date_told(settings.tokenizer, settings.template)
    if report.documents:
        cut = _cut_texts(found, list(files), settings, parts, processes)
        files |= {name: facts for about in cut for name, facts in about["files"].items()}
        weights += [np.full(about["rows"], about["weight"]) for about in cut]
    weight = np.concatenate([np.empty(0), *weights])
    report.kept = len(weight)
    if not len(weight):
        raise NothingLeft(report, _nothing(report, found, settings))
    rows = StoredRows(RowFiles([parts.folder / name for name in files]))
    if settings.teacher is not None and len(numbers := np.flatnonzero(rows.column("teacher"))):
        report.difference = settings.teacher.difference(rows[int(numbers[0])], settings.tokenizer)
    heldout = [one for about in found for one in about["heldout"]]
    renamed: dict[tuple[int, int], str] = {}
    if (weight != 1).any() and settings.nothing_left is None:
        order, copies = order_by_weight(weight, lambda numbers: _ids(rows, numbers), taken_once_more)
        report.per_epoch = len(order)
        if not len(order):
            raise DrklError("The weights of data.sources leave no row; raise one of them.")
        renamed = _renamed(rows, order, copies)
        for name, values in (("order.npy", order), ("copies.npy", copies)):
            np.save(parts.folder / name, values)
            files[name] = facts_of(parts.folder / name)
    return manifest_of(report, files, renamed, heldout=heldout)


def _nothing(report: DropReport, found: Sequence[dict[str, Any]], settings: Settings) -> str:
    if settings.nothing_left is not None:
        return settings.nothing_left(report)
    shortest = min((about["shortest"] for about in found if about["shortest"] is not None), default=None)
    return nothing_left(report, shortest, settings.lengths, settings.room)


def _ids(rows: StoredRows, numbers: NDArray[np.int64]) -> list[str]:
    wanted = np.zeros(len(rows), np.bool_)
    wanted[numbers] = True
    return [name for name, is_wanted in zip(rows.ids(), wanted.tolist(), strict=True) if is_wanted]


def _renamed(rows: StoredRows, order: NDArray[np.int64], copies: NDArray[np.int32]) -> dict[tuple[int, int], str]:
    """The ids of repeated rows whose own with ``#2`` and so on is another row's; few, if any."""
    marked = {name for name in rows.ids() if "#" in name}
    if not marked:
        return {}
    names = list(rows.ids())
    taken, renamed = set(names), {}
    for number, copy in zip(order.tolist(), copies.tolist(), strict=True):
        wanted = f"{names[number]}#{copy + 1}"
        if copy and wanted in taken:
            renamed[number, copy] = free_id(wanted, taken)
    return renamed


# texts ------------------------------------------------------------------------------------------------------------


class _Texts:
    """Texts of one weight, joined."""

    def __init__(self, batches: Sequence[pa.RecordBatch], around: tuple[int, int], max_tokens: int) -> None:
        self._begin, self._eos = around
        self._step = max_tokens - 1
        self._names = [batch.column("id") for batch in batches]
        self._ids = [batch.column("ids") for batch in batches]
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        sizes = [np.diff(column.offsets.to_numpy()) + 1 for column in self._ids]
        self._ends = np.cumsum(np.concatenate(sizes), dtype=np.int64)
        """Where in the stream each text and the eos after it ends, without the first token."""

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._step)

    def block(self, number: int) -> tuple[str, list[int]]:
        """The id of the text that a block begins in, and its tokens."""
        start = number * self._step
        end = min(start + self._step, int(self._ends[-1]))
        tokens = self._tokens(start - 1, end) if start else [self._begin, *self._tokens(0, end)]
        return self._name(self._at(start)), tokens

    def _at(self, place: int) -> int:
        return int(np.searchsorted(self._ends, place, side="right"))

    def _tokens(self, start: int, end: int) -> list[int]:
        """The stream from ``start`` to before ``end``; of a text, which may be a book, only what lies there."""
        ids: list[int] = []
        for text in range(self._at(start), self._at(end - 1) + 1):
            before = int(self._ends[text - 1]) if text else 0
            ids += self._part(text, max(start - before, 0), end - before)
            if end >= self._ends[text]:
                ids.append(self._eos)
        return ids

    def _place(self, text: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._firsts, text, side="right")) - 1
        return batch, text - int(self._firsts[batch])

    def _name(self, text: int) -> str:
        batch, place = self._place(text)
        return str(self._names[batch][place].as_py())

    def _part(self, text: int, start: int, end: int) -> list[int]:
        """The tokens of a text from ``start`` to before ``end``, or to its last."""
        batch, place = self._place(text)
        column = self._ids[batch]
        first, last = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
        ids: list[int] = column.values[first + start : min(first + end, last)].to_numpy().tolist()
        return ids


def _cut_texts(
    found: Sequence[dict[str, Any]], files: Sequence[str], settings: Settings, parts: Parts, processes: int
) -> list[dict[str, Any]]:
    """Make the rows of all texts, those of one weight after those of another, and return what is said of the parts."""
    around = around_texts(settings.tokenizer)
    by_weight: dict[float, list[pa.RecordBatch]] = {}
    for about in found:
        for name in about["files"]:
            if name.startswith("texts-"):
                with pa.memory_map(str(parts.folder / name)) as file, pa.ipc.open_stream(file) as stream:
                    by_weight.setdefault(about["weight"], []).extend(stream)
    made: list[dict[str, Any]] = []
    before = sum(about["rows"] for about in found)
    for number, (weight, batches) in enumerate(by_weight.items()):
        texts = _Texts(batches, around, settings.lengths.max_tokens)
        # Ids that blocks may not have, where there are other rows at all.
        others = [*files, *(name for about in made for name in about["files"])]
        taken = set(RowFiles([parts.folder / name for name in others]).ids())

        work = partial(_make_blocks, number, texts, before, taken, weight, settings, parts)
        made += in_order(work, range(0, len(texts), CHUNK_BLOCKS), processes)
        before += sum(about["rows"] for about in made if about["group"] == number)
    return made


def _make_blocks(
    group: int,
    texts: _Texts,
    before: int,
    taken: set[str],
    weight: float,
    settings: Settings,
    parts: Parts,
    start: int,
) -> dict[str, Any]:
    name = f"blocks-{group}-{start:09d}"
    if (known := parts.read(name)) is not None:
        return known
    blocks = []
    for number in range(start, min(start + CHUNK_BLOCKS, len(texts))):
        text, ids = texts.block(number)
        blocks.append((free_id(f"{text}/{before + number}", taken), Text(text, weight, ()), ids))
    rows = block_rows(
        blocks, settings.tokenizer, settings.lengths.max_prompt_tokens, encoder_decoder=settings.encoder_decoder
    )
    said: dict[str, Any] = parts.write(
        name,
        (("rows", to_record(some)) for some in [rows] if some),
        lambda: {"rows": len(rows), "weight": weight, "group": group},
    )
    return said


def heldout_examples(about: dict[str, Any]) -> list[Example]:
    """The held-out examples that a manifest knows of."""
    return [from_json(name, text) for name, text in about["heldout"]]
