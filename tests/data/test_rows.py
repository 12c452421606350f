"""Whatever a caller has as a data set, as the rows that a model is trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drkl.data.classification import LabelledRow
from drkl.data.examples import Example, hold_out, parse_rows
from drkl.data.rows import rows_from
from drkl.data.streams import has_no_end
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from tests.data.tiny_tokenizers import build

TOKENIZER = build(None, eos="</s>")
ROWS: list[dict[str, Any]] = [{"prompt": "a b", "response": "c"}, {"prompt": "hi", "response": "hello there"}]
CLASSES = ("no", "yes")


def text(ids: Any) -> str:
    """The tokens as they are: decoding puts spaces between them."""
    return "".join(TOKENIZER.convert_ids_to_tokens(list(ids)))


SMALL = {"max_prompt_tokens": 100, "max_tokens": 200}


class Indexed:
    """A data set as torch has them: a length and items, nothing else."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def forms(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    import datasets
    import pandas

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.Dataset.from_list(rows)
    return {
        "list": rows,
        "tuple": tuple(rows),
        "indexed": Indexed(rows),
        "Dataset": table,
        "Dataset with a format": table.with_format("numpy"),
        "DatasetDict": datasets.DatasetDict(train=table),
        "DataFrame": pandas.DataFrame(rows),
        "str": str(path),
        "Path": path,
        "examples": parse_rows([(f"row {i}", row) for i, row in enumerate(rows)], "rows"),
    }


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    for name, dataset in forms(ROWS, tmp_path).items():
        rows, report = rows_from(dataset, TOKENIZER, **SMALL)
        assert [row.id for row in rows] == ["row-1", "row-2"], name
        assert [text(row.response_ids) for row in rows] == ["c</s>", "hello there</s>"], name
        assert text(rows[0].prompt_ids).endswith("### Response:\n"), name
        assert (report.kept, report.dropped) == (2, {}), name
        again, _ = rows_from(rows, TOKENIZER)
        assert again == rows


def test_settings_are_those_of_tokenising() -> None:
    (row,), report = rows_from([{"prompt": "a", "completion": "b c d"}], TOKENIZER, template="plain", max_tokens=4)
    assert text(row.prompt_ids) == "a"
    assert len(row.all_ids) == 4 and report.responses_cut == 1
    said = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns = [{"role": role, "content": content} for role, content in said]
    chat = build()
    last, every = (rows_from([{"messages": turns}], chat, turns=which, **SMALL)[0][0] for which in ("last", "all"))
    assert chat.convert_ids_to_tokens(last.trained_ids) == ["d", "<|im_end|>"]
    assert chat.convert_ids_to_tokens(every.trained_ids) == ["b", "<|im_end|>", "d", "<|im_end|>"]


def test_a_bundled_name_and_an_encoder_decoder() -> None:
    rows, _ = rows_from("bundled:dolly-eval", TOKENIZER, encoder_decoder=True, max_tokens=2000, max_prompt_tokens=1000)
    assert rows and all(row.encoder_decoder for row in rows)


@pytest.mark.parametrize("label", [1, "yes", "1"])
def test_a_label_by_number_or_by_name(label: Any) -> None:
    classes = CLASSES if label != "1" else ("0", "1")
    (row,), _ = rows_from([{"text": "a", "label": label}], TOKENIZER, classes=classes)
    assert isinstance(row, LabelledRow) and (row.label, row.text, row.id) == (1, "a", "row-1")


def test_a_number_that_is_a_class_of_that_name_is_that_class() -> None:
    (row,), _ = rows_from([{"text": "a", "label": 1}], TOKENIZER, classes=("1", "0"))
    assert row.label == 0


def test_class_labels_of_a_dataset(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["yes", "no"]))
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    rows, _ = rows_from(table, TOKENIZER, classes=CLASSES)
    assert [row.label for row in rows] == [1, 0]  # by name, not by the data set's numbers


