"""A study's file: what it may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from drkl import DrklError
from drkl.studies.definition import Prediction, read_definition
from drkl.studies.plan import load_study
from tests.studies import tiny_studies

PRIMARY = {"metric": "rkl", "cell": {"objective.name": "drkl"}, "against": {"objective.name": "rkl"}}
PREDICTED = {"metric": "rkl", "cell": {"objective.name": "drkl"}}
BASE = {
    "run": {"name": "r", "dir": "runs"}, "teacher": {"model": "t"}, "student": {"init": "prune", "layers": 2},
    "data": {"path": "rows.jsonl"}, "training": {"max_steps": 6, "eval_every": 2, "save_every": 2},
    "stages": [{"name": "warmup", "objective": {"name": "fkl"}}],
}  # fmt: skip


def written(root: Path, **fields: Any) -> Path:
    """A study of runs that could not be trained here: nothing is loaded."""
    (root / "base.yaml").write_text(yaml.safe_dump(BASE))
    values = {name: value for name, value in tiny_studies.definition(root, **fields).items() if value is not None}
    (root / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return root / "study.yaml"


def test_a_folder_in_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shared = {"dir": "~/b", "cells": ["~/c", "d"]}
    found = read_definition(written(tmp_path, dir="~/a", shared=shared))
    home = tmp_path / "home"
    assert (found.dir, found.shared.dir, found.shared.cells) == (f"{home}/a", f"{home}/b", (f"{home}/c", "d"))


def test_a_study_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, dir=None, predictions=["Better.", {"text": "So.", "metric": "rkl", "expect": "worse"}])
    found = read_definition(path)
    assert (found.dir, found.shared.start, found.shared.teacher_cache, found.keep_students) == (
        "studies",
        True,
        None,
        True,
    )
    assert found.predictions == ["Better.", Prediction(text="So.", metric="rkl", expect="worse")]


def test_numbers_in_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, axes={"run.seed": [0]}, settings=None, baseline={})
    text = path.read_text().replace("axes:", "axes:\n  training.learning_rate: [1e-3, 5e-4]")
    path.write_text(text)
    plan = load_study(path)
    assert plan.definition.axes["training.learning_rate"] == [1e-3, 5e-4]
    assert [planned.config.training.learning_rate for planned in plan.cells] == [1e-3, 5e-4]


def test_every_cell_has_its_config(tmp_path: Path) -> None:
    variants = {"plain": {}, "hot": {"loss.temperature": 2.0, "training.max_steps": 8}}
    plan = load_study(written(tmp_path, settings={"evaluation.prompts": 5}, variants=variants,
                              baseline={"variant": "plain"}))  # fmt: skip
    assert len(plan.cells) == 8
    cell = next(planned for planned in plan.cells if planned.cell.name == "drkl-hot-seed1")
    config = cell.config
    assert (config.objective.name, config.run.seed, config.loss.temperature, config.training.max_steps) == (
        "drkl",
        1,
        2,
        8,
    )
    assert config.evaluation.prompts == 5 and [stage.name for stage in config.stages] == ["warmup"]
    assert cell.folder.root == tmp_path / "studies" / "s" / "cells" / "drkl-hot-seed1"
    assert plan.base.evaluation.prompts == 5 and plan.base.loss.temperature == 1


def test_a_base_is_a_file_beside_the_study_or_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert load_study(path).base.run.name == "r"
    assert load_study(written(tmp_path, base="quickstart")).base.run.name == "quickstart"
    (tmp_path.parent / "elsewhere.yaml").write_text(yaml.safe_dump(BASE | {"run": {"name": "e"}}))
    assert load_study(written(tmp_path, base="elsewhere.yaml")).base.run.name == "e"


def test_one_seed_decides_nothing_which_is_said(tmp_path: Path) -> None:
    plan = load_study(written(tmp_path, axes={"objective.name": ["rkl", "drkl"]}))
    assert any("run.seed is none of the axes" in note for note in plan.notes)
    plan = load_study(written(tmp_path, axes={"objective.name": ["rkl", "drkl"], "run.seed": [4]}))
    assert any("There is one seed" in note for note in plan.notes) and plan.cells[0].seed == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axs": {}}, "axs: unknown key. Did you mean 'axes'? Known here: name, dir, base,"),
        ({"shared": {"strat": True}}, "shared.strat: unknown key. Did you mean 'start'?"),
        ({"primary": [PRIMARY | {"cells": {}}]}, "primary.0.cells: unknown key. Did you mean 'cell'?"),
        ({"primary": [{"metric": "rkl", "cell": {}}]}, "primary.0.against: is missing"),
        ({"primary": [PRIMARY] * 7}, "primary: list should have at most 6 items"),
        ({"predictions": [3]}, "predictions.0: expected a sentence, or text, metric, cell, against and expect"),
        ({"predictions": [{"txt": "a"}]}, "predictions.0.txt: unknown key. Did you mean 'text'?"),
        ({"predictions": [{"expect": "best"}]}, "predictions.0.expect: input should be 'better', 'worse',"),
        ({"decide": "rkl"}, "decide: input should be a valid list, got 'rkl'"),
        ({"name": "a b"}, "name: 'a b' is no name of a folder"),
        ({"name": None}, "name: is missing"),
        ({"decide": []}, "decide names no metric"),
        ({"decide": ["rkl", "fkll"]}, "decide.1: there is no metric 'fkll' of generation. Did you mean 'fkl'?"),
        ({"decide": ["rkl", "rkl"]}, "decide.1: 'rkl' stands there twice."),
        ({"primary": [PRIMARY | {"metric": "acuracy"}]}, "primary.0.metric: there is no metric 'acuracy'"),
        ({"predictions": ["a", {"metric": "x", "cell": {"objective.name": "drkl"}}]},
         "predictions.1.metric: there is no metric 'x'"),
        ({"smallest_difference": {"ece": 0.1}}, "smallest_difference.ece: the metric is in none of decide, primary"),
        ({"predictions": [{"text": "a", "expect": "better"}]},
         "predictions.0: it expects 'better' and names no metric; name one, or leave expect out."),
        ({"predictions": ["a", PREDICTED | {"expect": "no difference"}]},
         "predictions.1.expect: no difference is never said of rkl, which has no smallest_difference. Name one."),
        ({"predictions": [PREDICTED | {"metric": "stronger_tail_share", "expect": "worse"}]},
         "predictions.0.expect: stronger_tail_share has no better side, so that worse is never said of it."),
        ({"smallest_difference": {"rkl": 0.0}}, "smallest_difference.rkl is 0.0; expected a number above 0."),
        ({"primary": [PRIMARY | {"against": {"model": "scaled"}}]},
         "primary.0 has model: scaled, and the cell rkl-seed0 has no evaluation.logit_temperature"),
        ({"baseline": {"objective.name": "rkl", "model": "scaled"}}, "baseline has model: scaled, and the cell"),
        ({"primary": [PRIMARY | {"metric": "distinct_2", "against": {"model": "scaled"}}]},
         "primary.0 has model: scaled, which writes no answers, and distinct_2 is of answers."),
        ({"baseline": {"objective.name": "rkll"}}, "baseline: objective.name has no value rkll in the study."),
        ({"axes": {"run.seed": []}}, "axes.run.seed has no value"),
        ({"base": "quickstrt"}, "base: There is no recipe, and no file, 'quickstrt'"),
        ({"base": "nothing.yaml"}, "There is no file 'nothing.yaml'"),
        ({"axes": tiny_studies.AXES | {"run.dir": ["a", "b"]}}, "run.dir is the study's"),
        ({"variants": {"a": {"run.name": "x"}}}, "run.name is the cell's own"),
        ({"axes": tiny_studies.AXES | {"rollouts.shar": [0, 1]}},
         "The cell rkl-shar0-seed0 (objective.name rkl, rollouts.shar 0, run.seed 0) is no valid run: rollouts.shar: "
         "unknown key. Did you mean 'share'?"),
        ({"settings": {"evaluatoin.prompts": 3}}, "evaluatoin: unknown key. Did you mean 'evaluation'?"),
        ({"axes": {"objective.name": ["rkl", "drlk"], "run.seed": [0]}}, "The cell drlk-seed0"),
        ({"axes": {"objective.name": ["rkl"], "run.seed": [2**32]}}, "is no valid run: run.seed: input should be less"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **fields)
    with pytest.raises(DrklError) as error:
        load_study(path)
    text = str(error.value)
    assert message in text, text
    assert text.startswith(str(path))
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("name", ["study.yaml", "base.yaml"])
def test_a_file_where_the_study_keeps_its_copy_is_refused(tmp_path: Path, name: str) -> None:
    """It would be overwritten: a study in the folder that is named for it."""
    written(tmp_path, dir=str(tmp_path), name="own")
    (tmp_path / "own").mkdir()
    (tmp_path / name).rename(tmp_path / "own" / name)
    if name == "base.yaml":
        written_again = (tmp_path / "study.yaml").read_text().replace("base: base.yaml", "base: own/base.yaml")
        (tmp_path / "study.yaml").write_text(written_again)
    else:
        (tmp_path / "base.yaml").rename(tmp_path / "own" / "recipe.yaml")
        text = (tmp_path / "own" / name).read_text().replace("base: base.yaml", "base: recipe.yaml")
        (tmp_path / "own" / name).write_text(text)
    with pytest.raises(DrklError, match="lies where the study keeps a copy of its own"):
        load_study(tmp_path / "own" / name if name == "study.yaml" else tmp_path / "study.yaml")


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- 1\n")
    with pytest.raises(DrklError, match="holds a list; expected `key: value` lines"):
        load_study(tmp_path / "s.yaml")
    with pytest.raises(DrklError, match="There is no file"):
        load_study(tmp_path / "none.yaml")


def test_the_example_is_a_study() -> None:
    plan = load_study(Path(__file__).parents[2] / "examples" / "study.yaml")
    assert len(plan.cells) == 9 and plan.base.data.max_rows == 40
