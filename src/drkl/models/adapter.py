"""LoRA students: add an adapter with peft, save it, merge it, and read it back."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from drkl.errors import DrklError
from drkl.losses.head import gather
from drkl.models.config import PeftConfig
from drkl.models.forward import is_encoder_decoder, probe_logits
from drkl.models.settings import read_generation_config
from drkl.models.sharded import is_sharded, own_class
from drkl.models.weights import is_finite, listed, not_loaded, rename_cure
from drkl.parsing import parse_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INSTALL = "pip install 'drkl[peft]'"
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_REMADE = ("pissa", "olora")
"""Starts that take a part of the base into the adapter, and that peft makes again when it loads one."""
_DRAWN = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Starts likewise that depend on chance, data or a quantisation, so that nothing makes them again."""
_WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json")
_FAILURES = (
    ValueError, TypeError, LookupError, NotImplementedError, AttributeError, ImportError, RuntimeError, Warning,
    re.error,
)  # fmt: skip
_WITHOUT_EFFECT = (
    "(?s).*(were ignored|will be ignored|no parameter was matched|no modules were excluded|fan_in_fan_out is set to "
    "True but)"
)
"""What peft warns of where a field does nothing."""


def add_adapter(model: PreTrainedModel, config: Any, seed: int, *, check: bool = True) -> Any:
    """Put LoRA layers into a model, in place, so that they alone are trained.

    Args:
        model: stays this `PreTrainedModel`, with other layers inside.
        config: the `peft` section, a `peft.PeftConfig`, or a dict of fields of `peft.LoraConfig`.
        seed: random seed for the adapter's first weights; the model's function is unchanged by them.
        check: try the adapter, for which the model needs its weights.

    Returns:
        peft's handle on the model, for `save_adapter` and `merge_adapter`.

    Raises:
        DrklError: fields that peft refuses, modules that the model does not have, an adapter on the output head, or
            one that cannot be merged.
    """
    from peft import LoraConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    try:
        with torch.random.fork_rng(), _quiet_peft():
            torch.manual_seed(seed)
            warnings.filterwarnings("error", _WITHOUT_EFFECT)
            if isinstance(config, (PeftConfig, dict)):
                fields = config if isinstance(config, dict) else config.lora
                config = LoraConfig(**{"task_type": task} | fields)
            for name in ("rank_pattern", "alpha_pattern"):
                if not getattr(config, name, None):  # then peft warns of a pattern of its own
                    warnings.filterwarnings("ignore", f"(?s).*{name} keys did not match")
            _check_kind(config)
            _check_saved(model, getattr(config, "modules_to_save", None) or [])
            adapter = get_peft_model(model, config)
    except DrklError:
        raise
    except _FAILURES as error:
        raise _refusal(error) from error
    if check:
        check_adapter(adapter)
    return adapter


def _check_kind(config: Any) -> None:
    if config.is_prompt_learning:
        raise DrklError(
            f"peft: a {type(config).__name__} puts prompts before the input; only adapters inside the layers (LoRA and "
            "its kin) can be distilled."
        )
    if getattr(config, "layer_replication", None):
        raise DrklError(
            "peft: layer_replication repeats layers of the model, and a merged model has no place for them. Leave it "
            "out."
        )
    if _start(config) == "loftq":
        raise DrklError(
            "peft: init_lora_weights='loftq' puts quantised weights in the place of the base model's, so what is saved "
            "would need a base that lies nowhere. Use another start."
        )


def _check_saved(model: nn.Module, modules: Any) -> None:
    """Raise DrklError where ``modules_to_save``, which are trained whole, are not the model's; peft passes over it."""
    if isinstance(modules, str):
        raise DrklError(f"peft: modules_to_save is {modules!r}; expected a list of names of modules.")
    names = [name for name, _ in model.named_modules()]
    if missing := [str(end) for end in modules if not any(name.endswith(str(end)) for name in names)]:
        raise DrklError(f"peft: the student has no module {listed(missing)}, which modules_to_save names.")


