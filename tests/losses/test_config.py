from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from drkl.losses.config import LossConfig


def test_defaults_are_those_of_the_function() -> None:
    assert LossConfig().model_dump() == {"temperature": 1.0, "kd_weight": 1.0, "t2_scaling": False}
    assert all(field.description for field in LossConfig.model_fields.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": math.inf}, "finite number"),
        ({"temperature": math.nan}, "finite number"),
        ({"kd_weight": -0.1}, "greater than or equal to 0"),
        ({"kd_weight": 1.5}, "less than or equal to 1"),
        ({"t2_scaling": "perhaps"}, "valid boolean"),
        ({"beta": 0.5}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig.model_validate(fields)
