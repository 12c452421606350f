"""Classification from rows to a student: the loss by hand, whole runs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from drkl import make_objective
from drkl.config import load_config
from drkl.data.classification import LabelledRow
from drkl.data.config import TokenizerConfig
from drkl.data.tokenize import DropReport
from drkl.data.tokenizer import learn_tokenizer
from drkl.errors import DrklError
from drkl.losses.config import LossConfig
from drkl.runs import RunFolder
from drkl.training.arguments import DistillationConfig
from drkl.training.estimate import estimate
from drkl.training.pair import TokenisedRows
from drkl.training.run import Listener
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny, tiny_classifiers
from tests.models.tiny_classifiers import CLASSES
from tests.training import tiny_runs
from tests.training.test_trainer import Gradients

BERT = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"num_hidden_layers": 2, "max_position_embeddings": 64}


def labelled(count: int) -> list[LabelledRow]:
    made = []
    for i in range(count):
        ids = (1, *(6 + (i * 7 + j * 5) % 50 for j in range(1 + (i * 3) % 6)), 2)
        made.append(LabelledRow(f"row-{i}", ids, (i * 2) % 3, ""))
    return made


def by_hand(student: Any, teacher: Any, rows: list[LabelledRow], target: str, loss: LossConfig) -> Tensor:
    """Decoupled reverse KL with gamma 0.5 from its definition, text by text, no batches and no padding."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.tensor([row.ids])
        z = student(input_ids=ids).logits[0]
        with torch.no_grad():
            y = teacher(input_ids=ids).logits[0]
        q, p = torch.softmax(z / loss.temperature, -1), torch.softmax(y / loss.temperature, -1)
        t = int(y.argmax()) if target == "teacher" else row.label
        tail = torch.tensor([i for i in range(3) if i != t])
        value = q[t] * torch.log(q[t] / p[t]) + (1 - q[t]) * torch.log((1 - q[t]) / (1 - p[t]))
        q_tail, p_tail = q[tail] / (1 - q[t]), p[tail] / (1 - p[t])
        value = value + 0.5 * (q_tail * torch.log(q_tail / p_tail)).sum()
        factor = loss.temperature**2 if loss.t2_scaling else 1.0
        observed = torch.softmax(z, -1)[row.label]
        total = total + loss.kd_weight * factor * value - (1 - loss.kd_weight) * torch.log(observed)
    return total / len(rows)


def no_dropout(seed: int, layers: int) -> Any:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": layers}
    return tiny_classifiers.make("bert", seed, **changes).double()


