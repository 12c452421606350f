"""Faults of numbers and memory, planted into a command of `tests.faults.forked.Runner` before it begins."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback


def _on_trainer(callback: TrainerCallback) -> None:
    """Give a callback to every trainer that the command makes."""
    from drkl.training.trainer import DistillationTrainer

    own = DistillationTrainer._own_callbacks

    def with_it(self: Any, *args: Any) -> Any:
        callback.trainer = self  # type: ignore[attr-defined]
        return [*own(self, *args), callback]

    DistillationTrainer._own_callbacks = with_it  # type: ignore[method-assign]


class _Plant(TrainerCallback):
    """Makes numbers of a training NaN, or infinite."""

    def __init__(self, what: str, steps: list[int], value: float) -> None:
        self.what, self.steps, self.value = what, steps, value

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def now() -> bool:
            return state.global_step + 1 in self.steps

        def spoil(module: nn.Module, given: Any, output: Any) -> Any:
            return output * self.value if module.training and now() else output

        if self.what == "states":
            model.model.layers[0].mlp.register_forward_hook(spoil)
        if self.what == "gradient":
            weight = model.model.layers[1].mlp.up_proj.weight
            weight.register_hook(lambda grad: grad * self.value if now() else grad)
        if self.what == "teacher's states":
            layer = self.trainer.teacher.model.model.layers[0].mlp  # type: ignore[attr-defined]
            student = self.trainer.student  # type: ignore[attr-defined]
            layer.register_forward_hook(
                lambda module, given, output: output * self.value if student.training and now() else output
            )

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step + 1 not in self.steps:
            return
        with torch.no_grad():
            if self.what == "weight":
                model.model.layers[1].mlp.up_proj.weight[0, 0] = self.value
            if self.what == "teacher's weight":
                self.trainer.teacher.model.model.norm.weight[0] = self.value  # type: ignore[attr-defined]
            if self.what == "optimiser":
                next(iter(optimizer.state.values()))["exp_avg"][0] = self.value
            if self.what == "learning rate":
                optimizer.param_groups[0]["lr"] = self.value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "last weights" and state.global_step in self.steps:
            with torch.no_grad():
                model.model.norm.weight[0] = self.value


def numbers(what: str, steps: list[int], value: str = "nan") -> None:
    """Plant numbers at some steps, counted from 1."""
    _on_trainer(_Plant(what, steps, float(value)))


class _AtBegin(TrainerCallback):
    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.what()


def memory(where: str, positions: int, kind: str = "cuda") -> None:
    """Let memory run out in forward passes of more positions: in ``training`` or ``eval`` mode, or while ``loading``.

    Args:
        where: one of these, or ``trials`` (eval mode, also as a model is tried), or ``update``, of the optimiser.
        positions: for which there is room.
        kind: ``cuda``, ``cpu`` or ``python``.
    """
    error = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."),
        "python": MemoryError(),
    }[kind]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    if where == "update":
        _on_trainer(_AtBegin(lambda: setattr(torch.optim.AdamW, "step", fail)))
        return
    if where == "loading":
        PreTrainedModel.from_pretrained = classmethod(fail)  # type: ignore[method-assign,assignment]
        return
    call = PreTrainedModel.__call__

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        large = ids is not None and ids.numel() > positions
        if large and self.training == (where == "training") and (where == "trials" or not _is_tried()):
            raise error
        return call(self, *args, **kwargs)

    PreTrainedModel.__call__ = guarded  # type: ignore[method-assign]


_TRIALS = ("models/check.py", "models/decoding.py", "models/packing.py", "teachers/stops.py")


def _is_tried() -> bool:
    """Whether a model is only tried or asked for a few tokens, as it is before all else."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(_TRIALS):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _End(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def numbers_and_end(what: str, steps: list[int], value: str, end: int) -> None:
    """The same, and the process is killed as a step ends."""
    numbers(what, steps, value)
    _on_trainer(_End(end))
