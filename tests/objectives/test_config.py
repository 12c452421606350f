from __future__ import annotations

import pytest
from pydantic import ValidationError

import drkl
from drkl.objectives.config import ObjectiveConfig


def test_the_objectives_own_fields_stand_beside_its_name() -> None:
    config = ObjectiveConfig.model_validate({"name": "drkl", "gamma": 0.25, "target": "label"})
    assert config.params == {"gamma": 0.25, "target": "label"}
    assert config.make() == drkl.make_objective("drkl", gamma=0.25, target="label")


def test_drkl_is_the_default() -> None:
    assert ObjectiveConfig().make() == drkl.make_objective("drkl")
    assert ObjectiveConfig().params == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "drk"}, "There is no objective 'drk'. Did you mean 'drkl'?"),
        ({"name": "rkl", "gamma": 0.5}, "Objective 'rkl' has no parameter 'gamma'"),
        ({"name": "drkl", "gamma": -0.5}, "drkl.gamma is -0.5; expected greater than 0."),
        ({"name": 3}, "Input should be a valid string"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveConfig.model_validate(fields)
    assert message in str(caught.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ObjectiveConfig().name = "rkl"  # type: ignore[misc]
