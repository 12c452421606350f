"""Which rows of a source are trained on and which are held out, and what each is called: two hashes for each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drkl.data.examples import (
    HELD_OUT_SHARE,
    MANY_TEXTS,
    MAX_HELD_OUT,
    Example,
    cannot_be_split,
    hash_of_id,
    no_rows,
    row_ids,
)
from drkl.data.files import Rows
from drkl.data.sources import LinesSource, Source
from drkl.data.workers import in_order, num_cores
from drkl.errors import DrklError

Hashes = NDArray[np.uint64]
"""Hashes of 16 bytes, `[rows, 2]`; they sort as the bytes do."""
Reader = Callable[[Rows], Iterator[tuple[str, str | None, Any]]]
"""From ``(place, value)`` to the place, the own id (or None) and what the row is."""


class Facts(NamedTuple):
    """What is known of the rows of a block."""

    ids: Hashes
    """The hashes of the rows' own ids; 0 where there is none."""
    named: NDArray[np.bool_]
    """Whether a row has an id of its own."""
    prompts: Hashes
    """The hashes of the prompts; 0 for a row that is no example."""
    texts: int
    """How many rows are plain texts."""


@dataclass
class Scan:
    """What is known of all rows of a source.

    Args:
        source: its rows.
        sizes: the number of rows of each block.
        prefix: stands before every id.
        renamed: what rows without an id are called whose number is another row's id.
    """

    source: Source
    sizes: list[int]
    facts: Facts
    prefix: str = ""
    renamed: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.sizes)

    def name(self, number: int, own: str | None) -> str:
        """The id of a row, by its number from 0 and its own id."""
        return self.prefix + (own if own is not None else self.renamed.get(number, f"row-{number + 1}"))

    @property
    def by_hash(self) -> NDArray[np.int64]:
        """The numbers of the rows in the order of the hashes of their ids."""
        ids = self.facts.ids.copy()
        unnamed = np.flatnonzero(~self.facts.named)
        ids[unnamed] = _hashes(hash_of_id(self.name(number, None)) for number in unnamed.tolist())
        return np.lexsort((ids[:, 1], ids[:, 0]))

    def blocks(self) -> Iterator[tuple[Any, int]]:
        """Every block of the source again, with the number of its rows.

        Raises:
            DrklError: the source has other blocks by now.
        """
        try:
            yield from zip(self.source.blocks(), self.sizes, strict=True)
        except ValueError as error:
            if isinstance(error, DrklError):
                raise
            raise DrklError(
                f"{self.source.name} changed while it was read. Start again once nothing writes to it any more."
            ) from error

    def held_out(self) -> NDArray[np.bool_] | None:
        """The rows that `drkl.data.examples.hold_out` selects; None where it cuts texts.

        Raises:
            DrklError: nothing would be left to train on.
        """
        size = len(self)
        if size < MANY_TEXTS and self.facts.texts == size:
            return None
        wanted = max(1, min(MAX_HELD_OUT, round(HELD_OUT_SHARE * size)))
        order = self.by_hash
        groups = _equal(self.facts.prompts[order])
        _, first, counts = np.unique(groups, return_index=True, return_counts=True)
        if len(first) < 2:
            raise cannot_be_split(size, len(first))
        by_first = np.argsort(first)
        chosen: list[int] = []
        left = wanted
        for group, members in zip(by_first.tolist(), counts[by_first].tolist(), strict=True):
            if members <= left:
                chosen.append(group)
                left -= members
            if not left:
                break
        if not chosen:
            chosen = [int(by_first[np.argmin(counts[by_first])])]
        mask = np.zeros(size, np.bool_)
        mask[order[np.isin(groups, chosen)]] = True
        return mask

    def places(self, numbers: set[int], read: Reader) -> list[tuple[str, str | None]]:
        """The places and own ids of a few rows."""
        rows = chain.from_iterable(map(self.source.read, self.source.blocks()))
        found = enumerate(islice(read(rows), max(numbers) + 1))
        return [(place, own) for number, (place, own, _) in found if number in numbers]


