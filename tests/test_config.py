from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from drkl.config import Config, describe_keys, load_config, resolve
from drkl.errors import DrklError
from drkl.objectives import OBJECTIVES

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/*.yaml"))


def values(**sections: Any) -> dict[str, Any]:
    return {
        "run": {"name": "r", "device": "cpu"},
        "data": {"path": "rows.jsonl"},
        "objective": {"name": "drkl", "gamma": 0.25},
        "stages": [
            {"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 7}},
            {"name": "more", "data": {"max_tokens": 400}},
        ],
    } | sections


def load(*overrides: str, **sections: Any) -> Config:
    return load_config(values(**sections), overrides)[0]


def refusal(*overrides: str, source: Any = None, **sections: Any) -> str:
    with pytest.raises(DrklError) as error:
        load_config(values(**sections) if source is None else source, overrides)
    return str(error.value)


def test_sections_and_defaults() -> None:
    config = load()
    assert config.teacher is not None and config.teacher.model == "smollm2-135m-instruct"
    assert config.student.init == "prune" and config.training.max_steps == 200
    assert config.objective.params == {"gamma": 0.25}
    assert load(teacher=None, objective={"name": "ce"}, student={"model": "m"}, stages=[]).teacher is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path) -> None:
    config, notes = load_config(path)
    assert notes == [] and len(config.specs()) == len(config.stages) + 1


def test_quickstart_gives_drkl_at_least_half_of_the_steps() -> None:
    config, _ = load_config(RECIPES[0].parent / "quickstart.yaml")
    steps = {spec.objective.name: spec.training.max_steps for spec in config.specs()}
    assert steps["drkl"] * 2 >= sum(steps.values())
    assert config.specs()[-1].folder.root == Path("runs/quickstart")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.max_steps=50", lambda c: c.training.max_steps == 50),
        ("training.learning_rate=1e-3", lambda c: c.training.learning_rate == 1e-3),
        ("training.learning_rate=2E-4", lambda c: c.training.learning_rate == 2e-4),
        ("training.learning_rate=.5", lambda c: c.training.learning_rate == 0.5),
        ("student.layers=[0, 3, 5]", lambda c: c.student.layers == [0, 3, 5]),
        ("student.layers=4", lambda c: c.student.layers == 4),
        ("objective.gamma=0.75", lambda c: c.objective.make().gamma == 0.75),
        ("loss.t2_scaling=true", lambda c: c.loss.t2_scaling is True),
        ("data.eval_path=null", lambda c: c.data.eval_path is None),
        ("data.eval_path=a=b.jsonl", lambda c: c.data.eval_path == "a=b.jsonl"),
        ("run.name=other-1.2_x", lambda c: c.run.name == "other-1.2_x"),
        ("training.arguments.adam_beta2=0.95", lambda c: c.training.arguments == {"adam_beta2": 0.95}),
        ("training.arguments={weight_decay: 1e-2}", lambda c: c.training.weight_decay == 0.01),
        ("teacher={model: m}", lambda c: c.teacher.model == "m"),
        ("evaluation.prompts=3", lambda c: c.evaluation.prompts == 3),
        ("analysis.watch_every=20", lambda c: c.analysis.watch_every == 20 and c.analysis.watch_positions == 256),
        ("stages.0.training.max_steps=3", lambda c: c.specs()[0].training.max_steps == 3),
        ("stages.warmup.training.max_steps=3", lambda c: c.specs()[0].training.max_steps == 3),
        ("stages.more.loss.temperature=2", lambda c: c.specs()[1].loss.temperature == 2.0),
        ("stages.more.training.learning_rate=1e-3", lambda c: c.specs()[1].training.learning_rate == 1e-3),
        ("stages.1.name=last", lambda c: c.specs()[1].folder.name == "02-last"),
        ("stages=[]", lambda c: len(c.specs()) == 1),
    ],
)
def test_an_override_is_set(override: str, read: Any) -> None:
    config, notes = load_config(values(), [override])
    assert read(config) and notes == []
    # Nothing else moved: put back, it is the config without it.
    assert load_config(values())[0] == load()


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: x.jsonl}\ntraining: {learning_rate: 1e-3, arguments: {adam_epsilon: 1e-9}}\n")
    training = load_config(path)[0].training
    assert training.learning_rate == 1e-3 and training.arguments["adam_epsilon"] == 1e-9


def test_the_last_override_counts() -> None:
    assert load("training.max_steps=5", "training.max_steps=6").training.max_steps == 6


def test_the_source_is_left_alone() -> None:
    source = values()
    load_config(source, ["training.max_steps=5", "objective.name=rkl", "stages.warmup.training.max_steps=1"])
    assert source == values()


def test_another_objective_drops_the_recipes_fields_and_says_so() -> None:
    config, notes = load_config(values(), ["objective.name=rkl"])
    assert config.objective.name == "rkl" and config.objective.params == {}
    assert notes == ["objective.name=rkl: the recipe's gamma=0.25 belonged to another objective and is dropped."]


def test_the_same_objective_keeps_them() -> None:
    config, notes = load_config(values(), ["objective.name=drkl"])
    assert config.objective.params == {"gamma": 0.25} and notes == []


@pytest.mark.parametrize(
    "overrides", [["objective.name=drkl", "objective.gamma=0.75"], ["objective.gamma=0.75", "objective.name=drkl"]]
)
def test_fields_that_are_overridden_too_stay(overrides: list[str]) -> None:
    source = values(objective={"name": "rkl"})
    source["stages"][0]["objective"] = {"name": "rkl"}
    config, notes = load_config(source, overrides)
    assert config.objective.params == {"gamma": 0.75} and notes == []


def test_a_field_that_is_overridden_is_not_said_to_be_dropped() -> None:
    source = values(objective={"name": "drkl", "gamma": 0.25, "tail": "rkl"})
    with pytest.raises(DrklError, match=r"Objective 'rkl' has no parameter 'gamma'"):
        load_config(source, ["objective.name=rkl", "objective.gamma=0.5"])


def test_a_stages_objective_too() -> None:
    source = values()
    source["stages"][0]["objective"] = {"name": "drkl", "gamma": 0.9}
    config, notes = load_config(source, ["stages.warmup.objective.name=rkl"])
    assert config.specs()[0].objective.params == {}
    assert notes[0].startswith("stages.warmup.objective.name=rkl: the recipe's gamma=0.9")


def test_stages_change_what_they_name_and_keep_the_rest() -> None:
    first, second, last = load(student={"layers": 3}, loss={"kd_weight": 0.5}).specs()
    assert (first.folder.root, last.folder.root) == (Path("runs/r/stages/01-warmup"), Path("runs/r"))
    assert first.objective.name == "fkl" and first.objective.params == {} and second.objective.params == {"gamma": 0.25}
    assert (first.training.max_steps, second.training.max_steps) == (7, 200)
    assert (first.data.max_tokens, second.data.max_tokens) == (512, 400)
    assert first.loss.kd_weight == second.loss.kd_weight == 0.5
    assert first.student.layers == 3 and first.student.init == "prune"
    assert (second.student.init, second.student.model) == ("pretrained", str(first.folder.student_path))
    assert (last.student.init, last.student.model) == ("pretrained", str(second.folder.student_path))
    # The same batches in the same order: a teacher's remembered states serve every stage.
    assert {spec.run.seed for spec in (first, second, last)} == {0}
    assert last.resolved["student"]["init"] == "prune" and len(last.resolved["stages"]) == 2


COMPOSED = ({"name": "decoupled"}, {"name": "decoupled", "on_target": "fkl", "on_tail": "gjs", "weight": "teacher"})


@pytest.mark.parametrize("objective", [*({"name": name} for name in OBJECTIVES), *COMPOSED], ids=str)
def test_the_objective_of_a_resolved_config_is_the_same(objective: dict[str, Any]) -> None:
    config = load(objective=objective, stages=[])
    written = yaml.safe_load(yaml.safe_dump(resolve(config)))
    again, _ = load_config(written)
    assert again.objective.make() == config.objective.make()
    assert resolve(again) == resolve(config)
    assert set(written["objective"]) >= set(objective)


def test_a_resolved_config_is_a_config_and_resolves_to_itself() -> None:
    config = load()
    resolved = resolve(config)
    assert resolved["run"]["device"] == "cpu"
    assert resolved["training"]["precision"] in ("fp32", "bf16") and resolved["teacher"]["dtype"] in ("fp32", "bf16")
    assert resolved["objective"]["tail"] == "rkl"
    again, _ = load_config(yaml.safe_load(yaml.safe_dump(resolved)))
    assert resolve(again) == resolved
    for spec in config.specs()[:-1]:
        stage, _ = load_config(spec.resolved)
        assert resolve(stage) == spec.resolved


@pytest.mark.parametrize(
    ("key", "meant", "place"),
    [
        ("trainig.max_steps=5", "training", "trainig"),
        ("run.nam=x", "name", "run.nam"),
        ("teacher.modell=x", "model", "teacher.modell"),
        ("student.layer=2", "layers", "student.layer"),
        ("data.eval_pth=x", "eval_path", "data.eval_pth"),
        ("loss.temprature=2", "temperature", "loss.temprature"),
        ("training.max_step=2", "max_steps", "training.max_step"),
        ("evaluation.prompt=2", "prompts", "evaluation.prompt"),
        ("analysis.watch_evry=2", "watch_every", "analysis.watch_evry"),
        ("stages.warmup.trainin={}", "training", "stages.0.trainin"),
        ("stages.0.training.max_step=2", "max_steps", "stages.0.training.max_step"),
        ("stages.more.data.max_token=2", "max_tokens", "stages.1.data.max_token"),
        ("stages.more.loss.kd_wait=2", "kd_weight", "stages.1.loss.kd_wait"),
    ],
)
def test_an_unknown_key_at_every_level(key: str, meant: str, place: str) -> None:
    message = refusal(key)
    assert message.startswith(f"{place}: unknown key. Did you mean {meant!r}? Known here: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.name=drlk", "objective: There is no objective 'drlk'. Did you mean 'drkl'? Known: "),
        ("objective.gama=1", "Objective 'drkl' has no parameter 'gama'"),
        ("objective.gama=1", "Did you mean 'gamma'?"),
        ("stages.warmup.objective.name=fk", "stages.0.objective: There is no objective 'fk'. Did you mean 'fkl'?"),
        ("objective.gamma=0.0", "drkl.gamma is 0.0; expected greater than 0"),
        ("objective.tail=drkl", "objective"),
        ("objective.name=null", "objective.name: input should be a valid string, got None"),
    ],
)
def test_an_unknown_objective_or_field(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    "override",
    [
        "training.max_steps=0",
        "training.max_steps=2.5",
        "training.max_steps=many",
        "training.learning_rate=-1",
        "training.learning_rate=.nan",
        "training.learning_rate=.inf",
        "training.tokens_per_step=0",
        "training.precision=fp8",
        "training.early_stop_patience=0",
        "loss.temperature=0",
        "loss.kd_weight=1.5",
        "run.seed=-1",
        "run.seed=4294967296",
        "run.device=tpu",
        "run.name=a/b",
        "run.name=..",
        "run.name=''",
        "student.dtype=fp16",
        "evaluation.sampling_temperature=0",
        "analysis.watch_every=0",
        "analysis.watch_positions=0",
        "evaluation.samples_per_prompt=0",
        "data.max_prompt_tokens=0",
        "teacher.dtype=int8",
    ],
)
def test_values_out_of_range(override: str) -> None:
    section, key = override.split(".")[0], override.split("=")[0]
    places = {"": ""} | ({"stages.warmup.": "stages.0."} if section in ("training", "loss", "data") else {})
    for where, place in places.items():
        message = refusal(where + override)
        assert message.startswith(f"{place}{key}: ")
        assert "got " in message and "pydantic" not in message


def test_save_every_is_a_multiple_of_eval_every() -> None:
    message = refusal("training.save_every=30", "training.eval_every=20")
    assert message.startswith("training: save_every is 30 and eval_every 20; save_every has to be a multiple")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=1", "seed is set by run.seed"),
        ("max_steps=1", "max_steps is set by training.max_steps"),
        ("output_dir=x", "output_dir is set by run.dir and run.name"),
        ("per_device_train_batch_size=4", "is set by training.per_device_train_batch_size"),
        ("bf16=true", "bf16 is set by training.precision"),
        ("metric_for_best_model=eval_rkl", "is set by the held-out loss"),
        ("resume_from_checkpoint=x", "is set by resuming the run"),
        ("wait_decay=1", "has no field 'wait_decay'. Did you mean 'weight_decay'?"),
        ("save_total_limit=1", "has to be at least 2"),
    ],
)
def test_training_arguments_that_are_not_free(argument: str, message: str) -> None:
    assert message in (found := refusal(f"training.arguments.{argument}"))
    assert found.startswith("training.arguments: ")
    assert message in refusal(f"stages.warmup.training.arguments.{argument}")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {}}, "data: Expected exactly one of path (a file) and dataset"),
        ({"data": {"path": "a", "dataset": "b"}}, "got both"),
        (
            {"data": {"path": "a", "max_prompt_tokens": 256, "max_tokens": 100}},
            "max_tokens (100) must be larger than max_prompt_tokens (256)",
        ),
        ({"data": None}, "data: input should be a valid dictionary"),
        ({"teacher": None}, "objective 'drkl' compares with a teacher, but teacher is null"),
        ({"teacher": None, "objective": {"name": "ce"}, "stages": []}, "name a model in student.model"),
        ({"teacher": None, "loss": {"kd_weight": 0}, "stages": []}, "name a model in student.model"),
        ({"student": {"init": "pretrained"}}, "student.model names no model"),
        ({"student": {"init": "pretrained", "model": "m", "layers": 3}}, "student: layers is set, but init is"),
        ({"student": {"config": {"hidden_size": 8}}}, "student: config is set, but init is 'prune'"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages have the same name: a, a"),
        ({"stages": [{}]}, "stages.0.name: is missing"),
        ({"stages": 5}, "stages: input should be a valid list, got 5"),
        ({"stages": [5]}, "stages.0: input should be"),
        ({"run": [1, 2]}, "run: input should be"),
    ],
)
def test_sections_that_do_not_fit(sections: dict[str, Any], message: str) -> None:
    assert message in refusal(**sections)


def test_what_is_missing_is_named() -> None:
    assert refusal(source={"run": {"name": "x"}}) == "data: is missing"


@pytest.mark.parametrize("source", [{1: 2, "data": {"path": "x"}}, {"run": {1: 2}, "data": {"path": "x"}}])
def test_keys_that_are_no_text(source: dict[Any, Any]) -> None:
    assert refusal(source=source)


def test_long_values_are_cut_in_a_message() -> None:
    assert len(refusal(f"training.max_steps={'x' * 5000}")) < 200


def test_every_problem_is_told_at_once() -> None:
    message = refusal("training.max_steps=0", "run.nam=x")
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "expected section.key=value, e.g. training.max_steps=50"),
        ("=5", "expected section.key=value"),
        ("training.max_steps=[1", "is not valid yaml"),
        ("stages.nope.loss.temperature=2", "There is no stage 'nope'; the config's stages: 0 (warmup), 1 (more)."),
        ("stages.2.name=x", "There is no stage '2'"),
        ("run.name.x=1", "run.name: input should be a valid string"),
    ],
)
def test_overrides_that_cannot_be_set(override: str, message: str) -> None:
    assert message in refusal(override)


def test_an_override_into_a_stage_that_is_none() -> None:
    assert "there is no section to set this in, only 5" in refusal("stages.0.name=x", stages=[5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid yaml"),
        (b"a: 1\n b: 2", "is not valid yaml"),
        (b"- 1\n- 2", "holds a list; expected `key: value` lines"),
        (b"just words", "holds a str"),
        (b"", "data: is missing"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"run: !!python/object/apply:os.getcwd []", "is not valid yaml"),
    ],
)
def test_a_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert message in refusal(source=path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    assert refusal(source=tmp_path / "no.yaml") == f"There is no file {str(tmp_path / 'no.yaml')!r}."
    assert "Cannot read" in refusal(source=tmp_path)


def test_every_key_is_described() -> None:
    described = {key: (default, meaning) for key, default, meaning in describe_keys()}
    assert described["training.max_steps"] == (
        "200",
        "Number of optimiser steps; left out where num_train_epochs is given.",
    )
    assert described["data.path"][0] == "null" and described["stages[].name"][0] == "required"
    assert {key.split(".")[0] for key in described} == {*Config.model_fields, "stages[]"}
    assert all(meaning and "\n" not in meaning for _, meaning in described.values())


def test_what_is_watched_is_so_in_every_stage_and_takes_a_teacher() -> None:
    assert Config.model_fields["analysis"].get_default(call_default_factory=True).watch_every is None
    specs = load("analysis.watch_every=20").specs()
    assert [spec.resolved["analysis"]["watch_every"] for spec in specs] == [20, 20, 20]
    student = {"init": "pretrained", "model": "m"}
    message = refusal("analysis.watch_every=20", teacher=None, objective={"name": "ce"}, student=student, stages=[])
    assert "analysis.watch_every looks at what pushes the student towards its teacher, but teacher is null" in message


def test_a_folder_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"run": {"dir": "~/runs", "name": "x"}, "data": {"path": "bundled:dolly"}}
    config, _ = load_config(values | {"teacher": {"model": "t"}})
    assert config.specs()[-1].folder.root == tmp_path / "runs" / "x"