def check_adapter(adapter: Any) -> None:
    """Raise DrklError for an adapter that the loss would miss, or that cannot be merged.

    Args:
        adapter: peft's handle, before training.
    """
    if len(adapter.peft_config) > 1:
        names = ", ".join(repr(name) for name in adapter.peft_config)
        raise DrklError(
            f"The student has several adapters ({names}); keep the one to train: model.delete_adapter(NAME)."
        )
    _check_kind(adapter.peft_config[_name(adapter)])
    model = adapter.get_base_model()
    _check_head(model)
    if not hasattr(adapter.base_model, "merge_and_unload"):
        raise DrklError(
            f"peft: what a {type(adapter.peft_config[_name(adapter)]).__name__} describes cannot be merged into its "
            "base, so no student without peft could come of it. Use LoRA or one of its kin."
        )
    _check_shared(model)
    try:
        with _quiet_peft():
            probe_logits(model)
            _try_merging(model)
    except _FAILURES as error:
        raise _refusal(error) from error
    _check_names(adapter)


def _check_head(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = any(weight is other for weight in head.parameters() for other in embeddings.parameters())
    what = {"the output head": head}
    if tied:
        what["the token embeddings, which are the output head too"] = embeddings
    for role, module in what.items():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise DrklError(
                f"peft puts an adapter on {names[id(module)]!r}, {role}. The loss reads the head's weight itself, "
                "chunk by chunk, and would miss it. Leave it out of peft.target_modules and peft.modules_to_save."
            )


def _check_shared(model: PreTrainedModel) -> None:
    """Raise DrklError where layers share a weight that each has an adapter of its own on: merged, it would be both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    places: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module.get_base_layer(), "weight", None) if isinstance(module, BaseTunerLayer) else None
        if weight is not None:
            places.setdefault(id(weight), {})[id(module)] = name
    shared = next((list(names.values()) for names in places.values() if len(names) > 1), None)
    if shared is not None:
        raise DrklError(
            f"peft puts an adapter each on {' and '.join(map(repr, shared[:2]))}, which are one weight of the model, "
            "so merged they would change each other. Leave such layers out of peft.target_modules."
        )


def _check_names(adapter: Any) -> None:
    """Raise DrklError where peft would not find the weights again that it saves.

    transformers renames weights of some families on their way to a file and back, and peft those of their adapters.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = _name(adapter)
    state = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    with _quiet_peft():
        loaded: Any = set_peft_model_state_dict(adapter, dict(state), adapter_name=name)
    if foreign := loaded.unexpected_keys:
        modules = sorted({key.partition(".lora_")[0].removeprefix("base_model.model.") for key in foreign})
        raise DrklError(
            f"peft saves the adapter of {listed(modules)} under names by which it does not find it again. Leave these "
            "modules out of peft.target_modules."
        )


def _try_merging(model: PreTrainedModel) -> None:
    """Merge a copy of one layer of each kind, so that what peft cannot merge is known before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried = set()
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "merge"):
            continue
        inner = layer.get_base_layer()
        kind = (type(layer), type(inner), getattr(inner, "bias", None) is None)
        if kind not in tried:
            tried.add(kind)
            whole = {id(weight): nn.Parameter(gather(weight.detach()), False) for weight in layer.parameters()}
            copy.deepcopy(layer, whole if is_sharded(layer) else None).merge()


def adapter_start(adapter: Any) -> dict[str, Tensor]:
    """The first weights of an adapter whose start took a part of the base model away; empty for any other.

    Args:
        adapter: peft's handle, before training.

    Returns:
        Copies of the ``lora_A`` and ``lora_B`` weights, by the names in an adapter's file.
    """
    from peft import get_peft_model_state_dict

    if not changes_base(adapter.peft_config[_name(adapter)]):
        return {}
    state = get_peft_model_state_dict(adapter, adapter_name=_name(adapter), save_embedding_layers=False)
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items() if _is_lora(key)}


def changes_base(config: Any) -> bool:
    """Whether the start of an adapter's first weights changes the base model: its `peft.PeftConfig`, or its json."""
    return _start(config).startswith((*_REMADE, *_DRAWN))


def _start(config: Any) -> str:
    read = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    start = read("init_lora_weights")
    return start.lower() if isinstance(start, str) else ""


def _is_lora(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def whole_adapter(adapter: Any, weights: dict[str, Tensor]) -> Any:
    """Make the model that a sharded one is with its adapter once more, with whole weights, in main memory.

    Args:
        adapter: peft's handle on the sharded model.
        weights: the `whole_state` of that handle.

    Returns:
        peft's handle on the copy.
    """
    from peft import get_peft_model

    student: Any = adapter.get_base_model()
    with torch.random.fork_rng(), no_init_weights():
        base = own_class(student)(copy.deepcopy(student.config)).to(student.dtype)
        config = copy.deepcopy(adapter.peft_config[_name(adapter)])
        config.init_lora_weights = True  # another start would be computed, and is replaced anyway
        with _quiet_peft():
            whole = get_peft_model(base, config, adapter_name=_name(adapter))
    base.generation_config = copy.deepcopy(student.generation_config)
    result = whole.load_state_dict(weights, strict=False, assign=True)
    assert not not_loaded(whole, set(result.missing_keys)) and not result.unexpected_keys
    base.tie_weights()
    return whole.eval()


def save_adapter(
    adapter: Any, folder: Path, start: Mapping[str, Tensor] | None = None, weights: dict[str, Tensor] | None = None
) -> None:
    """Save the adapter alone, without a config.json, for which transformers would expect a whole model's weights.

    Args:
        adapter: peft's handle.
        folder: is made.
        start: `adapter_start` from before training; where it is not empty, the adapter is written as plain LoRA of
            twice the rank, which gives the trained model on the base as it was.
        weights: the `whole_state` of the handle where the model is sharded; None takes its own.
    """
    name = _name(adapter)
    # With "auto" peft would look for the base model's embeddings on the hub.
    adapter.save_pretrained(
        folder, selected_adapters=[name], safe_serialization=True, save_embedding_layers=False, state_dict=weights
    )
    if name != "default":  # peft gives any other name a folder of its own
        for path in (folder / name).iterdir():
            shutil.move(path, folder / path.name)
        (folder / name).rmdir()
    if start:
        _as_plain_lora(folder, start)
    _name_magnitudes(folder)


def _name_magnitudes(folder: Path) -> None:
    """Name DoRA's magnitudes such that transformers finds them, which peft does under either name."""
    weights = load_file(folder / WEIGHTS)
    if any(key.endswith(_MAGNITUDE) for key in weights):
        named = {key + ".weight" if key.endswith(_MAGNITUDE) else key: tensor for key, tensor in weights.items()}
        save_file(named, folder / WEIGHTS, {"format": "pt"})


_MAGNITUDE = ".lora_magnitude_vector"


def _as_plain_lora(folder: Path, start: Mapping[str, Tensor]) -> None:
    """Rewrite an adapter for a changed base, W - s B0 A0 + s B A, as one for W: s [B, -B0] [A; A0]."""
    weights = load_file(folder / WEIGHTS)
    for key, trained in weights.items():
        in_a = ".lora_A." in key or key.endswith(".lora_embedding_A")
        if key in start:
            first = start[key] if in_a else -start[key]
        elif "lora_embedding_" in key:  # no start changes an embedding
            first = torch.zeros_like(trained)
        else:
            continue
        weights[key] = torch.cat((trained, first), dim=0 if in_a else 1)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    values = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
    # The scale is alpha / r, or alpha / sqrt(r) for rsLoRA, and stays as it is.
    factor = 2**0.5 if values.get("use_rslora") else 2
    values |= {
        "init_lora_weights": True,
        "r": 2 * values["r"],
        "lora_alpha": factor * values["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (values.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (values.get("alpha_pattern") or {}).items()},
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def merge_adapter(adapter: Any) -> PreTrainedModel:
    """Return the model with the adapter added to its weights, and without peft's layers.

    Raises:
        DrklError: peft cannot merge it, or what it merges computes something else.
    """
    model: PreTrainedModel = adapter.get_base_model()
    # In half precision the merged weights are rounded, and how far that carries depends on the model.
    exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    try:
        before = probe_logits(model) if exact else None
        merged: PreTrainedModel = adapter.merge_and_unload()
    except _FAILURES as error:
        raise _refusal(error) from error
    if before is not None:
        after = probe_logits(merged)
        if float((after - before).abs().max()) > 1e-2 * max(1.0, float(before.abs().max())):
            raise DrklError(
                f"peft merges this adapter ({type(adapter.peft_config[_name(adapter)]).__name__}) into a model that "
                "computes other logits than with the adapter beside it. Use plain LoRA."
            )
    return merged


def _name(adapter: Any) -> str:
    return str(next(iter(adapter.peft_config)))


def _refusal(error: Exception) -> DrklError:
    return DrklError(f"peft: {' '.join(str(error).split())[:400]}")


def adapter_base(name: str) -> str | None:
    """Return the base model of the adapter in a folder; None where there is no adapter.

    Raises:
        DrklError: a file that is no adapter's config, prompts in the place of an adapter, no base, or a whole model
            beside it.
    """
    if (values := _read_config(name)) is None:
        return None
    kind = str(values.get("peft_type")).upper()
    if kind in _PROMPTS:
        raise DrklError(
            f"{name!r} holds prompts that peft puts before a model's input ({kind}); they cannot be merged into a "
            "model. Only adapters inside the layers (LoRA and its kin) can be loaded."
        )
    if (task := values.get("task_type")) in _CLASSIFIES:
        raise DrklError(
            f"{name!r} is an adapter of a classifier ({task}); only those of language models can be loaded. Merge it "
            "with peft, save the model and name its folder."
        )
    base = values.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise DrklError(
            f"The adapter in {name!r} does not say which model it belongs to: set base_model_name_or_path in its "
            f"{CONFIG} to that model's folder or Hugging Face id."
        )
    if values.get("peft_type") is None:
        raise DrklError(
            f"The {CONFIG} in {name!r} has no peft_type, so what kind of adapter it describes is unknown. Save the "
            "adapter again with peft."
        )
    if any((Path(name) / file).is_file() for file in _WHOLE_MODEL):
        raise DrklError(
            f"{name!r} holds a whole model and an adapter ({CONFIG}), so which of the two is meant is unknown. Move "
            "one of them to a folder of its own."
        )
    if Path(base).is_dir() and Path(base).resolve() == Path(name).resolve():
        raise DrklError(f"The adapter in {name!r} names its own folder as its base model; set another in {CONFIG}.")
    return str(base)


def adapter_revision(name: str) -> str | None:
    """The revision of the base model that an adapter was made for, where its folder says so."""
    return (_read_config(name) or {}).get("revision")


def has_remade_start(name: str) -> bool:
    """Whether peft changes the base model again as an adapter's folder is loaded."""
    return _start(_read_config(name) or {}) in _REMADE


def _read_config(name: str) -> dict[str, Any] | None:
    path = Path(name) / CONFIG
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DrklError(f"Cannot read the adapter's config {str(path)!r}: {error}.") from error
    if not isinstance(values, dict):
        raise DrklError(f"The adapter's config {str(path)!r} is a {type(values).__name__}; expected a json object.")
    return values


def read_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Return the model with the adapter of a folder merged into it.

    Raises:
        DrklError: weights that are missing, pickled, broken or not those of this model, or an adapter that cannot be
            merged.
    """
    try:
        from peft import PeftConfig as Config
        from peft import PeftModel
    except ImportError as error:
        raise DrklError(f"{folder!r} holds a LoRA adapter, which takes the package peft: {INSTALL}.") from error
    weights = _read_weights(folder)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with _quiet_peft():
            config = Config.from_pretrained(folder)
            _check_readable(config, folder)
            _check_vocabulary(weights, model, folder)
            adapter = PeftModel.from_pretrained(model, folder, config=config)
            report = adapter.load_adapter(folder, _name(adapter))  # the first load only warns of what is missing
    except DrklError:
        raise
    except _FAILURES as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DrklError(f"The adapter in {folder!r} does not fit its base model. ({reason})") from error
    # A file's names are those in memory without the adapter's own.
    missing = [key.replace(f".{_name(adapter)}", "") for key in not_loaded(adapter, set(report.missing_keys))]
    unexpected = report.unexpected_keys
    if missing or unexpected or not weights:
        parts = [f"{len(missing)} of its weights are not in the file ({listed(missing)})"] if missing else []
        if unexpected:
            parts.append(f"{len(unexpected)} in the file have no place in the model ({listed(unexpected)})")
        cure = rename_cure(missing, unexpected, folder) or "Is base_model_name_or_path the model it was trained on?"
        raise DrklError(
            f"The adapter in {folder!r} does not fit its base model: {'; '.join(parts) or 'its file is empty'}. {cure}"
        )
    merged = merge_adapter(adapter)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name in trainable)  # peft had frozen the base
    merged.name_or_path = merged.config.name_or_path = folder  # which an adapter of this model has to name as its base
    if (Path(folder) / "generation_config.json").is_file():  # where it was taught to stop, which its base was not
        merged.generation_config = read_generation_config(folder)
    return merged


def _read_weights(folder: str) -> dict[str, Tensor]:
    path = Path(folder) / WEIGHTS
    if path.is_file():
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DrklError(f"Cannot read the adapter's weights {str(path)!r}: {error}.") from error
        if bad := [key for key, weight in weights.items() if not weight.is_floating_point() or not is_finite(weight)]:
            raise DrklError(
                f"The adapter in {folder!r} has weights that are no finite floating-point numbers: {len(bad)} tensors "
                f"({listed(bad)}). Take one from before it broke, or save it again with peft."
            )
        return weights
    pickled = sorted(file.name for file in Path(folder).glob("adapter_model*.bin"))
    if pickled:
        raise DrklError(
            f"The adapter in {folder!r} has pickled weights ({pickled[0]}), and drkl reads safetensors only. Where you "
            "trust the file, load it with peft and save it again: save_pretrained writes safetensors."
        )
    raise DrklError(f"The adapter in {folder!r} has no weights: expected {WEIGHTS} beside its {CONFIG}.")


def _check_readable(config: Any, folder: str) -> None:
    _check_kind(config)
    if _start(config) not in _REMADE and changes_base(config):
        raise DrklError(
            f"The adapter in {folder!r} started with init_lora_weights={config.init_lora_weights!r}, which changed its "
            "base model in a way that its folder does not keep. Merge it where it was trained, or save it there with "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA."
        )


def _check_vocabulary(weights: Mapping[str, Tensor], model: nn.Module, folder: str) -> None:
    """Raise DrklError for whole weights in an adapter's file, such as embeddings, of another shape than the base's."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for key, tensor in weights.items():
        own = shapes.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if own is not None and own != tensor.shape:
            raise DrklError(
                f"The adapter in {folder!r} was trained with another vocabulary than its base model has: {key} is "
                f"{list(tensor.shape)} in its file and {list(own)} in the base. Merge it with peft into a base whose "
                "embeddings are resized to the same number of tokens (resize_token_embeddings), save that model and "
                "name its folder."
            )


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hide warnings of peft that users cannot act on, or that are errors of drkl's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        # Tied layers with an adapter are refused by name, and so are layers that cannot be merged.
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter", UserWarning)
        warnings.filterwarnings("ignore", ".*merging LoRA weights won't be possible", UserWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        # `save_adapter` makes the conversion itself that this says peft cannot make.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern", UserWarning)
        warnings.filterwarnings("ignore", ".*eva initialization used with low_cpu_mem_usage", UserWarning)
        yield
