from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from drkl.errors import DrklError
from drkl.models.classes import is_classifier
from drkl.models.config import StudentConfig
from drkl.models.prune import pruned
from drkl.models.shorten import shortened, stacks_of
from drkl.models.student import make_student, prune, student_config
from tests.models import tiny, tiny_families

IDS = torch.tensor([[7, 9, 30, 41, 12, 55, 8, 50, 63, 12, 33, 21]])
WINDOWED = {"sliding_window": 4}


def inputs(model: PreTrainedModel) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    if model.config.is_encoder_decoder and not is_classifier(model):
        given |= {"decoder_input_ids": IDS.flip(1), "decoder_attention_mask": torch.ones_like(IDS)}
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in accepted}


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(copied, value)) if type(value) in (tuple, list) else value


@contextmanager
def calls(layers: nn.ModuleList) -> Iterator[list[tuple[Any, Any, Any]]]:
    """What each layer is called with, and what it gives."""
    seen: list[tuple[Any, Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((*before[module], copied(output)))

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        before[module] = copied(args), {name: copied(value) for name, value in kwargs.items()}

    before: dict[nn.Module, Any] = {}
    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def assert_layers_are_kept(model: PreTrainedModel, small: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Each layer gives the model's output for the model's input, and is given the masks and positions that it was."""
    theirs, ours = model.get_submodule(path), small.get_submodule(path)
    assert isinstance(theirs, nn.ModuleList) and isinstance(ours, nn.ModuleList) and len(ours) == len(kept)
    with calls(theirs) as seen:
        model(**inputs(model))
    with calls(ours) as own:
        small(**inputs(small))
    for j, i in enumerate(kept):
        args, kwargs, output = seen[i]
        torch.testing.assert_close(first(ours[j](*copied(args), **kwargs)), first(output))
        for name in ("attention_mask", "position_embeddings", "per_layer_input"):
            torch.testing.assert_close(own[j][1].get(name), kwargs.get(name))


def first(output: Any) -> Tensor:
    tensor = output if isinstance(output, Tensor) else output[0]
    assert isinstance(tensor, Tensor)
    return tensor


SPARSE = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
KEPT: list[tuple[str, dict[str, Any], list[int], str, dict[str, Any]]] = [
    # the family, its settings, the layers that stay, the path to them, and what the student's config says
    ("deepseek_v3", {"first_k_dense_replace": 2}, [0, 2, 5], "model.layers", {"first_k_dense_replace": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 2}, [3, 4], "model.layers", {"first_k_dense_replace": 0}),
    ("glm4_moe", {"first_k_dense_replace": 3}, [1, 2, 4], "model.layers", {"first_k_dense_replace": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0, 3]}, [0, 3, 5], "model.layers", {"mlp_only_layers": [0, 1]}),
    ("qwen2_moe", SPARSE, [0, 3, 5], "model.layers", {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    ("afmoe", {"num_dense_layers": 2, **WINDOWED}, [1, 3, 4], "model.layers", {"num_dense_layers": 1}),
    ("llama4_text", {"interleave_moe_layer_step": 2}, [0, 3, 5], "model.layers", {"moe_layers": [1, 2]}),
    ("jamba", {}, [1, 2, 4], "model.layers", {"num_hidden_layers": 3}),
    ("bamba", {"attn_layer_indices": [1, 4]}, [0, 1, 4], "model.layers", {"attn_layer_indices": [1, 2]}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, **WINDOWED}, [1, 4], "model.layers",
     {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma4_text", {"num_kv_shared_layers": 0, "layer_types": None, **WINDOWED}, [0, 2, 5], "model.layers",
     {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    ("recurrent_gemma", {}, [1, 2, 4], "model.layers", {"block_types": ["recurrent", "attention", "recurrent"]}),
    ("gpt_neo", {}, [1, 2, 5], "transformer.h", {"attention_layers": ["local", "global", "local"]}),
    ("mamba2", {"num_hidden_layers": 2}, [1], "backbone.layers", {"time_step_limit": [0.0, float("inf")]}),
    ("falcon_h1", {"num_hidden_layers": 2, "mlp_multipliers": [0.5, 2.0]}, [1], "model.layers",
     {"mlp_multipliers": [0.5, 2.0]}),
    ("xlm", {}, [0, 3], "transformer.ffns", {"n_layers": 2}),
    ("gemma3", {}, [0, 5], "model.language_model.layers", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "kept", "path", "written"), KEPT)
def test_each_kept_layer_computes_what_it_did(
    kind: str, changes: dict[str, Any], kept: list[int], path: str, written: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_families.model(kind, **changes)
    small = prune(model, kept)
    assert_layers_are_kept(model, small, path, kept)
    for name, value in written.items():
        assert getattr(small.config, name) == value
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in written} == written
    tiny.assert_alike(again, small)


@pytest.mark.parametrize(
    ("kind", "changes", "kept", "paths"),
    [
        ("led", {"attention_window": [4, 8, 8, 4, 8, 8]}, [0, 1, 5], ("led.encoder.layers", "led.decoder.layers")),
        ("nllb-moe", {"encoder_sparse_step": 2, "decoder_sparse_step": 3}, [0, 1], ()),
        ("t5gemma", {}, [1, 4], ()),
        ("t5", {}, [1, 4], ()),
    ],
)
def test_both_stacks_compute_what_they_did(
    kind: str, changes: dict[str, Any], kept: list[int], paths: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_families.model(kind, "seq2seq", **changes)
    small = prune(model, kept)
    for path in paths:
        assert_layers_are_kept(model, small, path, kept)
    small.save_pretrained(tmp_path)
    tiny.assert_alike(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), small)


@pytest.mark.parametrize("kept", [[2, 3, 5], [2, 3, 4, 5]])
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_go_on_to_read_the_same(kind: str, kept: list[int]) -> None:
    model = tiny_families.model(kind, **WINDOWED)
    small = prune(model, kept)
    assert small.config.num_kv_shared_layers == len(kept) - 2
    # By hand: the dropped layers taken out, and of the weights with a part for each layer the others' parts.
    for name in ("embed_tokens_per_layer", "per_layer_model_projection"):
        theirs, ours = (m.get_submodule(f"model.{name}").weight for m in (model, small))
        dim = 0 if name == "per_layer_model_projection" else 1
        parts = theirs.split(8, dim)
        torch.testing.assert_close(ours, torch.cat([parts[i] for i in kept], dim))
    states: list[dict[int, Tensor]] = [{}, {}]
    forced: dict[int, Tensor] = {}
    with calls(model.model.layers) as seen, torch.no_grad():
        model(**inputs(model))
    for j, i in enumerate(kept):
        forced[j], states[0][j] = first(seen[i][0]), first(seen[i][2])

    def force(j: int) -> Any:
        return lambda module, args: (forced[j], *args[1:])

    def keep(j: int) -> Any:
        return lambda module, args, output: states[1].update({j: first(output).clone()})

    for j, layer in enumerate(small.model.layers):
        layer.register_forward_pre_hook(force(j))
        layer.register_forward_hook(keep(j))
    with torch.no_grad():
        small(**inputs(small))
    torch.testing.assert_close(states[1], states[0])


def test_a_factor_of_the_depth_is_carried_over() -> None:
    model = tiny_families.model("minicpm3")
    small = prune(model, [0, 3])
    assert small.config.scale_depth == pytest.approx(1.4 * (2 / 6) ** 0.5)
    assert_layers_are_kept(model, small, "model.layers", [0, 3])


REFUSED: list[tuple[str, dict[str, Any], list[int], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 3],
     r"^layers keeps \[0, 3\], and GPT2Config settles by a layer's number what it computes \(.*scale_attn_by_inverse_"
     r"layer_idx\): as layer 1 of the student, layer 3 would have .* These layers keep theirs: layers=\[0, 1\]\.$"),
    ("diffllama", {}, [1, 2], r"DiffLlamaConfig .*\(self_attn\.lambda_init\).*layers=\[0, 1\]\.$"),
    ("jamba", {}, [0, 3, 5], r"JambaConfig .*\(expert_layer_period, expert_layer_offset\)"),
    ("gemma4_text", {}, [0, 1, 2], r"\(layer_types\): as layer 2 .* layer_types full_attention for layer_types "
     r"sliding_attention\. These layers keep theirs: layers=\[2, 3, 5\]"),
    ("gemma4_text", {}, [0, 1, 5], r"\(num_kv_shared_layers\): as layer 2 of the student, layer 5 would have the ones "
     r"of another for the keys and values of layer 3\. These layers keep theirs: layers=\[2, 3, 5\]"),
    ("gpt_neox_japanese", {}, [0, 1], r"\(attention\.dense_bias\).*These layers keep theirs: layers=\[0, 5\]"),
    ("olmo_hybrid", {}, [0, 1, 2], r"layers keeps \[0, 1, 2\], which OlmoHybridConfig cannot say \(.*at least one att"),
    ("rwkv", {}, [1, 2], r"RwkvConfig .*\(rescale_every\): as layer 0 of the student, layer 1 gives another output for "
     r"the same input\. Choose other layers, such as the first, \[0, 1\]\.$"),
    ("hy_v4", {}, [0, 3, 5], r"HYV4Config .*indexer_types.* layer 3 gives another output for the same input"),
    ("zamba2", {"num_mem_blocks": 2}, [0, 1, 5], r"Zamba2Config .*\(num_mem_blocks\)"),
    ("hrm_text", {}, [0, 3], r"There is no list of 48 layers in HrmTextForCausalLM, so it cannot be pruned"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "kept", "message"), REFUSED)
def test_what_no_setting_carries_over_is_refused_by_name(
    kind: str, changes: dict[str, Any], kept: list[int], message: str
) -> None:
    with pytest.raises(DrklError, match=message):
        prune(tiny_families.model(kind, **changes), kept)


def test_the_model_is_left_as_it_was_by_the_comparison() -> None:
    model = tiny_families.model("gemma2").train()
    window, state = model.config.sliding_window, torch.get_rng_state()
    prune(model, 2)
    assert model.config.sliding_window == window == 6 and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def by_number(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = forward(self, *args, **kwargs)
        return out / (1 + self.layer_idx), weights

    monkeypatch.setattr(attention, "forward", by_number)
    assert prune(model, [0, 1]).config.num_hidden_layers == 2
    with pytest.raises(DrklError, match=r"LlamaConfig settles .*\(in its code\): as layer 1 .*layer 3 gives another"):
        prune(model, [0, 3])


def test_the_students_config_is_known_without_its_weights(tmp_path: Path) -> None:
    tiny_families.model("deepseek_v3").save_pretrained(tmp_path)
    wanted = StudentConfig(layers=[0, 2, 5])
    assert student_config(wanted, str(tmp_path)).first_k_dense_replace == 1
    assert make_student(wanted, str(tmp_path), 0).config.first_k_dense_replace == 1


@pytest.mark.parametrize(("layers", "dense"), [(8, 2), ([0, 3], 1), (2, 1)])
def test_random_weights_take_the_settings_of_the_layers(layers: int | list[int], dense: int, tmp_path: Path) -> None:
    tiny_families.model("deepseek_v3").save_pretrained(tmp_path)
    made = make_student(StudentConfig(init="random", layers=layers), str(tmp_path), 0)
    assert made.config.first_k_dense_replace == dense
    assert len(made.model.layers) == made.config.num_hidden_layers == (layers if isinstance(layers, int) else 2)


def test_random_weights_need_no_layer_to_be_what_it_was(tmp_path: Path) -> None:
    tiny_families.model("diffllama").save_pretrained(tmp_path)
    made = make_student(StudentConfig(init="random", layers=[0, 5]), str(tmp_path), 0)
    assert made.config.num_hidden_layers == 2


def test_weights_of_one_setting_by_layer_and_layer_number() -> None:
    config = tiny_families.config("smollm3", num_hidden_layers=2, no_rope_layers=[0, 1])
    small = shortened(config, [1], build=AutoModelForCausalLM.from_config)
    assert (small.no_rope_layers, small.num_hidden_layers) == ([1], 1)


# Why a selection that leaves out or moves certain layers is refused; for all others both selections are kept.
KNOWN = {
    "beam": "layer_types", "big_bird": "seed", "bigbird_pegasus": "seed", "diffllama": "lambda_init",
    "gemma4": "layer_types", "gemma4_text": "layer_types", "gemma4_unified": "layer_types",
    "gemma4_unified_text": "layer_types", "gpt_neox_japanese": "dense_bias", "hrm_text": "no list of",
    "hy_v4": "indexer_types", "inkling2_text": "attention_input", "jamba": "expert_layer_period",
    "modernbert": "attn_norm", "modernbert-decoder": "attn_norm", "modernvbert": "attn_norm",
    "olmo_hybrid": "at least one attention", "pegasus_x": "stagger", "rwkv": "rescale_every",
    "switch_transformers": "sparse_step", "zamba": "tie_weights|LinearAttention",
    "zamba2": "num_mem_blocks|cannot read",
    "zaya": "router_states", "albert": "no list of", "funnel": "no list of", "perceiver": "no list of",
    "blt": "no list of", "qwen3_5": "LinearAttention", "qwen3_next": "LinearAttention",
    "qwen3_5_text": "LinearAttention",
}  # fmt: skip
EVERY = [
    *((kind, "causal") for kind in tiny_families.CAUSAL),
    *((kind, "seq2seq") for kind in tiny_families.SEQ_TO_SEQ),
    *((kind, "classifier") for kind in tiny_families.CLASSIFIERS),
]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [[0, 3, 5], [1, 2, 4]], ids=str)
@pytest.mark.parametrize(("kind", "task"), EVERY)
def test_every_family_is_kept_or_refused_by_name(kind: str, task: str, kept: list[int]) -> None:
    if kind == "blt":
        pytest.skip("its parts are large")
    try:
        model = tiny_families.model(kind, task)
        model(**inputs(model))
    except Exception as error:
        pytest.skip(f"cannot be built small: {error}")
    try:
        pruned(model, kept, kept if len(stacks_of(model.config)) == 2 else None)
    except DrklError as error:
        assert kind in KNOWN and re.search(KNOWN[kind], str(error)), str(error)


def test_a_classifier_whose_end_is_beyond_its_vocabulary() -> None:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32}  # eos stays 50256
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0)).eval()
    assert prune(model, layers=[0, 2]).config.num_hidden_layers == 2


def test_a_classifier_that_could_not_read_a_text_is_refused() -> None:
    """Jamba's cache, which a classifier's forward always makes, takes a layer with attention."""
    model = tiny_families.model("jamba", "classifier", attn_layer_period=3, attn_layer_offset=1)
    assert prune(model, layers=[0, 1]).config.num_hidden_layers == 2
    with pytest.raises(DrklError, match=r"A JambaForSequenceClassification of 2 layers cannot read a few tokens"):
        prune(model, layers=[2, 3])
