"""Weights in whole runs: of teachers, of students, of checkpoints; each is the file's, or the run does not start."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    TrainerCallback,
)
from transformers import logging as transformers_logging
from typer.testing import CliRunner

import drkl
from drkl.cli import app
from drkl.errors import DrklError
from drkl.models.load import load_model
from drkl.runs import RunFolder
from drkl.training.checkpoints import mark_complete, reached_at
from drkl.training.record import RunRecord
from drkl.training.run import distill
from drkl.training.spec import run_classes
from tests.models import tiny, tiny_classifiers
from tests.training import tiny_runs
from tests.training.test_resume import comparable, cut_off, kill_at_step, reference

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
PEFT: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def mixture() -> PreTrainedModel:
    """Its experts lie in one tensor in memory, and in several in a file."""
    torch.manual_seed(0)
    fields = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
    fields |= {"head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.2, "intermediate_size": 8}
    fields |= {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields)).eval()


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.mark.slow
def test_a_compiled_teacher_is_refused_and_teaches_the_same_once_it_is_renamed(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    shutil.copytree(tmp_path / "teacher", tmp_path / "compiled")
    rewrite(tmp_path / "compiled" / "model.safetensors", lambda w: {f"_orig_mod.{k}": v for k, v in w.items()})
    copied = {"name": "copy", **{k: v for k, v in values["run"].items() if k != "name"}}
    config = tiny_runs.write_config(
        values | {"run": copied, "teacher": {"model": str(tmp_path / "compiled"), "dtype": "fp32"}}, tmp_path / "c.yaml"
    )
    refused = CliRunner().invoke(app, ["distill", str(config)])
    assert isinstance(refused.exception, DrklError) and not (tmp_path / "runs" / "copy").exists()
    message = str(refused.exception)
    assert "Every name has '_orig_mod.' in it: the model was saved while torch.compile was around it" in message
    exec(shlex.split(message.partition("python -c ")[2])[0], {})
    done = CliRunner().invoke(app, ["distill", str(config)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    original = tiny_runs.train(values)
    losses = [
        [row["eval_loss"] for row in run.read_train_log() if "eval_loss" in row]
        for run in (RunFolder(tmp_path / "runs" / "copy"), original)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.usefixtures("rising")
@pytest.mark.parametrize(
    "kind",
    [
        "mixture",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "t5", "untied", "lora of a mixture")),
    ],
)
def test_the_best_checkpoint_is_what_is_saved(tmp_path: Path, kind: str, capfd, monkeypatch) -> None:
    models = {"llama": tiny.llama(layers=2), "t5": tiny.t5(layers=2), "untied": tiny.llama(tie_word_embeddings=False)}
    model = models.get(kind) or mixture()
    tiny.save(model, tmp_path / "teacher")
    tiny_runs.write_rows(tmp_path / "data.jsonl")
    student = {"init": "pretrained", "model": str(tmp_path / "teacher")}
    sections = {"student": student | {"layers": None}, "training": {"max_steps": 4}}
    if kind == "lora of a mixture":
        sections["peft"] = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    states: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **other: Any) -> None:
            states[state.global_step] = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    after: dict[str, Tensor] = {}
    write = RunRecord._write
    monkeypatch.setattr(
        RunRecord, "_write", lambda self, *given: (after.update(self.pair.student.state_dict()), write(self, *given))[1]
    )
    transformers_logging.set_verbosity_warning()
    try:
        specs = tiny_runs.specs(tiny_runs.config(tmp_path, **sections))
        run = distill(specs, on_trainer=lambda trainer: trainer.add_callback(Keep()))
    finally:
        transformers_logging.set_verbosity_error()
    assert run.read_env()["best_step"] == 2 and set(states) == {2, 4}
    assert any(not torch.equal(states[2][key], states[4][key]) for key in states[2])
    assert all(torch.equal(after[key], states[2][key]) for key in states[2])
    assert "missing keys" not in capfd.readouterr().err
    if kind != "lora of a mixture":
        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        saved = auto.from_pretrained(run.student_path).state_dict()
        assert all(torch.equal(saved[key], states[2][key]) for key in states[2])


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, PEFT | {"init_lora_weights": "pissa_niter_2"}])
def test_a_mixture_goes_on_from_its_checkpoint(tmp_path: Path, peft: dict[str, Any] | None) -> None:
    tiny.save(mixture(), tmp_path / "student")
    sections = {"student": {"init": "pretrained", "model": str(tmp_path / "student"), "layers": None}}
    sections |= {} if peft is None else {"peft": peft}
    values, whole = reference(tmp_path, **sections)
    run = cut_off(values, kill_at_step("r", 5))
    assert (run.checkpoints_path / "checkpoint-4").is_dir()
    run = tiny_runs.train(values, mode="resume")
    assert comparable(run) == comparable(whole)
    ours, theirs = (load_file(r.student_path / "model.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if "layers.1." not in k}, r"9 of its weights are missing \(model\.lay"),
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, r"21 of its weights are missing .*20 are not its own"),
        pytest.param(lambda w: w | {"extra": torch.ones(2)}, r"1 are not its own \(extra\)", marks=pytest.mark.slow),
        pytest.param(lambda w: w | {"model.norm.weight": torch.ones(8)}, r"size mismatch", marks=pytest.mark.slow),
        pytest.param(lambda w: {}, r"of its weights are missing", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    values = tiny_runs.config(tmp_path)
    run = cut_off(values, kill_at_step("r", 3))
    checkpoint = run.checkpoints_path / "checkpoint-2"
    rewrite(checkpoint / "model.safetensors", change)
    mark_complete(checkpoint, reached_at(checkpoint))
    with pytest.raises(DrklError, match=words) as error:
        tiny_runs.train(values, mode="resume")
    assert "checkpoint-2' cannot be used: " in str(error.value)


def test_a_checkpoint_cut_off_in_its_weights_is_refused(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    run = cut_off(values, kill_at_step("r", 3))
    path = run.checkpoints_path / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DrklError, match=r"no whole checkpoint .*checkpoint-2: model\.safetensors has [\d,]+ bytes in p"
    ):
        tiny_runs.train(values, mode="resume")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_a_start_that_changes_the_base_is_saved_as_trained(tmp_path: Path, start: str, export: str) -> None:
    tiny.save(tiny.llama(5, layers=2, tie_word_embeddings=False), tmp_path / "other")
    student = {"init": "pretrained", "model": str(tmp_path / "other"), "layers": None}
    peft = PEFT | {"init_lora_weights": start, "export": export}
    run = tiny_runs.train(tiny_runs.config(tmp_path, student=student, peft=peft))
    done = CliRunner().invoke(app, ["evaluate", str(run.root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    losses = {row["step"]: row["eval_rkl"] for row in run.read_train_log() if "eval_rkl" in row}
    measured = json.loads(run.eval_path.read_text())["student"]["rkl"]
    assert measured == pytest.approx(losses[run.read_env()["best_step"]], rel=1e-4)


def trainer(folder: Path, model: Any, **changes: Any) -> drkl.DistillationTrainer:
    rows = [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} w{i}"} for i in range(12)]
    args = drkl.DistillationConfig(
        output_dir=str(folder / "run"), use_cpu=True, precision="fp32", disable_tqdm=True, max_steps=2,
        tokens_per_step=60, max_tokens=64, eval_steps=1, save_steps=1, logging_steps=1,
        **changes.pop("fields", {}),
    )  # fmt: skip
    settings = {"teacher_model": tiny.llama(9), "processing_class": tiny.tokenizer()} | changes
    return drkl.DistillationTrainer(model, args=args, train_dataset=rows, eval_dataset=rows[:4], **settings)


def named(tmp_path: Path) -> PreTrainedModel:
    tiny.save(tiny.llama(5, layers=2, tie_word_embeddings=False), tmp_path / "base")
    return load_model(str(tmp_path / "base"), "fp32")


@pytest.mark.parametrize(
    "start", ["pissa_niter_2", *(pytest.param(start, marks=pytest.mark.slow) for start in (True, "olora"))]
)
def test_an_adapter_made_in_python_is_saved_as_trained(tmp_path: Path, start: Any) -> None:
    model = named(tmp_path)
    made = trainer(tmp_path, model, peft_config=LoraConfig(init_lora_weights=start, **PEFT))
    made.train()
    expected = tiny.logits(model)
    made.save_model()
    torch.testing.assert_close(tiny.logits(load_model(tmp_path / "run" / "student", "fp32")), expected)


def test_a_peft_model_is_checked_like_a_config(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match=r"start \('pissa'\) changed its base model, .*Pass the base model"):
        trainer(tmp_path, get_peft_model(named(tmp_path), LoraConfig(init_lora_weights="pissa", **PEFT)))
    with pytest.raises(DrklError, match=r"'lm_head', the output head"):
        trainer(tmp_path, get_peft_model(named(tmp_path), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])))
    made = trainer(tmp_path, get_peft_model(named(tmp_path), LoraConfig(**PEFT), adapter_name="mine"))
    made.train()
    made.save_model()
    loaded = load_model(tmp_path / "run" / "student", "fp32")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(made.pair.student))


def test_an_adapter_of_a_pruned_student_does_not_name_the_teacher(tmp_path: Path) -> None:
    small = drkl.prune(named(tmp_path), layers=1)
    made = trainer(tmp_path, small, peft_config=LoraConfig(**PEFT))
    made.train()
    made.save_model()
    with pytest.raises(DrklError, match=r"does not say which model it belongs to: set base_model_name_or_path"):
        load_model(tmp_path / "run" / "student", "fp32")


def two_branches(cache: Path) -> dict[str, Any]:
    """A repository whose branch ``classes`` holds a classifier and ``main`` a language model; options for the first."""
    repository = cache / "models--some--model"
    models = {"main": tiny.llama(layers=2), "classes": tiny_classifiers.make("llama")}
    for number, (branch, model) in enumerate(models.items()):
        commit = str(number) * 40
        tiny.save(model, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return {"revision": "classes", "cache_dir": str(cache), "local_files_only": True}


def test_a_revision_decides_what_a_name_is_in_a_config(tmp_path: Path) -> None:
    options = two_branches(tmp_path)
    values = tiny_runs.config(tmp_path, teacher={"model": "some/model", "model_init_kwargs": options})
    assert run_classes(tiny_runs.specs(values | {"task": "classification"})) == tiny_classifiers.CLASSES
    own = {"init": "pretrained", "model": "some/model", "model_init_kwargs": options, "layers": None}
    values = tiny_runs.config(tmp_path, student=own) | {"teacher": None, "task": "classification"}
    values["objective"] = {"name": "ce"}
    assert run_classes(tiny_runs.specs(values)) == tiny_classifiers.CLASSES


def test_a_revision_decides_what_a_name_is(tmp_path: Path) -> None:
    options = two_branches(tmp_path)
    rows = [{"text": f"w{i}", "label": tiny_classifiers.CLASSES[i % 3]} for i in range(12)]
    args = drkl.DistillationConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, precision="fp32", max_steps=1, tokens_per_step=60,
        max_tokens=64, model_init_kwargs=options, teacher_model_init_kwargs=dict(options),
    )  # fmt: skip
    made = drkl.DistillationTrainer(
        "some/model", "some/model", args, rows, processing_class=tiny_classifiers.tokenizer(),
    )  # fmt: skip
    assert isinstance(made.pair.student, type(tiny_classifiers.make("llama")))
    assert made.pair.classes == tiny_classifiers.CLASSES
