from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import AutoConfig, LlamaForCausalLM, LlavaConfig, ViTConfig, ViTModel

from drkl.errors import DrklError
from drkl.models import precision
from drkl.models.config import StudentConfig
from drkl.models.load import (
    count_parameters,
    load_classifier,
    load_config,
    load_model,
    load_tokenizer,
    model_class,
    model_note,
)
from drkl.models.student import make_student, student_config
from tests.data.tiny_tokenizers import build
from tests.families import builder
from tests.models import tiny, tiny_classifiers


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


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "header too small"), (b"\x10\0\0\0\0\0\0\0not a header..", "deserializing header")]
)
def test_broken_weights(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        DrklError, match=r"is there, but no usable model was found in it\. \(SafetensorError: .*" + words
    ):
        load_model(str(folder), "fp32")


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(DrklError, match=r"no usable model was found in it\. \(.*not a valid JSON file"):
        load_model(folder, "fp32")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("torch.float32", torch.float32),
        (torch.float32, torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        ("half", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_a_dtype_by_any_of_its_names(folder: Path, tmp_path: Path, dtype: str | torch.dtype, expected) -> None:
    assert load_model(folder, dtype).dtype == expected
    tiny_classifiers.save(tiny_classifiers.make(), tmp_path / "c")
    assert load_classifier(tmp_path / "c", dtype).dtype == expected


def test_auto_is_what_the_device_is_fast_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "has_fast_bf16", lambda device, fast=fast: fast)
        assert load_model(folder).dtype == load_model(folder, "auto").dtype == expected


@pytest.mark.parametrize("dtype", ["int8", torch.int8, torch.bool, torch.complex64, "fp31", "", None, 32])
def test_a_dtype_that_makes_no_sense(folder: Path, dtype) -> None:
    with pytest.raises(DrklError, match=r"The dtype .* is not one that models are loaded in; expected auto, .*bf16"):
        load_model(folder, dtype)


def test_a_dtype_with_a_slip_is_guessed() -> None:
    with pytest.raises(DrklError, match=r"Did you mean 'float32'\?"):
        precision.resolve_dtype("flaot32")


def failing(error: Exception):
    def load(*args, **kwargs):
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        TypeError("LlamaForCausalLM.__init__() got an unexpected keyword argument 'x'"),
        DrklError("another of our own"),
    ],
)
def test_what_is_not_about_the_files_stays_as_it_is(folder: Path, monkeypatch, error: Exception) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", failing(error))
    with pytest.raises(type(error)) as caught:
        load_model(folder, "fp32")
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), r"Cannot read the model '.*'\. \(PermissionError: .*denied"),
        (OSError(28, "No space left on device"), r"Cannot read the model '.*'\. \(OSError: .*No space left"),
        (ImportError("needs the package mamba-ssm"), r"no usable model was found in it\. \(ImportError: .*mamba-ssm"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), r"The memory ran out as the model '"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"The memory ran out as the model '.*CUDA.*smaller model or"),
        (MemoryError(), r"The memory ran out as the model '.*MemoryError"),
        (RecursionError("maximum recursion depth exceeded"), r"no usable model was found in it\. \(RecursionError: "),
        (
            AttributeError("'str' object has no attribute 'to_dict'"),
            r"usable model .*AttributeError: 'str'",
        ),
    ],
)
def test_errors_keep_their_words(folder: Path, monkeypatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", failing(error))
    with pytest.raises(DrklError, match=message):
        load_model(folder, "fp32")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (hub_errors.OfflineModeIsEnabled("offline"), r"and on the hub, which could not be reached\."),
        (ConnectionError("no route"), r"and on the hub, which could not be reached\."),
        (hub_errors.HFValidationError("bad id"), r"in the Hugging Face cache, and on the hub\. The embedded"),
        (KeyError("model_type"), r"Cannot load the config 'somebody/something'\. \(OSError: the words"),
    ],
)
def test_only_what_is_nowhere_is_called_missing(monkeypatch, cause: Exception, message: str) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", failing(caused(OSError("the words"), cause)))
    with pytest.raises(DrklError, match=message) as caught:
        load_config("somebody/something")
    assert "the words" in str(caught.value)


