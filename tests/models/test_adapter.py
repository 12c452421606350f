"""LoRA students: what is trained, what is refused, and that both exports are read back by other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from drkl.errors import DrklError
from drkl.models.adapter import adapter_base, add_adapter, merge_adapter, save_adapter
from drkl.models.config import PeftConfig
from drkl.models.load import load_config, load_model
from tests.models import tiny

QV = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def config(**changes: Any) -> PeftConfig:
    return PeftConfig(**(QV | changes))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Every trained weight is moved, as training would."""
    torch.manual_seed(8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


def base(tmp_path: Path) -> PreTrainedModel:
    tiny.save(tiny.llama(), tmp_path / "base")
    return load_model(str(tmp_path / "base"), "fp32")


def test_the_adapter_alone_is_trained_and_starts_as_nothing(tmp_path: Path) -> None:
    model = base(tmp_path)
    add_adapter(model, config(), seed=1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 2 * 2 and all("lora_" in name for name in trained)
    tiny.assert_alike(model, tiny.llama())


def test_its_first_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (tiny.llama() for _ in range(3))
    state = torch.get_rng_state()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        add_adapter(model, config(), seed)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.model.layers[0].self_attn.q_proj.lora_A["default"].weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_an_adapter_is_read_back_by_peft_and_by_transformers(tmp_path: Path) -> None:
    model = base(tmp_path)
    adapter = add_adapter(model, config(), seed=1)
    expected = tiny.logits(moved(model))
    folder = tmp_path / "adapter"
    save_adapter(adapter, folder)
    assert {p.name for p in folder.iterdir()} == {"README.md", "adapter_model.safetensors", "adapter_config.json"}
    assert load_config(str(folder)).num_hidden_layers == 4
    assert adapter_base(str(folder)) == str(tmp_path / "base") and adapter_base(str(tmp_path / "base")) is None
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    for loaded in (
        by_peft,
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
        load_model(str(folder), "fp32"),
    ):
        torch.testing.assert_close(tiny.logits(loaded), expected)
    assert not any("lora" in name for name, _ in load_model(str(folder), "fp32").named_parameters())


def test_a_merged_student_is_an_ordinary_model(tmp_path: Path) -> None:
    model = base(tmp_path)
    adapter = add_adapter(model, config(), seed=1)
    expected = tiny.logits(moved(model))
    merge_adapter(adapter).save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(loaded), expected)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in tiny.llama().named_parameters()}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("tied", "fields", "name"),
    [
        (False, {"target_modules": ["q_proj", "lm_head"]}, "'lm_head', the output head"),
        (False, {"modules_to_save": ["lm_head"]}, "'lm_head', the output head"),
        (True, {"modules_to_save": ["embed_tokens"]}, "the token embeddings, which are the output head too"),
    ],
)
def test_an_adapter_on_the_head_is_refused_by_name(tied: bool, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(DrklError, match=name):
        add_adapter(tiny.llama(tie_word_embeddings=tied), config(**fields), seed=1)


def test_modules_that_the_model_does_not_have() -> None:
    with pytest.raises(DrklError, match=r"peft: Target modules .*nowhere"):
        add_adapter(tiny.llama(), config(target_modules=["nowhere"]), seed=1)


def test_a_field_that_peft_does_not_have() -> None:
    with pytest.raises(ValidationError, match=r"peft\.LoraConfig has no field 'lora_alfa'.*lora_alpha"):
        PeftConfig(r=2, lora_alfa=3)


def test_an_adapter_without_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2}))
    with pytest.raises(DrklError, match="does not say which model it belongs to"):
        load_model(str(tmp_path), "fp32")


def test_an_encoder_decoder_takes_an_adapter() -> None:
    model = tiny.t5()
    adapter = add_adapter(model, config(target_modules=["q", "v"]), seed=1)
    expected = tiny.logits(moved(model))
    torch.testing.assert_close(tiny.logits(merge_adapter(adapter)), expected, rtol=1e-4, atol=1e-4)