def test_a_transform_of_the_callers_own_makes_the_rows() -> None:
    import datasets

    table = datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}])
    table.set_transform(lambda batch: {"prompt": batch["q"], "response": ["c"] * len(batch["q"])})
    assert len(rows_from(table, TOKENIZER, **SMALL)[0]) == 2


@pytest.mark.parametrize("label", [2, -1, "maybe"])
def test_an_unknown_class(label: Any) -> None:
    with pytest.raises(DrklError, match=r"Row 'row-1' has the label .*, which is none of the 2 classes: no, yes"):
        rows_from([{"text": "a", "label": label}], TOKENIZER, classes=CLASSES)


def _stream() -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(lambda: iter(ROWS))


def _splits() -> Any:
    import datasets

    return datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS), train=datasets.Dataset.from_list(ROWS))


READY = Row("a", (1,), (2,), Example("a", ()))
SEQ2SEQ = Row("a", (1,), (2,), Example("a", ()), encoder_decoder=True)
LABELLED = LabelledRow("a", (1,), 0, "a")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: [], "train_dataset has no rows"),
        (_stream, r"train_dataset is a IterableDataset, which can be read once.*list\(train_dataset.take"),
        (
            lambda: (row for row in ROWS),
            r"is a generator, which can be read once.* list\(train_dataset\)",
        ),
        (_splits, r"with the splits test, train; pass one of them, as in train_dataset\['test'\]"),
        (lambda: dict(_splits()), r"is a dict with the splits test, train; pass one of them"),
        (lambda: {"prompt": ["a"], "response": ["b"]}, "is one dict with the keys prompt, response; expected a list"),
        (lambda: None, "train_dataset is a NoneType; expected a datasets.Dataset, a list of dicts, or the path"),
        (lambda: 7, "train_dataset is a int; expected a datasets.Dataset"),
        (lambda: ["a", "b"], "train_dataset, row 1: expected an object .*; found text"),
        (
            lambda: [ROWS[0], {"prompt": "q"}],
            "train_dataset, row 2: expected .* A prompt alone is enough only",
        ),
        (lambda: [ROWS[0], {"input_ids": [1], "labels": [1]}], "train_dataset, row 2: a row of another kind"),
        (lambda: [READY, LABELLED], "train_dataset, row 2: a row of another kind"),
        (lambda: [SEQ2SEQ], "rows that were tokenised for an encoder-decoder; the model is a decoder-only model"),
        (lambda: [READY, SEQ2SEQ], "the model is a decoder-only model"),
        (lambda: [LABELLED], "rows that were tokenised for a classifier; the model is a decoder-only model"),
        (lambda: "no/such/file.jsonl", "There is no file 'no/such/file.jsonl'"),
        (lambda: Path("nowhere"), "There is no file 'nowhere'"),
        (lambda: "bundled:doly", "There is no bundled data 'bundled:doly'.*Did you mean 'bundled:dolly'"),
    ],
)
def test_what_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        rows_from(dataset(), TOKENIZER)


def test_rows_of_a_language_model_are_no_classifiers() -> None:
    with pytest.raises(DrklError, match="eval_dataset has rows that were tokenised for a decoder-only model; the model "
                       "is a classifier"):  # fmt: skip
        rows_from([READY], TOKENIZER, classes=CLASSES, name="eval_dataset")


TOKENS = st.lists(st.integers(0, 20), min_size=2, max_size=12)


@settings(deadline=None, max_examples=60)
@given(TOKENS, st.data(), st.integers(0, 3), st.booleans(), st.booleans())
def test_tokenised_rows_train_what_transformers_would(
    ids: list[int], data: st.DataObject, padding: int, left: bool, as_tensor: bool
) -> None:
    learnt = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    labels = [token if counts else -100 for token, counts in zip(ids, learnt, strict=True)]
    pad, mask = [0] * padding, [1] * len(ids)
    around = (lambda extra, part: extra + part) if left else (lambda extra, part: part + extra)
    row: dict[str, Any] = {
        "input_ids": around(pad, ids), "labels": around([-100] * padding, labels), "attention_mask": around(pad, mask),
    }  # fmt: skip
    if as_tensor:
        row = {name: torch.tensor(value) for name, value in row.items()}
    expected = [token for token in labels[1:] if token != -100]  # transformers shifts: the first is never predicted
    if not expected:
        with pytest.raises(DrklError, match="no token to learn"):
            rows_from([row], TOKENIZER, **SMALL)
        return
    (made,), report = rows_from([row], TOKENIZER, **SMALL)
    assert list(made.trained_ids) == expected and report.kept == 1
    last = max(i for i, label in enumerate(labels) if label != -100 and i)
    assert list(made.all_ids) == ids[: last + 1]
    assert list(made.sampling_ids) == ids[: len(made.sampling_ids)] and made.sampling_ids


