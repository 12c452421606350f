"""T5, BART and their kin: heads, hidden states, pruning and sampling, against the models' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    ProphetNetConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.check import check_forward
from drkl.models.config import StudentConfig
from drkl.models.forward import decoder_start, hidden_states, is_encoder_decoder, lm_head
from drkl.models.generate import sample_texts
from drkl.models.load import count_parameters, load_model
from drkl.models.student import make_student, prune, student_config
from drkl.teachers.live import LiveTeacher
from tests.models import tiny

ROWS = [
    Row("a", (5, 6, 7, 8, 4), (8, 9, 4), None, encoder_decoder=True),  # type: ignore[arg-type]
    Row("b", (10, 4), (11, 12, 13, 4), None, encoder_decoder=True),  # type: ignore[arg-type]
]
FAMILIES = [tiny.t5, tiny.mt5, tiny.bart]
BART_SIZES = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
    "pad_token_id": 0, "eos_token_id": 4, "decoder_start_token_id": 0, "init_std": 0.3,
}  # fmt: skip


def made(cls: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(config).eval()


CONFIGS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": tiny.t5,
    "t5 v1.1": lambda: tiny.t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mt5": tiny.mt5,
    "bart": tiny.bart,
    "umt5": lambda: made(UMT5ForConditionalGeneration, UMT5Config(**tiny.T5_SIZES, num_layers=2)),
    "switch": lambda: made(
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig(**tiny.T5_SIZES, num_layers=2, num_experts=2, expert_capacity=8),
    ),
    "pegasus": lambda: made(PegasusForConditionalGeneration, PegasusConfig(**BART_SIZES)),
    "marian": lambda: made(MarianMTModel, MarianConfig(**BART_SIZES, decoder_vocab_size=64)),
}


def own_logits(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    with torch.no_grad():
        out: torch.Tensor = model(**{name: batch[name] for name in names}, use_cache=False).logits
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_hidden_states_is_the_models_logits(name: str) -> None:
    model = CONFIGS[name]()
    check_forward(model)
    batch = collate(ROWS, pad_id=0, decoder_start=decoder_start(model))
    with torch.no_grad():
        ours = lm_head(model).logits(hidden_states(model, batch))
    torch.testing.assert_close(ours, own_logits(model, batch), rtol=1e-5, atol=1e-5)
    assert is_encoder_decoder(model) and is_encoder_decoder(model.config)


def test_a_scale_that_is_not_the_models_is_refused() -> None:
    model = tiny.t5()
    model.config.scale_decoder_outputs = False
    ours = model.forward
    model.config.scale_decoder_outputs = True
    model.forward = lambda **inputs: type("Out", (), {"logits": ours(**inputs).logits * 4})()  # type: ignore[assignment]
    with pytest.raises(DrklError, match=r"does not compute its logits"):
        check_forward(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_company_change_nothing(family: Callable[..., PreTrainedModel]) -> None:
    model = family().double()
    start = decoder_start(model)
    with torch.no_grad():
        together = hidden_states(model, collate(ROWS, pad_id=0, decoder_start=start))
        other_fill = hidden_states(model, collate(ROWS, pad_id=9, decoder_start=start))
        alone = [hidden_states(model, collate([row], pad_id=0, decoder_start=start))[0] for row in ROWS]
    for index, row in enumerate(ROWS):
        count = len(row.response_ids)
        torch.testing.assert_close(together[index, :count], alone[index], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[index, :count], other_fill[index, :count], rtol=1e-5, atol=1e-5)


def test_the_teacher_remembers_by_what_its_decoder_read() -> None:
    teacher = LiveTeacher(tiny.t5(), remember_mb=1)
    for response in ((8, 9, 4), (7, 9, 4)):
        row = Row("a", (5, 4), response, None, encoder_decoder=True)  # type: ignore[arg-type]
        batch = collate([row], pad_id=0, decoder_start=0)
        keep = batch["labels"] != -100
        assert torch.equal(teacher.hidden_at(batch, keep), teacher.hidden(batch)[keep])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_is_the_original(family: Callable[..., PreTrainedModel]) -> None:
    model = family()
    tiny.assert_alike(prune(model, [0, 1, 2, 3], [0, 1, 2, 3]), model)


def stack_layers(model: PreTrainedModel, which: str) -> torch.nn.ModuleList:
    stack = getattr(model.base_model if model.config.model_type == "bart" else model, which)
    return stack.layers if model.config.model_type == "bart" else stack.block


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_their_weights_in_order_in_both_stacks(family: Callable[..., PreTrainedModel]) -> None:
    model = family()
    small = prune(model, [0, 2, 3], [0, 3])
    assert count_parameters(small.config) <= sum(p.numel() for p in small.parameters())
    for which, kept in (("encoder", [0, 3]), ("decoder", [0, 2, 3])):
        ours, theirs = stack_layers(small, which), stack_layers(model, which)
        assert len(ours) == len(kept)
        for new, old in enumerate(kept):
            for a, b in zip(ours[new].parameters(), theirs[old].parameters(), strict=True):
                assert torch.equal(a, b)
    # By hand: the dropped layers taken out of the original.
    del stack_layers(model, "encoder")[1:3]
    del stack_layers(model, "decoder")[1]
    tiny.assert_alike(small, model)


def test_the_position_bias_of_layer_0_goes_to_the_layer_that_comes_first() -> None:
    model = tiny.t5()
    small = prune(model, [1, 2], [2, 3])
    for which, first in (("encoder", 2), ("decoder", 1)):
        ours, theirs = stack_layers(small, which), stack_layers(model, which)
        bias = ours[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(bias, theirs[0].layer[0].SelfAttention.relative_attention_bias.weight)
        assert torch.equal(ours[0].layer[0].SelfAttention.q.weight, theirs[first].layer[0].SelfAttention.q.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_read_back_as_it_was(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = family()
    small = prune(model, [0, 3], [0, 1, 3])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) is tied
    small.save_pretrained(tmp_path)
    tiny.assert_alike(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), small)
    tiny.assert_alike(load_model(str(tmp_path), "fp32"), small)


@pytest.mark.parametrize(
    ("student", "encoder", "decoder"),
    [
        ({}, 3, 2),
        ({"layers": 3}, 3, 3),
        ({"layers": 1, "encoder_layers": [0, 5]}, 2, 1),
        ({"encoder_layers": 2}, 2, 2),
        ({"init": "random", "layers": 5}, 5, 5),
    ],
)
def test_depth_of_the_student(student: dict, encoder: int, decoder: int, tmp_path: Path) -> None:
    tiny.save(tiny.t5(encoder_layers=6), tmp_path)
    config = student_config(StudentConfig(**student), str(tmp_path))
    assert (config.num_layers, config.num_decoder_layers) == (encoder, decoder)
    made = make_student(StudentConfig(**student), str(tmp_path), seed=0)
    assert (len(made.encoder.block), len(made.decoder.block)) == (encoder, decoder)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"layers": 5}, r"student\.layers is 5; the model has 4 layers"),
        ({"encoder_layers": 7}, r"student\.encoder_layers is 7; the encoder has 6 layers"),
        ({"encoder_layers": [6]}, r"student\.encoder_layers has layer 6; the encoder has layers 0 to 5"),
        ({"init": "random", "config": {"num_decoder_layers": 1}}, r"stands in student\.layers"),
    ],
)
def test_layers_that_are_not_there(student: dict, message: str, tmp_path: Path) -> None:
    tiny.save(tiny.t5(encoder_layers=6), tmp_path)
    with pytest.raises(DrklError, match=message):
        student_config(StudentConfig(**student), str(tmp_path))


def test_encoder_layers_of_a_model_without_an_encoder(tmp_path: Path) -> None:
    tiny.save(tiny.llama(), tmp_path)
    with pytest.raises(DrklError, match=r"encoder_layers is set, but LlamaConfig is a decoder-only model"):
        student_config(StudentConfig(encoder_layers=2), str(tmp_path))


def test_a_decoder_that_starts_with_nothing_is_refused() -> None:
    config = ProphetNetConfig(decoder_start_token_id=None)
    with pytest.raises(DrklError, match=r"no decoder_start_token_id"):
        decoder_start(config)
    assert decoder_start(tiny.llama()) is None
    assert decoder_start(tiny.bart()) == 4


PROMPTS = [[7, 9, 11, 4], [5, 4], [8, 8, 20, 31, 40, 12, 4]]


def sample(model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, **changes: object) -> list[list[tuple]]:
    arguments = {"samples_per_prompt": 3, "max_new_tokens": 6, "seed": 5, "stop_ids": [63], **changes}
    answers = sample_texts(model, tiny.tokenizer(), prompts, **arguments)  # type: ignore[arg-type]
    return [[answer.token_ids for answer in pool] for pool in answers]


@pytest.mark.parametrize("family", [pytest.param(tiny.t5, marks=pytest.mark.slow), tiny.bart])
def test_a_sample_depends_on_prompt_and_seed_alone(family: Callable[..., PreTrainedModel]) -> None:
    model = family(layers=2).double()
    together = sample(model)
    assert together == sample(model, batch_size=2)
    assert together == [sample(model, [prompt])[0] for prompt in PROMPTS]
    assert together == sample(model, PROMPTS[::-1])[::-1]
    assert together != sample(model, seed=6)
    for pool, longer in zip(together, sample(model, max_new_tokens=9), strict=True):
        assert [answer[: len(first)] for answer, first in zip(longer, pool, strict=True)] == pool


@pytest.mark.parametrize("family", [tiny.t5, tiny.bart])
def test_greedy_answers_are_those_of_a_plain_loop(family: Callable[..., PreTrainedModel]) -> None:
    model = family(layers=2).double()
    # What a checkpoint brings of its own has no say.
    model.generation_config.no_repeat_ngram_size = 1
    answers = sample(model, greedy=True, samples_per_prompt=1)
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        ids = [decoder_start(model)]
        while len(ids) <= 6 and ids[-1] != 63:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        assert list(answer) == ids[1:]
    assert model.generation_config.no_repeat_ngram_size == 1


def test_a_decoder_deeper_than_its_encoder_generates() -> None:
    model = tiny.t5(layers=3, encoder_layers=1).double()
    assert sample(model) == [sample(model, [prompt])[0] for prompt in PROMPTS]


def test_eos_alone_ends_an_answer() -> None:
    model = tiny.bart()
    model.final_logits_bias[0, 4] = 100.0
    (answer,) = sample_texts(model, tiny.tokenizer(), [[5, 4]], max_new_tokens=5)[0]
    assert answer.finished and answer.token_ids == (4,) and answer.text == ""


def test_a_prompt_may_be_as_long_as_the_encoder_is() -> None:
    model = tiny.bart(max_position_embeddings=8)
    sample(model, [[5] * 8], max_new_tokens=8)
    for prompts, count in (([[5] * 9], 2), ([[5]], 9)):
        with pytest.raises(DrklError, match=r"passes the 8 positions"):
            sample(model, prompts, max_new_tokens=count)
