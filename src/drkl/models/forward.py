"""The only place that knows how a model gets from tokens to hidden states, and from those to logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.models.classes import is_classifier

INPUTS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask")


def is_encoder_decoder(model_or_config: Any) -> bool:
    """Whether an encoder reads the prompt and a decoder writes the response (T5, BART and their kin)."""
    return bool(getattr(getattr(model_or_config, "config", model_or_config), "is_encoder_decoder", False))


def decoder_start(model_or_config: Any) -> int | None:
    """The token that a decoder is fed before the response; None for a decoder-only model.

    Raises:
        DrklError: an encoder-decoder model whose config names none.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not is_encoder_decoder(config) or is_classifier(model_or_config):
        return None  # BART's classifier makes its decoder's input itself
    start = getattr(config, "decoder_start_token_id", None)
    if start is None and config.model_type in _STARTS_WITH_PAD:
        start = config.pad_token_id
    if start is None:
        raise DrklError(
            f"The {type(config).__name__} has no decoder_start_token_id, so what the decoder reads before the response "
            "is unknown. Set it in the model's config.json (T5 starts with the padding token, BART with eos)."
        )
    return int(start)


_STARTS_WITH_PAD = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states, after the final norm, as the head takes them; of an encoder-decoder the decoder's.

    Args:
        model: a language model.
        batch: `input_ids`, `attention_mask`, `position_ids`, each `[batch, tokens]`; for an encoder-decoder also
            `decoder_input_ids` and `decoder_attention_mask`, `[batch, decoder tokens]`. Other keys are left alone.

    Returns:
        `[batch, tokens, hidden]`, or `[batch, decoder tokens, hidden]`; of a classifier its class logits
        `[batch, 1, classes]`, which need no head.
    """
    states: Tensor
    if is_classifier(model):
        # Not called as a module: the student's own forward is where this runs, and its hooks must run once.
        states = model.forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return states.unsqueeze(1)
    if is_encoder_decoder(model):
        mask = batch["attention_mask"]
        # Not base_model: T5's is the model itself, head and all.
        memory = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        states = model.get_decoder()(
            input_ids=batch["decoder_input_ids"],
            attention_mask=batch["decoder_attention_mask"],
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        return states
    body = model.base_model
    # Families without learnt or rotary positions (ALiBi) take none; right padding leaves theirs right.
    accepted = inspect.signature(body.forward).parameters
    inputs = {key: batch[key] for key in INPUTS if key in batch and key in accepted}
    states = body(**inputs, use_cache=False).last_hidden_state
    return states


def output_head(model: PreTrainedModel) -> LMHead | None:
    """The head that makes logits of `hidden_states`; None of a classifier, whose states are its class logits."""
    return None if is_classifier(model) else lm_head(model)


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's head with the scale and the soft-cap that its own forward applies."""
    module = model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise DrklError(f"{type(model).__name__} has no output head; a language model is needed here.")
    config = model.config.get_text_config()
    scale = decoder_scale(config)
    if isinstance(factor := getattr(config, "logit_scale", None), (int, float)):
        scale *= float(factor)
    if isinstance(divisor := getattr(config, "logits_scaling", None), (int, float)):
        scale /= float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(module, "bias", None)
    if bias is None and isinstance(added := getattr(model, "final_logits_bias", None), Tensor):
        bias = added.flatten()  # BART and its kin: a buffer [1, vocab]
    return LMHead(module.weight, bias, scale, softcap)


def decoder_scale(config: Any) -> float:
    """Return the factor by which the T5 family scales the decoder's states before the head."""
    scales = getattr(config, "scale_decoder_outputs", None)
    if scales is None:
        scales = config.model_type in ("umt5", "switch_transformers") and config.tie_word_embeddings
    return float(config.hidden_size**-0.5) if scales else 1.0


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of one row of four tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model):
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    return batch


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """The model's own fp32 logits `[1, 4, vocab]` of a few tokens, without dropout, to compare it with itself."""
    with in_eval_mode(model):
        logits: Tensor = model(**_probe(model), use_cache=False).logits.float()
    return logits


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise DrklError unless `lm_head` of `hidden_states` gives the model's own logits.

    A family that changes its logits in a way unknown here would otherwise be distilled on other numbers than it
    generates with.
    """
    theirs = probe_logits(model)
    with in_eval_mode(model):
        ours = lm_head(model).logits(hidden_states(model, _probe(model))).float()
    spread = float(theirs.abs().max())
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > tolerance * max(spread, 1.0):
        raise DrklError(
            f"{type(model).__name__} does not compute its logits as softcap(scale * (hidden @ weight.T + bias)), so "
            "its head cannot be used chunk by chunk. Use a model of another family."
        )
