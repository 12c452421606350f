from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from drkl.evaluation.config import MINILLM, EvaluationConfig


def test_defaults() -> None:
    assert EvaluationConfig().model_dump() == {
        "prompts": 24,
        "samples_per_prompt": 4,
        "sampling_temperature": 1.0,
        "sweep": (0.5, 0.7, 1.0, 1.2, 1.5),
        "max_new_tokens": 64,
        "seed": 0,
        "seeds": (),
        "batch_size": 96,
        "logit_temperature": None,
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
        {"sweep": [0.5, 0.0]},
        {"sweep": [float("nan")]},
        {"seeds": [1, 1]},
        {"seeds": [-1]},
        {"temperature": 1.0},
        {"logit_temperature": 0},
        {"logit_temperature": -1.5},
        {"logit_temperature": float("inf")},
        {"logit_temperature": float("nan")},
        {"logit_temperature": True},
        {"logit_temperature": "fits"},
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        EvaluationConfig(**change)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(change)]


def test_the_sweep_is_sorted_and_the_main_temperature_comes_first() -> None:
    settings = EvaluationConfig(sweep=(1.5, 0.5, 1.0, 0.5), sampling_temperature=1.0)
    assert settings.sweep == (0.5, 1.0, 1.5) and settings.temperatures == (1.0, 0.5, 1.5)
    assert EvaluationConfig(sweep=(), sampling_temperature=0.3).temperatures == (0.3,)


def test_a_temperature_on_the_logits_is_a_number_or_a_fit() -> None:
    given = (None, 2, 0.5, "fit", "fit_to_teacher")
    assert [EvaluationConfig(logit_temperature=one).logit_temperature for one in given] == [*given]  # type: ignore[arg-type]


def test_one_seed_or_several() -> None:
    assert EvaluationConfig(seed=3).all_seeds == (3,)
    assert EvaluationConfig(seed=3, seeds=(10, 20)).all_seeds == (10, 20)


def test_minillms_decoding() -> None:
    settings = EvaluationConfig.model_validate(MINILLM)
    assert (settings.prompts, settings.samples_per_prompt, settings.max_new_tokens) == (None, 1, 256)
    assert settings.all_seeds == (10, 20, 30, 40, 50) and settings.temperatures == (1.0,)
