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
    remember_mb: int = Field(
        0,
        ge=0,
        description="memory for the teacher's states of batches already seen: a later stage that trains on the same "
        "batches does not run the teacher again",
    )
    dtype: Dtype = Field("auto", description="of the teacher's weights; auto: bf16 where the device has it, else fp32")
