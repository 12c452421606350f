"""The config of a model with some of its layers, such that each of them is what it was.

A setting may speak of layers by a list with an entry for each, by their numbers, by a count or by a period. Rules for
lists and dictionaries come first. Then the models of both configs are built without weights and compared, layer by
layer; where one differs, other values of the settings are tried, and where none fits, the setting is refused by name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from drkl.errors import DrklError
from drkl.models.forward import is_encoder_decoder
from drkl.models.settings import making

Build = Callable[[Any], PreTrainedModel]
Settings = dict[str, Any]
Differences = dict[tuple[str, int, str], tuple[Any, Any]]

_DEPTHS = (
    "decoder_layers num_decoder_layers num_hidden_layers num_layers n_layer n_layers num_blocks "
    "encoder_layers num_encoder_layers"
).split()
_BY_LAYER = re.compile(
    r"layer|dense|every|share|interval|period|step|freq|offset|pattern|types$|start|end|stride|moe|block|attn"
)
_NOT_BY_LAYER = re.compile(
    r"token_ids?$|size|dim$|hidden|norm|eps|label|vocab|rank|experts|heads|_fn$|dropout|layerdrop"
)
# A layer's own number, or what a layer keeps for others: no part of what it computes from what it is given.
_BOOKKEEPING = re.compile(r"(^|_)(idx|index|number|layer_id|layer_num|block_id|layer_depth)$|^layer$|^store_")
_MOST_BUILDS = 400


@dataclass(frozen=True)
class Stack:
    """A list of layers: where its settings stand in the config's dictionary, and how many layers it has."""

    path: tuple[str, ...]
    depth_key: str
    available: int
    side: str  # "decoder" or "encoder"


def stacks_of(config: Any) -> tuple[Stack, ...]:
    """Return the decoder's stack, and the encoder's after it where there is one.

    Raises:
        DrklError: an encoder-decoder of unknown depths.
    """
    written = _written(config)
    if not is_encoder_decoder(config):
        path = _path_of(config, config.get_text_config())
        section = _section(written, path)
        mapped = config.get_text_config().attribute_map.get("num_hidden_layers", "num_hidden_layers")
        key = next((key for key in (*_DEPTHS[:2], mapped, *_DEPTHS) if isinstance(section.get(key), int)), mapped)
        depth = section.get(key, getattr(config.get_text_config(), "num_hidden_layers", None))
        return (Stack(path, key, int(depth or 0), "decoder"),)
    for encoder, decoder in (
        ("encoder_layers", "decoder_layers"),
        ("num_encoder_layers", "num_decoder_layers"),
        ("num_layers", "num_decoder_layers"),
    ):
        if all(isinstance(written.get(name), int) for name in (encoder, decoder)):
            return Stack((), decoder, written[decoder], "decoder"), Stack((), encoder, written[encoder], "encoder")
    parts = [getattr(config, side, None) for side in ("decoder", "encoder")]
    if all(hasattr(part, "get_text_config") for part in parts):
        found = [stacks_of(part)[0] for part in parts]
        return tuple(
            Stack((side, *stack.path), stack.depth_key, stack.available, side)
            for side, stack in zip(("decoder", "encoder"), found, strict=True)
        )
    raise DrklError(
        f"{type(config).__name__} does not say how many layers its encoder and decoder have in a way known here, so "
        "layers can be neither dropped nor added. Use student.init=pretrained, or a model of another family."
    )


def shortened(
    config: Any,
    layers: Sequence[int],
    encoder_layers: Sequence[int] | None = None,
    *,
    build: Build,
    section: str = "student.",
) -> Any:
    """Return a copy of a model config with these layers only; with an encoder, ``layers`` are the decoder's.

    Args:
        config: the model's config.
        layers: the layers that stay, by number from 0.
        encoder_layers: those of the encoder.
        build: makes the model of a config; it is called without memory for weights.
        section: stands before ``layers`` in errors.

    Raises:
        DrklError: a setting by layer number that no value carries over to these layers.
    """
    return _Shortening(config, layers, encoder_layers, build).found(section)


def settings_by_layer(config: Any, stack: Stack) -> list[str]:
    """Return the names of the settings in use that may speak of a stack's layers."""
    return [
        key
        for key, value in _section(_written(config), stack.path).items()
        if value and type(value) in (bool, int, list) and key not in _DEPTHS
        if _BY_LAYER.search(key) and not _NOT_BY_LAYER.search(key)
    ]