def test_a_tokenised_prompt_ends_where_the_labels_begin() -> None:
    ids = TOKENIZER("a b hi c")["input_ids"]
    labels = [-100] * (len(ids) - 1) + ids[-1:]
    (row,), _ = rows_from([{"input_ids": ids, "labels": labels, "id": "x"}], TOKENIZER)
    assert (row.id, row.prompt_ids, row.response_ids) == ("x", tuple(ids[:-1]), tuple(ids[-1:]))
    assert (row.example.prompt_text.split(), row.example.response) == (["a", "b", "hi"], "c")
    assert row.sampling_ids == row.prompt_ids


def test_of_a_tokenised_conversation_the_last_turn_is_sampled() -> None:
    ids = TOKENIZER("a b c d")["input_ids"]
    labels = [-100, ids[1], -100, -100, *ids[4:5], -100, -100]
    (row,), _ = rows_from([{"input_ids": ids, "labels": labels}], TOKENIZER)
    assert row.trained == (True, False, False, True) and row.sampling_ids == tuple(ids[:4])
    assert row.example.response == TOKENIZER.decode(ids[4:5])


def test_a_tokenised_text_is_continued_from_its_beginning() -> None:
    ids = TOKENIZER("a b c d a b c d")["input_ids"]
    (row,), _ = rows_from([{"input_ids": ids, "labels": ids}], TOKENIZER)
    assert (row.prompt_ids, row.response_ids) == (tuple(ids[:1]), tuple(ids[1:]))
    assert row.sampling_ids == tuple(ids[: len(ids) // 4])


def test_lengths_hold_for_tokenised_rows_too() -> None:
    def row(prompt: int, response: int) -> dict[str, list[int]]:
        return {"input_ids": [5] * (prompt + response), "labels": [-100] * prompt + [5] * response}

    rows, report = rows_from([row(3, 2), row(4, 9), row(5, 1)], TOKENIZER, max_prompt_tokens=4, max_tokens=8)
    assert [len(r.all_ids) for r in rows] == [5, 8] and report.responses_cut == 1
    assert report.dropped == {"prompt_too_long": 1}
    with pytest.raises(DrklError, match=r"prompt longer than max_prompt_tokens.*The shortest prompt has 5 tokens"):
        rows_from([row(5, 1)], TOKENIZER, max_prompt_tokens=4, max_tokens=8)


def test_a_tokenised_source_and_target() -> None:
    row = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [7, 8, -100]}
    (made,), _ = rows_from([row], TOKENIZER, encoder_decoder=True)
    assert (made.prompt_ids, made.response_ids, made.encoder_decoder) == ((5, 6), (7, 8), True)
    assert made.example.response == TOKENIZER.decode([7, 8])
    with pytest.raises(DrklError, match=r"labels\[1\] is -100 inside the target"):
        rows_from([row | {"labels": [7, -100, 8]}], TOKENIZER, encoder_decoder=True)
    with pytest.raises(DrklError, match="decoder_input_ids are made from labels"):
        rows_from([row | {"decoder_input_ids": [0, 7, 8]}], TOKENIZER, encoder_decoder=True)
    with pytest.raises(DrklError, match="1 empty prompt, 1 no token to learn"):
        void = [row | {"attention_mask": [0, 0, 0]}, row | {"labels": [-100]}]
        rows_from(void, TOKENIZER, encoder_decoder=True)


def test_a_tokenised_text_with_its_class() -> None:
    rows = [
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "label": 1},
        {"input_ids": torch.tensor([7]), "labels": torch.tensor([0])},
        {"input_ids": [7] * 9, "labels": "yes"},
    ]
    made, report = rows_from(rows, TOKENIZER, classes=CLASSES, max_tokens=8)
    assert [(row.ids, row.label) for row in made] == [((5, 6), 1), ((7,), 0)]
    assert report.dropped == {"text_too_long": 1} and "text longer than max_tokens" in report.summary()
    with pytest.raises(DrklError, match=r"row 1: labels is 2; expected a class by number \(0 to 1\) or by name"):
        rows_from([{"input_ids": [5], "labels": 2}], TOKENIZER, classes=CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "expected input_ids and labels; found input_ids, labels. Labels are a copy of input_ids"),
        ({"labels": [-100, 6]}, "labels has 2 entries and input_ids 3"),
        ({"labels": [6, 7, 8]}, r"labels\[0\] is 6 and input_ids\[0\] 5 .*: labels are not shifted here"),
        ({"labels": [-100, 6.5, 7]}, "labels must be a list of whole numbers"),
        ({"labels": [-100, -1, 7]}, "labels has -1; expected token ids, or -100"),
        ({"labels": 7}, "labels must be a list of whole numbers, one row at a time; found 7"),
        ({"input_ids": [[5, 6, 7]]}, r"input_ids must be a list of whole numbers, one row at a time; found \[\[5"),
        ({"input_ids": [5, -6, 7]}, "input_ids has -6; expected whole numbers from 0"),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 entries and input_ids 3"),
        ({"attention_mask": [1, 0, 1]}, "attention_mask must be one run of 1"),
        ({"attention_mask": [1, 1, 0]}, r"labels\[2\] is 7, but attention_mask is 0 there; set it to -100"),
        ({"position_ids": [0, 1, 0]}, r"position_ids that do not count from 0 \(packed rows\)"),
    ],
)
def test_tokenised_rows_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]} | change
    with pytest.raises(DrklError, match="train_dataset, row 1: " + message):
        rows_from([row], TOKENIZER)


