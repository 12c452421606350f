"""A hash of the rows that a model is trained on, by which the same rows are known again wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from drkl.data.stored import StoredRows, tokens_of

_ROWS = 2000
"""Rows in memory that are looked at together."""
_COLUMNS = (
    "prompt_ids", "response_ids", "trained_runs", "context_start", "context_tail", "teacher_prompt_ids",
    "encoder_decoder", "ids", "label",
)  # fmt: skip


def digest_rows(rows: Sequence[Any], *, ids: bool = False) -> dict[str, Any]:
    """Return the number of ``rows``, a ``digest`` of what is read and learnt of them in order, and one of ``ids``.

    Args:
        rows: tokenised rows, in memory or in files; both have the same hash.
        ids: whether the ids of the rows are looked at, as where they draw the random numbers; else it is None.
    """
    digests: dict[str, Any] = {}
    for batch in _batches(rows):
        for name in _COLUMNS:
            if name in batch.schema.names:
                for part, data in _buffers(batch.column(name)).items():
                    digests.setdefault(f"{name} {part}", xxhash.xxh3_128()).update(np.ascontiguousarray(data))
    if isinstance(rows, StoredRows):
        for name, numbers in rows.arrangement().items():
            values: Any = np.ascontiguousarray(numbers)
            digests[name] = xxhash.xxh3_128(values)
    text = " ".join(f"{name} {digest.hexdigest()}" for name, digest in sorted(digests.items()))
    names = rows.ids() if isinstance(rows, StoredRows) else (row.id for row in rows)
    return {
        "rows": len(rows),
        "digest": xxhash.xxh3_128_hexdigest(text.encode()),
        "ids": _digest_texts(names) if ids else None,
    }


def _batches(rows: Sequence[Any]) -> Iterator[pa.RecordBatch]:
    if isinstance(rows, StoredRows):
        yield from rows.batches()
        return
    for start in range(0, len(rows), _ROWS):
        yield pa.RecordBatch.from_pydict(tokens_of(rows[start : start + _ROWS]))


def _buffers(column: Any) -> dict[str, Any]:
    """The values of a column one after the other, and how long each is where they are not all of one length."""
    if pa.types.is_list(column.type):
        offsets = column.offsets.to_numpy()
        return {"sizes": np.diff(offsets), "values": column.values.to_numpy()[offsets[0] : offsets[-1]]}
    return {"values": column.to_numpy(zero_copy_only=False)}


def _digest_texts(texts: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        # Its length is part of it: two texts are not one.
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
