from __future__ import annotations

import pytest
from pydantic import ValidationError

from drkl.evaluation.config import EvaluationConfig


def test_defaults() -> None:
    assert EvaluationConfig().model_dump() == {
        "prompts": 24,
        "samples_per_prompt": 4,
        "sampling_temperature": 1.0,
        "max_new_tokens": 64,
        "seed": 0,
        "batch_size": 96,
    }


def test_every_key_has_its_meaning() -> None:
    for name, field in EvaluationConfig.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": -1},
        {"samples_per_prompt": 0},
        {"sampling_temperature": 0},
        {"sampling_temperature": float("inf")},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"batch_size": 0},
        {"temperature": 1.0},
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError) as caught:
        EvaluationConfig(**change)  # type: ignore[arg-type]
    assert [error["loc"] for error in caught.value.errors()] == [tuple(change)]
