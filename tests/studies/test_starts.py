"""The students that cells start from, and the teacher's caches they read: what is shared by which cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drkl.config import load_config
from drkl.evaluation.result import Evaluation
from drkl.models.fingerprint import describe_model
from drkl.models.load import load_model
from drkl.runs import RunFolder
from drkl.studies import running
from drkl.studies.commands import Commands
from drkl.studies.folder import settle
from drkl.studies.plan import Plan
from drkl.studies.records import cell_record
from drkl.studies.running import run_study
from drkl.studies.starts import cache_for, cell_config, make_init, start_for, unpaired, weights_of, why_live
from tests.studies.test_running import WORDS
from tests.studies.tiny_studies import SHORT, in_this_process, plan_of, ready
from tests.training import tiny_runs

PRUNED = {"student": {"init": "prune", "layers": 2}}


def keys(plan: Plan) -> list[str]:
    return [start.key for planned in plan.cells if (start := start_for(plan, planned)) is not None]


@pytest.mark.parametrize(
    ("axis", "values", "count"),
    [
        ("objective.name", ["rkl", "fkl"], 1),
        ("loss.temperature", [1, 2], 1),
        ("training.learning_rate", [1e-3, 1e-2], 1),
        ("training.max_steps", [6, 8], 1),
        ("rollouts.share", [0, 1], 1),
        ("evaluation.prompts", [2, 3], 1),
        ("analysis.watch_every", [None, 2], 1),
        ("run.seed", [0, 1], 2),
        ("student.layers", [1, 2], 2),
        ("student.freeze_embeddings", [False, True], 2),
        ("data.max_rows", [20, 30], 2),
        ("stages.warmup.training.max_steps", [2, 4], 2),
    ],
)
def test_what_changes_the_start(tmp_path: Path, axis: str, values: list[Any], count: int) -> None:
    plan = plan_of(tmp_path, axes={axis: values}, baseline={})
    assert len(set(keys(plan))) == count


def test_the_base_trains_the_start_and_settings_are_the_bases(tmp_path: Path) -> None:
    """What the last stage alone has in a cell does not reach the warm-up, which inherits it in an ordinary run."""
    one = plan_of(tmp_path, axes={"training.learning_rate": [1e-3]}, baseline={})
    two = plan_of(tmp_path, axes={"run.seed": [3]}, settings={"training.learning_rate": 1e-3}, baseline={})
    three = plan_of(tmp_path, axes={"run.seed": [3]}, baseline={})
    assert keys(one) == keys(three) != keys(two)


def test_an_axis_goes_before_the_settings_in_the_start_too(tmp_path: Path) -> None:
    plain = plan_of(tmp_path, axes={"run.seed": [0, 1]}, baseline={})
    both = plan_of(tmp_path, axes={"run.seed": [0, 1]}, settings={"run.seed": 0}, baseline={})
    assert [planned.start.run.seed for planned in both.cells] == [0, 1] and keys(both) == keys(plain)
    layers = plan_of(tmp_path, PRUNED, axes={"student.layers": [1, 2]}, settings={"student.layers": 2}, baseline={})
    assert [planned.start.student.layers for planned in layers.cells] == [1, 2]


def test_without_sharing_a_cell_has_its_own_stages(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, shared={"start": False})
    assert keys(plan) == []
    assert cell_config(plan.cells[0], None, None) == plan.cells[0].config


def test_a_cell_starts_from_its_start(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, settings={"student.disable_dropout": True})
    planned = plan.cells[0]
    start = start_for(plan, planned)
    assert start is not None and start.is_made and len(start.runs) == 1
    assert RunFolder(Path(start.runs[0].run.dir) / start.runs[0].run.name).root == start.record.folder
    assert start.runs[0].objective.name == "fkl" and start.runs[0].training.max_steps == 4
    config = cell_config(planned, start, None)
    assert config.stages == [] and config.student.model == str(start.student)
    assert (config.student.init, config.student.disable_dropout) == ("pretrained", True)
    again = load_config(config.values("json"))[0]
    assert again == config and again.data.given_lengths == config.data.given_lengths


def test_each_stage_by_itself_is_what_a_whole_run_would_train(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "objective": {"name": "fkl"}, "training": {"max_steps": 2, "arguments": {"adam_beta1": 0.5}}},
        {"name": "b", "data": {"max_rows": 20}, "training": {"max_steps": 3}},
    ]
    plan = plan_of(tmp_path, {"stages": stages})
    start = start_for(plan, plan.cells[0])
    assert start is not None
    specs = start.config.specs()[:-1]
    for run, spec in zip(start.runs, specs, strict=True):
        (own,) = load_config(run.values("json"))[0].specs()
        for part in ("teacher", "student", "data", "objective", "loss", "training", "rollouts", "peft", "tokenizer"):
            assert getattr(own, part) == getattr(spec, part), part
    assert start.runs[0].run.dir == str(start.record.folder / "stages")


def test_an_initial_student_is_the_one_that_training_makes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PRUNED)
    start = start_for(plan, plan.cells[0])
    assert start is not None and start.is_made and not start.runs and not start.has_weights
    make_init(start)
    assert start.has_weights
    digest = weights_of(start)
    assert digest == describe_model(load_model(str(start.student), "fp32"))["weights"]
    values = tiny_runs.config(tmp_path, training={"max_steps": 1, "eval_every": 1, "save_every": 1}, run={"seed": 0})
    assert tiny_runs.train(values).read_env()["inputs"]["student"]["weights"] == digest


def test_a_pretrained_student_is_made_by_nobody(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ready(tmp_path))
    start = start_for(plan, plan.cells[0])
    assert start is not None and not start.is_made and start.has_weights
    assert weights_of(start) == describe_model(load_model(str(tmp_path / "student"), "fp32"))["weights"]
    assert cell_config(plan.cells[0], start, None) == plan.cells[0].config


@pytest.mark.parametrize(
    ("axis", "values", "why"),
    [
        ("data.max_rows", [5, 6], "a key that sets them apart changes the stages that train their starts"),
        ("student.layers", [1, 2], "their student is another"),
        ("training.learning_rate", [1e-3, 1e-2], None),
    ],
)
def test_comparisons_that_can_decide_nothing_are_said(tmp_path: Path, axis: str, values: list[Any], why: Any) -> None:
    fields: dict[str, Any] = {
        "axes": {axis: values, "run.seed": [0, 1]}, "baseline": {axis: values[0]},
        "primary": [{"metric": "rkl", "cell": {axis: values[1]}, "against": {axis: values[0]}}],
    }  # fmt: skip
    base = {"stages": tiny_runs.STAGES, "student": {"init": "prune", "layers": 2}}
    said = unpaired(plan_of(tmp_path, base, **fields))
    assert len(said) == (why is not None)
    if why is not None:
        assert said[0].startswith("primary.0 will decide nothing: ") and why in said[0]
    alone = unpaired(plan_of(tmp_path, base, **fields, shared={"start": False}))
    assert len(alone) == (axis == "student.layers")


# The teacher's cache ------------------------------------------------------------------------------------------------


def test_which_cells_share_a_cache(tmp_path: Path) -> None:
    axes = {"objective.name": ["rkl", "drkl"], "loss.temperature": [1.0, 2.0], "data.max_rows": [20, 30],
            "run.seed": [0, 1]}  # fmt: skip
    hidden = plan_of(tmp_path, axes=axes, shared={"teacher_cache": "hidden"})
    caches = {cache.key: cache for planned in hidden.cells if (cache := cache_for(hidden, planned)) is not None}
    assert len(caches) == 2 and all(cache.temperatures == () for cache in caches.values())
    topk = plan_of(tmp_path, axes=axes, shared={"teacher_cache": "topk"})
    others = {cache.key: cache for planned in topk.cells if (cache := cache_for(topk, planned)) is not None}
    assert len(others) == 2 and all(cache.temperatures == (1.0, 2.0) for cache in others.values())
    assert not caches.keys() & others.keys()
    assert WORDS.cache(Path("c.yaml"), Path("f"), "topk", (1.0, 2.0))[-4:] == [
        "--temperature",
        "1.0",
        "--temperature",
        "2.0",
    ]


def test_cells_that_sample_answers_read_the_teacher_itself(tmp_path: Path) -> None:
    axes = {"rollouts.share": [0.0, 1.0], "run.seed": [0]}
    plan = plan_of(tmp_path, axes=axes, baseline={}, shared={"teacher_cache": "hidden"})
    assert [cache_for(plan, planned) is None for planned in plan.cells] == [False, True]
    assert why_live(plan, plan.cells[1]) == "it trains on sampled answers, which are new at every step"


@pytest.mark.slow
def test_cells_of_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is run once for all cells, and loaded again to be evaluated."""
    monkeypatch.setattr(running, "TICK", 0.0)
    axes = {"objective.name": ["rkl"], "loss.temperature": [1.0, 2.0], "run.seed": [0]}
    plan = plan_of(tmp_path, SHORT, axes=axes, shared={"teacher_cache": "hidden"})
    settle(plan, None)
    done = run_study(plan, WORDS, commands=Commands(launch=in_this_process))
    assert (done.done, done.failed) == (2, {})
    (folder,) = (plan.shared / "teacher").glob("*/cache")
    for planned in plan.cells:
        assert cell_record(planned.folder.root).read()["cache"] == str(folder)
        assert planned.folder.read_config()["teacher"]["cache"] == str(folder)
        assert Evaluation.load(planned.folder.root).value("teacher", "rouge_l") is not None  # it answers, too
    # Its states are exact.
    values = tiny_runs.config(tmp_path, **SHORT, run={"seed": 0})
    values["objective"] = {"name": "rkl"}
    wanted = tiny_runs.weights(tiny_runs.train(values))
    assert tiny_runs.weights(plan.cells[0].folder) == wanted


@pytest.mark.slow
def test_two_stages_of_a_start_are_those_of_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "TICK", 0.0)
    stages = [
        {"name": "a", "objective": {"name": "fkl"}, "training": {"max_steps": 2}},
        {"name": "b", "data": {"max_rows": 20}, "training": {"max_steps": 3}},
    ]
    plan = plan_of(tmp_path, SHORT | {"stages": stages}, axes={"objective.name": ["rkl"], "run.seed": [3]})
    settle(plan, None)
    assert run_study(plan, WORDS, commands=Commands(launch=in_this_process)).done == 1
    values = tiny_runs.config(tmp_path, **(SHORT | {"stages": stages}))
    values["objective"] = {"name": "drkl"}
    specs = load_config(values, ["objective.name=rkl", "stages.1.objective.name=drkl"])[0].specs()
    from drkl.training.run import distill

    assert tiny_runs.weights(plan.cells[0].folder) == tiny_runs.weights(distill(specs, mode="new"))
