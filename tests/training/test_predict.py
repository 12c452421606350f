"""The parts of a run's memory, against the tensors of the run itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drkl.errors import DrklError
from drkl.training.estimate import memory_of
from drkl.training.memory import Memory
from drkl.training.run import Listener, cache_states, prepare
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny
from tests.training import tiny_runs


def predicted(values: dict[str, Any], processes: int | None = None) -> Memory:
    return memory_of(tiny_runs.specs(values), processes)[-1]


def trained(values: dict[str, Any]) -> DistillationTrainer:
    """The trainer after a run, its last gradients kept."""
    prepared = prepare(tiny_runs.specs(values), Listener())
    trainer = prepared.trainer(prepared.specs[-1])
    trainer.train()
    return trainer


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def of_the_optimiser(trainer: DistillationTrainer) -> int:
    return size(
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"student": {"freeze_embeddings": True}},
    "lora": {"peft": {"r": 4}},
    "bf16": {"student": {"dtype": "bf16"}},
    "sgd": {"training": {"arguments": {"optim": "sgd"}}},
    "adafactor": {"training": {"arguments": {"optim": "adafactor"}}},
    "foreach": {"training": {"arguments": {"optim": "adamw_torch"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_gradients_and_the_optimiser_are_those_of_the_run(tmp_path: Path, name: str) -> None:
    values = tiny_runs.config(tmp_path, **SETTINGS[name])
    memory, trainer = predicted(values), trained(values)
    update = memory.moments["update"]
    student = trainer.pair.student
    teacher = trainer.pair.teacher.model  # type: ignore[union-attr]
    assert update["student_weights"] == size([*student.parameters(), *student.buffers()])
    assert update["gradients"] == size(p for p in student.parameters() if p.requires_grad)
    assert update["teacher_weights"] == size([*teacher.parameters(), *teacher.buffers()])
    found = memory.moments["loss"].get("optimiser", 0)
    state = of_the_optimiser(trainer)
    steps = 4 * len(trainer.optimizer.state)  # a number for each weight: how often it was updated
    assert state - steps <= found <= state + steps


@pytest.mark.slow
def test_kinds_of_teachers_hold_what_they_hold(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    live = predicted(values).moments["loss"]
    for kind in ("hidden", "topk"):
        cache_states(tiny_runs.specs(values), tmp_path / kind, kind=kind, k=4 if kind == "topk" else None)
    hidden = predicted(tiny_runs.config(tmp_path, teacher={"cache": str(tmp_path / "hidden")}))
    topk = predicted(tiny_runs.config(tmp_path, teacher={"cache": str(tmp_path / "topk")}))
    assert hidden.moments["loss"]["teacher_weights"] == tiny.VOCAB * 16 * 4 < live["teacher_weights"]
    assert "teacher_weights" not in topk.moments["loss"] and "teacher" not in topk.moments
    assert topk.moments["loss"]["loss"] < hidden.moments["loss"]["loss"]


@pytest.mark.slow
def test_what_is_divided_between_processes(tmp_path: Path) -> None:
    def of(sharding: dict[str, Any], processes: int = 8) -> dict[str, int]:
        values = tiny_runs.config(tmp_path, training={"arguments": sharding, "tokens_per_step": 960})
        return dict(predicted(values, processes).moments["update"])

    one, plain = of({}, 1), of({})
    assert plain["buckets"] == plain["gradients"] == one["gradients"] and "buckets" not in one
    fully = of({"fsdp": True})
    for part in ("student_weights", "gradients", "optimiser"):
        assert fully[part] == -(-one[part] // 8)
    assert fully["teacher_weights"] == one["teacher_weights"] and "buckets" not in fully
    second = of({"deepspeed": {"zero_optimization": {"stage": 2}}})
    assert second["student_weights"] == one["student_weights"] and second["gradients"] == fully["gradients"]
    third = of({"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert third["student_weights"] == fully["student_weights"]


@pytest.mark.slow
def test_a_sharded_run_gathers_the_largest_layer_and_what_is_outside_of_layers(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, training={"arguments": {"fsdp": True}, "precision": "fp32"})
    memory = predicted(values, 2)
    student = tiny.llama(layers=2)
    layer = sum(p.numel() for p in student.model.layers[0].parameters())
    whole = sum(p.numel() for p in student.parameters())
    assert memory.moments["loss"]["gathered"] == 4 * (2 * layer + whole - 2 * layer)
    assert "gathered" not in memory.moments["update"]


@pytest.mark.slow
def test_another_device_is_foreseen_without_it(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path, run={"device": "cuda"}, training={"precision": "auto"})
    if not torch.cuda.is_available():
        with pytest.raises(DrklError, match=r"run.device is 'cuda'"):
            predicted(values)
    memory = predicted(values, 4)
    assert (memory.device, memory.processes) == ("cuda", 4) and memory.peak_bytes > 0


@pytest.mark.slow
def test_longer_rows_and_checkpointing_change_the_activations_alone(tmp_path: Path) -> None:
    def of(**training: Any) -> dict[str, int]:
        return dict(predicted(tiny_runs.config(tmp_path, training=training)).moments["loss"])

    short, long = of(tokens_per_step=60), of(tokens_per_step=480)
    again = of(tokens_per_step=480, gradient_checkpointing=True)
    assert 4 < long["activations"] / short["activations"] < 16
    assert again["activations"] < long["activations"] / 3
    assert short["optimiser"] == long["optimiser"] == again["optimiser"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5, tiny.bart])
def test_language_models_of_each_kind_are_foreseen_without_rules_of_thumb(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    tiny.save(make(), tmp_path / "teacher")
    tiny_runs.write_rows(tmp_path / "data.jsonl")
    memory = predicted(tiny_runs.config(tmp_path, rollouts={"share": 0.5, "max_new_tokens": 4}))
    assert memory.notes == ()
    assert {"teacher", "loss", "backward", "update", "answers"} <= memory.moments.keys()


def test_a_family_that_cannot_be_run_without_numbers_goes_by_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("drkl.training.predict.hidden_states", refuse)
    memory = predicted(tiny_runs.config(tmp_path))
    assert "LlamaForCausalLM cannot be run without numbers" in memory.notes[0]
    assert memory.moments["loss"]["activations"] > 0 and memory.moments["backward"]["gradients"] > 0


@pytest.mark.slow
def test_what_a_student_is_made_from(tmp_path: Path) -> None:
    def of(**student: Any) -> dict[str, int]:
        return dict(predicted(tiny_runs.config(tmp_path, student=student)).moments.get("start", {}))

    numbers = sum(p.numel() for p in tiny.llama().parameters())
    teacher = str(tmp_path / "teacher")
    assert of(layers=2)["start"] == 4 * numbers
    assert of(layers=2, dtype="bf16")["start"] == (2 + 4) * numbers
    assert of(init="pretrained", model=teacher, layers=None) == {}
    assert of(init="pretrained", model=teacher, layers=None, dtype="bf16")["start"] == 4 * numbers
    assert of(init="random", layers=2) == {}
