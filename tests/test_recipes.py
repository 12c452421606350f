"""Every recipe that ships, with tiny models and bundled rows in the place of those that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from drkl import recipes
from drkl.cli import main
from drkl.config import load_config
from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training.run import distill
from tests.models import tiny

RECIPES = recipes.FOLDER
ALL = sorted(RECIPES.rglob("*.yaml"))
SMALL = ["run.device=cpu", "training.precision=fp32", "training.tokens_per_step=300", "training.eval_rows=2"]

LONG = ["data.max_prompt_tokens=900", "data.max_tokens=1000"]
"""A tiny tokenizer needs more tokens."""


def opt(seed: int = 0, **changes: Any) -> PreTrainedModel:
    settings = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2}
    settings |= {"num_hidden_layers": 2, "max_position_embeddings": 600, "word_embed_proj_dim": 16, "pad_token_id": 0}
    return OPTForCausalLM(OPTConfig(**(settings | changes))).eval()


def steps(recipe: Path, count: int = 2) -> list[str]:
    """Overrides that make every stage of a recipe so short."""
    values = yaml.safe_load(recipe.read_text())
    prefixes = ["training", *(f"stages.{stage['name']}.training" for stage in values.get("stages", ()))]
    return [f"{p}.{key}={count}" for p in prefixes for key in ("max_steps", "eval_every", "save_every")]


def run(recipe: Path, root: Path, *overrides: str) -> RunFolder:
    config, _ = load_config(recipe, [*SMALL, *steps(recipe), f"run.dir={root}", *overrides])
    return distill(config.specs())


def rows(name: str, count: int = 12) -> list[str]:
    return [f"data.path=bundled:{name}", f"data.eval_path=bundled:{name}-eval", f"data.max_rows={count}"]


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_a_recipe_is_a_config_and_says_how_to_run_it(recipe: Path) -> None:
    config, notes = load_config(recipe)
    assert config.specs() and not notes
    assert f"drkl distill {recipe.stem}" in recipe.read_text()
    assert load_config(recipe.stem)[0] == config
    assert config.run.name == recipe.stem
    if recipe.parent.name == "paper":
        assert "Not run at full size by us." in recipe.read_text()


def test_recipes_are_listed_with_what_they_do() -> None:
    known = recipes.recipe_names()
    assert list(known) == sorted(path.stem for path in ALL) and "quickstart" in known
    assert known["quickstart"].startswith("SmolLM2-135M-Instruct to ten of its thirty layers")
    assert all(20 < len(description) < 130 and "drkl distill" not in description for description in known.values())


def test_the_repository_has_the_recipes_as_files_too() -> None:
    link = Path(__file__).parents[1] / "recipes"
    if not link.is_dir():
        pytest.skip("a source archive has no links")
    for recipe in ALL:
        path = link / recipe.relative_to(RECIPES)
        assert path.samefile(recipe) and recipes.find_recipe(path) == path


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert recipes.find_recipe("quickstart") == recipes.find_recipe(Path("quickstart")) == RECIPES / "quickstart.yaml"
    (tmp_path / "dialogue").write_text("data: {path: 'bundled:sgd'}")
    assert recipes.find_recipe("dialogue") == Path("dialogue")
    assert load_config("dialogue")[0].run.name == "run"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", r"no recipe, and no file, 'quikstart'; the recipes are banking77, .*Did you mean 'quickstart'\?"),
        ("./quickstart", "There is no file 'quickstart'"),
        ("quickstart.yaml", "There is no file 'quickstart.yaml'"),
        ("recipes/quickstart.yaml", "There is no file 'recipes/quickstart.yaml' here.* by its name: quickstart"),
        ("recipes/paper/opt-6.7b-to-1.3b.yaml", "by its name: opt-6.7b-to-1.3b"),
        ("recipes/other.yaml", "There is no file 'recipes/other.yaml'"),
    ],
)
def test_a_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DrklError, match=message):
        load_config(name)


def test_the_command_lists_and_prints_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["drkl", "recipes", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    lines = printed().splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.recipe_names())
    assert printed("quickstart") == (RECIPES / "quickstart.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("gpt2-xl-to-gpt2", lambda seed, width: tiny.gpt2(seed, n_embd=width, n_positions=600), AutoModelForCausalLM),
        pytest.param(
            "opt-6.7b-to-1.3b",
            lambda seed, width: opt(seed, hidden_size=width),
            AutoModelForCausalLM,
            marks=pytest.mark.slow,
        ),
        ("t5-xl-to-t5-base", lambda seed, width: tiny.t5(seed, d_model=width), AutoModelForSeq2SeqLM),
    ],
)
def test_the_articles_pairs_with_stand_ins(
    tmp_path: Path, name: str, make: Callable[[int, int], PreTrainedModel], kind: Any
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tiny.save(make(0, 32), teacher)
    tiny.save(make(1, 16), student)
    models = (f"teacher.model={teacher}", f"student.model={student}", "evaluation.max_new_tokens=4")
    made = run(RECIPES / "paper" / f"{name}.yaml", tmp_path / "runs", *models, *rows("dolly"))
    assert [path.name for path in (made.root / "stages").iterdir()] == ["01-sft"]
    log = [row["loss"] for row in made.read_train_log() if "loss" in row]
    assert log and all(loss > 0 for loss in log)
    kind.from_pretrained(made.student_path)


@pytest.mark.parametrize(("name", "data"), [("dialogue", "sgd"), ("summarise-smollm2", "scitldr")])
@pytest.mark.slow
def test_a_pruned_student_on_the_slice_that_ships(tmp_path: Path, name: str, data: str) -> None:
    teacher = tmp_path / "teacher"
    tiny.save(tiny.llama(max_position_embeddings=1000), teacher)
    models = (f"teacher.model={teacher}", "student.layers=2", *LONG)
    made = run(RECIPES / f"{name}.yaml", tmp_path / "runs", *models, *rows(data))
    AutoModelForCausalLM.from_pretrained(made.student_path)
    described = yaml.safe_load(made.config_path.read_text())
    assert described["data"]["turns"] == ("all" if name == "dialogue" else "last")


def test_a_student_that_learns_on_what_it_writes(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tiny.save(tiny.llama(max_position_embeddings=1000), teacher)
    models = (f"teacher.model={teacher}", "student.layers=2", "rollouts.max_new_tokens=4", "rollouts.eval_prompts=2")
    made = run(RECIPES / "on-policy.yaml", tmp_path / "runs", *models, *LONG, *rows("dolly"))
    AutoModelForCausalLM.from_pretrained(made.student_path)
    assert any(line.get("rollout_share") == 1 for line in made.read_train_log())
    warmup = RunFolder(made.root / "stages" / "01-warmup").read_train_log()
    assert not any("rollout_share" in line for line in warmup)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("gpt-scratch", AutoModelForCausalLM, {"n_embd": 16, "n_head": 2}),
        ("summarise-t5", AutoModelForSeq2SeqLM, {"d_model": 16, "d_kv": 8, "d_ff": 16}),
    ],
)
def test_a_teacher_from_scratch_and_its_student(tmp_path: Path, name: str, kind: Any, config: dict[str, int]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Alice saw {i} rabbits, and {i} rabbits saw Alice run away." for i in range(200)))
    text, data = [f"data.path={book}", f"data.eval_path={book}"], []
    if name == "summarise-t5":
        data, text = [*rows("scitldr"), *LONG], [f"stages.text.{override}" for override in text]
    small = ["tokenizer.vocab_size=400", *(f"student.config.{key}={value}" for key, value in config.items())]
    teacher = run(RECIPES / f"{name}-teacher.yaml", tmp_path / "runs", *small, *text, *data)
    path = f"teacher.model={teacher.student_path}"
    student = run(RECIPES / f"{name}.yaml", tmp_path / "runs", path, *(data or text))
    sizes = [kind.from_pretrained(made.student_path).num_parameters() for made in (teacher, student)]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_a_classifier_from_scratch_and_its_student(tmp_path: Path) -> None:
    data = ["data.path=bundled:banking77", "data.eval_path=bundled:banking77-eval", "tokenizer.vocab_size=400"]
    small = [*data, "student.config.hidden_size=12", "student.config.intermediate_size=12"]
    teacher = run(RECIPES / "banking77-teacher.yaml", tmp_path / "runs", *small)
    path = f"teacher.model={teacher.student_path}"
    student = run(RECIPES / "banking77.yaml", tmp_path / "runs", path, *data[:2])
    models = [AutoModelForSequenceClassification.from_pretrained(made.student_path) for made in (teacher, student)]
    assert [len(model.bert.encoder.layer) for model in models] == [2, 1]
    assert models[0].config.id2label == models[1].config.id2label and models[0].config.num_labels == 77
