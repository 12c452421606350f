"""Objectives by their short names."""

from __future__ import annotations

import pytest

from drkl.errors import DrklError
from drkl.objectives import decoupled, make_objective
from drkl.objectives.variants import parse_variant, parse_variants


def test_a_name_stands_for_an_objective() -> None:
    assert parse_variant("drkl").objective == make_objective("drkl")
    assert parse_variant("drkl~0.1:0.2@floor").objective == make_objective("drkl", skew=0.1, gamma=0.2, weight="floor")
    assert parse_variant("srkl~0.3").objective == make_objective("srkl", skew=0.3)
    assert parse_variant("rkl+gjs:0.25").objective == decoupled("rkl", "gjs", gamma=0.25)
    found = parse_variant("rkl+fkl@teacher")
    assert (found.label, found.gamma, found.title, found.slug) == ("rkl+fkl@teacher", None, "rkl+fkl@teacher",
                                                                   "rkl-fkl-teacher")  # fmt: skip
    assert parse_variant("drkl").gamma == 0.5 and parse_variant("drkl").title == "drkl, γ 0.5"


def test_a_gamma_is_used_where_none_is_named() -> None:
    titles = [parse_variant(spec, gamma=0.2).title for spec in ("rkl", "drkl", "drkl:0.7", "rkl+gjs", "drkl@student")]
    assert titles == ["rkl", "drkl, γ 0.2", "drkl, γ 0.7", "rkl+gjs, γ 0.2", "drkl@student"]


def test_an_objective_under_two_names_is_kept_once() -> None:
    assert [variant.spec for variant in parse_variants(["drkl", "drkl:0.5", "rkl"])] == ["drkl", "rkl"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rlk", r"no objective 'rlk'. Did you mean 'rkl'"),
        ("rkl:0.5", "rkl has no gamma"),
        ("drkl:0", "greater than 0"),
        ("drkl:1e", "is no number"),
        ("drkl@all", "drkl.weight"),
        ("rkl+drkl", "decoupled.on_tail"),
        ("a b", "expected NAME"),
        ("rkl~0.1", "rkl has no skew; drkl, srkl and sfkl have"),
        ("rkl+gjs~0.1", "F\\+G has no skew; drkl, srkl and sfkl have"),
        ("drkl~1..2", r"'1\.\.2' is no number; expected a skew, as in drkl~0.1"),
    ],
)
def test_an_unknown_objective_is_refused(spec: str, message: str) -> None:
    with pytest.raises(DrklError, match=message):
        parse_variant(spec)
