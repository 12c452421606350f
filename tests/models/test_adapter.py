"""LoRA students: what is trained, what is refused, and that both exports are read back by other libraries."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    C3AConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from drkl.errors import DrklError
from drkl.models.adapter import adapter_base, adapter_start, add_adapter, check_adapter, merge_adapter, save_adapter
from drkl.models.config import PeftConfig, StudentConfig
from drkl.models.load import load_classifier, load_config, load_model, load_tokenizer
from drkl.models.student import make_student
from tests.families import builder
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "["}, "peft: unterminated character set"),
        ({"trainable_token_indices": [10**6]}, "peft: index 1000000 is out of bounds"),
        ({"rank_pattern": {"nothing": 4}}, r"peft: .*rank_pattern keys did not match .*\['nothing'\]"),
        ({"exclude_modules": ["nothing"]}, "peft: .*no modules were excluded"),
        ({"modules_to_save": ["nothing"]}, "peft: the student has no module nothing, which modules_to_save names"),
        ({"modules_to_save": "norm"}, "peft: modules_to_save is 'norm'; expected a list"),
    ],
)
def test_fields_without_an_effect_or_that_peft_stumbles_over(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        add_adapter(tiny.llama(), config(**changes), seed=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "r is 0; expected a whole number of at least 1"), ("r", True, "r is True"), ("r", 1.5, "r is 1.5"),
        ("lora_alpha", 0, "expected a positive number"), ("lora_alpha", math.nan, "lora_alpha is nan"),
        ("lora_alpha", "x", "lora_alpha is 'x'"), ("lora_dropout", -1, "below 1"), ("lora_dropout", 1.0, "below 1"),
        ("peft_type", "IA3", "peft_type has no use in a run"), ("revision", "main", "revision has no use"),
    ],
)  # fmt: skip
def test_values_of_a_peft_section(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**{name: value})


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


def untied(tmp_path: Path) -> PreTrainedModel:
    if not (tmp_path / "base").exists():
        tiny.save(tiny.llama(layers=2, tie_word_embeddings=False), tmp_path / "base")
    return load_model(str(tmp_path / "base"), "fp32")


def nudged(model: PreTrainedModel) -> torch.Tensor:
    """Move every trained weight a little, and return the logits."""
    torch.manual_seed(8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return tiny.logits(model)


def assert_same(model: Any, expected: torch.Tensor) -> None:
    """The same function; products of two low ranks are summed in another order once they are merged."""
    torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-4, atol=2e-5)


STARTS: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": False},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    {"init_lora_weights": "pissa_niter_2", "use_dora": True},
    {"init_lora_weights": "olora", "modules_to_save": ["norm"]},
    {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]},
    {"use_dora": True},
    {"use_rslora": True},
    {"target_modules": "all-linear"},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["embed_tokens"]},
    {"trainable_token_indices": [3, 5]},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    {"layers_to_transform": [1]},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("fields", STARTS, ids=str)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")  # peft's own
def test_lora_is_one_model_in_memory_saved_and_merged(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Reloaded by drkl and by peft alone; starts that change the base are made again by neither."""
    model = untied(tmp_path)
    adapter = add_adapter(model, config(**fields), seed=1)
    start = adapter_start(adapter)
    expected = nudged(model)
    save_adapter(adapter, tmp_path / "adapter", start)
    base = untied(tmp_path)
    assert not torch.allclose(tiny.logits(base), expected, atol=1e-3)
    assert_same(load_model(str(tmp_path / "adapter"), "fp32"), expected)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same(by_peft, expected)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), expected)
    merge_adapter(adapter).save_pretrained(tmp_path / "merged")
    assert_same(load_model(str(tmp_path / "merged"), "fp32"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"]),
        OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        VBLoRAConfig(r=2, num_vectors=4, vector_length=4, target_modules=["q_proj"], topk=2),
        HRAConfig(r=2, target_modules=["q_proj"]),
        RandLoraConfig(r=2, target_modules=["q_proj"]),
        C3AConfig(block_size=8, target_modules=["q_proj"]),
        TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
    ],
    ids=lambda kind: type(kind).__name__,
)
def test_the_kin_of_lora(tmp_path: Path, kind: Any) -> None:
    model = untied(tmp_path)
    adapter = add_adapter(model, kind, seed=1)
    expected = nudged(model)
    save_adapter(adapter, tmp_path / "adapter", adapter_start(adapter))
    assert_same(load_model(str(tmp_path / "adapter"), "fp32"), expected)
    assert_same(merge_adapter(adapter), expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (config(lora_bias=True), "Impossible to merge LoRA with `lora_bias=True`"),
        (config(layer_replication=[(0, 2), (1, 2)]), "layer_replication repeats layers of the model"),
        (config(alora_invocation_tokens=[3]), "aLoRA does not support merging"),
        (config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "'loftq' puts quantised weights in the"),
        (config(init_lora_weights="corda"), "`eigens` attribute not found"),
        (
            AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
            "cannot be merged into its base",
        ),
        (PolyConfig(r=2, target_modules=["q_proj"], n_tasks=1), "task_ids"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "puts prompts before the input"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "puts prompts before the input"),
    ],
)
@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'corda':UserWarning")  # peft's own
def test_adapters_that_no_student_comes_of(kind: Any, words: str) -> None:
    with pytest.raises(DrklError, match=words):
        add_adapter(tiny.llama(layers=2, tie_word_embeddings=False), kind, seed=1)


