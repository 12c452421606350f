from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from drkl.data.collate import collate
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.check import check_forward, check_student
from drkl.models.forward import decoder_start, hidden_states, lm_head
from tests.models import tiny
from tests.models.cache_families import FAMILIES, SIZES, TOKENS

QUICK = ("mamba", "falcon h1", "minicpm3", "recurrent gemma", "xlstm", "gpt", "roberta", "bert", "fsmt", "bert to bert")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_head_of_hidden_states_is_the_models_logits_row_by_row(name: str) -> None:
    model = FAMILIES[name]()
    model.config.use_cache = False  # which changes what FSMT reads
    both = model.config.is_encoder_decoder
    rows = [
        Row("a", (5, 6, 7), (8, 9, 10, 11, 4), None, encoder_decoder=both),  # type: ignore[arg-type]
        Row("b", (12, 13, 14, 15), (16, 4), None, encoder_decoder=both),  # type: ignore[arg-type]
    ]
    check_student(model)
    batch = collate(rows, pad_id=0, decoder_start=decoder_start(model))
    with torch.no_grad():
        logits = lm_head(model).logits(hidden_states(model, batch))
        for row, ours, labels in zip(rows, logits, batch["labels"], strict=True):
            if both:
                fed = {"input_ids": row.prompt_ids, "decoder_input_ids": (decoder_start(model), *row.response_ids[:-1])}
            else:
                fed = {"input_ids": row.prompt_ids + row.response_ids[:-1]}
            theirs = model(**{key: torch.tensor([value]) for key, value in fed.items()}).logits[0]
            trained = labels != -100
            torch.testing.assert_close(ours[trained], theirs[-len(row.response_ids) :], rtol=1e-4, atol=1e-4)


class OtherEachTime(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + (out.logits.shape[1] > 6) * torch.randn_like(out.logits)
        return out


class Averaged(LlamaForCausalLM):
    """What it predicts depends on the other rows."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        embedded = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embedded + embedded.mean((0, 1)) * (len(input_ids) - 1), use_cache=False)


class WantsAnImage(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **kwargs):
        return super().forward(inputs_embeds=pixel_values.flatten(1), **kwargs)


def llama_as(family: type[Any]) -> Callable[[], PreTrainedModel]:
    torch.manual_seed(0)
    return lambda: family(tiny.llama().config).eval()


def llama_with(head: torch.nn.Module) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = tiny.llama()
        model.lm_head = head
        return model

    return make


XLNET = XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=16, initializer_range=0.5)
XLM = XLMConfig(emb_dim=16, n_layers=2, n_heads=2, n_words=64, max_position_embeddings=80, embed_init_std=0.5)
PROPHETNET = ProphetNetConfig(
    **TOKENS, hidden_size=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_encoder_layers=1, num_decoder_layers=1,
    num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=80,
)  # fmt: skip
CPMANT = CpmAntConfig(
    vocab_size=64, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=16, num_hidden_layers=1, prompt_length=2,
    init_std=0.5,
)  # fmt: skip

LATER = "predicts at a position changes with the tokens after it, so it cannot be trained to write one token after"
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bert": (lambda: BertLMHeadModel(BertConfig(**SIZES, initializer_range=0.5)), rf"What BertLMHeadModel {LATER}"),
    "xlnet": (lambda: XLNetLMHeadModel(XLNET), rf"What XLNetLMHeadModel {LATER}"),
    "xlm": (lambda: XLMWithLMHeadModel(XLM), rf"What XLMWithLMHeadModel {LATER}"),
    "embedding": (
        llama_with(torch.nn.Embedding(64, 16)),
        r"LlamaForCausalLM makes its logits by its Embedding",
    ),
    "prophetnet": (
        lambda: ProphetNetForCausalLM(PROPHETNET),
        r"ProphetNetForCausalLM gives its output head \[2, 2, 6, 16\]; expected the states \[2, 6, 'hidden'\] of all",
    ),
    "cpmant": (lambda: CpmAntForCausalLM(CPMANT), r"CpmAntForCausalLM gives a row other logits in a padded batch than"),
    "random": (llama_as(OtherEachTime), r"OtherEachTime gives other logits each time it reads the same tokens"),
    "company": (llama_as(Averaged), r"Averaged gives a row other logits in a padded batch than alone"),
    "image": (llama_as(WantsAnImage), r"WantsAnImage in float32 cannot be run on token ids alone.*\(AttributeError: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_here_is_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    torch.manual_seed(0)
    model = make().eval()
    for _ in range(2):  # remembered only where it is right
        with pytest.raises(DrklError, match=words):
            check_forward(model)


def test_a_student_whose_experts_drop_tokens_of_a_batch_is_refused() -> None:
    config = NllbMoeConfig(
        **TOKENS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_sparse_step=1, decoder_sparse_step=1, num_experts=2,
        max_position_embeddings=80, decoder_start_token_id=4,
    )  # fmt: skip
    model = NllbMoeForConditionalGeneration(config)
    check_forward(model)
    with pytest.raises(DrklError, match=r"NllbMoeForConditionalGeneration drops tokens in training where a batch has"):
        check_student(model)


def test_a_student_that_is_trained_on_some_lengths_only_is_refused() -> None:
    config = ReformerConfig(
        vocab_size=64, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=16,
        attn_layers=["local"], local_attn_chunk_length=4, axial_pos_embds=False, max_position_embeddings=96,
        is_decoder=True,
    )  # fmt: skip
    model = ReformerModelWithLMHead(config).eval()
    state = torch.get_rng_state()
    check_forward(model)
    with pytest.raises(
        DrklError, match=r"ReformerModelWithLMHead can be read but not trained on rows of any length.*4"
    ):
        check_student(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    check_forward(model)
    monkeypatch.setattr(model, "forward", None)
    check_forward(model)


def test_weights_that_are_not_numbers_are_another_fault() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    check_forward(model)