def lengthened(config: Any, depth: int, encoder_depth: int | None = None) -> Any:
    """Return a copy of a config with more or fewer layers; settings with an entry for each layer are repeated."""
    stacks = stacks_of(config)
    kept = _kept_by_side([range(depth)] if encoder_depth is None else [range(depth), range(encoder_depth)], stacks)
    return _read(config, _sliced(config, _written(config), stacks, kept))


class _Shortening:
    """The search for the settings of a shorter model."""

    def __init__(self, config: Any, layers: Sequence[int], encoder_layers: Sequence[int] | None, build: Build) -> None:
        self.config, self.build, self.builds = config, build, 0
        self.stacks = stacks_of(config)
        given = [layers] if encoder_layers is None else [layers, encoder_layers]
        self.kept = _kept_by_side(given, self.stacks)
        self.teacher = _without_memory(build, copy.deepcopy(config))
        for stack in self.stacks:
            if not _lists(self.teacher, stack, stack.available):
                name = type(self.teacher).__name__
                raise DrklError(f"There is no list of {stack.available} layers in {name}, so it cannot be pruned.")
        self.written = _written(config)

    def found(self, section: str) -> Any:
        settings = _sliced(self.config, self.written, self.stacks, self.kept)
        differences = self.differences(settings)
        first, problem = differences, self.problem
        while differences != {}:
            better = self._better(settings, differences)
            if better is None:
                raise self._refusal(section, first, problem)
            settings, differences = better
        return _read(self.config, settings)

    def differences(self, settings: Settings) -> Differences | None:
        """What differs between layers of the model and of the shorter one, by side, new number and name.

        None where the settings make no model; ``problem`` then has the reason.
        """
        self.builds += 1
        self.problem = ""
        found: Differences = {}
        try:
            config = _read(self.config, settings)
            read = _written(config)
            for stack in self.stacks:
                found |= _changed_lists(stack.side, _section(settings, stack.path), _section(read, stack.path))
            student = _without_memory(self.build, config)
        except Exception as error:  # whatever a family raises at settings that do not go together
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return found or None
        for stack in self.stacks:
            kept = self.kept[stack.side]
            if not _lists(student, stack, len(kept)):
                self.problem = f"its model then has no list of {len(kept)} layers"
                return found or None
            old, new = layer_lists(self.teacher, student, stack, len(kept))
            for j, i in enumerate(kept):
                facts = _differing(_facts(old, i), _facts(new, j), stack, kept)
                if not (j == 0 and _is_moved(facts, _facts(old, 0))):
                    found |= {(stack.side, j, name): pair for name, pair in facts.items()}
            before, after = (_part(c, stack.path) for c in (self.config, config))
            found |= {
                (stack.side, j, "num_kv_shared_layers"): (
                    f"the keys and values of layer {source}",
                    "the ones of another",
                )
                for j, source in _lost_sources(before, after, kept)
            }
        return found

    def _better(self, settings: Settings, differences: Differences | None) -> tuple[Settings, Differences] | None:
        """Settings of fewer differences, one or two changes away."""
        best, fewest = None, _count(differences)
        second: list[tuple[str, Settings, Differences]] = []
        for name, other in self._changes(settings, differences or {}):
            found = self.differences(other)
            if found is not None and found != differences:
                second.append((name, other, found))
                if len(found) < fewest:
                    best, fewest = (other, found), len(found)
                if not found:
                    break
        if best is not None:
            return best
        for name, changed, between in second:
            for other_name, other in self._changes(changed, between):
                if _are_a_pair(name, other_name) and self.builds < _MOST_BUILDS:
                    found = self.differences(other)
                    if found is not None and len(found) < fewest:
                        return other, found
        return None

    def _changes(self, settings: Settings, differences: Differences) -> Iterator[tuple[str, Settings]]:
        """Every change of one setting that may speak of layers."""
        for stack in self.stacks:
            wrong = sorted({number for side, number, _ in differences if side == stack.side})
            if differences and not wrong:
                continue
            section, before = _section(settings, stack.path), _section(self.written, stack.path)
            for key in sorted(section):
                if key == stack.depth_key or key in _DEPTHS or key.startswith(_other(stack.side)):
                    continue
                for value in _values(key, section[key], before.get(key), stack, self.kept[stack.side], wrong):
                    if value != section[key]:
                        changed = copy.deepcopy(settings)
                        _section(changed, stack.path)[key] = value
                        yield key, changed

    def _refusal(self, section: str, differences: Differences | None, problem: str) -> DrklError:
        side = self.stacks[0].side if differences is None else next(iter(differences))[0]
        kept, name = list(self.kept[side]), type(self.config).__name__
        what = section + ("encoder_layers" if side == "encoder" else "layers")
        works = self._selection_that_works(side)
        way_out = f"Choose other {what}" if works is None else f"These layers keep theirs: {what}={works}"
        if differences is None:
            return DrklError(f"{what} keeps {kept}, which {name} cannot say ({problem}). {way_out}.")
        (_, j, fact), (theirs, ours) = next(iter(differences.items()))
        by = ", ".join(self._settings_of(side, fact) or [fact])
        return DrklError(
            f"{what} keeps {kept}, and {name} settles by a layer's number what it computes ({by}): as layer {j} of the "
            f"student, layer {kept[j]} would have {_shown(fact, ours)} for {_shown(fact, theirs)}. {way_out}."
        )

    def _selection_that_works(self, side: str) -> list[int] | None:
        """As many layers of this stack that keep their settings."""
        other = copy.copy(self)
        stack = next(stack for stack in self.stacks if stack.side == side)
        count, last = len(self.kept[side]), stack.available - 1
        needed = {last, *_sources(_part(self.config, stack.path)).values()}
        for layers in (
            list(range(count)),
            [*range(count - 1), last],
            [i * last // max(1, count - 1) for i in range(count)],
            sorted([*needed, *(i for i in range(last) if i not in needed)][: max(count, len(needed))]),
        ):
            other.kept = {**self.kept, side: layers}
            found = other.differences(_sliced(self.config, self.written, self.stacks, other.kept))
            if found is not None and not any(key[0] == side for key in found):
                return layers
        return None

    def _settings_of(self, side: str, fact: str) -> list[str]:
        """The settings that decide a fact of the model's layers: those that change it where they change."""
        stack = next(stack for stack in self.stacks if stack.side == side)
        section, found = _section(self.written, stack.path), []
        for key, value in section.items():
            if type(value) not in (bool, int) or not _BY_LAYER.search(key) or _NOT_BY_LAYER.search(key):
                continue
            for other in [not value] if type(value) is bool else [value + 1, value - 1]:
                changed = copy.deepcopy(self.written)
                _section(changed, stack.path)[key] = other
                try:
                    model = _without_memory(self.build, _read(self.config, changed))
                except Exception:  # a value that this family does not take says nothing
                    continue
                old, new = layer_lists(self.teacher, model, stack, stack.available)
                numbers = range(stack.available if old else 0)
                if key not in found and any(_facts(old, i).get(fact) != _facts(new, i).get(fact) for i in numbers):
                    found.append(key)
        return found


def _shown(name: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith("the "):
        return value
    return f"no {name}" if value is None else f"{name} {value}"[:120]


def _are_a_pair(name: str, other: str) -> bool:
    """Whether two settings may settle one thing: a period and an offset, or a period and the layers left out of it."""
    return name != other and (name.split("_")[0] == other.split("_")[0] or other.endswith("_layers"))


def _differing(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], stack: Stack, kept: Sequence[int]
) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (theirs.get(name), ours.get(name)) for name in sorted(theirs.keys() | ours.keys())}
    return {
        name: (a, b) for name, (a, b) in pairs.items() if not (_same(a, b) or _are_of_all_layers(a, b, stack, kept))
    }


