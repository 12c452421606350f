"""Files of every kind, several sources, plain text and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from drkl.data import DataConfig, Example, load_examples
from drkl.data.classification import labelled_texts
from drkl.data.examples import read_examples
from drkl.data.rows import read_shares
from drkl.data.tokenize import tokenize_examples
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import build

ROWS: list[dict[str, Any]] = [{"id": f"r{i}", "prompt": f'p{i}, "q"\nx', "response": f"r{i}"} for i in range(3)]


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(ROWS), path)


WRITERS = {
    "a.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    found = read_examples(str(tmp_path / name))
    assert [(e.id, e.prompt_text, e.response) for e in found] == [(r["id"], r["prompt"], r["response"]) for r in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response\na,b\nc\n", r"a\.csv:3: expected 2 columns as in the header; found 1"),
        ("a.csv", "prompt,response\na,b,c\n", r"a\.csv:2: expected 2 columns as in the header; found 3"),
        ("a.csv", 'prompt,response\na,"b\n', r"a\.csv:\d: not valid csv"),
        (
            "a.csv",
            "promt,response\na,b\n",
            r"a\.csv:2: expected the fields prompt and response.*; found promt, response",
        ),
        ("a.json", "[{},\n}]", r"a\.json:2: not valid JSON"),
        ("a.json", "[1]", r"a\.json, row 1: expected an object"),
        ("a.parquet", "no", r"Cannot read '.*a\.parquet' as parquet"),
        ("a.txt", " \n", r"empty text"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DrklError, match=message):
        tokenize_examples(read_examples(str(tmp_path / name)), build(), max_prompt_tokens=9, max_tokens=20)


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="There is no file"):
        read_examples(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(DrklError, match=r"a\.txt is plain text, but its format is 'messages'"):
        read_examples(str(tmp_path / "a.txt"), "messages")


def text_example(row_id: str, text: str) -> Example:
    return Example(row_id, ({"role": "assistant", "content": text},))


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 7, 100])
def test_every_token_of_a_text_is_trained_once(max_tokens: int) -> None:
    tokenizer = build(None, eos="</s>")
    examples = [text_example("x", "a b c d"), text_example("y", "hi there"), text_example("z", " ")]
    rows, report = tokenize_examples(examples, tokenizer, max_prompt_tokens=1, max_tokens=max_tokens)
    tokens = [token for row in rows for token in tokenizer.convert_ids_to_tokens(row.trained_ids)]
    assert "".join(tokens) == "a b c d</s>hi there</s>"
    stream = [tokenizer.bos_token_id, *(token for row in rows for token in row.response_ids)]
    place = 0
    for row in rows:
        assert row.prompt_ids == (stream[place],)  # the token before
        assert len(row.response_ids) < max_tokens
        assert (*row.prompt_ids, *row.response_ids)[: len(row.sampling_ids)] == row.sampling_ids
        place += len(row.response_ids)
    assert len({row.id for row in rows}) == len(rows)
    assert (report.documents, report.dropped) == (2, {"empty_text": 1})
    assert "blocks of 2 text(s)" in report.summary()


def test_of_few_texts_the_ends_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(100)))
    (train,), (held_out,) = load_examples(DataConfig(path=str(path), format="text"))
    assert (train.id, held_out.id) == ("book", "book-end")
    assert train.response + "\n\n" + held_out.response == path.read_text()
    assert held_out.response.startswith("paragraph 9") and 3 <= held_out.response.count("paragraph") <= 7
    path.write_text("a")
    with pytest.raises(DrklError, match=r"'book' is too short to hold out its end\. Set data\.eval_path"):
        load_examples(DataConfig(path=str(path)))


def test_of_many_texts_whole_ones_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {i}"}) + "\n" for i in range(40)))
    train, held_out = load_examples(DataConfig(path=str(path)))
    assert (len(train), len(held_out)) == (38, 2) and all(example.is_text for example in train)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    for name, count in (("a", 40), ("b", 20)):
        rows = [{"id": f"r{i}", "prompt": f"a {name}{i}", "response": "b"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_sources_are_mixed_by_their_weights(two: tuple[str, str]) -> None:
    config = DataConfig(
        sources=({"path": two[0], "weight": 0.5}, {"path": two[1], "weight": 2.25, "max_rows": 8}), eval_path=two[1]
    )
    train, held_out = load_examples(config)
    assert len(held_out) == 20
    rows, report = tokenize_examples(train, build(), **config.row_settings)
    first = [row.id for row in rows if row.id.startswith("1:")]
    second = [row.id for row in rows if row.id.startswith("2:")]
    assert len(first) == len(set(first)) == 20
    assert len(second) == len(set(second)) == 18 and {row.split("#")[0] for row in second} == {
        f"2:r{i}" for i in range(8)
    }
    assert (report.kept, report.per_epoch) == (48, 38) and "38 an epoch by their weights" in report.summary()
    assert [r.id for r in tokenize_examples(train, build(), **config.row_settings)[0]] == [row.id for row in rows]


def test_each_source_holds_out_its_own_rows(two: tuple[str, str]) -> None:
    train, held_out = load_examples(DataConfig(sources=[{"path": path} for path in two]))
    assert [e.id[0] for e in held_out] == ["1", "1", "2"] and len(train) == 57
    assert len({example.id for example in train + held_out}) == 60


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"path": "a", "sources": [{"path": "b"}]},
            "exactly one of path .*, or a list of sources; got path and sources",
        ),
        ({"sources": [{"path": "a", "dataset": "b"}]}, "exactly one of path .* got both"),
        ({"sources": [{"weight": 2}]}, "exactly one of path .* got neither"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"path": "a"}], "max_rows": 3}, "max_rows is set beside sources; each source has"),
    ],
)
def test_bad_sources(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**values)


def test_weights_that_leave_nothing(two: tuple[str, str]) -> None:
    config = DataConfig(sources=({"path": two[0], "weight": 0.001},), eval_path=two[1])
    with pytest.raises(DrklError, match=r"The weights of data\.sources leave no row"):
        tokenize_examples(load_examples(config)[0], build(), **config.row_settings)


def test_texts_with_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,id\nhi,greet,1\na b,other,2\nc,3,3\n")
    texts = labelled_texts(read_examples(str(path), "text_label"))
    assert texts == [("1", "hi", "greet"), ("2", "a b", "other"), ("3", "c", "3")]
    train, held_out = map(labelled_texts, read_shares(DataConfig(path=str(path)), classifier=True))
    assert sorted(train + held_out) == texts and len(held_out) == 1
    path.write_text("text,labl\nhi,greet\n")
    with pytest.raises(DrklError, match=r"a\.csv:2: expected the fields text and label; found text, labl"):
        read_shares(DataConfig(path=str(path)), classifier=True)


def test_labels_of_a_data_set_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "d")
    train, held_out = map(labelled_texts, read_shares(DataConfig(dataset=str(tmp_path / "d")), classifier=True))
    assert sorted(train + held_out) == [("row-1", "a", "yes"), ("row-2", "b", "no")]


@pytest.mark.parametrize(
    ("path", "way_out"),
    [
        ("someone/some-set", "The id of a data set on the hub goes into data.dataset"),
        ("rows/*.jsonl", "list several in data.sources"),
        ("https://example.org/rows.jsonl", "download it first"),
        ("folder/rows.jsonl", "$"),
    ],
)
def test_what_is_no_file_may_be_something_else(path: str, way_out: str) -> None:
    with pytest.raises(DrklError, match=rf"There is no file .*{way_out}"):
        read_examples(path)