def scan(source: Source, read: Reader, prefix: str = "", progress: Callable[[int], None] = lambda rows: None) -> Scan:
    """Read all rows of a source once.

    Args:
        source: its rows.
        read: makes examples of them.
        prefix: stands before every id.
        progress: called with the rows read so far.

    Raises:
        DrklError: a bad row, two rows of one id, or no rows.
    """
    try:
        return _scan(source, read, prefix, progress)
    except DrklError:
        if not isinstance(source, LinesSource):
            raise
    return _scan(source.whole(), read, prefix, progress)


def _scan(source: Source, read: Reader, prefix: str, progress: Callable[[int], None]) -> Scan:
    blocks = source.blocks()
    first = list(islice(blocks, 2))
    processes = num_cores() if len(first) == 2 else 1
    found: list[Facts] = []
    rows = 0

    def facts_of(block: Any) -> Facts:
        return _facts(read(source.read(block)), prefix)

    for facts in in_order(facts_of, chain(first, blocks), processes):
        found.append(facts)
        rows += len(facts.named)
        if len(first) > 1:
            progress(rows)
    if not rows:
        raise DrklError(no_rows(source.name))
    joined = Facts(
        np.concatenate([facts.ids for facts in found]),
        np.concatenate([facts.named for facts in found]),
        np.concatenate([facts.prompts for facts in found]),
        sum(facts.texts for facts in found),
    )
    result = Scan(source, [len(facts.named) for facts in found], joined, prefix)
    _check_ids(result, read)
    return result


def _facts(rows: Iterator[tuple[str, str | None, Any]], prefix: str) -> Facts:
    ids, prompts, named, texts = [], [], [], 0
    for _, own, row in rows:
        named.append(own is not None)
        ids.append(hash_of_id(prefix + own) if own is not None else bytes(16))
        prompts.append(_prompt_hash(row))
        texts += isinstance(row, Example) and row.is_text
    return Facts(_hashes(iter(ids)), np.array(named, np.bool_), _hashes(iter(prompts)), texts)


def _prompt_hash(row: Any) -> bytes:
    if not isinstance(row, Example):
        return bytes(16)
    text = json.dumps(row.prompt_messages or row.messages, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _hashes(digests: Iterator[bytes]) -> Hashes:
    joined = b"".join(digest[:16] for digest in digests)
    return np.frombuffer(joined, ">u8").reshape(-1, 2).astype(np.uint64)


def _equal(hashes: Hashes) -> NDArray[np.int64]:
    """A number for each hash, the same for those that are equal."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    new = (np.diff(hashes[order], axis=0) != 0).any(1)
    numbers = np.empty(len(hashes), np.int64)
    numbers[order] = np.concatenate([np.zeros(min(1, len(hashes)), np.int64), np.cumsum(new)])
    return numbers


def _check_ids(rows: Scan, read: Reader) -> None:
    """Raise DrklError where two rows have one id of their own; rename rows whose number is another's id."""
    named = np.flatnonzero(rows.facts.named)
    own = rows.facts.ids[named]
    order = np.lexsort((named, own[:, 1], own[:, 0]))
    same = np.flatnonzero((own[order[1:]] == own[order[:-1]]).all(1))
    if len(same):
        second = int(named[order[same + 1]].min())
        equal = (own == rows.facts.ids[second]).all(1)
        first = int(named[np.flatnonzero(equal)[0]])
        row_ids(rows.places({first, second}, read))  # raises
    if not 0 < len(named) < len(rows):
        return
    taken = set(map(bytes, own))
    for number in np.flatnonzero(~rows.facts.named).tolist():
        wanted = f"row-{number + 1}"
        for marks in count():
            name = wanted + "'" * marks
            if bytes(_hashes(iter([hash_of_id(rows.prefix + name)]))[0]) not in taken:
                break
        if marks:
            rows.renamed[number] = name