def test_an_adapter_under_another_name_is_saved_where_it_is_looked_for(tmp_path: Path) -> None:
    adapter = get_peft_model(untied(tmp_path), LoraConfig(**QV), adapter_name="mine")
    check_adapter(adapter)
    expected = nudged(adapter.get_base_model())
    save_adapter(adapter, tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(load_model(str(tmp_path / "adapter"), "fp32")), expected)
    adapter.add_adapter("other", LoraConfig(**QV))
    with pytest.raises(DrklError, match=r"several adapters \('mine', 'other'\)"):
        check_adapter(adapter)


def adapter_folder(tmp_path: Path, model: PreTrainedModel | None = None, **fields: Any) -> Path:
    adapter = get_peft_model(untied(tmp_path) if model is None else model, LoraConfig(**(QV | fields)))
    nudged(adapter.get_base_model())
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_merged_adapter_is_trained_as_a_whole(tmp_path: Path) -> None:
    folder = str(adapter_folder(tmp_path, modules_to_save=["norm"]))
    student = make_student(StudentConfig(init="pretrained", model=folder), None, 0)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_an_adapter_of_a_merged_adapter_names_the_folder_of_that(tmp_path: Path) -> None:
    student = load_model(str(adapter_folder(tmp_path)), "fp32")
    adapter = add_adapter(student, config(), seed=1)
    expected = nudged(student)
    save_adapter(adapter, tmp_path / "second")
    assert_same(load_model(str(tmp_path / "second"), "fp32"), expected)


def test_an_adapter_without_a_tokenizer_is_read_with_its_base_models(tmp_path: Path) -> None:
    assert load_tokenizer(adapter_folder(tmp_path)).get_vocab() == tiny.tokenizer().get_vocab()


def edit(folder: Path, **values: Any) -> str:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


@pytest.mark.parametrize(
    "kind",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    ],
    ids=lambda kind: type(kind).__name__,
)
@pytest.mark.parametrize("load", [lambda name: load_model(name, "fp32"), load_config])
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name:UserWarning")  # one config for several bases
def test_a_folder_of_prompts_is_refused(tmp_path: Path, kind: Any, load: Any) -> None:
    get_peft_model(untied(tmp_path), kind).save_pretrained(tmp_path / "prompts")
    with pytest.raises(DrklError, match=r"holds prompts that peft puts before a model's input"):
        load(str(tmp_path / "prompts"))


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to:UserWarning")  # peft's own
def test_an_adapter_with_another_vocabulary(tmp_path: Path, target: bool) -> None:
    model = untied(tmp_path)
    model.resize_token_embeddings(tiny.VOCAB + 6, mean_resizing=False)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    folder = adapter_folder(tmp_path, model, **({"target_modules": ["q_proj", "embed_tokens"]} if target else saved))
    with pytest.raises(DrklError, match=r"another vocabulary than its base model|does not fit its base model"):
        load_model(str(folder), "fp32")


