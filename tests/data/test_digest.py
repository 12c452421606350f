"""Rows have one digest wherever they lie, and another where anything that is read or learnt of them is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from drkl.data import digest as digest_module
from drkl.data.classification import LabelledRow
from drkl.data.digest import digest_rows
from drkl.data.examples import Example
from drkl.data.stored import RowFiles, StoredRows, to_record
from drkl.data.tokenize import Row

EXAMPLE = Example("x", ({"role": "user", "content": "a"},), "b")
ROWS = [Row(f"r{i}", tuple(range(i + 1)), (7, i), EXAMPLE) for i in range(7)]
CHANGES: list[dict[str, Any]] = [
    {"prompt_ids": (9,)},
    {"response_ids": (7, 7)},
    {"trained": (False, True)},
    {"sampling_context": (1, 2)},
    {"encoder_decoder": True},
    {"teacher_prompt_ids": (3,)},
]


def stored(folder: Path, rows: list[Any], chunk: int, **words: Any) -> StoredRows:
    path = folder / f"{chunk}.arrow"
    with pa.OSFile(str(path), "wb") as sink:
        batches = [to_record(rows[start : start + chunk]) for start in range(0, len(rows), chunk)]
        with pa.ipc.new_stream(sink, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    return StoredRows(RowFiles([path]), **words)


def test_rows_in_memory_and_in_files_of_any_chunks_have_one_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest_rows(ROWS, ids=True)
    assert expected["rows"] == 7
    assert [digest_rows(stored(tmp_path, ROWS, chunk), ids=True) for chunk in (2, 3, 7)] == [expected] * 3
    monkeypatch.setattr(digest_module, "_ROWS", 2)
    assert digest_rows(ROWS, ids=True) == expected
    assert digest_rows([]) == digest_rows([], ids=False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_is_read_or_learnt_counts(change: dict[str, Any]) -> None:
    other = [*ROWS[:3], replace(ROWS[3], **change), *ROWS[4:]]
    assert digest_rows(other)["digest"] != digest_rows(ROWS)["digest"]


def test_order_counts_and_ids_where_they_are_asked_for(tmp_path: Path) -> None:
    digest = digest_rows(ROWS)["digest"]
    renamed = [replace(row, id=f"q{i}\ud800") for i, row in enumerate(ROWS)]
    assert digest_rows(renamed) == digest_rows(ROWS)
    assert digest_rows(renamed, ids=True)["ids"] != digest_rows(ROWS, ids=True)["ids"]
    assert digest_rows(ROWS[::-1])["digest"] != digest
    # Tokens that move from one row to the next.
    assert (
        digest_rows([replace(ROWS[0], prompt_ids=(0, 1)), replace(ROWS[1], prompt_ids=())])["digest"]
        != digest_rows([replace(ROWS[0], prompt_ids=(0,)), replace(ROWS[1], prompt_ids=(1,))])["digest"]
    )
    twice = stored(tmp_path, ROWS, 3, order=np.arange(7)[::-1], copies=np.zeros(7, np.int32))
    assert digest_rows(twice)["digest"] != digest


def test_labels_count() -> None:
    rows = [LabelledRow(f"r{i}", (1, 2, i), i % 2, "text") for i in range(4)]
    assert digest_rows([*rows[:3], replace(rows[3], label=0)])["digest"] != digest_rows(rows)["digest"]
    assert digest_rows([*rows[:3], replace(rows[3], text="other")]) == digest_rows(rows)
