"""`drkl.evaluate` and `drkl.compare` with models in memory, as a notebook calls them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from drkl.analysis.analyze import analyze
from drkl.errors import DrklError
from drkl.evaluation.comparison import compare
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.evaluate import Settings, evaluate
from drkl.evaluation.result import Evaluation
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs

QUICK: Any = {"prompts": 3, "samples_per_prompt": 2, "max_new_tokens": 4, "sweep": (0.5, 1.0)}
ROWS = [{"prompt": f"w{i} w{i + 2}", "response": f"w{i + 1} w{(3 * i) % 20}"} for i in range(8)]
TEXTS = [{"text": f"w{i} w{i + 1}", "label": tiny_classifiers.CLASSES[i % 2]} for i in range(10)]


def snapshot(model: PreTrainedModel) -> Any:
    weights = {name: (p.detach().clone(), p.requires_grad, p.device, p.grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    generation = getattr(model, "generation_config", None)
    return weights, modes, copy.deepcopy(model.config.to_dict()), generation and generation.to_dict()


def same(a: Any, b: Any) -> bool:
    weights = all(
        torch.equal(a[0][name][0], b[0][name][0]) and a[0][name][1:] == b[0][name][1:] for name in a[0].keys() | b[0]
    )
    return weights and a[1:] == b[1:]


def pairs(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, Any, list[dict[str, str]]]:
    if kind == "classifier":
        student, teacher = tiny_classifiers.make("llama", 2), tiny_classifiers.make("llama", 1)
        return student, teacher, tiny_classifiers.tokenizer(), TEXTS
    make = getattr(tiny, kind)
    return make(1, layers=2), make(0), tiny.tokenizer(), ROWS


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "classifier"))]
)
def test_models_in_memory_are_measured_and_handed_back_as_they_were(kind: str, tmp_path: Path) -> None:
    student, teacher, tokenizer, rows = pairs(kind)
    student.train()
    next(iter(student.parameters())).requires_grad_(False)
    before = [snapshot(model) for model in (student, teacher)]
    result = evaluate(student, teacher, rows, tokenizer, **QUICK)
    assert all(same(snapshot(model), old) for model, old in zip((student, teacher), before, strict=True))
    assert result.models == ["teacher", "student"] and (result["rkl"].value or 0) > 0
    low, high = result["nll"].interval or (0, 0)
    assert low <= (result["nll"].value or 0) <= high
    assert result.task == ("classification" if kind == "classifier" else "generation")
    assert result.settings["models"]["student"] == f"in memory: {type(student).__name__}"
    assert {finding.id for finding in result.findings} >= {"overconfident_by_teacher", "overconfident_by_data"}
    # The same as from folders, by the same path.
    saver = tiny_classifiers if kind == "classifier" else tiny
    folders = [saver.save(model, tmp_path / name) for model, name in ((student, "s"), (teacher, "t"))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = evaluate(folders[0], folders[1], file, output_dir=tmp_path / "out", dtype=torch.float32, **QUICK)
    assert named.numbers.values["student"] == pytest.approx(result.numbers.values["student"], abs=1e-6)
    assert named.samples == result.samples and named.name == "out"
    assert Evaluation.load(tmp_path / "out").numbers == named.numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_student_with_an_adapter_is_measured_with_it() -> None:
    from peft import LoraConfig, get_peft_model

    student, teacher, tokenizer, rows = pairs("llama")
    plain = evaluate(student, teacher, rows, tokenizer, prompts=0)["rkl"].value or 0
    wrapped: Any = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    unchanged = evaluate(wrapped, teacher, rows, tokenizer, prompts=0)["rkl"].value
    assert unchanged == pytest.approx(plain, abs=1e-6), "an adapter begins as nothing"
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    assert abs((evaluate(wrapped, teacher, rows, tokenizer, prompts=0)["rkl"].value or 0) - plain) > 1e-4


@pytest.mark.slow
def test_rows_of_every_kind() -> None:
    student, teacher, tokenizer, rows = pairs("llama")
    ids = [{"id": f"row-{i + 1}", **row} for i, row in enumerate(rows)]
    expected = evaluate(student, teacher, ids, tokenizer, prompts=0)
    for given in (Dataset.from_list(ids), Dataset.from_list(rows), tuple(rows)):
        assert evaluate(student, teacher, given, tokenizer, prompts=0).numbers == expected.numbers
    from drkl.data.rows import rows_from

    tokenised, _ = rows_from(ids, tokenizer, max_prompt_tokens=48, max_tokens=96)
    assert evaluate(student, teacher, tokenised, tokenizer, prompts=0).numbers == expected.numbers
    few = evaluate(student, teacher, rows, tokenizer, prompts=0, max_rows=3)
    assert few.settings["data"]["heldout_rows"] == 3


@pytest.mark.slow
def test_without_a_teacher_and_compared() -> None:
    student, teacher, tokenizer, rows = pairs("llama")
    alone = evaluate(student, None, rows, tokenizer, **QUICK)
    assert alone.models == ["student"] and alone["rkl"].value is None and alone["nll"].value is not None
    assert {f.id: f.answer for f in alone.findings}["overconfident_by_teacher"] == "not_applicable"
    a, b = (evaluate(model, teacher, rows, tokenizer, **QUICK) for model in (student, teacher))
    found = compare(a, b)
    assert {f.id: f.answer for f in found.findings}["b_better_rkl"] == "yes"
    assert "Reverse KL" in str(found) and str(found).startswith("A: ")


def test_the_keyword_arguments_are_the_fields_of_the_config() -> None:
    assert set(Settings.__annotations__) == set(EvaluationConfig.model_fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "There is no setting 'prompt' of an evaluation; .*Did you mean 'prompts'"),
        ({"samples_per_prompt": 0}, "samples_per_prompt: .*; got 0"),
        ({"rows": None}, "Expected exactly one of rows and suites; got neither"),
        ({"suites": ["dolly"]}, "exactly one of rows and suites; got both"),
        ({"processing_class": None}, "processing_class is missing"),
        ({"student": 3}, "A int came as a model; expected a transformers PreTrainedModel"),
        ({"teacher": "RUN"}, r"is a run folder\. drkl\.evaluate_run"),
        ({"output_dir": "RUN"}, "output_dir '.*' is a run folder"),
        ({"output_dir": "FILE"}, "output_dir '.*' is a file"),
        ({"protocol": "x"}, "There is no protocol 'x'"),
        ({"teacher": "classifier"}, "is a language model and the teacher .* a classifier"),
        ({"teacher": "t5"}, "is a decoder-only model and the teacher"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "file").write_text("")
    student, teacher, tokenizer, rows = pairs("llama")
    names = {
        "RUN": tmp_path / "run", "FILE": tmp_path / "file", "classifier": tiny_classifiers.make(), "t5": tiny.t5(),
    }  # fmt: skip
    given = {"student": student, "teacher": teacher, "rows": rows, "processing_class": tokenizer, **QUICK}
    given |= {key: names.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(DrklError, match=message):
        evaluate(**given)


@pytest.mark.slow
def test_a_run_by_name(tmp_path: Path) -> None:
    from drkl.run_models import evaluate_run

    values = tiny_runs.config(tmp_path, training={"max_steps": 1})
    run = tiny_runs.train(values)
    found = evaluate_run(run.root, prompts=2, samples_per_prompt=1, max_new_tokens=3, sweep=())
    assert found.models == ["teacher", "before", "student"] and found.name == "r"
    assert (run.root / "eval.json").is_file() and found.settings["sampling_temperature"] == 1
    assert Evaluation.load(run.root).name == "r"


@pytest.mark.slow
def test_tokenizer_is_another_name_for_processing_class() -> None:
    student, teacher, tokenizer, rows = pairs("llama")
    quick: Any = {"prompts": 1, "samples_per_prompt": 1, "max_new_tokens": 2, "sweep": ()}
    assert evaluate(student, teacher, rows[:2], tokenizer=tokenizer, **quick)["rkl"].value is not None
    for call in (evaluate, analyze):
        with pytest.raises(DrklError, match="tokenizer and processing_class are two names for one thing"):
            call(student, teacher, rows, tokenizer, tokenizer=copy.copy(tokenizer))  # type: ignore[operator]
