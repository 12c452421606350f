from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen2Config

from drkl.errors import DrklError
from drkl.models.config import StudentConfig
from drkl.models.shorten import lengthened, shortened
from drkl.models.student import kept_layers, make_student, prune, source_model, student_config
from tests.families import builder
from tests.models import tiny, tiny_classifiers

FAMILIES = [tiny.llama, tiny.gpt2]


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("layers", "of", "kept"),
    [
        (1, 30, [0]),
        (2, 30, [0, 29]),
        (3, 5, [0, 2, 4]),
        (9, 30, [0, 4, 7, 11, 14, 18, 22, 25, 29]),
        (4, 4, [0, 1, 2, 3]),
        (None, 6, [0, 2, 5]),
        (None, 1, [0]),
        ([0, 3, 5], 6, [0, 3, 5]),
    ],
)
def test_first_last_and_evenly_between(layers: int | list[int] | None, of: int, kept: list[int]) -> None:
    assert kept_layers(StudentConfig(layers=layers), of) == kept


@pytest.mark.parametrize(("layers", "message"), [(7, "has 6 layers"), ([0, 6], "has layers 0 to 5")])
def test_layers_the_model_does_not_have(layers: int | list[int], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        kept_layers(StudentConfig(layers=layers), 6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"layers": []},
        {"layers": [2, 1]},
        {"layers": [1, 1]},
        {"layers": [-1]},
        {"layers": 2, "init": "pretrained", "model": "m"},
        {"config": {"hidden_size": 8}},
        {"init": "pruned"},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        StudentConfig(**wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_is_the_original(family: Callable[..., PreTrainedModel]) -> None:
    model = family()
    tiny.assert_alike(prune(model, [0, 1, 2, 3]), model)


@pytest.mark.parametrize("layers", [2, [0, 2], (0, 3), range(1, 3), None])
@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2, tiny.t5, tiny_classifiers.make])
def test_pruning_in_memory_is_the_students_init(
    family: Callable[..., PreTrainedModel], layers: int | list[int] | None, tmp_path: Path
) -> None:
    model = family().train()
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    small = prune(model, layers=layers)
    assert torch.equal(torch.get_rng_state(), state)
    classes = tiny_classifiers.CLASSES if family is tiny_classifiers.make else None
    config = StudentConfig(layers=layers if layers is None or isinstance(layers, int) else list(layers))
    made = make_student(config, str(tmp_path), 0, None, classes)
    for other in (made, prune(tmp_path, layers), prune(str(tmp_path), layers=layers, dtype=torch.float32)):
        assert type(small) is type(other) and not small.training
        states = small.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in small.parameters())
    next(small.parameters()).data.zero_()  # nothing is shared
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_pruning_keeps_the_dtype_of_a_model_in_memory() -> None:
    assert prune(tiny.llama().to(torch.bfloat16), 2).dtype == torch.bfloat16
    with pytest.raises(DrklError, match=r"in memory has weights of torch\.float32"):
        prune(tiny.llama(), 2, dtype="bf16")


