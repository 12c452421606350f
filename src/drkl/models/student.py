"""Make the student: some of a model's layers, a model as it is, or a fresh one."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from drkl.errors import DrklError, did_you_mean
from drkl.models.config import StudentConfig
from drkl.models.load import load_config, load_model
from drkl.models.precision import DTYPES


def make_student(config: StudentConfig, teacher_name: str | None, seed: int, tokenizer: Any = None) -> PreTrainedModel:
    """Make the student of a config; the same config and seed give the same weights.

    Args:
        config: the ``student`` section.
        teacher_name: the model to prune, or to scale, where ``config.model`` is left out.
        seed: of a random init.
        tokenizer: the run's; a student that is made from nothing but its config has that vocabulary.

    Raises:
        DrklError: no model to start from, or layers that it does not have.
    """
    if config.init == "pretrained":
        return load_model(source_model(config, teacher_name), config.dtype)
    if config.init == "random":
        model_config = student_config(config, teacher_name, tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[config.dtype])
        return made.eval()
    larger = load_model(source_model(config, teacher_name), config.dtype)
    return prune(larger, kept_layers(config, larger.config.get_text_config().num_hidden_layers))


def source_model(config: StudentConfig, teacher_name: str | None) -> str:
    """The model a student starts from."""
    if config.model is None and config.init == "pretrained":
        raise DrklError("student.init is 'pretrained', but student.model names no model.")
    source = config.model or teacher_name
    if source is None:
        raise DrklError(f"student.init is {config.init!r} and there is no teacher; name a model in student.model.")
    return source


def student_config(config: StudentConfig, teacher_name: str | None, tokenizer: Any = None) -> Any:
    """The model config of the student, without loading any weights."""
    if config.model_type is not None:
        return _own_config(config, config.model_type, teacher_name, tokenizer)
    base = load_config(source_model(config, teacher_name))
    if config.init == "pretrained":
        return base
    layers = kept_layers(config, base.get_text_config().num_hidden_layers)
    if config.init == "prune":
        return shortened(base, layers)
    for key, value in config.config.items():
        if key in ("num_hidden_layers", base.attribute_map.get("num_hidden_layers")):
            raise DrklError(f"student.config has {key!r}; the number of layers stands in student.layers.")
        if not hasattr(base, key):
            raise DrklError(f"student.config has {key!r}, which {type(base).__name__} does not.")
        setattr(base, key, value)
    return shortened(base, layers)


def _own_config(config: StudentConfig, model_type: str, teacher_name: str | None, tokenizer: Any) -> Any:
    """A config from its fields alone; the vocabulary is the teacher's, or else the tokenizer's."""
    assert tokenizer is not None, "a student of its own has the run's tokenizer"
    if model_type not in CONFIG_MAPPING:
        raise DrklError(
            f"student.config has model_type {model_type!r}, which transformers does not know; for instance gpt2, "
            f"llama, t5.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    base = AutoConfig.for_model(model_type)
    fields = {key: value for key, value in config.config.items() if key != "model_type"}
    for key in fields:
        if key == "vocab_size":
            raise DrklError("student.config has vocab_size, which is the tokenizer's: set tokenizer.vocab_size.")
        if not hasattr(base, key):
            raise DrklError(
                f"student.config has {key!r}, which {type(base).__name__} does not.{did_you_mean(key, vars(base))}"
            )
    size = len(tokenizer) if teacher_name is None else load_config(teacher_name).get_text_config().vocab_size
    fields |= {"vocab_size": size, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields["pad_token_id"] = tokenizer.pad_token_id
    if base.is_encoder_decoder:
        fields.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
    try:
        made = AutoConfig.for_model(model_type, **fields)
        with torch.device("meta"):
            AutoModel.from_config(made)  # sizes that do not go together are refused by the model alone
        return made
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, AttributeError) as error:
        raise DrklError(f"student.config makes no {model_type}: {' '.join(str(error).split())[:300]}") from error


def kept_layers(config: StudentConfig, available: int) -> list[int]:
    """Which layers stay: those listed, or so many, the first and the last among them and the others evenly between."""
    if isinstance(config.layers, list):
        if config.layers[-1] >= available:
            raise DrklError(f"student.layers has layer {config.layers[-1]}; the model has layers 0 to {available - 1}.")
        return config.layers
    count = max(1, available // 2) if config.layers is None else config.layers
    if count > available:
        if config.init == "random":
            return list(range(count))
        raise DrklError(f"student.layers is {count}; the model has {available} layers.")
    if count == 1:
        return [0]
    return [round(i * (available - 1) / (count - 1)) for i in range(count)]


def shortened(config: Any, layers: list[int]) -> Any:
    """A copy of a model config with these layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    available = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        # Per-layer settings (layer_types and its kin) are lists as long as the model is deep.
        # A deeper student goes through them again.
        if isinstance(value, list) and len(value) == available and not key.endswith(("_token_id", "architectures")):
            setattr(text, key, [value[i % available] for i in layers])
    text.num_hidden_layers = len(layers)
    return config


def prune(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A new model with these of the model's layers; embeddings, norm and head as they are, tied where they were."""
    prefix = layers_prefix(model)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    place = {old: new for new, old in enumerate(layers)}
    state = {}
    for key, tensor in model.state_dict().items():
        match = pattern.match(key)
        if match is None:
            state[key] = tensor
        elif int(match[1]) in place:
            state[f"{prefix}.{place[int(match[1])]}.{key[match.end() :]}"] = tensor
    small: PreTrainedModel = AutoModelForCausalLM.from_config(shortened(model.config, layers), dtype=model.dtype)
    small.load_state_dict(state)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def layers_prefix(model: PreTrainedModel) -> str:
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise DrklError(f"Found no list of {depth} layers in {type(model).__name__}, so it cannot be pruned.")
