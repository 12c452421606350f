"""The `student` section of a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from drkl.errors import did_you_mean

DTYPE_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float64": "fp64",
    "double": "fp64",
}
"""torch's names of the dtypes, and the short ones that configs and records use."""


def short_dtype(dtype: Any) -> Any:
    """Return ``fp32`` for ``float32``, ``torch.float32`` and the like; anything unknown comes back as it is."""
    name = str(dtype).removeprefix("torch.")
    known = name in DTYPE_NAMES or name in DTYPE_NAMES.values() or name == "auto"
    return DTYPE_NAMES.get(name, name) if known else dtype


def _without_dtype(options: dict[str, Any]) -> dict[str, Any]:
    if name := next((name for name in ("dtype", "torch_dtype") if name in options), None):
        raise ValueError(f"{name} has a key of its own in this section, dtype")
    return options


InitKwargs = Annotated[dict[str, Any], AfterValidator(_without_dtype)]
"""Further arguments of ``from_pretrained``."""
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(short_dtype)]


class StudentConfig(BaseModel):
    """The source of the student."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: Literal["prune", "pretrained", "random"] = Field(
        "prune",
        description="Initial weights: prune (some layers of a larger model), pretrained (a model unchanged) or random.",
    )
    model: str | None = Field(None, description="Hugging Face id or folder. Default for prune and random: the teacher.")
    layers: int | list[int] | None = Field(
        None,
        description="For prune and random: number of layers, or their numbers from 0 (default: half). prune keeps the "
        "first, the last and others evenly spaced.",
    )
    encoder_layers: int | list[int] | None = Field(
        None,
        description="Encoder layers of an encoder-decoder, in the form of layers, which then selects decoder layers. "
        "Default: the same as layers.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="For random: fields of the model config to replace, such as hidden_size; or, with model_type and "
        "without model, a config of its own, such as {model_type: gpt2, n_embd: 128}.",
    )
    freeze_embeddings: bool = Field(
        False,
        description="Do not train the token embeddings, nor a head tied to them (with prune they are the teacher's).",
    )
    dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(short_dtype)] = Field(
        "fp32", description="Dtype of the student's weights, which the optimiser updates."
    )
    disable_dropout: bool = Field(False, description="Set the student's dropout to 0.")
    model_init_kwargs: InitKwargs = Field(
        default_factory=dict, description="Further arguments of from_pretrained for the model, such as revision."
    )

    @model_validator(mode="after")
    def _check_used(self) -> StudentConfig:
        for name in ("layers", "encoder_layers"):
            if getattr(self, name) is not None and self.init == "pretrained":
                raise ValueError(f"{name} is set, but init is 'pretrained', which keeps all of them; prune drops some")
        if self.config and self.init != "random":
            raise ValueError(f"config is set, but init is {self.init!r}; only random makes a model from a config")
        for name in ("model", "layers", "encoder_layers"):
            if self.model_type is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"config has a model_type, which makes a model of its own; {name} has no place beside it"
                )
        return self

    @property
    def model_type(self) -> str | None:
        """The architecture of a student that is made from its config alone."""
        kind = self.config.get("model_type")
        return None if kind is None else str(kind)

    @field_validator("layers", "encoder_layers")
    @classmethod
    def _check_layers(cls, layers: int | list[int] | None) -> int | list[int] | None:
        if isinstance(layers, int) and layers < 1:
            raise ValueError("expected at least 1 layer")
        if isinstance(layers, list) and (not layers or layers != sorted(set(layers)) or layers[0] < 0):
            raise ValueError("expected layer numbers from 0, ascending, each once")
        return layers


_NOT_READ = (
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_config", "megatron_core",
)  # fmt: skip
"""Fields of LoraConfig that peft writes itself, or that are of use elsewhere."""


def _check_lora(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for values that peft would take and not read, or that no adapter can have."""
    for name in _NOT_READ:
        if name in fields:
            raise ValueError(f"{name} has no use in a run: the adapter is a LoRA of the student. Leave it out")
    domains: dict[str, tuple[str, Callable[[float], bool]]] = {
        "r": ("a whole number of at least 1", lambda r: isinstance(r, int) and r >= 1),
        "lora_alpha": ("a positive number", lambda alpha: 0 < alpha < math.inf),
        "lora_dropout": ("a number of at least 0 and below 1", lambda share: 0 <= share < 1),
    }
    for name, (expected, holds) in domains.items():
        value: Any = fields.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in fields and not (is_number and holds(value)):
            raise ValueError(f"{name} is {value!r}; expected {expected}")


class PeftConfig(BaseModel):
    """The `peft` section: fields of peft's own LoraConfig, and what is saved at the end."""

    model_config = ConfigDict(extra="allow", frozen=True)

    export: Literal["adapter", "merged"] = Field(
        "merged",
        description="Saved student: merged (an ordinary model) or adapter (a peft folder, which needs its base model).",
    )

    @model_validator(mode="after")
    def _check_fields(self) -> PeftConfig:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(f"this section takes the package peft ({error}); pip install 'drkl[peft]'") from error
        known = [field.name for field in dataclasses.fields(LoraConfig)]
        for name in self.lora:
            if name not in known:
                raise ValueError(f"peft.LoraConfig has no field {name!r}.{did_you_mean(name, known)}")
        _check_lora(self.lora)
        return self

    @property
    def lora(self) -> dict[str, Any]:
        """The fields of peft's LoraConfig."""
        return dict(self.model_extra or {})
