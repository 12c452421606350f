"""Names and parameters: what is accepted, and what each refusal says."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

import drkl
from drkl.errors import DrklError
from drkl.objectives import CrossEntropy, ReverseKL

PARTS = ", ".join(name for name in drkl.OBJECTIVES if name not in ("ce", "dkd", "drkl"))
KNOWN = ", ".join((*drkl.OBJECTIVES, "decoupled"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gamma": 0.0}, "drkl.gamma is 0.0; expected greater than 0."),
        ({"gamma": -1.0}, "drkl.gamma is -1.0; expected greater than 0."),
        ({"gamma": math.nan}, "drkl.gamma is nan; expected greater than 0."),
        ({"gamma": math.inf}, "drkl.gamma is inf; expected greater than 0."),
        ({"gamma": "half"}, "drkl.gamma is 'half'; expected a number greater than 0."),
        ({"gamma": True}, "drkl.gamma is True; expected a number greater than 0."),
        ({"gamma": None}, "drkl.gamma is None; expected a number greater than 0."),
        ({"skew": 1.0}, "drkl.skew is 1.0; expected in [0, 1)."),
        ({"skew": -0.1}, "drkl.skew is -0.1; expected in [0, 1)."),
        ({"skew": math.nan}, "drkl.skew is nan; expected in [0, 1)."),
        ({"skew": "0"}, "drkl.skew is '0'; expected a number in [0, 1)."),
        ({"target": "labels"}, "drkl.target is 'labels'; expected one of teacher, label. Did you mean 'label'?"),
        ({"target": 3}, "drkl.target is 3; expected one of teacher, label."),
        (
            {"weight": "studnet"},
            "drkl.weight is 'studnet'; expected one of constant, student, teacher, floor. Did you mean 'student'?",
        ),
        ({"tail": "tvd"}, "drkl.tail is 'tvd'; expected one of rkl, fkl, gjs."),
        ({"tail": ["rkl"]}, "drkl.tail is ['rkl']; expected one of rkl, fkl, gjs. Did you mean 'rkl'?"),
        ({"skew": 0.1, "tail": "fkl"}, "drkl.skew is 0.1 with tail 'fkl'; a skewed DRKL needs tail 'rkl'."),
        (
            {"gama": 0.1},
            "Objective 'drkl' has no parameter 'gama'; it has gamma, target, weight, skew, tail. Did you mean 'gamma'?",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_drkl_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.make_objective("drkl", **params)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gamma": 0.0}, "decoupled.gamma is 0.0; expected greater than 0."),
        ({"target_weight": -1.0}, "decoupled.target_weight is -1.0; expected at least 0."),
        ({"target_weight": math.inf}, "decoupled.target_weight is inf; expected at least 0."),
        ({"target_weight": "1"}, "decoupled.target_weight is '1'; expected a number at least 0."),
        ({"target": "top"}, "decoupled.target is 'top'; expected one of teacher, label."),
        ({"weight": ""}, "decoupled.weight is ''; expected one of constant, student, teacher, floor."),
        ({"on_target": "rlk"}, f"decoupled.on_target is 'rlk'; expected one of {PARTS}. Did you mean 'rkl'?"),
        ({"on_tail": "ce"}, f"decoupled.on_tail is 'ce'; expected one of {PARTS}."),
        (
            {"on_tail": CrossEntropy()},
            "decoupled.on_tail is 'ce'; expected a divergence between student and teacher.",
        ),
        (
            {"on_target": drkl.make_objective("drkl", target="label")},
            "decoupled.on_target is 'drkl'; expected a divergence between student and teacher.",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_decoupled_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.decoupled(**params)
    assert str(caught.value) == message


GJS = "in (0, 1): at 0 and 1 it is 0 everywhere; what is meant there are 'fkl' and 'rkl'."


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("symmetric_kl", {"forward_weight": 1.5}, "symmetric_kl.forward_weight is 1.5; expected in [0, 1]."),
        ("symmetric_kl", {"forward_weight": -0.1}, "symmetric_kl.forward_weight is -0.1; expected in [0, 1]."),
        ("gjs", {"beta": 0.0}, f"gjs.beta is 0.0; expected {GJS}"),
        ("gjs", {"beta": 1}, f"gjs.beta is 1; expected {GJS}"),
        ("gjs", {"beta": math.nan}, f"gjs.beta is nan; expected {GJS}"),
        ("sfkl", {"skew": 1.0}, "sfkl.skew is 1.0; expected in [0, 1)."),
        ("srkl", {"skew": -0.1}, "srkl.skew is -0.1; expected in [0, 1)."),
        ("akl", {"mu": 0.0}, "akl.mu is 0.0; expected in (0, 1]."),
        ("akl", {"mu": 1.01}, "akl.mu is 1.01; expected in (0, 1]."),
        ("akl", {"mu": "half"}, "akl.mu is 'half'; expected a number in (0, 1]."),
        ("dkd", {"alpha": -1.0}, "dkd.alpha is -1.0; expected at least 0."),
        ("dkd", {"beta": math.inf}, "dkd.beta is inf; expected at least 0."),
        ("dkd", {"alpha": 0, "beta": 0}, "dkd.alpha and dkd.beta are both 0; expected one of them above 0."),
        ("dkd", {"target": "top"}, "dkd.target is 'top'; expected one of teacher, label."),
        (
            "ab",
            {"alpha": -0.5},
            "ab.alpha is -0.5 and ab.beta is 0.7; expected both at least 0, or alpha = -beta.",
        ),
        ("ab", {"beta": math.nan}, "ab.beta is nan; expected at least 0, or the negative of the other."),
        ("ab", {"aplha": 1.0}, "Objective 'ab' has no parameter 'aplha'; it has alpha, beta. Did you mean 'alpha'?"),
        ("tvd", {"beta": 1.0}, "Objective 'tvd' has no parameter 'beta'; it has none."),
        ("todi", {"beta": 1.0}, "Objective 'todi' has no parameter 'beta'; it has none."),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_the_others_refuse(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.make_objective(name, **params)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("drlk", {}, f"There is no objective 'drlk'. Did you mean 'drkl'? Known: {KNOWN}."),
        ("quadratic", {}, f"There is no objective 'quadratic'. Known: {KNOWN}."),
        ("", {}, f"There is no objective ''. Known: {KNOWN}."),
        ("rkl", {"gamma": 0.1}, "Objective 'rkl' has no parameter 'gamma'; it has none."),
        (
            ReverseKL(),
            {"gamma": 0.1},
            "Parameters ['gamma'] were given beside an objective that is already made.",
        ),
        (
            None,
            {},
            "objective is None; expected a name in drkl.OBJECTIVES, an objective, or a function of (student_logp, "
            "teacher_logp, labels).",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_make_objective_refuses(name: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.make_objective(name, **params)
    assert str(caught.value) == message


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("params", [{}, {"gamma": 0.1}])
def test_a_class_is_no_objective(params: dict[str, Any]) -> None:
    with pytest.raises(DrklError) as caught:
        drkl.make_objective(ReverseKL, **params)  # type: ignore[arg-type]
    assert str(caught.value) == "objective is the class ReverseKL; expected an instance, ReverseKL(...)."


@pytest.mark.usefixtures("unchecked")
def test_edges_and_whole_numbers_are_accepted() -> None:
    assert drkl.make_objective("drkl", gamma=1, skew=0) == drkl.make_objective("drkl", gamma=1.0, skew=0.0)
    drkl.make_objective("drkl", skew=0.999)
    drkl.make_objective("drkl", gamma=1e-6)
    drkl.decoupled(target_weight=0)


def test_defaults_are_the_papers_with_gamma_one_half() -> None:
    made = drkl.make_objective("drkl")
    assert dataclasses.asdict(made) == {  # type: ignore[call-overload]
        "gamma": 0.5,
        "target": "teacher",
        "weight": "constant",
        "skew": 0.0,
        "tail": "rkl",
    }


def test_an_objective_is_taken_as_it_is() -> None:
    made = drkl.make_objective("drkl", gamma=0.25)
    assert drkl.make_objective(made) is made
    assert drkl.decoupled(made, "gjs").on_target is made


DEFAULTS: dict[str, dict[str, Any]] = {
    "ce": {},
    "fkl": {},
    "rkl": {},
    "tvd": {},
    "todi": {},
    "symmetric_kl": {"forward_weight": 0.5},
    "gjs": {"beta": 0.5},
    "sfkl": {"skew": 0.1},
    "srkl": {"skew": 0.1},
    "dkd": {"alpha": 1.0, "beta": 0.5, "target": "teacher"},
    "akl": {"mu": 0.5},
    "ab": {"alpha": 0.2, "beta": 0.7},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_their_sources(name: str) -> None:
    made: Any = drkl.make_objective(name)
    assert dataclasses.asdict(made) == DEFAULTS[name]


@pytest.mark.parametrize("name", list(drkl.OBJECTIVES))
def test_the_registry_describes_each_objective(name: str) -> None:
    cls: Any = drkl.OBJECTIVES[name]
    made = drkl.make_objective(name)
    assert type(made) is cls and isinstance(made, drkl.Objective)
    assert made.name == name and made.formula and made.source and cls.__doc__
    for field in dataclasses.fields(cls):
        assert field.metadata["help"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_what_an_objective_reads() -> None:
    reads = {name: (made.needs_teacher, made.needs_labels) for name, made in map(_made, drkl.OBJECTIVES)}
    assert reads.pop("ce") == (False, True)
    assert set(reads.values()) == {(True, False)}
    assert drkl.make_objective("dkd", target="label").needs_labels
    assert drkl.make_objective("drkl", target="label").needs_labels
    assert drkl.decoupled(target="label").needs_labels and not drkl.decoupled().needs_labels


def _made(name: str) -> tuple[str, drkl.Objective]:
    return name, drkl.make_objective(name)
