"""The `student` section of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["auto", "fp32", "bf16", "fp16"]


class StudentConfig(BaseModel):
    """Where the student comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: Literal["prune", "pretrained", "random"] = Field(
        "prune", description="prune (layers of a larger model), pretrained (a model as it is) or random (a config)"
    )
    model: str | None = Field(
        None, description="Hugging Face id or folder; for prune and random the teacher's where left out"
    )
    layers: int | list[int] | None = Field(
        None, description="prune, random: how many layers (prune: first, last, evenly between), or which; default half"
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="random: fields of the model's config to replace, e.g. hidden_size; with model_type (and no model) "
        "a config of its own, e.g. {model_type: gpt2, n_embd: 128}",
    )
    freeze_embeddings: bool = Field(
        False, description="keep the token embeddings (and a head tied to them) as they are; for prune, the teacher's"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the student's own weights, which the optimiser moves"
    )

    @model_validator(mode="after")
    def _check_used(self) -> StudentConfig:
        if self.layers is not None and self.init == "pretrained":
            raise ValueError("layers is set, but init is 'pretrained', which keeps all of them; prune drops some")
        if self.config and self.init != "random":
            raise ValueError(f"config is set, but init is {self.init!r}; only random makes a model from a config")
        if self.config.get("model_type") is not None and (self.model is not None or self.layers is not None):
            other = "model" if self.model is not None else "layers"
            raise ValueError(f"config has a model_type, which makes a model of its own; {other} has no place beside it")
        return self

    @property
    def model_type(self) -> str | None:
        """The architecture of a student that is made from nothing but its config."""
        kind = self.config.get("model_type")
        return None if kind is None else str(kind)

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: int | list[int] | None) -> int | list[int] | None:
        if isinstance(layers, int) and layers < 1:
            raise ValueError("expected at least 1 layer")
        if isinstance(layers, list) and (not layers or layers != sorted(set(layers)) or layers[0] < 0):
            raise ValueError("expected layer numbers from 0, ascending, each once")
        return layers
