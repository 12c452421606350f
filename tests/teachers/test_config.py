from __future__ import annotations

import pytest
from pydantic import ValidationError

from drkl.models.config import StudentConfig
from drkl.models.smollm2 import NAME
from drkl.teachers.config import TeacherConfig


def test_the_default_is_the_embedded_teacher() -> None:
    assert TeacherConfig() == TeacherConfig(model=NAME, dtype="auto")
    assert hash(TeacherConfig()) == hash(TeacherConfig(model=NAME))


@pytest.mark.parametrize("wrong", [{"modle": "m"}, {"dtype": "int8"}, {"model": None}])
def test_what_it_refuses(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        TeacherConfig(**wrong)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("section", [TeacherConfig, StudentConfig])
def test_the_dtype_is_said_once(name: str, section: type) -> None:
    with pytest.raises(ValidationError, match=f"{name} has a key of its own in this section, dtype"):
        section(model_init_kwargs={name: "float32"})
