from __future__ import annotations

import pytest
from pydantic import ValidationError

from drkl.models.smollm2 import NAME
from drkl.teachers.config import TeacherConfig


def test_the_default_is_the_embedded_teacher() -> None:
    assert TeacherConfig() == TeacherConfig(model=NAME, dtype="auto")
    assert hash(TeacherConfig()) == hash(TeacherConfig(model=NAME))


@pytest.mark.parametrize("wrong", [{"modle": "m"}, {"dtype": "int8"}, {"model": None}])
def test_what_it_refuses(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        TeacherConfig(**wrong)
