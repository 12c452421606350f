"""The `rollouts` section of a config: which rows are answered by a model while training goes on, and how."""

from __future__ import annotations

import math
import os
import re
from numbers import Integral
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from drkl.client import has_name_or_password, is_address
from drkl.data.lengths import Room

PREFIX = "rollout_"
"""``rollouts.X`` of a config is ``rollout_X`` of a `DistillationConfig`, and in a message below either of them."""


class ShareRamp(BaseModel):
    """A share that goes from one value to another in a straight line, and stays there."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    start: float = Field(0.0, ge=0, le=1, alias="from", description="Share in the first step.")
    end: float = Field(alias="to", ge=0, le=1, description="Share after the last step of the ramp.")
    steps: int = Field(ge=1, description="Optimiser steps of the ramp.")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_flags(cls, value: Any) -> Any:
        return _not_a_flag(value)


class RolloutsConfig(BaseModel):
    """Sampled answers in place of the data's responses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float | ShareRamp = Field(
        0.0,
        description="Share of the rows of each step that are answered by a model, in [0, 1]; 0 is off, 1 needs prompts "
        "only. A ramp: {from: 0, to: 1, steps: 200}. A hash of the seed, the row's id and the pass selects the rows.",
    )
    source: Literal["student", "mixed", "teacher"] = Field(
        "student",
        description="Writer of the answers: student (GKD), mixed (each token from teacher_share of the teacher's "
        "distribution and the rest of the student's: MiniLLM) or teacher (sequence-level distillation).",
    )
    teacher_share: float = Field(0.2, gt=0, lt=1, description="Weight of the teacher's distribution in source: mixed.")
    sampling_temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Temperature of the sampling; loss.temperature is another."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens that together have this probability."
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer, in tokens, its end included. Default: data.max_tokens less data.max_prompt_tokens "
        "(for an encoder-decoder, what the decoder has room for).",
    )
    refresh_every: int = Field(
        1,
        ge=1,
        description="Optimiser steps that one set of answers serves: those of so many steps are written at once, by "
        "the weights before the first of them.",
    )
    replay: float = Field(
        0.0, ge=0, lt=1, description="Share of the answered rows that take an earlier answer from memory (DistiLLM)."
    )
    replay_memory: int = Field(1000, ge=1, description="Number of earlier answers that are kept, the newest.")
    generator: Literal["builtin", "vllm"] = Field("builtin", description="Program that samples: builtin, or vllm.")
    server: str | None = Field(None, description="Address of the vLLM server: http://host:port.")
    server_folder: str | None = Field(
        None,
        description="Folder, seen by this program and by the server, through which the student's weights go. Default: "
        "NAME-rollout-server beside the run folder NAME.",
    )
    server_timeout: float = Field(
        600.0, gt=0, le=1e6, allow_inf_nan=False, description="Longest wait for the server, in seconds."
    )
    stop_map: dict[str, str] = Field(
        default_factory=dict,
        description="Stop tokens that mean one event, {student's token: teacher's token}, by text or id: both models "
        "are compared on the summed probability of these tokens.",
    )
    batch_size: int = Field(64, ge=1, description="Answers that are written at once.")
    eval_prompts: int = Field(
        16, ge=0, description="Held-out prompts that the student answers in each evaluation during training."
    )
    keep_texts: int = Field(4, ge=0, description="Answers to held-out prompts that each evaluation keeps as text.")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_flags(cls, value: Any) -> Any:
        return _not_a_flag(value)

    @field_validator("share", mode="before")
    @classmethod
    def _as_share(cls, value: Any) -> Any:
        return value if isinstance(value, ShareRamp) else _read_share(_not_a_flag(value))

    @field_validator("server")
    @classmethod
    def _check_server(cls, value: str | None) -> str | None:
        if value is not None and not is_address(value):
            raise _expected("expected an address such as http://127.0.0.1:8000")
        return value

    @field_validator("server_folder", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("stop_map", mode="before")
    @classmethod
    def _ids_as_text(cls, pairs: Any) -> Any:
        tokens = [token for pair in pairs.items() for token in pair] if isinstance(pairs, dict) else [None]
        if any(isinstance(token, bool) or not isinstance(token, (str, Integral)) for token in tokens):
            raise _expected("expected {student's token: teacher's token}, each by its text or id")
        return {str(key): str(value) for key, value in pairs.items()}

    @model_validator(mode="after")
    def _check(self) -> RolloutsConfig:
        if self.generator == "vllm" and self.source != "student":
            reasons = {
                "mixed": "it needs the distributions of both models token by token, which a server does not give",
                "teacher": "the server holds the student",
            }
            raise ValueError(
                f"{PREFIX}source is {self.source!r} and {PREFIX}generator 'vllm': {reasons[self.source]}; set "
                f"{PREFIX}generator='builtin'"
            )
        if self.server is not None and has_name_or_password(self.server):
            raise ValueError(
                f"{PREFIX}server has a name or a password in it, which would stand in the run's files; give the "
                "address alone, and the server's key in the environment variable VLLM_API_KEY"
            )
        if self.is_on and self.generator == "vllm" and self.server is None:
            raise ValueError(
                f"{PREFIX}generator is 'vllm', but {PREFIX}server names no address; start one with `drkl "
                "rollout-server CONFIG` and give its address, for instance http://127.0.0.1:8000"
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether any row is ever answered by a model."""
        return max(self._ends) > 0

    @property
    def needs_responses(self) -> bool:
        """Whether some rows are trained with the data's own response."""
        return min(self._ends) < 1

    @property
    def _ends(self) -> tuple[float, float]:
        return (self.share.start, self.share.end) if isinstance(self.share, ShareRamp) else (self.share, self.share)

    def reserved(self, room: Room) -> int | None:
        """Tokens of the models' context that are kept for an answer where the user gives no length of prompts.

        Half of it where no length of answers is given either; None where nothing is sampled, or nothing limits it.
        """
        if not self.is_on or room.decoder is None:
            return None
        return self.max_new_tokens or room.decoder // 2

    def share_at(self, step: int) -> float:
        """The share in an optimiser step, counted from 0."""
        if not isinstance(self.share, ShareRamp):
            return self.share
        ramp = self.share
        return ramp.start + (ramp.end - ramp.start) * min(1.0, step / ramp.steps)

    def as_arguments(self) -> dict[str, Any]:
        """The fields of a `DistillationConfig` that say the same; settings without an effect are left out."""
        without = self._without_effect()
        return {PREFIX + name: value for name, value in self.model_dump(mode="json").items() if name not in without}

    def notes(self, prefix: str) -> list[str]:
        """What is set and has no effect, a sentence each.

        Args:
            prefix: what stands before the name of a field.
        """
        if self.is_on:
            return [f"{prefix}{name} has no effect: {prefix}{why}." for name, why in self._without_effect().items()]
        names = [f"{prefix}{name}" for name in self._given() if name != "share"]
        verb = "has" if len(names) == 1 else "have"
        return [f"{prefix}share is 0, so that no answer is sampled: {', '.join(names)} {verb} no effect."] * bool(names)

    def _given(self) -> list[str]:
        fields = type(self).model_fields.items()
        return [name for name, info in fields if getattr(self, name) != info.get_default(call_default_factory=True)]

    def _without_effect(self) -> dict[str, str]:
        """Settings that differ from their defaults and are not read, with the reason."""
        is_served = self.generator == "vllm", f"generator is {self.generator!r}"
        read = {
            "teacher_share": (self.source == "mixed", f"source is {self.source!r}, not 'mixed'"),
            "replay_memory": (self.replay > 0, "replay is 0"),
            "server": is_served,
            "server_folder": is_served,
            "server_timeout": is_served,
            "keep_texts": (self.eval_prompts > 0, "eval_prompts is 0"),
        }
        given = self._given()
        return {name: why for name, (is_read, why) in read.items() if name in given and not is_read}


def in_words_of_config(text: str) -> str:
    """A message with the settings under their names in a config.

    >>> in_words_of_config("Lower rollout_batch_size. The log has rollout_length.")
    'Lower rollouts.batch_size. The log has rollout_length.'
    """
    names = "|".join(RolloutsConfig.model_fields)
    return re.sub(rf"(?<!in Python )\b{PREFIX}({names})\b", r"rollouts.\1", text)


def _not_a_flag(value: Any) -> Any:
    """Refuse what pydantic would take for a number."""
    if isinstance(value, bool):
        raise _expected("no setting of rollouts is true or false")
    return value


def _read_share(value: Any) -> float | ShareRamp:
    expected = "expected a number in [0, 1], or {from: 0, to: 1, steps: 200}"
    if isinstance(value, dict):
        try:
            return ShareRamp.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _expected(f"{where}: {first['msg'].lower()}; {expected}") from error
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise _expected(expected)
    return share


def _expected(text: str) -> PydanticCustomError:
    """An error beside which the value that came is shown."""
    return PydanticCustomError("expected", "{text}", {"text": text})
