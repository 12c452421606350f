"""Started by test_sharded in every process: trains sharded students, and writes down what came of each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from drkl.errors import DrklError
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny
from tests.models.pair_processes import blocks
from tests.training.test_trainer import make_trainer, rows

UNTIED = {"tie_word_embeddings": False}


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return adapted.to(next(model.parameters()).dtype)


@dataclass(frozen=True)
class Case:
    """A student, how it is trained, and how it is sharded where there are several processes."""

    student: Callable[[], Any] = lambda: tiny.llama(1, layers=2).double()
    teacher: Callable[[], Any] = lambda: tiny.llama(9).double()
    arguments: dict[str, Any] = field(default_factory=dict)
    by: str = "caller"
    """Who shards the student: the caller, accelerate or nobody."""
    teacher_by: str = "nobody"
    """Who shards the teacher: the caller, drkl or nobody."""
    export: str = "adapter"
    count: int = 9
    peft_config: Any = None


CASES = {
    "tied": Case(),
    "untied": Case(student=lambda: tiny.llama(1, layers=2, **UNTIED).double()),
    "frozen": Case(arguments={"freeze_embeddings": True}),
    "frozen untied": Case(
        student=lambda: tiny.llama(1, layers=2, **UNTIED).double(), arguments={"freeze_embeddings": True}
    ),
    "lora": Case(student=lambda: lora(tiny.llama(1, layers=2).double())),
    "lora merged": Case(student=lambda: lora(tiny.llama(1, layers=2).double()), export="merged"),
    "checkpointing": Case(arguments={"activation_checkpointing": True}),
    "accumulation": Case(arguments={"gradient_accumulation_steps": 3}),
    "teacher": Case(by="nobody", teacher_by="drkl", arguments={"gradient_accumulation_steps": 2}, count=3),
    "teacher remembers": Case(
        by="nobody", teacher_by="drkl", arguments={"teacher_remember_mb": 1, "same_batches": True, "max_steps": 8}
    ),
    "teacher untied": Case(teacher=lambda: tiny.llama(9, **UNTIED).double(), teacher_by="drkl"),
    "both by the caller": Case(teacher_by="caller"),
    "plain": Case(by="nobody"),
    "few rows": Case(arguments={"gradient_accumulation_steps": 2}, count=3),
    "t5": Case(
        student=lambda: tiny.t5(1, layers=2).double(),
        teacher=lambda: tiny.t5(9).double(),
        arguments={"disable_dropout": True},
    ),
}


def shard(model: Any) -> None:
    """As PyTorch's own tutorial does it: each layer, then the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def make(folder: Path, case: Case) -> DistillationTrainer:
    """The trainer of a case; with one process nothing is sharded."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    student, teacher = case.student(), case.teacher()
    if several and case.by == "caller":
        shard(base_of(student))
    if several and case.teacher_by == "caller":
        shard(teacher)
    settings: dict[str, Any] = {
        "max_steps": 4, "tokens_per_step": 60, "eval_steps": 2, "save_steps": 2, "save_strategy": "steps",
        "max_grad_norm": 0.05, "learning_rate": 1e-2, "save_total_limit": 9, "ddp_backend": "gloo" if several else None,
    }  # fmt: skip
    if case.by == "accelerate" and several:
        settings |= {"fsdp": True}
    if case.teacher_by == "drkl":
        settings |= {"teacher_shard": several}
    kind = base_of(student).config.is_encoder_decoder
    data, heldout = ([replace(row, encoder_decoder=kind) for row in rows(count)] for count in (case.count, 5))
    trainer = make_trainer(folder, data, model=student, teacher=teacher, heldout=heldout, **settings | case.arguments)
    trainer.record.export = case.export
    return trainer


def numbers(trainer: DistillationTrainer) -> list[dict[str, float]]:
    names = ("loss", "eval_loss", "grad_norm", "entropy", "eval_nll", "step")
    return [{name: float(line[name]) for name in names if name in line} for line in trainer.state.log_history]


class Stop(TrainerCallback):
    """Ends a run after its second step, as a machine that is taken away."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def train(folder: Path, case: Case, mode: str = "whole") -> dict[str, Any]:
    """Train and save a case; what was logged, and whether the student was in pieces.

    In mode ``begin`` the run is cut off after its checkpoint of step 2, and in mode ``resume`` it goes on from there.
    """
    trainer = make(folder, case)
    if mode == "begin":
        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=mode == "resume" or None)
    weights = list(trainer.student.parameters())
    sharded = all(isinstance(weight, DTensor) for weight in weights)
    if mode != "begin":
        trainer.save_model()
    return {"log": numbers(trainer), "sharded": sharded, "parameters": sum(weight.numel() for weight in weights)}


def main(folder: Path, mode: str, names: list[str]) -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = train(folder / name.replace(" ", "-"), CASES[name], mode)
        except DrklError as error:
            found[name] = str(error)
        dist.barrier()
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