def test_a_model_in_memory_is_returned_as_it_is() -> None:
    model, tokens = tiny.llama().train(), tiny.tokenizer()
    assert load_model(model) is model and load_model(model, torch.float32) is model and model.training
    assert load_config(model) is model.config and load_tokenizer(tokens) is tokens
    with pytest.raises(DrklError, match=r"in memory has weights of torch.float32, and the dtype asked for is bf16"):
        load_model(model, "bf16")
    classifier = tiny_classifiers.make()
    assert load_classifier(classifier, "fp32", tiny_classifiers.CLASSES) is classifier
    with pytest.raises(DrklError, match=r"other classes|classes, expected 2"):
        load_classifier(classifier, "fp32", ("a", "b"))
    with pytest.raises(DrklError, match="'LlamaForCausalLM' is no classifier"):
        load_classifier(model)


def test_further_options_are_handed_on(folder: Path, tmp_path: Path) -> None:
    assert load_model(folder, "fp32", attn_implementation="eager").config._attn_implementation == "eager"
    tiny_classifiers.save(tiny_classifiers.make(), tmp_path / "c")
    assert load_classifier(tmp_path / "c", "fp32", attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(DrklError, match="from_pretrained takes no argument 'revison' for"):
        load_model(folder, "fp32", revison="main")
    with pytest.raises(DrklError, match="revision: options of loading, but the LlamaForCausalLM is in memory already"):
        load_model(tiny.llama(), revision="main")


def test_a_folder_in_the_home_folder(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_config(f"~/{folder.name}").vocab_size == tiny.VOCAB


def test_weights_of_another_shape(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"hidden_size": 24}
    (folder / "config.json").write_text(json.dumps(values))
    expected = r"embed_tokens\.weight is \[64, 16\] in the file and \[64, 24\] by config\.json and 37 more"
    with pytest.raises(DrklError, match=expected):
        load_model(str(folder), "fp32")


def test_an_encoder_alone_is_no_language_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(DrklError, match=r"has a ViTConfig, of which transformers has no ModelForCausalLM"):
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


def test_only_the_embedded_teacher_has_a_note(folder: Path) -> None:
    assert model_note(str(folder)) is None
    assert "4 bits" in str(model_note("smollm2-135m-instruct"))


def test_a_decoder_that_also_hears_is_loaded(tmp_path: Path) -> None:
    """transformers registers it with the encoder-decoders, whose config it has not."""
    model = builder.build("qwen2_audio")
    tiny.assert_alike(load_model(tiny.save(model, tmp_path), "fp32"), model)


def test_a_config_that_no_auto_class_knows_is_loaded_by_the_class_it_names(tmp_path: Path) -> None:
    model = builder.build("emu3")
    tiny.assert_alike(load_model(tiny.save(model, tmp_path), "fp32"), model)


@pytest.mark.parametrize("init", ["prune", "random", "pretrained"])
def test_a_model_that_reads_images_and_is_no_language_model_is_refused_by_name(tmp_path: Path, init: str) -> None:
    LlavaConfig(text_config={"model_type": "llama"}).save_pretrained(tmp_path)
    words = rf"{re.escape(str(tmp_path))}' has a LlavaConfig, of which transformers has no ModelForCausalLM\. Of a"
    student = StudentConfig(init=init, model=str(tmp_path), **({} if init == "pretrained" else {"layers": 1}))
    with pytest.raises(DrklError, match=words):
        make_student(student, None, 0)
    if init != "pretrained":  # whose config is read as it is
        with pytest.raises(DrklError, match=words):
            student_config(student, None)


def test_a_family_without_classifiers_is_refused_by_name() -> None:
    with pytest.raises(DrklError, match=r"'The model' has a LlavaConfig, of .* no ModelForSequenceClassification\."):
        model_class(LlavaConfig(text_config={"model_type": "llama"}), classifier=True)
