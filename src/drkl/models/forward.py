"""The only place that knows how a language model gets from tokens to hidden states, and from those to logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.losses import LMHead

INPUTS = ("input_ids", "attention_mask", "position_ids")


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states, after the final norm, as the head takes them.

    Args:
        model: a decoder-only language model.
        batch: `input_ids`, `attention_mask`, `position_ids`, each `[batch, tokens]`; other keys are left alone.

    Returns:
        `[batch, tokens, hidden]`.
    """
    body = model.base_model
    # Families without learnt or rotary positions (ALiBi) take none; right padding leaves theirs right.
    accepted = inspect.signature(body.forward).parameters
    inputs = {key: batch[key] for key in INPUTS if key in batch and key in accepted}
    out = body(**inputs, use_cache=False)
    states: Tensor = out.last_hidden_state
    return states


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's head with the scale and the soft-cap that its own forward applies."""
    module = model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise DrklError(f"{type(model).__name__} has no output head; a causal language model is needed here.")
    config = model.config.get_text_config()
    scale = 1.0
    if isinstance(factor := getattr(config, "logit_scale", None), (int, float)):
        scale *= float(factor)
    if isinstance(divisor := getattr(config, "logits_scaling", None), (int, float)):
        scale /= float(divisor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(module.weight, getattr(module, "bias", None), scale, softcap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise DrklError unless `lm_head` of `hidden_states` gives the model's own logits.

    A family that changes its logits in a way unknown here would otherwise be distilled on other numbers than it
    generates with.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = model.training
    model.eval()
    try:
        theirs = model(**batch, use_cache=False).logits.float()
        ours = lm_head(model).logits(hidden_states(model, batch)).float()
    finally:
        model.train(training)
    spread = float(theirs.abs().max())
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > tolerance * max(spread, 1.0):
        raise DrklError(
            f"{type(model).__name__} does not compute its logits as softcap(scale * (hidden @ weight.T + bias)), so "
            "its head cannot be used chunk by chunk. Use a model of another family."
        )
