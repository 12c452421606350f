"""The `teacher` section of a config."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from drkl.client import is_address
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
    shard: bool = Field(
        False,
        description="Spread the teacher's weights over the processes of a training (FSDP2), where it does not fit on "
        "one device. Without effect in one process.",
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
    server: str | None = Field(
        None,
        description="Address of the vLLM server that serves the teacher as model, http://host:port/v1: its top_k most "
        "probable tokens are asked for in place of running the model. Its key: DRKL_TEACHER_KEY in the environment.",
    )
    top_k: int = Field(64, ge=1, description="Tokens of a served teacher's distribution that are known.")
    tokenizer: str | None = Field(
        None,
        description="Folder or id whose config and tokenizer stand for a served teacher's. Default: the first of "
        "model, the folder that the server names, and the student's own.",
    )
    server_timeout: float = Field(
        600.0, gt=0, le=1e6, allow_inf_nan=False, description="Longest wait for the teacher's server, in seconds."
    )
    server_requests: int = Field(
        32, ge=1, description="Requests that wait for the teacher's server at a time, in each process."
    )
    dtype: Dtype = Field(
        "auto", description="Dtype of the teacher's weights. auto: bf16 if the hardware supports it, else fp32."
    )
    model_init_kwargs: InitKwargs = Field(
        default_factory=dict, description="Further arguments of from_pretrained for the model, such as revision."
    )

    @field_validator("server", "tokenizer", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.server is not None and (fault := address_fault(self.server)) is not None:
            raise ValueError(fault)
        names = ("top_k", "tokenizer", "server_timeout", "server_requests")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if self.server is None and given:
            raise ValueError(f"{given[0]} is about a served teacher, and server names no address; leave it out")
        if self.is_served and (self.dtype != "auto" or self.model_init_kwargs):
            name = "dtype" if self.dtype != "auto" else "model_init_kwargs"
            raise ValueError(
                f"{name} says how weights are loaded, and those of a served teacher are the server's; leave it out"
            )
        if self.shard and (self.cache is not None or self.server is not None):
            where = "a cache" if self.cache is not None else "a server"
            raise ValueError(
                f"shard spreads a teacher's weights over processes, and this one is in {where}; leave it out"
            )
        if self.fill_cache and self.cache is None:
            raise ValueError("fill_cache is true, and no cache is named that could be filled. Name its folder as cache")
        return self

    @property
    def is_served(self) -> bool:
        """Whether a server is asked; what a cache has is read from there."""
        return self.server is not None and self.cache is None

    @property
    def source(self) -> str:
        """Where its config and its tokenizer are: the cache has them too."""
        if self.cache is not None:
            return os.path.expanduser(self.cache)
        return self.model if self.tokenizer is None else os.path.expanduser(self.tokenizer)

    @property
    def source_options(self) -> dict[str, Any]:
        """Further arguments of from_pretrained for them."""
        return self.model_init_kwargs if self.cache is None else {}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def address_fault(server: Any) -> str | None:
    """What is wrong with the address of a teacher's server; None where nothing is."""
    if isinstance(server, str) and "@" in server.partition("//")[2].partition("/")[0]:
        return (
            "server has a name or a password in it, which would stand in the run's files; give the address alone, and "
            "the server's key in the environment variable DRKL_TEACHER_KEY"
        )
    if not isinstance(server, str) or not is_address(server):
        return f"server is {server!r}; expected an address such as http://127.0.0.1:8000/v1"
    return None
