from __future__ import annotations

import pytest
from pydantic import ValidationError

import drkl
from drkl.objectives.config import ObjectiveConfig
from drkl.objectives.registry import settings_of


def test_the_objectives_own_fields_stand_beside_its_name() -> None:
    config = ObjectiveConfig.model_validate({"name": "drkl", "gamma": 0.25, "target": "label"})
    assert config.params == {"gamma": 0.25, "target": "label"}
    assert config.make() == drkl.make_objective("drkl", gamma=0.25, target="label")


def test_drkl_is_the_default() -> None:
    assert ObjectiveConfig().make() == drkl.make_objective("drkl")
    assert ObjectiveConfig().params == {}


def test_the_operator_is_made_by_the_names_of_its_parts() -> None:
    config = ObjectiveConfig.model_validate({"name": "decoupled", "on_target": "fkl", "on_tail": "rkl", "gamma": 0.25})
    assert config.make() == drkl.decoupled("fkl", "rkl", gamma=0.25)
    assert settings_of(config.make()) == (
        "decoupled",
        {"on_target": "fkl", "on_tail": "rkl", "gamma": 0.25, "target_weight": 1.0, "target": "teacher",
         "weight": "constant"},
    )  # fmt: skip
    name, fields = settings_of(drkl.make_objective("srkl", skew=0.2)) or ("", {})
    assert (name, fields) == ("srkl", {"skew": 0.2})
    # Parts with settings of their own, and functions, have no name that would make them again.
    assert settings_of(drkl.decoupled(drkl.make_objective("srkl", skew=0.2), "rkl")) is None
    assert settings_of(drkl.make_objective(lambda student_logp, teacher_logp, labels: student_logp[:, 0])) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "decoupled", "on_tail": "fk"}, "decoupled.on_tail is 'fk'; expected one of"),
        ({"name": "decoupled", "on_target": "drkl"}, "decoupled.on_target is 'drkl'; expected one of"),
        (
            {"name": "decoupled", "tail": "fkl"},
            "Objective 'decoupled' has no parameter 'tail'; it has on_target, on_ta",
        ),
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