def _are_of_all_layers(theirs: Any, ours: Any, stack: Stack, kept: Sequence[int]) -> bool:
    """Whether two lists that a layer holds whole have an entry for each layer, or name the same layers."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return False
    named = _are_numbers(theirs, stack) and _renumbered(theirs, kept) == ours
    return named or (len(theirs), len(ours)) == (stack.available, len(kept))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and bool(a == b)


def _is_moved(facts: Mapping[str, tuple[Any, Any]], first: Mapping[str, Any]) -> bool:
    """Whether the new first layer only has, besides its own, what layer 0 holds for all: T5's position bias."""
    return all(
        (theirs is None or theirs is False) and ours == first.get(name) for name, (theirs, ours) in facts.items()
    )


def _lost_sources(before: Any, after: Any, kept: Sequence[int]) -> list[tuple[int, int]]:
    """The layers that read the keys and values of another layer than they did, each with the one it did."""
    old, new = _sources(before), _sources(after)
    return [(j, old[i]) for j, i in enumerate(kept) if i in old and kept[new.get(j, j)] != old[i]]


def _sources(config: Any) -> dict[int, int]:
    """The layer whose keys and values a layer reads, for those that read another's."""
    if not getattr(config, "num_kv_shared_layers", 0) or not hasattr(config, "kv_sharing_modes"):
        return {}
    modes, kinds = config.kv_sharing_modes, config.layer_types
    last = {kind: i for i, (kind, mode) in enumerate(zip(kinds, modes, strict=True)) if mode != "reuse"}
    return {i: last[kinds[i]] for i, mode in enumerate(modes) if mode == "reuse"}