def test_embeddings_saved_beside_an_adapter_are_read(tmp_path: Path) -> None:
    model = untied(tmp_path)
    adapter = get_peft_model(model, LoraConfig(**QV))
    model.get_input_embeddings().weight.data.mul_(1.5)
    expected = nudged(model)
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    torch.testing.assert_close(tiny.logits(load_model(str(tmp_path / "adapter"), "fp32")), expected)


def test_adapters_without_weights_or_with_pickled_or_broken_ones(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DrklError, match=r"Cannot read the adapter's weights"):
        load_model(str(folder), "fp32")
    path.unlink()
    with pytest.raises(DrklError, match=r"has no weights: expected adapter_model\.safetensors beside"):
        load_model(str(folder), "fp32")
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(DrklError, match=r"pickled weights \(adapter_model\.bin\), and drkl reads safetensors only"):
        load_model(str(folder), "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key: None if "layers.1" in key else key, r"4 of its weights are not in the file \(base_model"),
        (lambda key: None, r"8 of its weights are not in the file"),
        (lambda key: key.replace("layers.1", "layers.7"), r"4 of its weights .*4 in the file have no place"),
        (lambda key: key.replace("self_attn", "attention"), r"8 of its weights .*8 in the file have no place"),
        (lambda key: "_orig_mod." + key, r"Every name has '_orig_mod\.' in it: .*python -c "),
        (lambda key: key.replace("model.layers", "_orig_mod.model.layers"), r"Every name has '_orig_mod\.' in it"),
    ],
)
def test_adapter_weights_that_are_not_those_of_the_base(tmp_path: Path, change: Any, words: str) -> None:
    folder = adapter_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    renamed = {new: tensor for key, tensor in load_file(path).items() if (new := change(key)) is not None}
    save_file(renamed, path, {"format": "pt"})
    with pytest.raises(DrklError, match=words) as error:
        load_model(str(folder), "fp32")
    assert str(error.value).startswith(f"The adapter in {str(folder)!r} does not fit its base model: ")


@pytest.mark.parametrize(
    "broken", [lambda tensor: tensor * float("nan"), lambda tensor: tensor / 0, lambda tensor: tensor.to(torch.int8)]
)
def test_adapter_weights_that_are_no_numbers(tmp_path: Path, broken: Any) -> None:
    folder = adapter_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "layers.1" in key and "lora_A" in key)
    save_file(weights | {key: broken(weights[key])}, path, {"format": "pt"})
    with pytest.raises(DrklError, match=rf"no finite floating-point numbers: 1 tensors \({re.escape(key)}\)"):
        load_model(str(folder), "fp32")