def test_a_missing_value_of_pandas_is_null() -> None:
    pandas = pytest.importorskip("pandas")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    frame = pandas.DataFrame({"messages": [messages, messages], "id": [None, "x"], "tools": [float("nan"), None]})
    assert [row.id for row in rows_from(frame, TOKENIZER)[0]] == ["row-1", "x"]
    with pytest.raises(DrklError, match="rows, row 2: response must be text; found null"):
        rows_from(pandas.DataFrame({"prompt": ["a", "b"], "response": ["c", None]}), TOKENIZER, name="rows")


def test_a_series_and_an_array_are_lists_of_rows() -> None:
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    expected = [row.all_ids for row in rows_from(rows, TOKENIZER)[0]]
    for dataset in (pandas.Series(rows, index=[7, 3]), numpy.array(rows, dtype=object)):
        assert [row.all_ids for row in rows_from(dataset, TOKENIZER)[0]] == expected


def test_no_made_up_id_of_a_block_clashes_with_a_written_one() -> None:
    rows = [{"id": "x/1", "prompt": "a", "response": "b"}, {"id": "x", "text": "a b"}]
    assert [row.id for row in rows_from(rows, TOKENIZER)[0]] == ["x/1", "x/1'"]
    texts = parse_rows([(f"a:{name}", {"id": name, "text": "a b " * 30}) for name in ("x", "x-end")], "a")
    train, held_out = hold_out(texts)
    assert [row.id for row in train] == ["x", "x-end"] and [row.id for row in held_out] == ["x-end'", "x-end-end"]


def test_rows_in_memory_need_no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    dataset = [{"prompt": "a", "completion": "b c"}]
    assert not has_no_end(dataset)
    assert len(rows_from(dataset, TOKENIZER, **SMALL)[0]) == 1
