"""Prune a model: a new one with some of its layers, each of which computes what it did."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.models.check import special_ids
from drkl.models.classes import is_classifier
from drkl.models.forward import in_eval_mode, is_encoder_decoder
from drkl.models.shorten import Stack, layer_lists, settings_by_layer, shortened, stacks_of

_TOKENS = 12
_WINDOW = 5  # shorter than _TOKENS, so that a layer with a window and one without differ


def pruned(
    model: PreTrainedModel,
    layers: Sequence[int],
    encoder_layers: Sequence[int] | None = None,
    *,
    section: str = "student.",
) -> PreTrainedModel:
    """Return a new model with these layers; the model is left as it is.

    Args:
        model: a language model or a classifier.
        layers: the layers that stay, by number from 0; for an encoder-decoder the decoder's.
        encoder_layers: the encoder's.
        section: stands before ``layers`` in errors.

    Raises:
        DrklError: a layer that would compute something else at its new place.
    """
    config = shortened(model.config, layers, encoder_layers, build=type(model)._from_config, section=section)
    small: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    if not _head_is_tied(model) and _head_is_tied(small):
        # T5 v1.1 comes with a head of its own under a config that says it is tied.
        head = small.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        name = next(name for name, module in small.named_modules() if module is head)
        small.all_tied_weights_keys.pop(f"{name}.weight", None)
    stacks = stacks_of(model.config)
    kept = dict(zip(stacks, [layers] if encoder_layers is None else [layers, encoder_layers], strict=True))
    _load(small, _kept_state(model, small, kept))
    small.name_or_path = small.config.name_or_path = ""  # an adapter of it would name the teacher as its base
    small.pruned_from = getattr(model, "pruned_from", "") or model.name_or_path  # type: ignore[assignment]
    if not is_classifier(model):
        small.generation_config = copy.deepcopy(model.generation_config)
    small = small.to(model.device).eval()  # type: ignore[arg-type]
    check_layers(model, small, kept, section=section)
    return small


def _head_is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()  # a classifier has none
    return head is not None and head.weight is model.get_input_embeddings().weight


def _kept_state(
    model: PreTrainedModel, small: PreTrainedModel, kept: Mapping[Stack, Sequence[int]]
) -> dict[str, Tensor]:
    """The state of the smaller model: the layers of each stack that stay, and everything outside of them."""
    state, expected = model.state_dict(), small.state_dict()
    found: dict[str, Tensor] = {}
    prefixes = {
        name: layers for stack, layers in kept.items() for name in layer_lists(model, small, stack, len(layers))[0]
    }
    for key, like in expected.items():
        prefix = next((name for name in prefixes if key.startswith(f"{name}.")), None)
        if prefix is None:
            found[key] = _outside(key, state[key], like, kept)
            continue
        number, _, rest = key[len(prefix) + 1 :].partition(".")
        source = f"{prefix}.{prefixes[prefix][int(number)]}.{rest}"
        # What layer 0 holds for all layers, such as T5's position bias, moves to the new first layer.
        found[key] = state[source] if source in state else state[f"{prefix}.0.{rest}"]
    return found


def _outside(key: str, tensor: Tensor, like: Tensor, kept: Mapping[Stack, Sequence[int]]) -> Tensor:
    """A tensor outside of the layers; one with a part for each layer, as Gemma 3n's embeddings, for those that stay."""
    if tensor.shape == like.shape:
        return tensor
    for stack, layers in kept.items():
        for dim, (old, new) in enumerate(zip(tensor.shape, like.shape, strict=True)):
            rest = (*tensor.shape[:dim], new, *tensor.shape[dim + 1 :])
            if rest == tuple(like.shape) and old % stack.available == 0 and old // stack.available * len(layers) == new:
                by_layer = tensor.unflatten(dim, (stack.available, old // stack.available))
                numbers = torch.tensor(list(layers), device=tensor.device)
                return by_layer.index_select(dim, numbers).flatten(dim, dim + 1)
    raise DrklError(
        f"The weight {key} has the shape {tuple(tensor.shape)}, and {tuple(like.shape)} in a model with fewer layers, "
        "so its part for each layer is unknown. Use student.init=pretrained, or a model of another family."
    )


def _load(small: PreTrainedModel, found: Mapping[str, Tensor]) -> None:
    small.load_state_dict(found)
    shared: dict[int, str] = {}
    for key, tensor in small.state_dict().items():
        first = shared.setdefault(tensor.data_ptr(), key) if tensor.numel() else key
        if first != key and not torch.equal(found[first], found[key]):
            raise DrklError(
                f"{type(small).__name__} has one weight for {first} and {key}, which come from layers with different "
                "ones. Keep other layers, so that those that shared their weights go on to do so."
            )


@torch.no_grad()
def check_layers(
    model: PreTrainedModel, small: PreTrainedModel, kept: Mapping[Stack, Sequence[int]], *, section: str = "student."
) -> None:
    """Raise DrklError unless each kept layer gives the larger model's output for the larger model's input.

    Both models read the same tokens. Each layer of the smaller one is given what its original was given; masks,
    positions and what layers share are the smaller model's own.
    """
    inputs = _inputs(model)
    seen, name = _Seen(), type(model).__name__
    lists = {stack: layer_lists(model, small, stack, len(layers)) for stack, layers in kept.items()}
    compared = _Compared(seen, model.config, kept, {s: list(new) for s, (_, new) in lists.items()}, section)
    modes = _in_mode_for_comparison(model), _in_mode_for_comparison(small)
    with modes[0], modes[1], _short_windows(model, small), torch.random.fork_rng():
        with _watched([old for old, _ in lists.values()], seen):
            theirs = _logits(model, inputs)
        with _watched([new for _, new in lists.values()], compared):
            ours = _logits(small, inputs)
    if not _alike(ours, theirs):
        raise DrklError(
            f"With the last layer's states of the {name}, the pruned one gives other logits, so what follows the "
            "layers depends on their number. Use student.init=pretrained, or a model of another family."
        )


def _logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    try:
        logits: Tensor = model(**inputs).logits
        return logits
    except DrklError:
        raise
    except Exception as error:  # whatever a family raises: at inputs of another kind, at layers that do not go together
        raise DrklError(
            f"A {type(model).__name__} of {model.config.get_text_config().num_hidden_layers} layers cannot read a "
            "few tokens, so its pruned layers cannot be compared with what they were: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A few ordinary tokens, as the model's forward takes them."""
    config = model.config.get_text_config()
    special = special_ids(model)
    ordinary = [number for number in range(getattr(config, "vocab_size", 128)) if number not in special]
    context = getattr(config, "max_position_embeddings", None)
    length = min(_TOKENS, context - 2) if isinstance(context, int) and context > 2 else _TOKENS  # RoBERTa's begin at 2
    ids = torch.tensor([[ordinary[(7 * i + 3) % len(ordinary)] for i in range(length)]], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_classifier(model):
        eos = getattr(config, "eos_token_id", None)
        if isinstance(eos, int) and eos in range(getattr(config, "vocab_size", 0)):  # CANINE hashes characters
            ids[0, -1] = eos  # BART reads the class there
    else:
        inputs["use_cache"] = False
        if is_encoder_decoder(model):
            inputs |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in accepted}


@contextmanager
def _in_mode_for_comparison(model: PreTrainedModel) -> Iterator[None]:
    with in_eval_mode(model):
        # RWKV halves its weights in place in eval mode, by a layer's number; it has no dropout.
        model.base_model.training = hasattr(model.config, "rescale_every")
        try:
            yield
        finally:
            model.base_model.training = False


@contextmanager
def _short_windows(*models: PreTrainedModel) -> Iterator[None]:
    """Windows of attention shorter than the tokens read, so that a layer with one differs from a layer without."""
    configs = {id(m.config): m.config for model in models for m in model.modules() if hasattr(m, "config")}
    before = [
        (vars(config), name, vars(config)[name])
        for config in configs.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(vars(config).get(name), int)
    ]
    try:
        for settings, name, value in before:
            settings[name] = min(value, _WINDOW)
        yield
    finally:
        for settings, name, value in before:
            settings[name] = value


Place = tuple[str, int]
"""A list of layers by name, and a number in it."""


class _Seen:
    """What each layer of a model was given and gave, call by call."""

    def __init__(self) -> None:
        self.inputs: dict[Place, list[dict[int | str, Tensor]]] = {}
        self.outputs: dict[Place, list[Any]] = {}
        self.order: list[Place] = []
        self._last: list[Tensor] = []

    def given(self, place: Place, states: Mapping[int | str, Any], main: int | str) -> Mapping[int | str, Tensor]:
        """Note the states, and what else comes straight from the layer before."""
        came = {tensor.data_ptr() for tensor in self._last}
        carried = {
            name: value.clone()
            for name, value in states.items()
            if isinstance(value, Tensor) and value.is_floating_point() and (name == main or value.data_ptr() in came)
        }
        self.inputs.setdefault(place, []).append(carried)
        self.order.append(place)
        return {}

    def gave(self, place: Place, output: Any) -> Any:
        self.outputs.setdefault(place, []).append(_cloned(output))
        self._last = [tensor for tensor in _flat(output) if tensor.is_floating_point()]
        return None


class _Compared:
    """Gives each layer of the smaller model its original's input, and compares what it gives with its original's."""

    def __init__(
        self,
        seen: _Seen,
        config: Any,
        kept: Mapping[Stack, Sequence[int]],
        names: Mapping[Stack, Sequence[str]],
        section: str,
    ) -> None:
        self.seen, self.config, self.section, self.calls = seen, config, section, dict[Place, int]()
        self.stacks = {name: (stack, kept[stack]) for stack, own in names.items() for name in own}

    def given(self, place: Place, states: Mapping[int | str, Any], main: int | str) -> Mapping[int | str, Tensor]:
        call = self.calls[place] = self.calls.get(place, -1) + 1
        stack, layers = self.stacks[place[0]]
        first = next(at for at in self.seen.order if self.stacks[at[0]][0] == stack)
        if place == first and not _alike(states[main], self.seen.inputs[place][call][main]):
            raise DrklError(
                f"The first layer of the pruned {type(self.config).__name__} is given other states than the model's, "
                "so what comes before the layers depends on their number. Use student.init=pretrained, or a model of "
                "another family."
            )
        calls = self.seen.inputs.get((place[0], layers[place[1]]), [])
        if call >= len(calls):
            raise self._refusal(stack, layers, place[1])
        return {name: value.clone() for name, value in calls[call].items() if isinstance(states.get(name), Tensor)}

    def gave(self, place: Place, output: Any) -> Any:
        name, j = place
        (stack, layers), call = self.stacks[name], self.calls[place]
        theirs = self.seen.outputs[name, layers[j]][call]
        if len(_flat(output)) != len(_flat(theirs)) or not all(map(_alike, _flat(output), _flat(theirs))):
            raise self._refusal(stack, layers, j)
        called = [number for own, number in self.seen.order if own == name]
        if layers[j] != max(i for i in layers if i in called):
            return None
        return self.seen.outputs[name, max(called)][call]  # what follows is compared on the model's own last states

    def _refusal(self, stack: Stack, layers: Sequence[int], j: int) -> DrklError:
        what = self.section + ("encoder_layers" if stack.side == "encoder" else "layers")
        first = list(range(len(layers)))
        settings = ", ".join(settings_by_layer(self.config, stack)) or "in its code"
        return DrklError(
            f"{what} keeps {list(layers)}, and {type(self.config).__name__} settles by a layer's number what it "
            f"computes ({settings}): as layer {j} of the student, layer {layers[j]} gives another output for the "
            "same input. "
            + (
                f"Choose other {what}."
                if list(layers) == first
                else f"Choose other {what}, such as the first, {first}."
            )
        )


@contextmanager
def _watched(lists: Sequence[Mapping[str, nn.ModuleList]], watcher: _Seen | _Compared) -> Iterator[None]:
    """Show a watcher what each layer is given and gives; what it returns takes its place.

    Not hooks: SqueezeBERT calls its layers' forward itself.
    """
    layers = [(name, j, module) for own in lists for name, modules in own.items() for j, module in enumerate(modules)]
    before = [vars(module).get("forward") for _, _, module in layers]
    for name, number, module in layers:
        module.forward = partial(_forward, watcher, (name, number), module.forward)
    try:
        yield
    finally:
        for (_, _, module), forward in zip(layers, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forward(watcher: _Seen | _Compared, place: Place, forward: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)  # Reformer's layers draw numbers
    given = watcher.given(place, _named(args, kwargs), _states_in(args, kwargs))
    args = tuple(given.get(number, value) for number, value in enumerate(args))
    output = forward(*args, **{name: given.get(name, value) for name, value in kwargs.items()})
    instead = watcher.gave(place, output)
    return output if instead is None else instead


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    return named


def _states_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str:
    """Where a layer's call holds the states that the layer before it gave."""
    if args and isinstance(args[0], Tensor):
        return 0
    if "hidden_states" in kwargs:
        return "hidden_states"
    named = _named(args, kwargs)
    return next(name for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())


def _flat(output: Any) -> list[Tensor]:
    """The tensors of an output; a cache has none here."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _flat(part)]


def _cloned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) is dict:
        return {name: _cloned(part) for name, part in output.items()}
    if not isinstance(output, tuple | list):
        return output
    parts = [_cloned(part) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for the order of sums, which may differ with where the weights lie in memory.

    A model cast to bf16 in memory has its rotary frequencies rounded, too; one that is built so has not.
    """
    if ours.shape != theirs.shape:
        return False
    tolerance = 2e-5 if theirs.dtype in (torch.float32, torch.float64) else 5e-2
    ours, theirs = ours.float(), theirs.float()
    spread = float(theirs.abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * spread, equal_nan=True)
