from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from drkl.studies.figures import LONGEST_NAME, name_in_figure
from drkl.studies.kinds import Names, key_of, kinds_of, labels, metric_of, seeds_of
from tests.studies.example import example

KEYS = ("objective.name", "rollouts.share", "loss.temperature", "variant")


def test_cells_of_a_kind_come_together_in_the_order_of_their_seeds() -> None:
    study = example(seeds=(2, 0), curves=False, states={("drkl", 0): ("failed", "no")})
    kinds = kinds_of(study)
    assert [kind.label for kind in kinds] == ["fkl", "rkl", "drkl"] and seeds_of(study) == [2, 0]
    assert [cell.axes["run.seed"] for cell in kinds[0].cells] == [2, 0]
    assert list(kinds[2].by_seed("rkl")) == [2] and len(kinds[2].values("rkl")) == 1
    assert not kinds[0].values("unknown")


def test_a_label_says_what_sets_a_kind_apart() -> None:
    kinds: list[dict[str, Any]] = [
        {"objective.name": name, "rollouts.share": share, "loss.temperature": 2.0}
        for name in ("rkl", "drkl")
        for share in (0.0, 0.5)
    ]
    assert labels(kinds) == ["rkl, rollouts.share 0", "rkl, rollouts.share 0.5", "drkl, rollouts.share 0",
                             "drkl, rollouts.share 0.5"]  # fmt: skip
    assert labels([{}]) == ["all cells"] and labels(kinds[:1]) == ["rkl, rollouts.share 0, loss.temperature 2"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries({key: st.sampled_from(["a", "b", "0"]) for key in KEYS}), min_size=1))
def test_different_kinds_have_different_labels(kinds: list[dict[str, Any]]) -> None:
    by_key = {key_of(axes): axes for axes in kinds}
    assert len(set(labels(list(by_key.values())))) == len(by_key)


def test_settings_that_are_no_kind_are_named_as_they_are_written() -> None:
    names = Names(kinds_of(example(curves=False)))
    assert names.against({"objective.name": "drkl"}, {"objective.name": "new", "run.seed": 3}) == ("drkl", "new")
    assert names.of({}) == "all cells"


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_a_name_beside_an_axis_is_short_and_on_one_line(text: str) -> None:
    name = name_in_figure(text)
    assert len(name) <= LONGEST_NAME and "\n" not in name


def test_a_metric_that_is_not_declared_claims_nothing() -> None:
    assert metric_of("rouge_l_when_as_varied", "generation").better == "higher"
    odd = metric_of("my_own", "generation")
    assert (odd.title, odd.better) == ("My own", "none")
