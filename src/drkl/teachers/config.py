"""The `teacher` section of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from drkl.models.config import Dtype


class TeacherConfig(BaseModel):
    """The model whose distributions the student learns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "smollm2-135m-instruct",
        description="Hugging Face id, folder, or the embedded teacher's name; `teacher: null` for none",
    )
    dtype: Dtype = Field("auto", description="of the teacher's weights; auto: bf16 where the device has it, else fp32")
