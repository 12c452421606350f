"""Streams: every row once a pass, windows that follow from where they begin, and bad sources by name."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from drkl.data import streams
from drkl.data.batching import plan_epochs
from drkl.data.config import DataConfig
from drkl.data.cursors import counted, open_dataset, open_file, open_path, open_stream
from drkl.data.rows import Placed
from drkl.data.streams import RowStream, Source, Window, stream_from, stream_of, tokenizing
from drkl.data.tokenize import DropReport, NothingLeft, Row
from drkl.errors import DrklError
from tests.models import tiny

NUMBERS = [{"id": f"r{i}", "n": 1 + i * 7 % 5} for i in range(23)]


def take(part: Placed, name: str, row_format: str) -> tuple[list[Row], DropReport]:
    """Stands for tokenising: a row has as many tokens as its ``n`` says; of 0 it is dropped."""
    items = [item for _, item in part.items]
    rows = [Row(str(i["id"]), (1,) * i["n"], (2,), None) for i in items if i["n"]]  # type: ignore[arg-type]
    report = DropReport(kept=len(rows))
    if len(rows) < len(items):
        report.dropped["empty_prompt"] = len(items) - len(rows)
    if not rows:
        raise NothingLeft(report, "All are empty.")
    return rows, report


def source(rows: Sequence[Any], name: str = "numbers", **settings: Any) -> Source:
    def after(count: int) -> Iterator[tuple[str, Any]]:
        yield from ((f"{name}, row {i + 1}", row) for i, row in list(enumerate(rows))[count:])

    return Source(name, counted(after), **settings)


def windows(stream: RowStream, count: int, state: Any = None, **settings: Any) -> list[Window]:
    plan = {"seed": 3} | (settings or {"tokens_per_step": 12})
    state = None if state is None else json.loads(json.dumps(state))
    return list(itertools.islice(stream.windows(state, **plan), count))


def same(ours: Window, theirs: Window) -> bool:
    """Whether two windows are one; where they begin may be written in two ways."""
    return all(getattr(ours, name) == getattr(theirs, name) for name in vars(ours) if name != "begin")


sizes = st.one_of(
    st.fixed_dictionaries({"tokens_per_step": st.integers(1, 20)}),
    st.fixed_dictionaries({"rows_per_step": st.integers(1, 9), "drop_last": st.booleans()}),
)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any), buffer=st.integers(1, 12), size=sizes,
    chunk=st.integers(1, 9),
)  # fmt: skip
def test_a_pass_has_every_usable_row_once_and_goes_on_from_any_window(
    lengths: list[int], buffer: int, size: dict[str, Any], chunk: int
) -> None:
    rows = [{"id": f"r{i}", "n": n} for i, n in enumerate(lengths)]
    usable = sorted(row["id"] for row in rows if row["n"])
    stream = RowStream([source(rows)], take, buffer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK_ROWS", chunk)
        if size.get("drop_last") and len(usable) < size["rows_per_step"]:
            with pytest.raises(DrklError, match="leaves out every step"):
                windows(stream, 1, **size)
            return
        whole = windows(stream, 6, **size)
        for number, window in enumerate(whole[:4]):
            assert all(map(same, windows(stream, 2, window.begin, **size), whole[number:]))
    given_away = [row.id for window in whole for row in window.rows]
    per_step = size.get("rows_per_step", 1)
    one_window = buffer if not size.get("rows_per_step") else per_step * -(-buffer // per_step)
    if not size.get("drop_last"):
        passes = [sorted(given_away[i : i + len(usable)]) for i in range(0, len(given_away), len(usable))]
        assert all(part == usable for part in passes[:-1])
        assert not Counter(passes[-1]) - Counter(usable)
    for window in whole:
        assert len(window.rows) <= one_window
        places = sorted(place for step in window.steps for place in step)
        left_out = len(window.rows) - len(places)
        assert len(set(places)) == len(places), "no row comes twice"
        assert left_out == (len(window.rows) % per_step if size.get("drop_last") else 0)
        assert window.rows_read >= len(window.rows)
    assert [w.first_step for w in whole[1:]] == [w.end for w in whole[:-1]]


def test_rows_that_fit_into_one_window_have_the_plan_of_epochs() -> None:
    lengths = [row["n"] for row in NUMBERS]
    for size in ({"tokens_per_step": 12}, {"rows_per_step": 4}):
        epochs = plan_epochs(lengths, seed=3, **size)
        for window in windows(RowStream([source(NUMBERS)], take, 23), 3, **size):
            assert window.steps == next(epochs)


def test_sources_take_turns_by_their_weights() -> None:
    other = [{"id": f"o{i}", "n": 2} for i in range(4)]
    stream = RowStream([source(NUMBERS, weight=3), source(other, "others", weight=1)], take, 16)
    first, second = windows(stream, 2)
    assert [row.id for row in first.rows[:5]] == ["1:r0", "1:r1", "1:r2", "2:o0", "1:r3"]
    assert Counter(row.id[0] for window in (first, second) for row in window.rows) == {"1": 24, "2": 8}
    assert [row.id for row in second.rows if row.id[0] == "2"] == ["2:o0", "2:o1", "2:o2", "2:o3"], "it began again"
    assert same(windows(stream, 1, second.begin)[0], second)


def test_a_source_ends_after_its_max_rows() -> None:
    found = windows(RowStream([source(NUMBERS, max_rows=5)], take, 4), 4)
    assert [[row.id for row in window.rows] for window in found] == [["r0", "r1", "r2", "r3"], ["r4"]] * 2
    assert [window.rows_read for window in found] == [4, 5, 9, 10]


def test_what_was_dropped_is_counted_over_passes_and_after_a_resume() -> None:
    rows = [row | {"n": 0} if i % 4 == 1 else row for i, row in enumerate(NUMBERS)]
    stream = RowStream([source(rows)], take, 8)
    found = windows(stream, 5)
    assert [(w.rows_read, w.dropped) for w in found][-1] == (46, {"empty_prompt": 12})
    assert windows(stream, 1, found[4].begin)[0].dropped == found[4].dropped


def test_a_source_of_which_nothing_is_left_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DrklError, match=r"^numbers has no rows\.$"):
        windows(RowStream([source([])], take), 1)
    with pytest.raises(DrklError, match=r"^numbers: nothing is left of its first 23 rows\. .* All are empty\.$"):
        windows(RowStream([source([row | {"n": 0} for row in NUMBERS])], take), 1)
    monkeypatch.setattr(streams, "PATIENCE", 20)

    def forever(count: int) -> Iterator[tuple[str, Any]]:
        return ((f"place {i}", {"n": 0}) for i in itertools.count(count))

    with pytest.raises(DrklError, match=r"^endless: nothing is left of its first 20 rows\."):
        windows(RowStream([Source("endless", counted(forever))], take, 10), 1)


def test_a_long_part_without_a_usable_row_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 6)
    rows = [row | {"n": 0} if 3 < i < 18 else row for i, row in enumerate(NUMBERS)]
    windows(RowStream([source(rows)], take, 4), 9)
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: up to numbers, row 12, 8 rows in a row could not be used; the stream is read on. All are empty."
    ]


def test_rows_of_one_id_are_told_apart_within_a_chunk() -> None:
    (window,) = windows(RowStream([source([{"id": "a", "n": 1}, {"n": 2}, {"id": "a", "n": 3}])], take), 1)
    assert [row.id for row in window.rows] == ["a", "row-2", "a'"]


# sources ----------------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str) -> Any:
    """Where the rows are written, and what opens them."""
    text = "".join(json.dumps(row) + "\n" for row in NUMBERS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\ufeff" + text.replace("\n", "\n\n", 3))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(NUMBERS), path, row_group_size=5)
    elif kind == "json":
        path.write_text(json.dumps(NUMBERS))
    elif kind == "csv":
        with path.open("w") as file:
            writer = csv.DictWriter(file, ["id", "n"])
            writer.writeheader()
            writer.writerows(NUMBERS)
    elif kind == "files":
        (folder / "part-1.jsonl").write_text("".join(text.splitlines(keepends=True)[:9]))
        (folder / "part-2.jsonl").write_text("".join(text.splitlines(keepends=True)[9:]))
        return open_dataset(str(folder))
    else:
        dataset = datasets.Dataset.from_list(NUMBERS)
        if kind == "dataset":
            return open_stream(dataset, "numbers")
        return open_stream(
            dataset.to_iterable_dataset(num_shards=3).map(lambda row: row).with_format("numpy"), "numbers"
        )
    return open_path(path)


KINDS = ["jsonl", "jsonl.gz", "parquet", "json", "csv", "files", "dataset", "iterable"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_goes_on_at_any_row(tmp_path: Path, kind: str) -> None:
    opens = write(tmp_path, kind)
    cursor = opens(None)
    positions, found = [cursor.position()], []
    for item in cursor:
        found.append(item)
        positions.append(json.loads(json.dumps(cursor.position())))
    expected = [{"id": row["id"], "n": str(row["n"]) if kind == "csv" else row["n"]} for row in NUMBERS]
    assert [row for _, row in found] == expected
    for number in (0, 1, 4, 9, 10, 22, 23):
        assert list(opens(positions[number])) == found[number:]


def test_sources_that_cannot_be_a_stream_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "two.jsonl").write_text('{"n": 1}\n{"n": 2} {"n": 3}\n')
    (tmp_path / "cut.jsonl").write_text('{"n": 1}\n{"n": 2\n{"n": 3}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"n": 1}\n{"n": "\xff"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n' * 9000)[:60])
    whole = datasets.Dataset.from_list(NUMBERS).to_iterable_dataset()
    split = split_dataset_by_node(whole, rank=0, world_size=2)

    def fails() -> Iterator[Any]:
        yield {"n": 1}
        raise OSError("the line is dead")

    broken = datasets.IterableDataset.from_generator(fails)

    def read(name: str) -> Any:
        return lambda: list(open_file(str(tmp_path / name))(None))

    cases: list[tuple[Any, str]] = [
        (lambda: open_path(tmp_path / "no.jsonl"), "There is no file"),
        (lambda: open_file(str(tmp_path / "a.txt")), "is one plain text, which a stream would hold in memory"),
        (lambda: open_path("in memory: list"), "cannot be read again"),
        (lambda: open_stream(whole.shuffle(seed=1, buffer_size=4), "rows"), "^rows shuffles in a buffer of its own"),
        (lambda: open_stream(split, "rows"), "^rows was cut for several processes"),
        (read("two.jsonl"), r"two\.jsonl:2: 2 values in one line\."),
        (read("cut.jsonl"), r"cut\.jsonl:2: not valid JSON: .*one object in each"),
        (read("bytes.jsonl"), r"bytes\.jsonl:2: not UTF-8 text \(byte 7"),
        (read("cut.jsonl.gz"), "Cannot read .*end-of-stream marker"),
        (lambda: list(open_stream(broken, "rows")(None)), "^rows, after row 1: cannot be read: OSError: the line is"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(DrklError, match=message):
            call()


def test_a_section_is_a_stream_with_the_rows_of_all_of_it(tmp_path: Path) -> None:
    data = [{"prompt": f"w{i}", "response": "w1 w2"} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    config = DataConfig(path=str(path), eval_path="none", streaming=True, shuffle_buffer=4)
    tokenizer = tiny.tokenizer()
    rows, report = stream_of(config, tokenizer).sample()
    assert ([row.id for row in rows], report.kept) == ([f"row-{i}" for i in range(1, 5)], 4)
    tokenize = tokenizing(tokenizer)
    for given_as in (data, datasets.Dataset.from_list(data), datasets.Dataset.from_list(data).to_iterable_dataset()):
        again, _ = stream_from(given_as, "train_dataset", tokenize, 4).sample()
        assert [row.all_ids for row in again] == [row.all_ids for row in rows]
    path.write_text(path.read_text().replace("w7", "").replace('"w8"', "8"))
    with pytest.raises(DrklError, match=rf"^{re.escape(str(path))}:9: prompt must be text"):
        windows(stream_of(config, tokenizer), 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streaming": True}, "from a stream no share can be held out. Set eval_path"),
        ({"shuffle_buffer": 5}, "shuffle_buffer is set, but streaming is not"),
        ({"streaming": True, "eval_path": "none", "shuffle_buffer": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_streams_that_mean_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(path="a.jsonl", **fields)
