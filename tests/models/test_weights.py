"""Every weight comes from the file, or the file is refused by name; nothing is drawn at random in silence."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    LlamaForSequenceClassification,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
)
from transformers import logging as transformers_logging

from drkl.errors import DrklError
from drkl.models.config import StudentConfig
from drkl.models.load import load_classifier, load_model
from drkl.models.student import make_student, prune
from tests.models import tiny, tiny_classifiers

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def saved(folder: Path, model: PreTrainedModel, change: Change = dict, **config: object) -> str:
    """A model's folder with other weights in its file, and other values in its config."""
    tiny.save(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(weights).items()}, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def untied(**changes: object) -> PreTrainedModel:
    return tiny.llama(tie_word_embeddings=False, **changes)


def without(part: str) -> Change:
    return lambda weights: {key: tensor for key, tensor in weights.items() if part not in key}


def renamed(old: str, new: str) -> Change:
    return lambda weights: {key.replace(old, new, 1): tensor for key, tensor in weights.items()}


@torch.no_grad()
def held_out_loss(model: PreTrainedModel) -> float:
    """Mean cross-entropy of a row's tokens after the first, from the logits alone."""
    row = [1, 9, 12, 33, 7, 4]
    logits = model(torch.tensor([row])).logits[0].double()
    terms = [float(logits[i].exp().sum().log() - logits[i, row[i + 1]]) for i in range(len(row) - 1)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "_orig_mod.", r"'_orig_mod\.' in it: the model was saved while torch\.compile was around it"),
        ("", "module.", r"'module\.' in it: the model was saved while DataParallel"),
        ("", "module._orig_mod.", r"Every name begins with 'module\._orig_mod\.'"),
        ("", "base_model.model.", r"'base_model\.model\.' in it: the model was saved while peft"),
        ("", "student.", r"Every name begins with 'student\.', which the model does not know"),
    ],
)
def test_a_prefix_is_named_with_a_cure_that_works(
    tmp_path: Path, tied: bool, shards: bool, old: str, new: str, words: str
) -> None:
    original = tiny.llama(layers=2, tie_word_embeddings=tied)
    folder = tmp_path / "it's"
    if shards:
        tiny.save(original, folder)
        original.save_pretrained(folder, max_shard_size="5KB")
        (folder / "model.safetensors").unlink()
        for path in folder.glob("*.safetensors"):
            save_file({new + key: tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    else:
        saved(folder, original, renamed(old, new))
    with pytest.raises(DrklError, match=words) as error:
        load_model(str(folder), "fp32")
    assert "Nothing is put in their place at random" in str(error.value)
    line = str(error.value).partition("python -c ")[2]
    code = shlex.split(line)[0]
    exec(compile(code, "the cure", "exec"), {})
    assert held_out_loss(load_model(str(folder), "fp32")) == held_out_loss(original)


@pytest.mark.slow
def test_the_cure_is_one_line_for_a_shell(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny.llama(layers=1), renamed("", "_orig_mod."))
    with pytest.raises(DrklError) as error:
        load_model(folder, "fp32")
    line = "python -c " + str(error.value).partition("python -c ")[2]
    subprocess.run(line.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
    tiny.assert_alike(load_model(folder, "fp32"), tiny.llama(layers=1))


def test_wrappers_inside_the_names_are_named_too(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", key): tensor for key, tensor in weights.items()}

    with pytest.raises(DrklError, match=r"Every name has '_orig_mod\.' in it"):
        load_model(saved(tmp_path, tiny.llama(), change), "fp32")


def test_the_prefix_of_a_lost_part_is_added(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny.t5(), renamed("", "x."))
    with pytest.raises(DrklError, match=r"Every name begins with 'x\.'"):
        load_model(folder, "fp32")
    # A body saved by itself is read as it is, by transformers' own rule.
    inner = saved(tmp_path / "inner", tiny.llama(), renamed("model.", ""))
    tiny.assert_alike(load_model(inner, "fp32"), tiny.llama())


def add(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda weights: weights | {key: torch.ones(shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (without("lm_head"), {}, r"1 of 39 weights are not in the file \(lm_head\.weight\)"),
        (without("layers.2."), {}, r"9 of 39 weights are not in the file \(model\.layers\.2\.input_layernorm\.weight"),
        (without("model.norm"), {}, r"1 of 39 weights are not in the file \(model\.norm\.weight\)"),
        (dict, {"num_hidden_layers": 3}, r"the file has 9 that the model has no place for \(model\.layers\.3\.in"),
        (dict, {"num_hidden_layers": 5}, r"9 of 48 weights are not in the file \(model\.layers\.4\."),
        (dict, {"vocab_size": 70}, r"lm_head\.weight is \[64, 16\] in the file and \[70, 16\] by config\.json and 1"),
        (dict, {"attention_bias": True}, r"16 of 55 weights are not in the file .*k_proj\.bias"),
        (lambda w: {}, {}, r"39 of 39 weights are not in the file"),
        (add("model.layers.0.self_attn.q_proj.weight_scale", 1), {}, r"belong to quantised weights, and config"),
        (add("model.layers.0.self_attn.q_proj.weight_scale_inv", 1), {}, r"no quantization_config: put it back"),
        (renamed("q_proj.weight", "q_proj.qweight"), {}, r"4 of 39 .*has 4 .*These belong to quantised weights"),
        (add("model.layers.0.self_attn.q_proj.lora_A.default.weight", 2, 16), {}, r"layers of peft that were not"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), {}, r"layers of peft that were not merged: call merge"),
        (add("score.weight", 3, 16), {}, r"another task's head"),
        (add("v_head.summary.weight", 1, 16), {}, r"another task's head"),
        (add("model.mtp.layers.0.weight", 4), {}, r"no place for \(model\.mtp\.layers\.0\.weight\)"),
        (add("visual.patch_embed.weight", 4), {}, r"no place for \(visual\.patch_embed\.weight\)"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_model(tmp_path: Path, change: Change, config: dict[str, object], words: str) -> None:
    folder = saved(tmp_path, untied(), change, **config)
    with pytest.raises(DrklError, match=words) as error:
        load_model(folder, "fp32")
    assert str(error.value).startswith(f"The weights of {folder!r} are not those of a LlamaForCausalLM by its config")


@pytest.mark.parametrize("load", ["student", "random layers", "prune"])
def test_every_way_to_a_student_refuses_the_same(tmp_path: Path, load: str) -> None:
    folder = saved(tmp_path, untied(), without("layers.2."))
    makers: dict[str, Callable[[], object]] = {
        "student": lambda: make_student(StudentConfig(init="pretrained", model=folder), None, 0),
        "random layers": lambda: make_student(StudentConfig(init="prune", layers=2), folder, 0),
        "prune": lambda: prune(folder, 2),
    }
    with pytest.raises(DrklError, match=r"9 of 39 weights are not in the file"):
        makers[load]()


def test_what_a_family_ties_or_remakes_is_not_missed(tmp_path: Path, capfd) -> None:
    unbiased = tiny.bart()
    unbiased.final_logits_bias.zero_()
    transformers_logging.set_verbosity_warning()
    try:
        for name, model, change in (
            ("tied", tiny.llama(), dict),
            ("head only", tiny.llama(), renamed("model.embed_tokens", "lm_head")),
            ("both", tiny.llama(), lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
            ("rotary", tiny.llama(), add("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
            ("masks", tiny.gpt2(), add("transformer.h.0.attn.bias", 1, 1, 4, 4)),
            ("bart", unbiased, without("final_logits_bias")),
            ("t5", tiny.t5(), dict),
        ):
            tiny.assert_alike(load_model(saved(tmp_path / name, model, change), "fp32"), model)
        with pytest.raises(DrklError):
            load_model(saved(tmp_path / "none", tiny.llama(), without("embed_tokens")), "fp32")
    finally:
        transformers_logging.set_verbosity_error()
    printed = capfd.readouterr().err
    assert "LOAD REPORT" not in printed and "corrupted" not in printed


def pegasus() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "max_position_embeddings": 32,
        "init_std": 0.2,
        "forced_eos_token_id": None,
    }
    sizes |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    return PegasusForConditionalGeneration(PegasusConfig(**sizes)).eval()


MASK = torch.ones(1, 1, 128, 128, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (tiny.gpt2, {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        (lambda: untied(num_nextn_predict_layers=1), {"model.layers.4.eh_proj.weight": torch.ones(16, 32)}),
        (untied, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        (pegasus, {"model.encoder.version": torch.ones(1)}),
    ],
    ids=["masks", "a layer for the token after next", "rotary", "version and positions"],
)
def test_what_published_files_hold_and_models_do_without(
    tmp_path: Path, make: Callable[[], PreTrainedModel], extra: dict[str, Tensor]
) -> None:
    model = make()
    lost = "embed_positions"  # the published Pegasus has no table of sines
    loaded = load_model(saved(tmp_path, model, lambda weights: without(lost)(weights) | extra), "fp32")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_head_of_its_own_in_a_tied_file_stays_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, untied(), dict, tie_word_embeddings=True)
    tiny.assert_alike(load_model(folder, "fp32"), untied())


def test_half_of_the_shards(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path, max_shard_size="5KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(DrklError, match=rf"its index names 1 file\(s\) that are not there \({lost.name}\)"):
        load_model(str(tmp_path), "fp32")
    for text in ("{", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DrklError, match=r"no usable model was found"):
            load_model(str(tmp_path), "fp32")


def test_a_pointer_in_the_place_of_a_file(tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DrklError, match=r"model\.safetensors is a pointer of git-lfs .*git lfs pull"):
        load_model(str(tmp_path), "fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    def broken(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        return weights

    folder = saved(tmp_path, tiny.llama(), broken)
    with pytest.raises(DrklError, match=r"not finite numbers in float32: 1 tensors \(model\.layers\.1\.mlp\.up_proj"):
        load_model(folder, "fp32")


def test_weights_beyond_fp16(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny.llama(), lambda w: w | {"model.norm.weight": torch.full((16,), 1e6)})
    load_model(folder, "bf16")
    with pytest.raises(DrklError, match=r"not finite numbers in float16: .*fp16 overflows where bf16 does not"):
        load_model(folder, "fp16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_codes_in_the_place_of_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    folder = saved(tmp_path, tiny.llama(), lambda w: w | {key: torch.ones_like(w[key], dtype=dtype)})
    what = "other numbers than floats" if dtype == torch.bool else "integers"
    with pytest.raises(DrklError, match=rf"holds {what} where a LlamaForCausalLM has weights: 1 tensors \(model\.lay"):
        load_model(folder, "fp32")


def test_experts_that_cannot_be_put_together(tmp_path: Path) -> None:
    settings = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "vocab_size": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **settings)).eval()
    tiny.assert_alike(load_model(saved(tmp_path / "whole", model), "fp32"), model)
    for part in ("layers.1.mlp.experts.2.up_proj", "layers.1.mlp.experts.2."):
        folder = saved(tmp_path / part, model, without(part))
        with pytest.raises(DrklError, match=r"not those of (its config\.json: 1 cannot be put together|a Qwen3Moe)"):
            load_model(folder, "fp32")
    codes = {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(8, 16, dtype=torch.int8)}
    folder = saved(tmp_path / "codes", model, lambda weights: weights | codes)
    with pytest.raises(DrklError, match=r"holds integers where a Qwen3Moe"):
        load_model(folder, "fp32")


def bert(kind: type[PreTrainedModel], **changes: object) -> PreTrainedModel:
    torch.manual_seed(3)
    sizes = tiny_classifiers.SIZES["bert"] | {"vocab_size": tiny.VOCAB, "max_position_embeddings": 96} | changes
    return kind(BertConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_a_new_head_is_said_and_only_a_head_is_new(
    tmp_path: Path, kind: type[PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "whole", bert(kind))
    with caplog.at_level("WARNING", "drkl"):
        loaded = load_classifier(folder, "fp32", ("a", "b"))
    assert (
        "has no head for these classes. New, and drawn at random: " in caplog.text and "classifier.bias" in caplog.text
    )
    body, own = loaded.bert.encoder.state_dict(), bert(kind).base_model.encoder.state_dict()
    assert all(torch.equal(body[key], own[key]) for key in own)
    for name, change, config in (
        ("missing", without("layer.2.attention"), {}),
        ("extra", dict, {"num_hidden_layers": 3}),
        ("compiled", renamed("", "_orig_mod."), {}),
        ("shape", dict, {"vocab_size": 70}),
    ):
        with pytest.raises(DrklError, match=r"are not those of a BertForSequenceClassification by its config"):
            load_classifier(saved(tmp_path / name, bert(kind), change, **config), "fp32", ("a", "b"))


@pytest.mark.parametrize("kind", sorted(tiny_classifiers.SIZES))
def test_a_classifier_without_its_head_is_refused(tmp_path: Path, kind: str) -> None:
    model = tiny_classifiers.make(kind)
    head = next(key for key in model.state_dict() if key.startswith(("classifier", "score")))
    load_classifier(saved(tmp_path / "whole", model), "fp32")
    folder = saved(tmp_path / "headless", model, lambda weights: {k: v for k, v in weights.items() if k != head})
    with pytest.raises(DrklError, match=rf"1 of \d+ weights are not in the file \({re.escape(head)}\)"):
        load_classifier(folder, "fp32")


def test_a_pooler_that_no_part_uses_stays_in_the_file(tmp_path: Path) -> None:
    model = tiny_classifiers.make("roberta")
    loaded = load_classifier(saved(tmp_path, model, add("roberta.pooler.dense.weight", 16, 16)), "fp32")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(tiny.llama().config)
    with pytest.raises(DrklError, match=r"no place for \(score\.weight\).*train a classifier with task: class"):
        load_model(saved(tmp_path, model), "fp32")


@pytest.mark.parametrize("name", ["trust_remote_code", "ignore_mismatched_sizes", "output_loading_info"])
def test_options_that_would_let_weights_through(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, tiny.llama())
    with pytest.raises(DrklError, match=rf"is to be loaded with {name}=True: .*Leave it out"):
        load_model(folder, "fp32", **{name: True})
    load_model(folder, "fp32", **{name: False})


def test_a_subfolder(tmp_path: Path) -> None:
    saved(tmp_path / "inner", tiny.llama())
    tiny.assert_alike(load_model(str(tmp_path), "fp32", subfolder="inner"), tiny.llama())
    saved(tmp_path / "inner", tiny.llama(), without("layers.1."))
    with pytest.raises(DrklError, match=r"9 of 39 weights"):
        load_model(str(tmp_path), "fp32", subfolder="inner")
