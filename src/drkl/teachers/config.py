"""The `teacher` section of a config."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from drkl.models.config import Dtype, InitKwargs


class TeacherConfig(BaseModel):
    """The model whose distributions the student learns to match."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "smollm2-135m-instruct",
        description="Hugging Face id, folder, or the name of the embedded teacher. `teacher: null` is no teacher.",
    )
    remember_mb: int = Field(
        0,
        ge=0,
        description="Memory in MiB for the teacher's hidden states of batches already seen. An epoch or a stage that "
        "trains on the same batches again does not run the teacher again.",
    )
    cache: str | None = Field(
        None,
        description="Folder of `drkl cache`: the teacher's states are read from it in place of running the model.",
    )
    fill_cache: bool = Field(
        False,
        description="Load the model where the cache lacks rows of the run, and add these to it. Otherwise they are "
        "refused.",
    )
    dtype: Dtype = Field(
        "auto", description="Dtype of the teacher's weights. auto: bf16 if the hardware supports it, else fp32."
    )
    model_init_kwargs: InitKwargs = Field(
        default_factory=dict, description="Further arguments of from_pretrained for the model, such as revision."
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.fill_cache and self.cache is None:
            raise ValueError("fill_cache is true, and no cache is named that could be filled. Name its folder as cache")
        return self

    @property
    def source(self) -> str:
        """Where its config and its tokenizer are: the cache has them too."""
        return self.model if self.cache is None else os.path.expanduser(self.cache)

    @property
    def source_options(self) -> dict[str, Any]:
        """Further arguments of from_pretrained for them."""
        return self.model_init_kwargs if self.cache is None else {}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())