def _count(differences: Differences | None) -> int:
    return 10**9 if differences is None else len(differences)


def _changed_lists(side: str, written: Settings, read: Settings) -> Differences:
    """The entries of lists by layer that a config changes as it reads them."""
    found: Differences = {}
    for key, value in written.items():
        if isinstance(value, list) and isinstance(read.get(key), list) and len(read[key]) == len(value):
            found |= {(side, j, key): (a, b) for j, (a, b) in enumerate(zip(value, read[key], strict=True)) if a != b}
    return found


def _kept_by_side(given: Sequence[Sequence[int]], stacks: Sequence[Stack]) -> dict[str, Sequence[int]]:
    assert len(given) == len(stacks), "one selection for each stack"
    return {stack.side: layers for stack, layers in zip(stacks, given, strict=True)}


def _without_memory(build: Build, config: Any) -> PreTrainedModel:
    with making(config), torch.device("meta"), no_init_weights():
        return build(config)


def _written(config: Any) -> Settings:
    """The config as a dictionary with every default."""
    return copy.deepcopy(config.to_dict())


def _read(config: Any, settings: Settings) -> Any:
    """A config of these settings, as it comes back from the file that is saved of it."""
    with TemporaryDirectory() as folder:
        type(config).from_dict(copy.deepcopy(settings)).save_pretrained(folder)
        read = type(config).from_pretrained(folder)
    _keep_what_is_not_saved(config, read)
    return read


def _keep_what_is_not_saved(config: Any, read: Any) -> None:
    read._attn_implementation = config._attn_implementation
    read._experts_implementation = config._experts_implementation
    read.name_or_path = config.name_or_path
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None and getattr(read, name, None) is not None:
            _keep_what_is_not_saved(part, getattr(read, name))


def _path_of(config: Any, part: Any) -> tuple[str, ...]:
    """The names that lead from a config to one of its parts."""
    if part is config:
        return ()
    for name in config.sub_configs:
        below = getattr(config, name, None)
        if below is part:
            return (name,)
        if getattr(below, "sub_configs", None) and (path := _path_of(below, part)):
            return (name, *path)
    return ()


def _part(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _section(settings: Settings, path: Sequence[str]) -> Settings:
    for name in path:
        settings = settings[name]
    return settings


def _sliced(config: Any, written: Settings, stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> Settings:
    """The settings with their lists and dictionaries by layer for the layers that stay."""
    settings = copy.deepcopy(written)
    for stack in reversed(stacks):  # where a list may belong to either, the encoder's comes first
        section, layers = _section(settings, stack.path), kept[stack.side]
        if sum(other.path == stack.path for other in stacks) == 1:
            depths = [key for key in _DEPTHS if section.get(key) == stack.available]
        else:
            depths = ["num_hidden_layers"] if stack.side == "encoder" and "num_hidden_layers" in section else []
        fixed = _lists_of_other_things(_part(config, stack.path), stack.available)
        for key, value in section.items():
            untouched = value == _section(written, stack.path).get(key)
            if untouched and key not in fixed and not key.startswith(_other(stack.side)):
                section[key] = _value(key, value, stack, layers)
        for key in {stack.depth_key, *depths} & section.keys():
            section[key] = len(layers)
    return settings


def _lists_of_other_things(config: Any, depth: int) -> list[str]:
    """The settings whose lists are as long at the default depth, which is another: Mamba 2's time_step_limit."""
    try:
        plain = type(config)()
        default = plain.to_dict()
    except Exception:  # a family without defaults
        return []
    # Nemotron H counts its list of kinds and writes no depth.
    if depth in (*(default.get(key) for key in _DEPTHS), getattr(plain, "num_hidden_layers", None)):
        return []
    now = config.to_dict()
    lists = [key for key, value in default.items() if isinstance(value, list | tuple) and len(value) > 0]
    return [key for key in lists if isinstance(now.get(key), list | tuple) and len(now[key]) == len(default[key])]


def _other(side: str) -> str:
    return "decoder" if side == "encoder" else "encoder"


def _value(key: str, value: Any, stack: Stack, layers: Sequence[int]) -> Any:
    """A setting for these layers: the rule for lists and dictionaries by layer."""
    if isinstance(value, list) and len(value) == stack.available and not key.endswith(("_token_id", "architectures")):
        return [value[i % stack.available] for i in layers]
    if _are_numbers(value, stack) and re.search(r"layers$|_ids$|idxs$|indices$|indexes$", key):
        return _renumbered(value, layers)
    if key == "num_kv_shared_layers" and isinstance(value, int):
        return sum(i >= stack.available - value for i in layers)
    if key == "attention_types" and value:  # GPT-Neo: [[kinds, times], ...]
        kinds = [kind for part, times in value for kind in part * times]
        return [[[kinds[i % len(kinds)] for i in layers], 1]]
    if isinstance(value, dict) and value and all(str(name).isdigit() for name in value) and not key.startswith("id2"):
        by_number = {int(name): entry for name, entry in value.items()}
        return {str(j): by_number[i] for j, i in enumerate(layers) if i in by_number}
    return value


def _are_numbers(value: Any, stack: Stack) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(number) is int and 0 <= number < stack.available for number in value)
        and len(set(value)) == len(value)
    )


