"""Classifiers of several families: loaded, pruned, given classes, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

from drkl.errors import DrklError
from drkl.models.classes import check_classes, class_names, is_classifier
from drkl.models.config import StudentConfig
from drkl.models.forward import hidden_states, output_head
from drkl.models.load import load_classifier, load_config, load_tokenizer
from drkl.models.student import make_student, prune, student_config
from tests.models import tiny, tiny_classifiers
from tests.models.tiny_classifiers import CLASSES

FAMILIES = sorted(tiny_classifiers.SIZES)


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_class_logits_are_the_models_own_and_no_padding_shows(kind: str) -> None:
    model = tiny_classifiers.make(kind)
    rows = [[1, 7, 9, 2], [1, 30, 31, 32, 33, 2]]
    with torch.no_grad():
        together = hidden_states(model, batch(*rows))
        alone = [model(input_ids=torch.tensor([row])).logits for row in rows]
    assert output_head(model) is None and together.shape == (2, 1, 3)
    torch.testing.assert_close(together[:, 0], torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_pruning_keeps_the_layers_and_the_head(kind: str, tmp_path: Path) -> None:
    teacher = tiny_classifiers.make(kind)
    tiny_classifiers.save(teacher, tmp_path / "t")
    student = make_student(StudentConfig(layers=[0, 2]), str(tmp_path / "t"), 0, tiny_classifiers.tokenizer(), CLASSES)
    assert student.config.num_hidden_layers == 2 and class_names(load_config(str(tmp_path / "t")), "t") == CLASSES
    theirs, ours = teacher.state_dict(), student.state_dict()
    moved = {name for name in ours if ".2." in name.replace("layers.2", ".2").replace("layer.2", ".2")}
    assert not moved and len(ours) < len(theirs)
    for name in ours:
        old = name.replace(".layer.1.", ".layer.2.").replace(".layers.1.", ".layers.2.").replace(".h.1.", ".h.2.")
        assert torch.equal(ours[name], theirs[old]), name
    student.save_pretrained(tmp_path / "s")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s")
    inputs = batch([1, 7, 9, 2], [1, 30, 2])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, student(**inputs).logits)


def test_a_modern_bert_keeps_its_first_layer_which_alone_has_no_norm() -> None:
    assert prune(tiny_classifiers.make("modernbert"), [0, 3])(**batch([1, 7, 2])).logits.isfinite().all()
    with pytest.raises(
        DrklError, match=r"layers keeps \[1, 3\], and ModernBertConfig settles .*attn_norm.*layers=\[0, 1\]"
    ):
        prune(tiny_classifiers.make("modernbert"), [1, 3])


def test_a_bare_encoder_gets_a_head_for_the_classes(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=tiny.VOCAB, **tiny_classifiers.SIZES["bert"])
    BertModel(config).save_pretrained(tmp_path)
    student = StudentConfig(init="pretrained", model=str(tmp_path))
    first, again, other = (make_student(student, None, seed, None, CLASSES) for seed in (1, 1, 2))
    assert class_names(_saved(first, tmp_path), "m") == CLASSES
    heads = [model.classifier.weight for model in (first, again, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)
    with pytest.raises(DrklError, match=r"is no classifier \(its config.json says \['BertModel'\]\)"):
        load_classifier(str(tmp_path), "fp32")


def _saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "classifier")
    return load_config(str(folder / "classifier"))


def test_a_random_student_has_the_teachers_classes(tmp_path: Path) -> None:
    tiny_classifiers.save(tiny_classifiers.make(), tmp_path)
    own = StudentConfig(init="random", config={"model_type": "distilbert", "dim": 8, "n_heads": 2, "n_layers": 1})
    made = make_student(own, str(tmp_path), 0, load_tokenizer(str(tmp_path), classifier=True), CLASSES)
    assert is_classifier(made) and made.config.num_labels == 3 and made.config.pad_token_id == 0
    assert student_config(StudentConfig(init="random"), str(tmp_path), None, ("a", "b")).num_labels == 2
    unfit = StudentConfig(init="random", config={"model_type": "marian"})
    with pytest.raises(DrklError, match=r"student\.config makes no marian"):
        make_student(unfit, str(tmp_path), 0, load_tokenizer(str(tmp_path), classifier=True), CLASSES)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("loan", "card", "other"), r"the same classes in another order \(class 0: 'card', expected 'loan'\)"),
        (("card", "loan"), r"'m' has 3 classes, expected 2"),
        (("card", "loan", "x"), r"other classes \(for instance 'other'; expected 'card' and so on\)"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], message: str) -> None:
    config = tiny_classifiers.make().config
    config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(DrklError, match=message):
        check_classes(config, classes, "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {0: "x"}}, r"has 1 output\(s\)"),
        ({"problem_type": "multi_label_classification"}, "problem_type 'multi_label_classification'"),
        ({"id2label": {0: "x", 1: "x"}}, "calls two of its classes 'x'"),
        ({"architectures": None}, "is no classifier"),
    ],
)
def test_what_is_no_choice_of_one_class_is_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_classifiers.make().config
    for key, value in ({"architectures": ["BertForSequenceClassification"]} | changes).items():
        setattr(config, key, value)
    with pytest.raises(DrklError, match=message):
        class_names(config, "m")


def test_a_tokenizer_of_a_classifier_needs_no_end_but_something_to_pad_with(tmp_path: Path) -> None:
    tokens = tiny_classifiers.tokenizer()
    tokens.eos_token = None
    tokens.save_pretrained(tmp_path / "a")
    assert load_tokenizer(str(tmp_path / "a"), classifier=True).pad_token_id == 0
    with pytest.raises(DrklError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "a"))
    tokens.pad_token = None
    tokens.save_pretrained(tmp_path / "b")
    with pytest.raises(DrklError, match="no padding token"):
        load_tokenizer(str(tmp_path / "b"), classifier=True)
