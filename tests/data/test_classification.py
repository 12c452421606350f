"""Texts with labels, as a classifier reads them."""

from __future__ import annotations

import pytest
import torch

from drkl.data.classification import LabelledRow, label_set, labelled_texts, tokenize_labelled
from drkl.data.collate import collate
from drkl.data.config import DataConfig, TokenizerConfig
from drkl.data.rows import read_shares
from drkl.data.tokenizer import learn_tokenizer
from drkl.errors import DrklError
from tests.models.tiny_classifiers import tokenizer

ROWS = [("a", "hi there", "card"), ("b", " ", "card"), ("c", "hi", ""), ("d", "hi a b c d", "loan")]


def test_rows_are_cut_dropped_and_counted() -> None:
    rows, report = tokenize_labelled(ROWS, tokenizer(), ("card", "loan"), max_tokens=6)
    assert [(row.id, row.label, row.text, row.length) for row in rows] == [
        ("a", 0, "hi there", 5),
        ("d", 1, "hi a b c d", 6),
    ]
    assert all((row.ids[0], row.ids[-1]) == (1, 2) for row in rows), "begin and end stay where a text is cut"
    assert report.dropped == {"empty_text": 1, "empty_label": 1} and report.responses_cut == 1
    assert report.summary() == (
        "2 of 4 rows kept, 1 dropped (empty text), 1 dropped (empty label), 1 texts cut at max_tokens."
    )


def test_an_unknown_label_is_named_with_the_known_ones() -> None:
    with pytest.raises(DrklError) as error:
        tokenize_labelled([("r7", "hi", "cart")], tokenizer(), ("card", "loan"), max_tokens=9)
    text = str(error.value)
    assert "Row 'r7' has the label 'cart', which is none of the 2 classes: card, loan. Did you mean 'card'?" in text
    with pytest.raises(DrklError, match="c11 and 8 more"):
        tokenize_labelled(ROWS, tokenizer(), [f"c{i}" for i in range(20)], max_tokens=9)


def test_rows_without_text_or_label_are_not_enough() -> None:
    with pytest.raises(DrklError, match="None of the 1 rows has both a text and a label"):
        tokenize_labelled([("a", "", "card")], tokenizer(), ("card", "loan"), max_tokens=9)


def test_the_classes_are_the_sorted_labels() -> None:
    assert label_set([*ROWS, ("e", "", "never")]) == ("card", "loan")
    with pytest.raises(DrklError, match="only 'card'"):
        label_set(ROWS[:3])
    with pytest.raises(DrklError, match="have none"):
        label_set([])
    config = DataConfig(path="bundled:banking77", eval_path="bundled:banking77-eval")
    train, held_out = map(labelled_texts, read_shares(config, classifier=True))
    assert len(label_set(train)) == 77 and {label for *_, label in held_out} <= set(label_set(train))


def test_a_text_is_one_position_of_a_batch() -> None:
    rows = [LabelledRow("a", (1, 5, 2), 3, "x"), LabelledRow("b", (1, 2), 0, "y")]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert torch.equal(batch["labels"], torch.tensor([[3], [0]])) and batch["row_ids"] == ["a", "b"]


def test_a_learnt_tokenizer_of_a_classifier_begins_ends_and_pads_with_tokens_of_their_own() -> None:
    texts = ["the cat and the hat", "the bat"] * 20
    tokens = learn_tokenizer(TokenizerConfig(vocab_size=270), texts, classifier=True)
    ids = tokens("the cat, 世界")["input_ids"]
    assert (tokens.pad_token_id, tokens.cls_token_id, tokens.sep_token_id) == (0, 1, 2)
    assert (tokens.bos_token_id, tokens.eos_token_id) == (1, 2) and (ids[0], ids[-1]) == (1, 2)
    assert tokens.decode(ids[1:-1]) == "the cat, 世界" and not {0, 1, 2} & set(ids[1:-1])
    cut = tokens("the cat, the bat", truncation=True, max_length=4)["input_ids"]
    assert len(cut) == 4 and cut[-1] == 2