def _renumbered(numbers: Sequence[int], layers: Sequence[int], first: int = 0) -> list[int]:
    """Layer numbers, counted from ``first``, as those of the layers that stay."""
    return [j + first for j, i in enumerate(layers) if i + first in numbers]


def _values(
    key: str, now: Any, before: Any, stack: Stack, layers: Sequence[int], wrong: Sequence[int]
) -> Iterator[Any]:
    """Other values that a setting may have for these layers."""
    if _NOT_BY_LAYER.search(key) and not isinstance(before, list):
        return
    if isinstance(before, list):
        yield before
        if before:
            yield [before[i % len(before)] for i in layers]  # a pattern that repeats
        if len(before) == stack.available and all(type(number) is int for number in before):
            place = {i: j for j, i in enumerate(layers)}
            yield [place.get(before[i % stack.available], -1) for i in layers]
        if _are_numbers(before, stack) or not before:
            yield _renumbered(before, layers)
            yield _renumbered(before, layers, 1)
            yield sorted(set(_renumbered(before, layers)) ^ set(wrong))
    elif type(now) is bool and _BY_LAYER.search(key):
        yield not now
    elif type(now) is int and _BY_LAYER.search(key):
        yield from range(len(layers) + 2)
        yield -1
    elif type(now) is float and re.search(r"scale|depth|multiplier|alpha|beta", key):
        for power in (0.5, -0.5, 0.25, -0.25, 1.0, -1.0):  # the powers of the depth that families divide by
            yield before * (len(layers) / stack.available) ** power


def layer_lists(
    model: PreTrainedModel, small: PreTrainedModel, stack: Stack, depth: int
) -> tuple[dict[str, nn.ModuleList], dict[str, nn.ModuleList]]:
    """Return the lists of layers of a stack by name, in a model and in one of ``depth`` layers there.

    Most families have one. XLM has one for attention and others for what follows it.
    """
    old, new = _lists(model, stack, stack.available), _lists(small, stack, depth)
    names = [name for name in old if name in new]
    return {name: old[name] for name in names}, {name: new[name] for name in names}


def _lists(model: PreTrainedModel, stack: Stack, depth: int) -> dict[str, nn.ModuleList]:
    """The lists of this many modules in a stack, but for those inside of another."""
    part: Any = model.get_encoder() if stack.side == "encoder" else model.get_decoder()
    if not isinstance(part, nn.Module) or not any(isinstance(m, nn.ModuleList) for m in part.modules()):
        part = model  # ModernBERT's decoder calls a part of its head that
    inside = set(part.modules())
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != depth or module not in inside:
            continue
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        if outermost and next(module.parameters(), None) is not None:  # not the rotary embeddings of each kind
            found[name] = module
    return found


def _facts(lists: Mapping[str, nn.ModuleList], number: int) -> dict[str, Any]:
    """What is known of a layer without its weights: classes, shapes and plain attributes, but for its own number."""
    facts: dict[str, Any] = {}
    for prefix, modules in lists.items():
        start = "" if len(lists) == 1 else prefix.rpartition(".")[2] + "."
        for path, module in modules[number].named_modules():
            name = start + path
            facts[name or "class"] = type(module).__name__
            tensors = list(module._parameters.items()) + list(module._buffers.items())
            facts |= {f"{name}.{key}".lstrip("."): _size(tensor) for key, tensor in tensors}
            for key, value in vars(module).items():
                known = key.startswith("_") or key == "training" or key in _DEPTHS or _BOOKKEEPING.search(key)
                if not known and _is_plain(value):
                    facts[f"{name}.{key}".lstrip(".")] = value
    return facts


def _size(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str)
