"""Files are read block by block: where a block ends changes neither rows nor errors."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from drkl.data import files
from drkl.data.files import file_rows
from drkl.errors import DrklError

TEXTS = {
    "lines.jsonl": '{"a": 1}\n\n{"a": "é\u2028\\n"}\r\n{"a": [1, -2.5e10, null, true]}\n',
    "spread.jsonl": '{"a":\n 1}\n  {"b":\n\n[{"c": 2}]} {"d": 3}{"e": 4}\n',
    "numbers.jsonl": "12 -3.25e+1\n-Infinity 1e5 true\n",
    "one.jsonl": '{"prompt": "a", "response": "b"}',
    "list.json": '\ufeff [{"a": 1},\n {"a": 2}]\n ',
    "columns.json": '{"text": ["a", "b"], "n": [1, 2]}',
    "broken.jsonl": '{"a": 1}\n{"a": 2\n{"a": 3}\n',
    "string.jsonl": '{"a": 1}\n{"a": "b}\n{"a": 3}\n',
    "comma.jsonl": '{"a": 1},\n{"a": 2}\n',
    "ends.jsonl": '{"a": 1}\n{"a": 2, "b": "é',
    "literal.jsonl": '{"a": tru}\n',
    "late.json": '[{"a": 1},\n{"a": 2},\n{"a" 3}]\n',
    "twice.jsonl": '{"a": 1}{"a": 1, "a": 2}\n',
    "table.csv": '\r\nprompt,response\r\n"a ""b"",\r\nc",d\r\n\r\ne,\u2028é\rf,"g"',
    "marks.tsv": "a\tb\n1\t\n\t2\n",
    "open.csv": 'a,b\n1,2\n"3,4\n5,6\n',
    "ragged.csv": "a;b\n1;2\n1;2;3\n",
    "text.txt": "a\r\nb\rc\n",
    "empty.jsonl": " \n",
    "bytes.jsonl": b'{"a": 1}\n{"a": "\xff"}\n',
    "cut.jsonl": b'{"a": 1}\n{"a": "\xc3',
    "wide.csv": "prompt,response\na,b\n".encode("utf-16"),
    "packed.jsonl.gz": gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0),
}


def outcome(path: Path) -> tuple[list[Any], str | None]:
    rows: list[Any] = []
    try:
        rows += file_rows(str(path))
    except DrklError as error:
        return rows, str(error)
    return rows, None


@pytest.mark.parametrize("name", TEXTS)
def test_where_blocks_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    whole = outcome(path)
    assert whole[0] or whole[1] or name == "empty.jsonl"
    for size in (1, 2, 3, 5, 8, 13):
        monkeypatch.setattr(files, "BLOCK_BYTES", max(size, 4))  # a byte order mark stands in one block
        assert outcome(path) == whole


def test_a_file_is_read_as_far_as_its_rows_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    path = tmp_path / "long.jsonl"
    path.write_text('{"a": 1}\n' * 100 + "broken")
    rows = file_rows(str(path))
    assert [next(rows) for _ in range(3)] == [(f"{path}:{n}", {"a": 1}) for n in (1, 2, 3)]
    with pytest.raises(DrklError, match=r"long.jsonl:101: not valid JSON"):
        list(rows)
