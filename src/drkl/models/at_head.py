"""Call a model, through any wrapper, with another function in place of its output head.

A loss that needs hidden states and a head has two ways to get them. Read from outside (``model.base_model(...)``,
``model.lm_head.weight``), they bypass what DDP and FSDP2 do in a forward call: DDP then averages no gradient, and FSDP2
counts that of a head it has sharded by itself twice; neither says so. Here the model is called as it always is, and the
loss is computed where the head would make the logits: every wrapper, hook, adapter and autocast context is passed
through in its own order, and the head's weight is whole while it is read.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.models.classes import is_classifier
from drkl.models.forward import is_encoder_decoder, lm_head, output_module, replaced

AtHead = Callable[[Tensor, LMHead | None], Tensor]
"""From hidden states `[batch, tokens, hidden]` and a head; of a classifier from class logits `[batch, 1, classes]` and
None."""

CLASSIFIER, ENCODER_DECODER, DECODER_ONLY = "a sequence classifier", "an encoder-decoder", "a decoder-only model"

_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models known to do to their logits what `LMHead` does."""


class Wrapped(NamedTuple):
    """A model and what is around it."""

    model: PreTrainedModel
    wrappers: tuple[nn.Module, ...]
    """Outermost first."""


def unwrap(model: Any, role: str = "model") -> Wrapped:
    """Find the `PreTrainedModel` within DDP, FSDP, DeepSpeed, `torch.compile` and peft's `PeftModel`.

    Args:
        model: any of these.
        role: what an error calls it, e.g. ``student``.

    Raises:
        DrklError: another wrapper, or no transformers model within.
    """
    wrappers: list[nn.Module] = []
    while not isinstance(model, PreTrainedModel):
        wrappers.append(model)
        if isinstance(model, nn.parallel.DistributedDataParallel) or is_fsdp1(model) or is_deepspeed(model):
            model = model.module
        elif _is(model, "peft", "PeftModel"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise DrklError(
                    f"The {role}'s adapter ({model.active_peft_config.peft_type}) puts positions of its own before the "
                    "batch's, so labels and hidden states would not line up. Use LoRA or another adapter of weights."
                )
            model = model.get_base_model()
        elif _is(model, "torch._dynamo.eval_frame", "OptimizedModule"):
            model = model._orig_mod
        else:
            raise DrklError(_refusal(model, role))
    return Wrapped(model, tuple(wrappers))


def kind_of(model: PreTrainedModel, role: str) -> str:
    """Return the kind of a model: `CLASSIFIER`, `ENCODER_DECODER` or `DECODER_ONLY`.

    Raises:
        DrklError: none of these.
    """
    if is_classifier(model):
        return CLASSIFIER
    if is_encoder_decoder(model):
        return ENCODER_DECODER
    if not model.can_generate():
        raise DrklError(
            f"The {role} is a {type(model).__name__}; expected a decoder-only language model (…ForCausalLM), an "
            "encoder-decoder (…ForConditionalGeneration) or a sequence classifier (…ForSequenceClassification)."
        )
    return DECODER_ONLY


def call_at_head(wrapped: nn.Module, inputs: Mapping[str, Any], at_head: AtHead, role: str = "model") -> Tensor:
    """Call a model with ``at_head`` in the place of its output head, and return what that returns.

    Args:
        wrapped: a `PreTrainedModel`, or one within what `unwrap` knows.
        inputs: the model's own arguments.
        at_head: called once, with the hidden states `[batch, tokens, hidden]` that the head is given and the head as it
            is to be applied to them; for a classifier with its class logits `[batch, 1, classes]` and None. Returns a
            tensor. Other results leave through its closure.
        role: what an error calls the model.

    Returns:
        The result of ``at_head``, as it comes out of the outermost wrapper.

    Raises:
        DrklError: a wrapper or a head that this cannot go through, or logits that are no `LMHead`'s.
    """
    model = unwrap(wrapped, role).model
    forward = model.forward  # with what accelerate puts around the method itself, autocast say
    if is_classifier(model):

        def class_forward(*args: Any, **kwargs: Any) -> Tensor:
            return at_head(_logits(forward(*args, **kwargs)).unsqueeze(1), None)

        with replaced(model, class_forward):
            result: Tensor = wrapped(**inputs)
        return result
    module = head_module(model, role)
    results: list[Tensor] = []
    used: list[LMHead] = []

    def head_forward(hidden: Tensor) -> Tensor:
        head = head_of(model, role, in_forward=True)
        used.append(head)
        return at_head(hidden.to(head.weight.device), head)

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        # The last of the head's hooks: FSDP2 has seen the result. The model goes on with a single made-up logit.
        results.append(output)
        first = output.detach().flatten()[:1]
        return (first if first.numel() else output.new_zeros(1)).reshape(1, 1, 1)

    def finish(output: Any) -> Tensor:
        if len(results) != 1:
            raise DrklError(
                f"The {role} ({type(model).__name__}) called its output head {len(results)} times in one forward; "
                "expected once. Use a model of another family."
            )
        _check_logits(model, used[0], results[0], output, role)
        return results[0]

    at_end = _uncompiled(finish)

    def model_forward(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = at_end(forward(*args, **kwargs))
        return result

    handle = module.register_forward_hook(_uncompiled(keep))
    try:
        with replaced(module, _uncompiled(head_forward)), replaced(model, model_forward):
            result = wrapped(**inputs)
    finally:
        handle.remove()
    return result


def head_of(model: PreTrainedModel, role: str, *, in_forward: bool = False) -> LMHead:
    """The head that makes logits of the states which a model hands to its head module.

    Outside the model's forward the weight may be sharded (a DTensor).
    """
    head, module = lm_head(model), head_module(model, role)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        raise DrklError(
            f"The {role}'s output head ({type(module).__name__}) holds no weights in memory as floating point numbers, "
            "and the loss reads them chunk by chunk. Load the head unquantised and on the device."
        )
    if in_forward and hasattr(weight, "full_tensor"):
        raise DrklError(
            f"The {role}'s output head stays sharded in its own forward (tensor parallelism), and the loss needs it "
            "whole. Leave the head out of the plan, or shard the model with DDP or FSDP2 (fully_shard) alone."
        )
    if bias is None:
        bias = head.bias  # BART's, a buffer of the model
    return dataclasses.replace(head, weight=weight, bias=bias).trimmed(head.vocab_size)


def head_module(model: PreTrainedModel, role: str) -> nn.Linear:
    """The module that makes a language model's logits: the one peft trains in its place, where it does.

    Raises:
        DrklError: it does more, or other, than a matrix product.
    """
    module = output_module(model)
    if _is(module, "peft.utils.other", "ModulesToSaveWrapper"):
        active = [] if module.disable_adapters else list(module.active_adapters)
        module = module.modules_to_save[active[0]] if active else module.original_module
    if type(module).forward is not nn.Linear.forward:
        why = "it may do more than a matrix product, or hold its weights packed: load the head as it was trained"
        if _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            why = "an adapter on the head: leave it out of target_modules, or name it in modules_to_save"
        elif is_fsdp1(module):
            why = "it is wrapped by itself: leave it to the wrapper of the whole model, or use fully_shard"
        raise DrklError(
            f"The {role}'s output head is a {type(module).__module__}.{type(module).__qualname__}, not a "
            f"torch.nn.Linear, and the loss reads the head's weight itself ({why})."
        )
    head: nn.Linear = module
    return head


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function outside torch.compile, in one graph break."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return function
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def _logits(output: Any) -> Tensor:
    logits: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
    return logits


def _check_logits(model: PreTrainedModel, head: LMHead, result: Tensor, output: Any, role: str) -> None:
    """Raise DrklError unless the model did to the made-up logit what `LMHead` does: scale, bias and soft-cap."""
    if model in _CHECKED:
        return
    logit = result.detach().flatten()[:1].to(torch.float64)
    if logit.numel() == 0 or not torch.isfinite(logit).all() or float(logit) == 0.0:
        return
    theirs = _logits(output).detach().flatten().to(torch.float64)
    added = getattr(model, "final_logits_bias", None)
    if isinstance(added, Tensor):
        logit = logit + added.detach().flatten().to(torch.float64)
    ours = logit * head.scale
    if head.softcap is not None:
        ours = torch.tanh(ours / head.softcap) * head.softcap
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-6):
        raise DrklError(
            f"The {role} ({type(model).__name__}) does not compute its logits as softcap(scale * (hidden @ weight.T + "
            "bias)), so its head cannot be used chunk by chunk. Use a model of another family."
        )
    _CHECKED.add(model)


def is_fsdp1(module: Any) -> bool:
    """Whether a module is PyTorch's older wrapper for sharded weights."""
    return _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_deepspeed(module: Any) -> bool:
    """Whether a module is DeepSpeed's engine, which need not be installed."""
    return type(module).__name__ == "DeepSpeedEngine"


def _is(value: Any, module: str, name: str) -> bool:
    """Whether ``value`` is of a class that need not be imported to find out."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _refusal(model: Any, role: str) -> str:
    name = type(model).__name__
    if isinstance(model, nn.DataParallel):
        return (
            f"The {role} is in a DataParallel, which copies the model in every step. Use DistributedDataParallel or "
            "fully_shard, with one process for each device."
        )
    return (
        f"The {role} is a {name}; expected a transformers PreTrainedModel, as it is or in "
        "DistributedDataParallel, fully_shard, torch.compile or a PeftModel."
    )