def trainer_of(root: Path, student: Any, teacher: Any, objective: Any, loss: LossConfig, parts: int) -> Any:
    rows = TokenisedRows(labelled(9), DropReport(kept=9))
    settings: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "use_cpu": True, "save_strategy": "no"}
    settings |= {"precision": "fp32", "disable_tqdm": True, "logging_steps": 1, "tokens_per_step": 1000}
    settings |= {"objective": objective, "gradient_accumulation_steps": parts, **loss.model_dump()}
    return DistillationTrainer(
        student,
        teacher,
        DistillationConfig(output_dir=str(root), **settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_classifiers.tokenizer(),
        callbacks=[Gradients()],
    )


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    ("target", "loss"),
    [
        ("teacher", LossConfig()),
        ("label", LossConfig()),
        ("teacher", LossConfig(temperature=2.0, kd_weight=0.7, t2_scaling=True)),
    ],
)
def test_loss_and_gradient_are_those_of_a_loop_by_hand(
    tmp_path: Path, target: str, loss: LossConfig, parts: int
) -> None:
    student, teacher = no_dropout(1, 2), no_dropout(9, 4)
    expected = by_hand(student, teacher, labelled(9), target, loss)
    expected.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    trainer = trainer_of(
        tmp_path, no_dropout(1, 2), teacher, make_objective("drkl", gamma=0.5, target=target), loss, parts
    )
    heldout = trainer.evaluate()
    trainer.train()
    kept = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).first
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert heldout["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert gradients.keys() == kept.keys() and max(float(g.abs().max()) for g in kept.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-5, atol=1e-7)
    assert trainer.num_tokens_seen == 9, "a text counts once"


def test_statistics_are_of_the_class_logits(tmp_path: Path) -> None:
    student, teacher = no_dropout(1, 2), no_dropout(9, 4)
    expected = by_hand(student, teacher, labelled(9), "label", LossConfig(kd_weight=0)).detach()
    trainer = trainer_of(tmp_path, student, teacher, make_objective("fkl"), LossConfig(), 1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert line["fkl"] == pytest.approx(line["loss"], rel=1e-5) and 0 <= line["agreement"] <= 1


def config(root: Path, **sections: Any) -> dict[str, Any]:
    """A classifier from the rows alone; the teacher of the others."""
    base: dict[str, Any] = {
        "task": "classification",
        "run": {"name": "t", "dir": str(root / "runs"), "seed": 3, "device": "cpu"},
        "teacher": None,
        "tokenizer": {"train": "bpe", "vocab_size": 400},
        "student": {"init": "random", "config": BERT},
        "data": {"path": str(write_rows(root / "rows.jsonl")), "max_tokens": 24},
        "objective": {"name": "ce"},
        "training": {
            "max_steps": 4,
            "tokens_per_step": 150,
            "learning_rate": 5e-3,
            "precision": "fp32",
            "eval_every": 2,
            "save_every": 2,
            "arguments": {"logging_steps": 1},
        },
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(base.get(name), dict)
        base[name] = base[name] | section if both else section
    return base


def write_rows(path: Path, labels: tuple[str, ...] = CLASSES) -> Path:
    rows = [
        {"id": f"r{i}", "text": f"{'my' if i % 2 else 'the'} {labels[i % len(labels)]} number {i}", "label": label}
        for i in range(60)
        for label in [labels[i % len(labels)]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def student_of(root: Path, teacher: Path, **sections: Any) -> dict[str, Any]:
    values = {"run": {"name": "s"}, "teacher": {"model": str(teacher), "dtype": "fp32"}, "tokenizer": None}
    values |= {"student": {"init": "prune", "layers": 1, "config": {}}, "objective": {"name": "drkl"}}
    return config(root, **(values | sections))


@pytest.mark.slow
def test_a_teacher_from_the_rows_and_its_students(tmp_path: Path, drkl: Callable[..., str]) -> None:
    """Every command on a run of either kind."""
    made = tiny_runs.train(config(tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(made.student_path)
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(made.student_path).cls_token == "[CLS]"
    assert pipeline("text-classification", model=str(made.student_path))("my card")[0]["label"] in CLASSES
    assert "A text classifier" in (made.student_path / "README.md").read_text()

    path = tiny_runs.write_config(
        student_of(
            tmp_path,
            made.student_path,
            stages=[{"name": "warmup", "objective": {"name": "fkl"}, "training": {"max_steps": 2}}],
        ),
        tmp_path / "s.yaml",
    )
    assert "student:" in drkl("distill", path, "--dry-run")
    drkl("distill", path)
    run = RunFolder(tmp_path / "runs" / "s")
    assert run.read_env()["data"]["train_rows"] == 57 and run.read_env()["vocabulary"] is None
    assert "accuracy" in drkl("evaluate", run.root)
    table = json.loads(run.eval_path.read_text())
    assert table["classes"] == list(CLASSES) and table["teacher"]["agreement"] == 1
    assert {"teacher", "before", "warmup", "student"} <= table.keys() and table["student"]["num_rows"] == 3
    lines = [json.loads(line) for line in run.predictions_path.read_text().splitlines()]
    assert len(lines) == 3 and {"id", "text", "label", "student", "teacher", "teacher_confidence"} <= lines[0].keys()
    shown = drkl("generate", run.root, "--prompt", "my card number")
    assert "teacher" in shown and "student" in shown and "card" in shown
    drkl("evaluate", made.root)
    drkl("report", run.root)
    assert "its teacher" in run.report_path.read_text()


def test_drkl_data_counts_the_classes(tmp_path: Path, drkl: Callable[..., str]) -> None:
    out = drkl("data", tiny_runs.write_config(config(tmp_path), tmp_path / "c.yaml"))
    assert "3 of 3" in out and "texts cut" in out and "57 of 57" in out and "[CLS]" in out and "-> card" in out


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    teacher = tiny_runs.train(config(tmp_path)).student_path
    values = student_of(tmp_path, teacher, training={"max_steps": 6})
    whole = tiny_runs.train(values | {"run": values["run"] | {"name": "whole"}})

    def stop(step: int, of: int, newest: dict[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_runs.train(values, listener=Listener(on_progress=stop))
    assert tiny_runs.weights(tiny_runs.train(values, "resume")) == tiny_runs.weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_other_families_train_too(tmp_path: Path, kind: str) -> None:
    teacher = tiny_classifiers.save(tiny_classifiers.make(kind), tmp_path / "teacher")
    run = tiny_runs.train(student_of(tmp_path, teacher))
    assert AutoModelForSequenceClassification.from_pretrained(run.student_path).config.num_hidden_layers == 1
    assert tiny_runs.steps(run) == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_classes_are_told_that_drkl_is_rkl(tmp_path: Path) -> None:
    pair = ("card", "loan")
    teacher = tiny_classifiers.save(tiny_classifiers.make(classes=pair), tmp_path / "teacher")
    rows = str(write_rows(tmp_path / "two.jsonl", pair))
    said: list[str] = []
    listener = Listener(on_message=said.append)
    losses = []
    for name in ("drkl", "rkl"):
        values = student_of(tmp_path, teacher, run={"name": name}, objective={"name": name}, data={"path": rows})
        run = tiny_runs.train(values, listener=listener)
        losses.append([row["loss"] for row in run.read_train_log() if "loss" in row])
    assert [line for line in said if "every unskewed drkl equals rkl here" in line] == [said[0]]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(DrklError) as error:
        tiny_runs.train(values)
    with pytest.raises(DrklError):
        estimate(load_config(values)[0].specs())
    return str(error.value)


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = tiny_classifiers.save(tiny_classifiers.make(), tmp_path / "teacher")
    other = tiny_classifiers.save(tiny_classifiers.make(classes=("loan", "card", "other")), tmp_path / "other")
    language = tiny.save(tiny.llama(), tmp_path / "language")
    pretrained = {"init": "pretrained", "model": str(other), "config": {}}
    with pytest.raises(DrklError, match="the same classes in another order"):
        tiny_runs.train(student_of(tmp_path, teacher, student=pretrained))
    assert "is no classifier" in refused(student_of(tmp_path, language))
    unknown = str(write_rows(tmp_path / "x.jsonl", (*CLASSES, "mortgage")))
    assert "the label 'mortgage', which is none of the 3 classes" in refused(
        student_of(tmp_path, teacher, data={"path": unknown})
    )
    tiny_classifiers.make().save_pretrained(tmp_path / "strange")
    learnt = learn_tokenizer(TokenizerConfig(vocab_size=270), ["a b"], classifier=True)
    learnt.save_pretrained(tmp_path / "strange")
    message = refused(student_of(tmp_path, teacher, student=pretrained | {"model": str(tmp_path / "strange")}))
    assert "The vocabularies differ" in message and "One batch feeds both models" in message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"peft": {"r": 2}}, "peft is set"),
        ({"data": {"format": "messages"}}, "data.format takes text_label only"),
        ({"data": {"turns": "all"}}, "data.turns is about conversations"),
        ({"data": {"template": "plain"}}, "data.template is about prompts"),
        ({"data": {"path": None, "sources": [{"path": "a", "weight": 2.0}]}}, "data.sources[].weight repeats"),
        ({"student": {"init": "prune", "encoder_layers": 1, "config": {}}}, "student.encoder_layers is about"),
    ],
)
def test_what_does_not_go_with_classification(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as error:
        load_config(student_of(tmp_path, tmp_path / "t", **sections))
    assert f"task is 'classification', and {message}" in str(error.value) and "leave it out" in str(error.value)


def test_a_misspelt_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DrklError, match="task: input should be 'generation' or 'classification', got 'classify'"):
        load_config(config(tmp_path, task="classify"))