@pytest.mark.parametrize(
    ("make", "wanted", "message"),
    [
        (tiny.llama, {"layers": 5}, r"^layers is 5; the model has 4 layers"),
        (tiny.llama, {"layers": [0, 4]}, r"^layers has layer 4; the model has layers 0 to 3"),
        (tiny.llama, {"layers": 0}, r"^layers is 0; expected a number of layers, at least 1, or layer numbers"),
        (tiny.llama, {"layers": [2, 1]}, r"^layers is \[2, 1\]; expected"),
        (tiny.llama, {"layers": [-1]}, r"^layers is \[-1\]; expected"),
        (tiny.llama, {"layers": "ten"}, r"^layers is .*; expected"),
        (tiny.llama, {"layers": 2, "encoder_layers": 1}, r"^encoder_layers is set, but LlamaConfig is a decoder-only"),
        (tiny.t5, {"layers": 2, "encoder_layers": 5}, r"^encoder_layers is 5; the encoder has 4 layers"),
        (tiny.t5, {"encoder_layers": []}, r"^encoder_layers is \[\]; expected"),
        (lambda: "/no/such/folder", {"layers": 2}, r"There is no folder '/no/such/folder'"),
        (
            lambda: torch.nn.Linear(1, 1),
            {"layers": 2},
            r"Expected a folder, a Hugging Face id, or .* a Linear",
        ),
    ],
)
def test_layers_that_cannot_be_kept(make: Callable[[], Any], wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        prune(make(), **wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_their_weights_in_order(family: Callable[..., PreTrainedModel]) -> None:
    model = family()
    small = prune(model, [0, 2, 3])
    layers = model.base_model.layers if family is tiny.llama else model.base_model.h
    kept = small.base_model.layers if family is tiny.llama else small.base_model.h
    assert small.config.num_hidden_layers == len(kept) == 3
    for new, old in enumerate([0, 2, 3]):
        for ours, theirs in zip(kept[new].parameters(), layers[old].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    # By hand: the dropped layer taken out of the original.
    del layers[1]
    model.config.num_hidden_layers = 3
    tiny.assert_alike(small, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_in_the_original(
    family: Callable[..., PreTrainedModel], tied: bool, tmp_path: Path
) -> None:
    small = prune(family(tie_word_embeddings=tied), [0, 3])
    assert is_tied(small) is tied
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded) is tied
    tiny.assert_alike(loaded, small)


def test_the_original_is_left_alone() -> None:
    model = tiny.llama()
    before = tiny.logits(model)
    small = prune(model, [0, 3])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(tiny.logits(model), before)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(("layers", "kept"), [(3, [0, 2, 3]), ([1, 2], [1, 2])])
def test_make_student_prunes_the_teacher(layers: int | list[int], kept: list[int], tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    made = make_student(StudentConfig(layers=layers), str(tmp_path), seed=0)
    tiny.assert_alike(made, prune(tiny.llama(), kept))
    assert not made.training


def test_per_layer_settings_follow_the_layers() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma2Config(num_hidden_layers=6, layer_types=kinds, eos_token_id=[1, 2, 3, 4, 5, 6])
    small = shortened(config, [0, 3, 5], build=AutoModelForCausalLM.from_config)
    assert small.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert small.eos_token_id == [1, 2, 3, 4, 5, 6]
    assert config.layer_types == kinds and config.num_hidden_layers == 6


def test_gemma2_is_pruned_to_what_it_would_be_by_hand() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    tiny.assert_alike(prune(model, [0, 1, 2, 3]), model)
    assert prune(model, [1, 2]).config.layer_types == ["full_attention", "sliding_attention"]


def test_a_list_as_long_as_the_default_is_cut_too() -> None:
    """Nemotron H's config writes its depth as the length of its list of kinds alone, 4 by default."""
    small = prune(builder.build("nemotron_h"), layers=[1, 2])
    assert small.config.layers_block_type == ["moe", "full_attention"]
    assert len(small.base_model.layers) == 2


def test_pretrained_is_the_model_as_it_is(tmp_path: Path) -> None:
    tiny.save(tiny.gpt2(3), tmp_path)
    made = make_student(StudentConfig(init="pretrained", model=str(tmp_path)), None, seed=0)
    tiny.assert_alike(made, tiny.gpt2(3))


def test_random_is_seeded_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    config = StudentConfig(init="random", layers=2)
    state = torch.get_rng_state()
    first = make_student(config, str(tmp_path), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = make_student(config, str(tmp_path), seed=5), make_student(config, str(tmp_path), seed=6)
    assert first.config.num_hidden_layers == 2
    tiny.assert_alike(first, again)
    assert not torch.equal(tiny.logits(first), tiny.logits(other))


def test_random_takes_fields_of_the_config(tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    config = StudentConfig(init="random", layers=6, config={"hidden_size": 8, "head_dim": 4})
    made = make_student(config, str(tmp_path), seed=0)
    assert (made.config.hidden_size, made.config.num_hidden_layers) == (8, 6)
    assert tiny.logits(made).shape == (2, 6, tiny.VOCAB)


@pytest.mark.parametrize(
    ("family", "key", "message"),
    [
        (tiny.llama, "hiden_size", "which LlamaConfig does not"),
        (tiny.llama, "num_hidden_layers", "stands in student.layers"),
        (tiny.gpt2, "n_layer", "stands in student.layers"),
    ],
)
def test_fields_that_random_does_not_take(
    family: Callable[..., PreTrainedModel], key: str, message: str, tmp_path: Path
) -> None:
    tiny.save(family(), tmp_path)
    with pytest.raises(DrklError, match=message):
        student_config(StudentConfig(init="random", config={key: 4}), str(tmp_path))


def test_a_deeper_random_model_repeats_the_pattern_of_layers() -> None:
    config = Qwen2Config(
        num_hidden_layers=2, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
    )
    assert lengthened(config, 4).layer_types == ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize("init", ["prune", "pretrained", "random"])
def test_no_model_to_start_from(init: str) -> None:
    with pytest.raises(DrklError, match=r"student\.model"):
        source_model(StudentConfig(init=init), None)  # type: ignore[arg-type]
