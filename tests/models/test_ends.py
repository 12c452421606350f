"""The ends that a model's own settings list, and those that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MBart50Tokenizer, MBartTokenizer, PreTrainedModel

from drkl.data.template import encode_prompt
from drkl.errors import DrklError
from drkl.models.ends import answer_start, check_languages, listed_ends, set_ends, stops_of
from drkl.models.generate import sample_texts
from drkl.models.load import load_model
from tests.data.tiny_tokenizers import CHATML, build
from tests.models import tiny, tiny_classifiers
from tests.models.chains import chain

HI = [{"role": "user", "content": "hi"}]
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{c}", -1.0) for c in "abcd")]


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return found


def model_with(ends: Any) -> PreTrainedModel:
    model = tiny.llama(layers=1)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model


def test_what_a_generation_config_lists(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    word = tokenizer.convert_tokens_to_ids("hi")
    model = model_with([2, word, 4, 999, -1])
    assert listed_ends(model, tokenizer) == [2, word, 4]
    tiny.save(model, tmp_path)
    assert listed_ends(tmp_path, tokenizer) == [2, word, 4]
    # What a config says without one is often its class's default.
    assert listed_ends(tiny.llama(layers=1, eos_token_id=[2, word]), tokenizer) == [2]
    (tmp_path / "generation_config.json").unlink()
    assert listed_ends(tmp_path, tokenizer) == [4]
    assert listed_ends(model_with(None), tokenizer) == []


def test_each_model_stops_at_its_own_ends_too() -> None:
    tokenizer = build(CHATML, eos="</s>")
    eos, stop, word = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "c"])
    assert stops_of(model_with(None), tokenizer) == [eos, stop]
    assert stops_of(model_with([word]), tokenizer) == [eos, stop, word]
    bare = build(None, eos="</s>")
    assert stops_of(model_with([word]), bare, "plain") == [eos, word]
    assert stops_of(model_with(None), bare, "plain", [stop]) == [eos, stop]
    of_a_decoder = tiny.bart(layers=1)
    of_a_decoder.generation_config.eos_token_id = [word]
    assert stops_of(of_a_decoder, tokenizer) == [eos, word]


def test_a_sample_ends_where_the_template_ends_a_turn() -> None:
    chat = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}</s>{% else %}")
    tokenizer = build(chat, eos="</s>")
    model = chain(tokenizer, {"\n": "hello", "hello": "<|im_end|>", "<|im_end|>": "\n"})
    (answer,) = sample_texts(model, tokenizer, [encode_prompt(tokenizer, HI)], max_new_tokens=8)[0]
    assert answer.text == "hello" and answer.finished and answer.num_tokens == 2
    prompt, bare = encode_prompt(tokenizer, HI), build(None, eos="</s>")
    (longer,) = sample_texts(model, bare, [prompt], max_new_tokens=8)[0]
    assert not longer.finished
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (again,) = sample_texts(model, bare, [prompt], max_new_tokens=8)[0]
    assert again == answer


def test_a_student_is_saved_with_all_of_its_ends(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.llama(layers=1, eos_token_id=2, pad_token_id=None)
    assert set_ends(model, tokenizer, [4]) == []
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == [4, 2] == saved.config.eos_token_id
    assert saved.generation_config.pad_token_id == tokenizer.pad_token_id
    assert "_from_model_config" not in (tmp_path / "generation_config.json").read_text()
    model.generation_config.eos_token_id = None
    set_ends(model, tokenizer, [4])
    assert model.generation_config.eos_token_id == 4


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        (SAMPLING, []),
        ({"temperature": 0.6, "top_p": 0.9}, ["temperature", "top_p"]),
        ({"early_stopping": True, "length_penalty": 2.0, "temperature": 0.1}, ["early_stopping", "length_penalty"]),
        ({"num_return_sequences": 3}, ["num_return_sequences"]),
        ({"pad_token_id": -1}, []),
    ],
)
def test_settings_that_transformers_would_not_save_are_left_out(
    tmp_path: Path, settings: dict[str, Any], dropped: list[str]
) -> None:
    model = tiny.llama(layers=1)
    model.generation_config = GenerationConfig(eos_token_id=2)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    notes = set_ends(model, tiny.tokenizer(), [4])
    assert len(notes) == bool(dropped) and all(name in notes[0] for name in dropped)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [4, 2] and saved.pad_token_id == 0
    for name, value in settings.items():
        if not dropped and name != "pad_token_id":
            assert getattr(saved, name) == value
    if dropped:
        saved.validate(strict=True)


@pytest.mark.parametrize("ends", ["[4, 2]", "2"])
def test_published_settings_are_saved_back_as_they_were(tmp_path: Path, ends: str) -> None:
    model = tiny.llama(layers=1)
    loose = f'{{"eos_token_id": {ends}, "pad_token_id": 0, "temperature": 0.6}}'
    tiny.save(model, tmp_path)
    (tmp_path / "generation_config.json").write_text(loose)
    loaded = load_model(tmp_path, "fp32")
    assert set_ends(loaded, tiny.tokenizer(), [4, 2]) == []
    loaded.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert again.temperature == 0.6 and again.eos_token_id == [4, 2]


def test_a_classifier_has_no_ends() -> None:
    assert set_ends(tiny_classifiers.make(), tiny.tokenizer(), [4]) == []


def test_an_encoder_decoder_without_any_end_is_refused() -> None:
    endless, model = tiny.tokenizer(), tiny.t5(layers=1)
    endless.eos_token = None
    assert stops_of(model, endless) == [4]
    model.generation_config.eos_token_id = None
    assert stops_of(model, endless, taught=[7]) == [7]
    with pytest.raises(DrklError, match=r"has no eos token and .* list none, .* Set the tokenizer's eos_token"):
        stops_of(model, endless)


def translators() -> list[Any]:
    """mBART writes the language after eos, mBART-50 before the text."""
    return [make(vocab=list(PIECES), src_lang="en_XX", tgt_lang="ro_RO") for make in (MBartTokenizer, MBart50Tokenizer)]


def test_an_answer_begins_as_the_targets_do() -> None:
    old, new = translators()
    romanian = new.convert_tokens_to_ids("ro_RO")
    bart = tiny.bart(layers=1, vocab_size=len(new))
    assert answer_start(bart, new) == [romanian] and answer_start(bart, old) == []
    bart.generation_config.forced_bos_token_id = 7
    assert answer_start(bart, old) == [7] and answer_start(bart, new) == [romanian]
    assert answer_start(tiny.llama(), new) == []
    set_ends(bart, new, [2])
    assert bart.generation_config.forced_bos_token_id == romanian
    # What transformers writes by the saved settings is what a sample is.
    (answer,) = sample_texts(bart, new, [[5, 2]], max_new_tokens=6, greedy=True)[0]
    ids = torch.tensor([[5, 2]])
    theirs = bart.generate(ids, max_new_tokens=7, do_sample=False)[0].tolist()
    assert theirs[:2] == [4, romanian] and tuple(theirs[2:]) == answer.token_ids


def test_a_language_that_the_model_does_not_begin_with_is_refused() -> None:
    old, new = translators()
    romanian, german = new.convert_tokens_to_ids(["ro_RO", "de_DE"])
    bart = tiny.bart(layers=1, vocab_size=len(new), decoder_start_token_id=german)
    with pytest.raises(DrklError, match=r"targets in 'ro_RO'.* teacher begins its answers in 'de_DE' .*decoder_start"):
        check_languages(old, {"student": None, "teacher": bart})
    check_languages(new, {"teacher": bart})
    bart.generation_config.forced_bos_token_id = german
    with pytest.raises(
        DrklError, match=r"student begins its answers in 'de_DE' \(forced_bos_token_id\).*data\.tgt_lang"
    ):
        check_languages(new, {"student": bart})
    bart.generation_config.forced_bos_token_id = romanian
    check_languages(new, {"student": bart})
    check_languages(tiny.tokenizer(), {"student": bart})
