"""LoRA students: add an adapter with peft, save it, merge it, and read it back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from drkl.errors import DrklError
from drkl.models.config import PeftConfig
from drkl.models.forward import is_encoder_decoder

CONFIG = "adapter_config.json"
INSTALL = "pip install 'drkl[peft]'"


def add_adapter(model: PreTrainedModel, config: Any, seed: int) -> Any:
    """Put LoRA layers into a model, in place, so that they alone are trained.

    Args:
        model: stays this `PreTrainedModel`, with other layers inside.
        config: the `peft` section, a `peft.PeftConfig`, or a dict of fields of `peft.LoraConfig`.
        seed: random seed for the adapter's first weights; the model's function is unchanged by them.

    Returns:
        peft's handle on the model, for `save_adapter` and `merge_adapter`.

    Raises:
        DrklError: fields that peft refuses, modules that the model does not have, or an adapter on the output head.
    """
    from peft import LoraConfig, get_peft_model

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = head.weight is embeddings.weight
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    try:
        if isinstance(config, (PeftConfig, dict)):
            fields = config if isinstance(config, dict) else config.lora
            config = LoraConfig(**{"task_type": task} | fields)
        if config.is_prompt_learning:
            raise DrklError(
                f"peft: a {type(config).__name__} puts prompts before the input; only adapters inside the layers (LoRA "
                "and its kin) can be distilled."
            )
        with torch.random.fork_rng(), _quiet_peft():
            torch.manual_seed(seed)
            adapter = get_peft_model(model, config)
    except DrklError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DrklError(f"peft: {' '.join(str(error).split())[:400]}") from error
    what = {id(head): "the output head"}
    if tied:
        what[id(embeddings)] = "the token embeddings, which are the output head too"
    for key, role in what.items():
        if id(model.get_submodule(names[key])) != key:
            raise DrklError(
                f"peft puts an adapter on {names[key]!r}, {role}. The loss reads the head's weight itself, chunk by "
                "chunk, and would miss it. Leave it out of peft.target_modules and peft.modules_to_save."
            )
    return adapter


def save_adapter(adapter: Any, folder: Path) -> None:
    """Save the adapter alone, without a config.json, for which transformers would expect a whole model's weights."""
    # Embeddings are never trained here; with "auto" peft would look for the base model's on the hub.
    adapter.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def merge_adapter(adapter: Any) -> PreTrainedModel:
    """Return the model with the adapter added to its weights, and without peft's layers."""
    merged: PreTrainedModel = adapter.merge_and_unload()
    return merged


def adapter_base(name: str) -> str | None:
    """Return the base model of the adapter in a folder; None where there is no adapter."""
    path = Path(name) / CONFIG
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise DrklError(f"The adapter in {name!r} does not say which model it belongs to (base_model_name_or_path).")
    return str(base)


def read_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Return the model with the adapter of a folder merged into it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DrklError(f"{folder!r} holds a LoRA adapter, which takes the package peft: {INSTALL}.") from error
    with _quiet_peft():
        merged = merge_adapter(PeftModel.from_pretrained(model, folder))
    if (Path(folder) / "generation_config.json").is_file():  # where it was taught to stop, which its base was not
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    return merged


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hide peft's warning about a property that newer transformers deprecate; users cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        # Tied layers with an adapter: refused below, by name.
        warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter", UserWarning)
        yield