def test_an_adapter_of_a_larger_base(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    tiny.save(tiny.llama(layers=2, hidden_size=32), tmp_path / "large")
    with pytest.raises(DrklError, match=r"does not fit its base model\. \(RuntimeError: .*size mismatch"):
        load_model(edit(folder, base_model_name_or_path=str(tmp_path / "large")), "fp32")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"Cannot read the adapter's config .*adapter_config\.json"),
        ("[1]", r"is a list; expected a json object"),
        ("", r"Cannot read the adapter's config"),
    ],
)
@pytest.mark.parametrize("load", [lambda name: load_model(name, "fp32"), load_config, load_classifier])
def test_a_broken_adapter_config(tmp_path: Path, text: str, words: str, load: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(DrklError, match=words):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_model_name_or_path": None}, r"does not say which model it belongs to: set base_model_name_or_path in"),
        ({"base_model_name_or_path": 5}, r"does not say which model it belongs to: set base_model_name_or_path in"),
        ({"peft_type": None}, r"has no peft_type, so what kind of adapter it describes is unknown"),
        ({"task_type": "TOKEN_CLS", "base_model_name_or_path": "gone"}, r"an adapter of a classifier \(TOKEN_CLS\)"),
        ({"base_model_name_or_path": "/no/such/base"}, r"needs its base model '/no/such/base', .*There is no folder"),
        ({"base_model_name_or_path": "gone/base"}, r"needs its base model 'gone/base', which cannot be loaded: T"),
        ({"peft_type": "NOBODY"}, r"does not fit its base model\. \("),
        ({"r": 3}, r"does not fit its base model\. \(RuntimeError: .*size mismatch"),
        ({"r": "two"}, r"does not fit its base model\. \("),
        ({"target_modules": ["nowhere"]}, r"does not fit its base model\. \("),
        ({"task_type": "SEQ_CLS"}, r"is an adapter of a classifier \(SEQ_CLS\)"),
        ({"init_lora_weights": "pissa_niter_4"}, r"started with init_lora_weights='pissa_niter_4', which changed"),
        ({"init_lora_weights": "lora_ga"}, r"which changed its base model in a way that its folder does not keep"),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"layer_replication repeats layers"),
    ],
)  # fmt: skip
def test_an_adapter_config_that_cannot_be_followed(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(DrklError, match=words):
        load_model(edit(adapter_folder(tmp_path), **values), "fp32")


def test_folders_that_are_two_things_at_once(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    with pytest.raises(DrklError, match=r"names its own folder as its base"):
        load_model(edit(folder, base_model_name_or_path=str(folder)), "fp32")
    untied(tmp_path).save_pretrained(folder)
    with pytest.raises(DrklError, match=r"holds a whole model and an adapter"):
        load_model(edit(folder, base_model_name_or_path=str(tmp_path / "base")), "fp32")


def test_an_adapter_of_an_adapter(tmp_path: Path) -> None:
    first = adapter_folder(tmp_path)
    first = first.rename(tmp_path / "first")
    model = load_model(str(first), "fp32")
    adapter = get_peft_model(model, LoraConfig(**(QV | {"target_modules": ["k_proj"], "init_lora_weights": False})))
    expected = tiny.logits(model)
    adapter.save_pretrained(tmp_path / "second", save_embedding_layers=False)
    torch.testing.assert_close(tiny.logits(load_model(str(tmp_path / "second"), "fp32")), expected)


def test_a_start_that_peft_makes_again_is_made_in_full_precision(tmp_path: Path) -> None:
    """In bf16 another part of the base would be taken away than the one that was."""
    model = untied(tmp_path)
    adapter = get_peft_model(model, LoraConfig(**(QV | {"init_lora_weights": "pissa"})))
    nudged(model)
    adapter.save_pretrained(tmp_path / "adapter")
    expected = merge_adapter(adapter).to(torch.bfloat16).state_dict()
    loaded = load_model(str(tmp_path / "adapter"), "bf16").state_dict()
    assert all(torch.allclose(loaded[key], expected[key], rtol=2**-7, atol=1e-5) for key in expected)


def test_an_adapter_on_a_weight_that_layers_share_is_refused() -> None:
    model = builder.build("zamba")
    with pytest.raises(
        DrklError, match=r"^peft puts an adapter each on 'model\.layers\..*, which are one weight of the model"
    ):
        add_adapter(model, {"r": 2, "target_modules": ["down_proj"]}, seed=0)


def test_an_adapter_that_peft_would_not_find_again_is_refused_before_training() -> None:
    model = builder.build("laguna")
    with pytest.raises(
        DrklError, match=r"^peft saves the adapter of model\.layers\.1\.mlp\.shared_experts.* does not find"
    ):
        add_adapter(model, {"r": 2, "target_modules": r".*shared_experts\.down_proj"}, seed=0)
