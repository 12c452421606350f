"""The cells of a study, their names, and what a setting selects."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drkl.errors import DrklError
from drkl.studies.definition import Definition
from drkl.studies.grid import baseline_of, cells_of, check_grid, groups_of, label, pair_of, same, select

AXES: dict[str, list[Any]] = {"objective.name": ["fkl", "rkl", "drkl"], "rollouts.share": [0, 1], "run.seed": [0, 1]}


def study(**changes: Any) -> Definition:
    values: dict[str, Any] = {
        "name": "s", "base": "quickstart", "axes": AXES, "baseline": {"objective.name": "rkl"}, "decide": ["rkl"],
    }  # fmt: skip
    return Definition(**(values | changes))


def test_the_cells_of_a_seed_come_before_those_of_the_next() -> None:
    cells = cells_of(study())
    assert [cell.name for cell in cells[:3]] == ["fkl-share0-seed0", "fkl-share1-seed0", "rkl-share0-seed0"]
    assert [cell.axes["run.seed"] for cell in cells] == [0] * 6 + [1] * 6
    wanted = set(itertools.product(("fkl", "rkl", "drkl"), (0, 1), (0, 1)))
    assert {tuple(cell.axes.values()) for cell in cells} == wanted


def test_variants_are_one_more_axis() -> None:
    variants = {"plain": {"objective.name": "drkl"}, "drkl-0.1": {"objective.name": "drkl", "objective.gamma": 0.1}}
    asked = study(axes={"run.seed": [3]}, variants=variants, baseline={"variant": "plain"})
    assert [(cell.name, cell.axes) for cell in cells_of(asked)] == [
        ("plain-seed3", {"variant": "plain", "run.seed": 3}),
        ("drkl-0.1-seed3", {"variant": "drkl-0.1", "run.seed": 3}),
    ]
    assert select(asked, None, {"objective.name": "drkl", "objective.gamma": 0.1}) == {"variant": "drkl-0.1"}
    assert select(asked, {"variant": "drkl-0.1"}, {"objective.name": "drkl"}) == {"variant": "plain"}


def test_without_seeds_there_is_one_cell_of_each_kind() -> None:
    assert [cell.axes for cell in cells_of(study(axes={"objective.name": ["rkl", "fkl"]}))] == [
        {"objective.name": "rkl"}, {"objective.name": "fkl"},
    ]  # fmt: skip
    assert [cell.name for cell in cells_of(study(axes={}, baseline={}))] == ["cell"]


def test_a_name_stays_when_others_are_added() -> None:
    before = {cell.name: cell.axes for cell in cells_of(study())}
    more = AXES | {"objective.name": ["gjs", *AXES["objective.name"]], "run.seed": [7, 0, 1]}
    after = {cell.name: cell.axes for cell in cells_of(study(axes=more, variants={}))}
    assert after.items() >= before.items()


@settings(max_examples=40)
@given(st.lists(st.one_of(st.text(max_size=50), st.floats(allow_nan=False, allow_infinity=False), st.none()),
                min_size=1, max_size=6, unique_by=repr))  # fmt: skip
def test_names_are_those_of_folders(values: list[Any]) -> None:
    if any(same(a, b) for a, b in itertools.combinations(values, 2)):
        return
    names = [cell.name for cell in cells_of(study(axes={"teacher.model": values, "run.seed": [0]}, baseline={}))]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and len(name) < 80 for name in names)
    assert len({name.casefold() for name in names}) == len(values)


def test_the_baseline_fixes_its_keys_and_leaves_the_others() -> None:
    assert baseline_of(study(), {"objective.name": "drkl", "rollouts.share": 1, "run.seed": 1}) == {
        "objective.name": "rkl", "rollouts.share": 1,
    }  # fmt: skip
    one_share = study(axes=AXES | {"rollouts.share": [1]})
    assert pair_of(one_share, {"objective.name": "drkl"}, {"objective.name": "fkl"}) == (
        {"objective.name": "drkl", "rollouts.share": 1}, {"objective.name": "fkl", "rollouts.share": 1},
    )  # fmt: skip
    assert pair_of(one_share, {"objective.name": "drkl"}, {})[1]["objective.name"] == "rkl"


def test_numbers_are_the_same_however_they_are_written() -> None:
    assert select(study(), {"objective.name": "rkl"}, {"rollouts.share": 1.0}) == {
        "objective.name": "rkl", "rollouts.share": 1,
    }  # fmt: skip
    assert not same(1, True) and not same("1", 1) and same([1, {"a": 0}], [1.0, {"a": 0.0}])


def test_the_scaled_student_of_cells_is_one_more_model() -> None:
    asked = study(axes={"objective.name": ["fkl", "rkl", "drkl"], "run.seed": [0]})
    scaled = {"objective.name": "rkl", "model": "scaled"}
    assert pair_of(asked, {"objective.name": "drkl"}, scaled) == ({"objective.name": "drkl"}, scaled)
    assert pair_of(asked, {"objective.name": "rkl"}, scaled)[1] == scaled  # another model of the same cells
    assert baseline_of(asked, {"objective.name": "drkl", "model": "scaled"}) == scaled
    assert select(asked, scaled, {"model": "student"}) == {"objective.name": "rkl"}
    assert label(scaled) == "rkl, scaled"
    with pytest.raises(DrklError, match="is compared with itself"):
        pair_of(asked, {"objective.name": "rkl"}, {"model": "student"})


def test_labels_leave_out_what_is_told_elsewhere() -> None:
    axes = {"objective.name": "drkl", "rollouts.share": 1.0, "loss.temperature": 2.5}
    assert label(axes) == "drkl, rollouts.share 1, loss.temperature 2.5"
    assert label(axes, {"rollouts.share": 1, "objective.name": "rkl"}) == "drkl, loss.temperature 2.5"


VARIANTS = {"a": {"objective.gamma": 0.1}, "b": {"objective.gamma": 0.2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"objective.name": []}}, r"axes\.objective\.name has no value"),
        ({"axes": {"rollouts.share": [0, 1, 0.0]}}, r"axes\.rollouts\.share has 0 twice"),
        ({"axes": {"run.seed": ["a"]}}, r"axes\.run\.seed has a; expected whole numbers"),
        ({"axes": {"variant": ["a"]}}, r"axes\.variant: named settings stand under variants"),
        ({"axes": {"x": ["1", 1]}, "baseline": {}}, "Two cells would have one folder, 'x1'"),
        ({"variants": {"../a": {"loss.temperature": 2}}}, "cannot be part of a folder's name"),
        ({"variants": {"a": {"objective.name": "gjs"}}}, r"variants\.a sets objective\.name, which is an axis"),
        ({"variants": {"a": {"run.seed": 4}}}, r"variants\.a sets run\.seed, which is"),
        ({"variants": VARIANTS | {"c": {"objective.gamma": 0.10}}}, r"variants\.a and variants\.c set the same"),
        ({"baseline": {"objective.nam": "rkl"}}, r"baseline: .* is no axis .* Did you mean 'objective\.name'\?"),
        ({"baseline": {"objective.name": "rk"}}, r"baseline: .* no value rk in the study\. Did you mean 'rkl'\?"),
        ({"axes": {"model": ["a"]}}, r"axes\.model: model says which model of a cell is compared"),
        ({"baseline": {"model": "teacher"}}, "baseline: model is teacher; expected student or scaled"),
        ({"baseline": {"run.seed": 0}}, "every seed is compared with itself"),
        ({"variants": VARIANTS, "baseline": {"objective.gamma": 0.3}}, "No variant sets just .* a .objective.gamma"),
        ({"variants": VARIANTS, "baseline": {"objective.gamma": 0.1, "variant": "a"}}, "Give its name alone"),
        (
            {"primary": [{"metric": "rkl", "cell": {"objective.name": "drkl"}, "against": {"objective.name": "rkl"}}]},
            r"primary\.0: .* leaves rollouts\.share open, which has 2 values: 0, 1",
        ),
        (
            {"predictions": ["words", {"metric": "rkl", "cell": {"objective.name": "rkl", "rollouts.share": 1}}]},
            r"predictions\.1: .* is compared with itself",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        check_grid(study(**changes))


def test_a_whole_study_is_right() -> None:
    check_grid(study(predictions=["in words"]))
    assert len(groups_of(study())) == 6
