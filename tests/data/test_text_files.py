"""Text files give what pandas and pyarrow give; what cannot be read is refused with its place and a way out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import ArrowInvalid
from pyarrow import csv as arrow_csv

from drkl.data.examples import read_examples
from drkl.data.files import dataset_rows, file_rows, rows_at
from drkl.errors import DrklError

ROWS = [{"prompt": "a", "response": "None"}, {"prompt": "NA", "response": "null"}, {"prompt": "007", "response": "1.0"}]
# The characters at which some reader breaks a line, and those with a meaning in csv.
ODD = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\t ,;\"'\0\\\ufeffé字🙂NAnull07."
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=12)


def values(path: Path) -> list[Any]:
    return [row for _, row in file_rows(str(path))]


@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_is_read_as_pandas_and_pyarrow_read_it(
    tmp_path: Path, table: list[tuple[str, str]], line_end: str, encoding: str
) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=line_end).writerows([("prompt", "response"), *table])
    found = values(path)
    by_pandas = pandas.read_csv(path, dtype=str, keep_default_na=False)
    by_arrow = arrow_csv.read_csv(
        path,
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(column_types={"prompt": "string", "response": "string"}),
    )
    assert found == by_pandas.to_dict("records") == by_arrow.to_pylist()
    assert found == [{"prompt": prompt, "response": response} for prompt, response in table]


@given(st.text('"xy ;', max_size=8), st.text('"xy ;\n', max_size=8), st.sampled_from(["\n", "\r\n", ""]))
@example('"x"y', '"x""y"z"', "\n")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quotes_anywhere_are_read_as_pandas_and_pyarrow_read_them(
    tmp_path: Path, prompt: str, response: str, line_end: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"prompt,response\n{prompt},{response}{line_end}".encode())
    types = {"prompt": "string", "response": "string"}
    options = arrow_csv.ParseOptions(newlines_in_values=True), arrow_csv.ConvertOptions(column_types=types)
    try:  # pandas alone refuses an open quote, and pyarrow alone a line of too few fields
        by_pandas = pandas.read_csv(path, dtype=str, keep_default_na=False, index_col=False).to_dict("records")
        by_arrow = arrow_csv.read_csv(path, parse_options=options[0], convert_options=options[1]).to_pylist()
    except (pandas.errors.ParserError, ArrowInvalid):
        with pytest.raises(DrklError, match=r"a quoted field has no end|expected 2 columns"):
            values(path)
    else:
        assert values(path) == by_pandas == by_arrow


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_is_read_as_pandas_reads_it(tmp_path: Path, table: list[tuple[str, str]]) -> None:
    rows = [{"prompt": prompt, "response": response} for prompt, response in table]
    frame = pandas.DataFrame(rows)
    written = {
        "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "list.json": json.dumps(rows, indent=2),
        "list.jsonl": json.dumps(rows),
        "several.json": "\n".join(json.dumps(row, indent=1) for row in rows),
        "several.jsonl": "\r\n\r\n".join(json.dumps(row, indent=1) for row in rows),
        "pandas.json": frame.to_json(),
        "pandas.jsonl": frame.to_json(orient="records", lines=True),
        "columns.json": json.dumps(frame.to_dict("list")),
        "wrapped.json": json.dumps({"version": 1, "data": rows}, indent=1),
    }
    for name, text in written.items():
        (tmp_path / name).write_bytes(text.encode())
        assert values(tmp_path / name) == rows, name


def test_a_single_json_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    one_row: list[dict[str, Any]] = [
        {"prompt": "a", "response": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tags": ["x", "y"]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    for row in one_row:
        path.write_text(json.dumps(row, indent=2))
        assert values(path) == [row]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
def test_byte_order_marks(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    text = {
        "a.csv": "prompt,response\né,字\n", "a.tsv": "prompt\tresponse\né\t字\n", "a.txt": "é\r\n字\x0c\0",
    }.get(name, json.dumps({"prompt": "é", "response": "字"}, ensure_ascii=False))  # fmt: skip
    path.write_bytes(text.encode(encoding))
    expected = {"text": "é\n字\x0c\0", "id": "a"} if name == "a.txt" else {"prompt": "é", "response": "字"}
    assert values(path) == [expected]


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_packed_files(tmp_path: Path, end: str) -> None:
    pack: Any = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[end]
    texts = {"a.csv": "prompt,response\na,b\n", "a.jsonl": '{"prompt": "a", "response": "b"}'}
    for name, text in texts.items():
        path = tmp_path / (name + end)
        path.write_bytes(pack(text.encode()))
        assert values(path) == [row for _, row in rows_at(path)] == [{"prompt": "a", "response": "b"}]
        path.write_bytes(pack(text.encode())[:-9])
        with pytest.raises(DrklError, match=rf"Cannot read '.*{name}{end}': "):
            values(path)
        path.write_bytes(b"no")
        with pytest.raises(DrklError, match=rf"Cannot read '.*{name}{end}': "):
            values(path)


def test_csv_fields_are_text_and_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    limit = csv.field_size_limit()
    pandas.DataFrame([*ROWS, {"prompt": "x" * 300_000, "response": ""}]).to_csv(path, index=False)
    assert values(path) == [*ROWS, {"prompt": "x" * 300_000, "response": ""}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "text",
    [
        "prompt,response\nq,a\nq,b",
        "\n\nprompt,response\n\nq,a\n\n\nq,b\n\n",
        "prompt,response\rq,a\rq,b\r",
        "prompt;response\nq;a\nq;b\n",
        "prompt\tresponse\nq\ta\nq\tb\n",
        "prompt,response,,\nq,a,,\nq,b,,\n",
        '"prompt","response"\n"q","a"\n"q",b\n',
    ],
)
def test_forms_of_csv(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    assert values(path) == [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b"}]


def test_places_are_the_lines_where_rows_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\na,b\r\n1,"x\n\r\ny"\n\n2,3\n')
    assert [place.rsplit(":", 1)[1] for place, _ in file_rows(str(path))] == ["3", "7"]
    path = tmp_path / "a.json"
    path.write_text('\n{\n"a": 1\n}\n\n{"a": 2} {"a": 3}')
    assert [place.rsplit(":", 1)[1] for place, _ in file_rows(str(path))] == ["2", "6", "6"]


def test_ids_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,prompt,response\n,q,a\nrow-1,q,b\n,q,c\nrow-5,q,d\n,q,e\n")
    assert [example.id for example in read_examples(str(path))] == ["row-1'", "row-1", "row-3", "row-5", "row-5'"]
    path.write_text(f"id,prompt,response\n{'9' * 5000},q,a\n")
    assert read_examples(str(path))[0].id == "9" * 5000


BROKEN = [
    ("a.csv", "prompt,response,response\na,b,c\n", r"a\.csv:1: two columns are called 'response'; rename one of them"),
    ("a.csv", '\nprompt,response\na,"b\nc', r"a\.csv:3: not valid csv: a quoted field has no end\. Inside of a quoted"),
    (
        "a.csv",
        'prompt,response\na,"b"c,d\n',
        r"a\.csv:2: expected 2 columns .*; found 3\. A field that holds a separator",
    ),
    ("a.csv", 'prompt,response\na,b\n"', r"a\.csv:3: not valid csv: a quoted field has no end"),
    ("a.csv", 'prompt,response\na,b\n"x"y","', r"a\.csv:3: not valid csv: a quoted field has no end"),
    ("a.csv", "prompt, response\na,b\n", r"a\.csv:2: expected the fields .*; found prompt, ' response'"),
    ("a.csv", "prompt,response\n", r"a\.csv has no rows"),
    ("a.csv", "", r"a\.csv has no rows"),
    ("a.json", "", r"a\.json has no rows"),
    ("a.json", "[]", r"a\.json has no rows"),
    ("a.json", '{"prompt": "a",\n "response": "b"', r"a\.json:2: not valid JSON: Expecting ',' delimiter"),
    ("a.jsonl", '{"text": "a"}\n{"a": 1,\n{"a": 2}\n', r"a\.jsonl:2: not valid JSON: .* \(column \d+\)"),
    (
        "a.jsonl",
        '{"text": "a"},\n{"a": 2}\n',
        r"a\.jsonl:1: not valid JSON: a comma follows an object\. Write",
    ),
    ("a.jsonl", '{"id": ' + "9" * 5000 + "}", r"a\.jsonl:1: a number has too many digits; write it as text, in quotes"),
    ("a.jsonl", "[1]", r"a\.jsonl:1: expected an object .*; found a list"),
    ("a.jsonl", '\n{"a": {"b": 1, "b": 2}}', r"a\.jsonl:2: an object has two keys 'b'; rename one of them"),
    ("a.json", '[{"a": 1, "a": 2}]', r"a\.json:1: an object has two keys 'a'"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(DrklError, match=message):
        read_examples(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,response\na,b\nr\xe9,b\n", r"not UTF-8 text \(byte 21\), in line 3\. Save it as UTF-8"),
        (
            "a.xlsx",
            b"PK\3\4\xff",
            r"is not UTF-8 text \(byte 4\), in line 1\. Save the sheet as csv \(UTF-8\)",
        ),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", r"is not UTF-8 text .* Unpack it first; \.gz, \.bz2 and \.xz are read"),
        ("data.arrow", b"\xff\xff", r"is not UTF-8 text .* Name the folder that it lies in as data\.dataset"),
        ("a.csv", b"\xff\xfea\0,", r"is not UTF-16 text \(byte \d\), in line 1\. Save it as UTF-8"),
        ("a.jsonl", b"\xff\xfe{}", r"is not UTF-8 text \(byte 0\), in line 1\. Save it as UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DrklError, match=message):
        read_examples(str(tmp_path / name))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"Is a directory\. A folder of files goes into data\.dataset"):
        read_examples(str(tmp_path))


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "response"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DrklError, match=r"a\.parquet: two columns are called 'response'"):
        read_examples(str(tmp_path / "a.parquet"))


def test_kinds_of_columns_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    columns = {
        "messages": pyarrow.array(messages),
        "id": pyarrow.array(["x"], pyarrow.large_string()).dictionary_encode(),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [(e.id, e.prompt_text, e.response) for e in read_examples(str(tmp_path / "a.parquet"))] == [("x", "q", "a")]


def test_class_numbers_of_parquet_have_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in values(tmp_path / "a.parquet")] == ["yes", "no"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return tmp_path


def test_a_folder_gives_the_rows_of_its_files(cache: Path) -> None:
    folder = cache / "rows"
    folder.mkdir()
    buffer = io.StringIO()
    pandas.DataFrame([*ROWS, {"prompt": "", "response": "x\x0cy"}]).to_csv(buffer, index=False)
    (folder / "train.csv").write_text(buffer.getvalue())
    expected = values(folder / "train.csv")
    assert [row for _, row in dataset_rows(str(folder))] == [row for _, row in rows_at(folder)] == expected
    assert [row for _, row in dataset_rows(str(folder / "train.csv"))] == expected
    with pytest.raises(DrklError, match=r"Cannot load the data set .*split 'test'.*Unknown split"):
        list(dataset_rows(str(folder), split="test"))
    # With types of its own, `datasets` reads it; "None" stays text there too.
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n"
        "  - name: prompt\n    dtype: string\n  - name: response\n    dtype: string\n---\n"
    )
    assert [row for _, row in dataset_rows(str(folder))] == expected


def test_a_folder_of_json_keeps_its_texts(cache: Path) -> None:
    folder = cache / "rows"
    folder.mkdir()
    rows = [{"prompt": "2020-01-01", "response": "2020-01-01T00:00:00", "id": "007"}]
    for number in range(2):
        (folder / f"train-{number}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert [row for _, row in dataset_rows(str(folder))] == rows * 2


def test_a_single_row_of_two_messages_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"prompt": {"role": "user", "content": "a"}, "completion": {"role": "assistant", "content": "b"}}
    path.write_text(json.dumps(row))
    assert values(path) == [row]
    with pytest.raises(DrklError, match="prompt must be text; found an object"):
        read_examples(str(path))
