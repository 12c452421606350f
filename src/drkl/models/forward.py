"""The only place that knows how a model gets from tokens to hidden states, and from those to logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested

from drkl.data.collate import collate_sources, is_packed
from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.models.classes import is_classifier
from drkl.models.sharded import is_fully_sharded, reshard

INPUTS = ("input_ids", "attention_mask", "position_ids", "decoder_input_ids", "decoder_attention_mask")
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keys that describe packed sequences, which models accept without naming them."""
VARLEN = "torch_varlen"
"""transformers' name for `drkl.models.varlen`."""


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
    """The states that a model makes its logits of: those it hands to its output head, by whatever way.

    Args:
        model: a language model.
        batch: `input_ids` and `attention_mask`, each `[batch, tokens]`, padded on the right; with padding on the left
            also `position_ids`. Packed: `input_ids` and `position_ids`, each `[1, tokens]`, and no mask (see
            `drkl.models.packing`). For an encoder-decoder also `decoder_input_ids` and `decoder_attention_mask`,
            `[batch, decoder tokens]`. Other keys are left alone.

    Returns:
        `[batch, tokens, hidden]`, or `[batch, decoder tokens, hidden]`; of a classifier its class logits
        `[batch, 1, classes]`, which need no head.

    Raises:
        DrklError: a model that calls its head never, or several times.
    """
    if is_classifier(model):
        with _forward_of(model) as forward:
            logits: Tensor = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.unsqueeze(1)
    given: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.new_zeros(1, 1, 1)  # the model goes on with a single made-up logit

    with replaced(output_module(model), keep), _forward_of(model) as forward:
        forward(**accepted_inputs(model, batch) | row_bounds(model, batch))
    expected = batch["decoder_input_ids" if is_encoder_decoder(model) else "input_ids"].shape
    if len(given) != 1 or given[0].shape[:-1] != expected:
        shapes = ", ".join(str(list(hidden.shape)) for hidden in given) or "none"
        raise DrklError(
            f"{type(model).__name__} gives its output head {shapes}; expected the states {[*expected, 'hidden']} of "
            "all positions, once. Use a model of another family."
        )
    return given[0]


@contextmanager
def _forward_of(model: PreTrainedModel) -> Iterator[Callable[..., Any]]:
    """The forward of the model's class: hooks and autocast of a training around it are not for these numbers.

    Of a sharded model it is the call of the module, whose hooks gather the weights.
    """
    forward = functools.partial(type(model).forward, model)
    if not is_fully_sharded(model):
        yield forward
        return
    try:
        with replaced(model, forward):
            yield model
    finally:
        reshard(model)


def right_padded(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
    pad_id: int = 0,
) -> dict[str, Tensor]:
    """Token ids as `hidden_states` takes them, on the model's device.

    Args:
        model: a language model.
        rows: what it reads; of an encoder-decoder what its decoder does.
        sources: what the encoder reads.
        pad_id: fills the batch.
    """
    batch = collate_sources(rows, pad_id=pad_id)
    if sources is not None:
        decoder = {f"decoder_{name}": tensor for name, tensor in batch.items()}
        batch = collate_sources(sources, pad_id=pad_id) | decoder
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@functools.cache
def named_arguments(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The arguments that a forward names, and whether it hands on others to what is within."""
    parameters = inspect.signature(forward).parameters.values()
    named = frozenset(parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD)
    return named, any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def accepted_inputs(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of `INPUTS` that a model, or its body, takes, and that it need not keep a cache."""
    named, hands_on = named_arguments(type(module).forward)
    everything = hands_on and "input_ids" not in named
    inputs = {key: batch[key] for key in INPUTS if key in batch and (everything or key in named)}
    if hands_on or "use_cache" in named:
        inputs["use_cache"] = False
    return inputs


def without_mask(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its padding read as tokens are, as attention without a mask is quicker; for a causal model alone.

    Where all padding is on the right, the states of a row's own tokens stay what they are.

    Args:
        model: one that `drkl.models.check.check_forward` has found right.
        batch: of `drkl.data.collate`. An encoder's, a classifier's, or one with positions of its own, stays as it is.
    """
    if is_encoder_decoder(model) or is_classifier(model) or "position_ids" in batch or "attention_mask" not in batch:
        return dict(batch)
    # Ones rather than nothing: the families that would warn of a missing mask, or count positions by it, have one.
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


def uses_flash(model: PreTrainedModel) -> bool:
    """Whether a model runs a FlashAttention, which reads packed rows without a mask."""
    config = model.config.get_text_config()
    return config._attn_implementation == VARLEN or is_flash_attention_requested(config)


def row_bounds(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Where the rows of a packed batch begin, as a FlashAttention is told; else each layer looks for it, and waits.

    Nothing for another batch or another attention, or where the caller says it himself.
    """
    if not is_packed(batch) or any(key in batch for key in PACKED) or not uses_flash(model):
        return {}
    if not named_arguments(type(model).forward)[1] or len(batch["position_ids"]) != 1:
        return {}
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    return dict(zip(PACKED, (starts, starts, int(longest), int(longest)), strict=False))


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another ``forward`` in a module inside the block."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def output_module(model: PreTrainedModel) -> Any:
    """The module that makes a language model's logits.

    Raises:
        DrklError: there is none, or it is no matrix.
    """
    module: Any = model.get_output_embeddings()
    if module is None:
        raise DrklError(f"{type(model).__name__} has no output head; a language model is needed here.")
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        # FSMT names the decoder's embeddings; its head is the layer of their shape.
        layers = (part for part in model.modules() if isinstance(part, nn.Linear) and part.weight.shape == weight.shape)
        module = next(layers, module)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        raise DrklError(
            f"{type(model).__name__} makes its logits by its {type(module).__name__}; expected a layer with a weight "
            "[vocab, hidden], which the loss reads chunk by chunk. Use a model of another family."
        )
    return module


def output_head(model: PreTrainedModel) -> LMHead | None:
    """The head that makes logits of `hidden_states`; None of a classifier, whose states are its class logits.

    It is whole: of a sharded model every process has to ask for it.
    """
    return None if is_classifier(model) else lm_head(model).gathered()


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's head with the scale and the soft-cap that its own forward applies, sharded where the model is."""
    module = output_module(model)
    config = model.config.get_text_config()
    scale = 1.0
    for name, power in _SCALES.items():
        if isinstance(factor := getattr(config, name, None), (int, float)):
            scale *= float(factor) ** power
    if config.model_type in _SCALES_STATES:
        scale = 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    bias = getattr(module, "bias", None)
    if bias is None and isinstance(added := getattr(model, "final_logits_bias", None), Tensor):
        bias = added.flatten()  # BART and its kin: a buffer [1, vocab]
    head = LMHead(module.weight, bias, scale, softcap)
    return head.trimmed(min(getattr(config, "unpadded_vocab_size", None) or head.vocab_size, head.vocab_size))


_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Names in a config for a factor on the logits, or a divisor."""
_SCALES_STATES = ("minicpm3",)
"""Families that apply the factor to the states, before the head."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
