from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, ViTConfig, ViTModel

from drkl.errors import DrklError
from drkl.models.load import count_parameters, load_config, load_model, load_tokenizer, model_note, shared_tokens
from tests.data.tiny_tokenizers import build
from tests.models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.llama(), tmp_path / "model")


def test_a_folder_gives_the_model_that_was_saved(folder: Path) -> None:
    model = load_model(str(folder), "fp32")
    tiny.assert_alike(model, tiny.llama())
    assert not model.training
    assert load_model(str(folder), "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("load", [lambda name: load_model(name, "fp32"), load_config, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "There is no folder '/no/such/folder'"),
        ("./nowhere", "There is no folder './nowhere'"),
        ("nobody/nothing", "looked for a folder of that name here, in the Hugging Face cache, and on the hub"),
        ("smollm2", "The embedded teacher is called 'smollm2-135m-instruct'"),
    ],
)
def test_a_model_that_is_nowhere(load, name: str, message: str) -> None:
    with pytest.raises(DrklError) as error:
        load(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"is there, but no usable config was found in it"):
        load_config(str(tmp_path))


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DrklError, match=r"convert them to safetensors first"):
        load_model(str(folder), "fp32")


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not a header.."])
def test_broken_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DrklError, match=r"no usable model was found"):
        load_model(str(folder), "fp32")


def test_weights_of_another_shape(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"hidden_size": 24}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(DrklError, match=r"no usable model was found"):
        load_model(str(folder), "fp32")


def test_an_encoder_alone_is_no_language_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(DrklError, match=r"no usable model was found"):
        load_model(str(tmp_path), "fp32")


@pytest.mark.parametrize("load", [lambda name: load_model(name, "fp32"), load_config])
def test_code_from_the_models_side_is_not_run_nor_asked_about(tmp_path: Path, load, monkeypatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}})
    )
    (tmp_path / "c.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    with pytest.raises(DrklError, match=r"custom code"):
        load(str(tmp_path))
    assert not ran.exists()


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tokens = tiny.tokenizer()
    tokens.pad_token = None
    tokens.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == tokens.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    build(eos=None).save_pretrained(tmp_path)
    with pytest.raises(DrklError, match=r"no end-of-sequence token, so a student could not learn to stop"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_making_them(tied: bool) -> None:
    model = tiny.llama(tie_word_embeddings=tied)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    huge = AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    assert count_parameters(huge) > 5e10


def test_the_same_tokens_pass() -> None:
    tokens = tiny.tokenizer()
    assert shared_tokens(tokens, tiny.tokenizer(), "a", "b") == (max(tokens.get_vocab().values()) + 1, False)


def test_tokens_that_differ_are_named() -> None:
    student, teacher = build(extra=["x", "y"]), build(extra=["y", "x"])
    with pytest.raises(DrklError) as error:
        shared_tokens(student, teacher, "small", "large")
    where = student.get_vocab()["x"]
    assert f"{where}: student 'x', teacher 'y'" in str(error.value)
    assert "'small'" in str(error.value) and "'large'" in str(error.value)


def test_a_tokenizer_that_goes_on_where_the_other_ends_shares_its_beginning() -> None:
    short, long = build(extra=["x"]), build(extra=["x", "y", "z"])
    count = max(short.get_vocab().values()) + 1
    assert shared_tokens(short, long, "a", "b") == shared_tokens(long, short, "a", "b") == (count, True)


def test_tokenizers_that_both_go_on_differ() -> None:
    with pytest.raises(DrklError, match=r"student 'y', teacher 'z'"):
        shared_tokens(build(extra=["x", "y", "w"]), build(extra=["x", "z"]), "a", "b")


def test_only_the_embedded_teacher_has_a_note(folder: Path) -> None:
    assert model_note(str(folder)) is None
    assert "4 bits" in str(model_note("smollm2-135m-instruct"))
