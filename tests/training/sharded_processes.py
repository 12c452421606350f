"""Started by test_sharded in every process: trains sharded students, and writes down what came of each."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import TrainerCallback

from drkl.errors import DrklError
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny
from tests.models.pair_processes import blocks
from tests.training.test_trainer import make_trainer, rows

TOKENS, STEPS, RATE = 60, 4, 1e-2
FP32 = STEPS * RATE * TOKENS * 2**-23
"""Of plain gradient descent: the order in which a gradient below 1 is summed over the tokens of a step costs an ulp for
each of them, and it is taken so many times with this rate. bf16 has 16 bits less."""
BF16 = FP32 * 2**16
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
    """Who shards the student, and how: the caller, accelerate or nobody."""
    teacher_by: str = "nobody"
    """Who shards the teacher: the caller, drkl or nobody."""
    export: str = "adapter"
    count: int = 9
    tolerance: float | None = None
    """Of the weights and the log, where it is not that of float64."""


ANSWERS = {"rollout_share": 1.0, "rollout_max_new_tokens": 4}
CASES = {
    "tied": Case(),
    "untied": Case(student=lambda: tiny.llama(1, layers=2, **UNTIED).double()),
    "frozen": Case(arguments={"freeze_embeddings": True}),
    "frozen untied": Case(
        student=lambda: tiny.llama(1, layers=2, **UNTIED).double(), arguments={"freeze_embeddings": True}
    ),
    "hybrid": Case(by="caller, hybrid"),
    "at once": Case(by="caller, at once"),
    "head by itself": Case(student=lambda: tiny.llama(1, layers=2, **UNTIED).double(), by="caller, head by itself"),
    "lora": Case(student=lambda: lora(tiny.llama(1, layers=2).double())),
    "lora merged": Case(student=lambda: lora(tiny.llama(1, layers=2).double()), export="merged"),
    "checkpointing": Case(arguments={"activation_checkpointing": True}),
    "accumulation": Case(arguments={"gradient_accumulation_steps": 3}),
    "fp32": Case(
        student=lambda: tiny.llama(1, layers=2),
        teacher=lambda: tiny.llama(9),
        arguments={"optim": "sgd", "max_grad_norm": 0.0},
        tolerance=FP32,
    ),
    "bf16 compute": Case(
        student=lambda: tiny.llama(1, layers=2),
        teacher=lambda: tiny.llama(9),
        arguments={"precision": "bf16", "optim": "sgd", "max_grad_norm": 0.0},
        tolerance=BF16,
    ),
    "bf16 weights": Case(
        student=lambda: tiny.llama(1, layers=2).bfloat16(),
        teacher=lambda: tiny.llama(9).bfloat16(),
        arguments={"precision": "bf16", "optim": "sgd", "max_grad_norm": 0.0},
        tolerance=BF16,
    ),
    "teacher": Case(by="nobody", teacher_by="drkl", arguments={"gradient_accumulation_steps": 2}, count=3),
    "teacher remembers": Case(
        by="nobody", teacher_by="drkl", arguments={"teacher_remember_mb": 1, "same_batches": True, "max_steps": 8}
    ),
    "teacher untied": Case(teacher=lambda: tiny.llama(9, **UNTIED).double(), teacher_by="drkl"),
    "held-out batches": Case(teacher_by="drkl", arguments={"per_device_eval_batch_size": 2}),
    "answers to a teacher in pieces": Case(by="nobody", teacher_by="drkl", arguments=ANSWERS),
    "both by the caller": Case(teacher_by="caller"),
    "accelerate": Case(by="accelerate"),
    "accelerate untied": Case(student=lambda: tiny.llama(1, layers=2, **UNTIED).double(), by="accelerate"),
    "accelerate frozen": Case(by="accelerate", arguments={"freeze_embeddings": True}),
    "accelerate lora": Case(student=lambda: lora(tiny.llama(1, layers=2).double()), by="accelerate"),
    "accelerate merged": Case(student=lambda: lora(tiny.llama(1, layers=2).double()), by="accelerate", export="merged"),
    "accelerate checkpointing": Case(by="accelerate", arguments={"fsdp_config": {"activation_checkpointing": True}}),
    "accelerate checkpointing by transformers": Case(by="accelerate", arguments={"activation_checkpointing": True}),
    "accelerate accumulation": Case(by="accelerate", arguments={"gradient_accumulation_steps": 3}),
    "accelerate bf16": Case(
        student=lambda: tiny.llama(1, layers=2),
        teacher=lambda: tiny.llama(9),
        by="accelerate",
        arguments={"precision": "bf16", "optim": "sgd", "max_grad_norm": 0.0},
        tolerance=BF16,
    ),
    "accelerate pieces": Case(
        by="accelerate", teacher_by="drkl", arguments={"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    ),
    "packed": Case(teacher_by="drkl", arguments={"padding_free": True, "activation_checkpointing": True}),
    "accelerate packed": Case(by="accelerate", arguments={"padding_free": True}),
    "plain": Case(by="nobody"),
    "few rows": Case(arguments={"gradient_accumulation_steps": 2}, count=3),
    "t5": Case(
        student=lambda: tiny.t5(1, layers=2).double(),
        teacher=lambda: tiny.t5(9).double(),
        arguments={"disable_dropout": True},
    ),
}


@contextmanager
def accelerate_on_a_gpu() -> Iterator[None]:
    """Inside, accelerate takes the CPU for a GPU, where it shards; what it then does is its own."""
    backend, environment = PartialState._prepare_backend, {"ACCELERATE_TORCH_DEVICE": "cpu"}

    def prepare(self: PartialState, *args: Any, **words: Any) -> tuple[str, DistributedType]:
        return backend(self, *args, **words)[0], DistributedType.MULTI_GPU

    def barrier(device_ids: Any = None) -> None:
        wait()

    wait = dist.barrier
    with (
        mock.patch.object(PartialState, "_prepare_backend", prepare),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(dist, "barrier", barrier),
    ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


REFUSED: dict[str, tuple[Case, str]] = {
    "parts": (Case(by="caller, parts"), "fully_shard was applied to parts of the student"),
    "each by itself": (Case(by="caller, each by itself"), "sharded over 1 of 2 processes"),
    "by columns": (Case(by="caller, by columns"), "not by torch.distributed.fsdp.fully_shard"),
    "answers": (Case(arguments=ANSWERS), "fully_shard cuts the student's weights over the processes"),
    "answers, accelerate": (Case(by="accelerate", arguments=ANSWERS), "FSDP cuts the student's weights"),
    "answers of a teacher": (
        Case(by="nobody", teacher_by="drkl", arguments=ANSWERS | {"rollout_source": "teacher"}),
        "the teacher's weights are cut over the processes",
    ),
}


def shard(model: Any, how: str = "") -> None:
    """As PyTorch's own tutorial does it, each layer and then the model, or in another way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "each by itself":
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "own"))["own"]
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))
    if how == "head by itself":
        fully_shard(model.lm_head, mesh=mesh)
    for block in blocks(model) if how != "at once" else ():
        if how == "by columns":
            parallelize_module(block.mlp.up_proj, mesh, ColwiseParallel())
        else:
            fully_shard(block, mesh=mesh)
    if how not in ("parts", "by columns"):
        fully_shard(model, mesh=mesh)


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def make(folder: Path, case: Case) -> DistillationTrainer:
    """The trainer of a case; with one process nothing is sharded."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    student, teacher = case.student(), case.teacher()
    if several and case.by.startswith("caller"):
        shard(base_of(student), case.by.removeprefix("caller").removeprefix(", "))
    if several and case.teacher_by == "caller":
        shard(teacher)
    settings: dict[str, Any] = {
        "max_steps": STEPS, "tokens_per_step": TOKENS, "eval_steps": 2, "save_steps": 2, "save_strategy": "steps",
        "max_grad_norm": 0.05, "learning_rate": RATE, "save_total_limit": 9, "ddp_backend": "gloo" if several else None,
    }  # fmt: skip
    if case.by == "accelerate" and several:
        settings |= {"fsdp": True}
    settings |= {name: value for name, value in case.arguments.items() if several or name != "fsdp_config"}
    if case.teacher_by == "drkl":
        settings |= {"teacher_shard": several}
    kind = base_of(student).config.is_encoder_decoder
    data, heldout = ([replace(row, encoder_decoder=kind) for row in rows(count)] for count in (case.count, 5))
    trainer = make_trainer(folder, data, model=student, teacher=teacher, heldout=heldout, **settings)
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
        case = REFUSED[name][0] if mode == "refused" else CASES[name]
        try:
            with accelerate_on_a_gpu() if case.by == "accelerate" else nullcontext():
                found[name] = train(folder / name.replace(" ", "-"), case, mode)
        except DrklError as error:
            found[name] = str(error)
        dist.barrier()
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
