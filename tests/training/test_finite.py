from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from drkl.errors import DrklError, Halted
from drkl.losses.head import LMHead
from drkl.objectives import make_objective
from drkl.training.arguments import DistillationConfig
from drkl.training.config import TrainingConfig
from drkl.training.faults import Way, find_fault, first_module, gradient_fault, state_faults
from drkl.training.trainer import DistillationTrainer
from tests.models import tiny
from tests.training.test_trainer import make_trainer, poison, rows


class BadAt(TrainerCallback):
    """Makes what a layer gives in training NaN at some steps."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def spoil(module: nn.Module, given: Any, output: Any) -> Any:
            bad = module.training and state.global_step + 1 in self.steps
            return output * math.nan if bad else output

        model.model.layers[0].mlp.register_forward_hook(spoil)


class OnStep(TrainerCallback):
    """Calls a function as a step begins."""

    def __init__(self, step: int, what: Callable[..., None]) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.what(**kwargs)


def trainer_of(tmp_path: Path, *callbacks: TrainerCallback, **arguments: Any) -> DistillationTrainer:
    settings = {"max_steps": 3, "tokens_per_step": 60, "max_grad_norm": 1.0} | arguments
    return make_trainer(
        tmp_path, rows(6), model=tiny.llama(1), teacher=tiny.llama(9), callbacks=list(callbacks), **settings
    )


def log_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept: list[tuple[Any, ...]] = []

    def keep(model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        state = [value.clone() for one in optimizer.state.values() for value in one.values()]
        kept.append(([p.detach().clone() for p in model.parameters()], state, lr_scheduler.last_epoch))

    trainer = trainer_of(tmp_path, BadAt([2]), OnStep(2, keep), OnStep(3, keep), nan="skip", logging_steps=2)
    trainer.train()
    (weights, state, place), (then, state_then, place_then) = kept
    assert all(map(torch.equal, weights, then)) and all(map(torch.equal, state, state_then)) and place == place_then
    first, last = log_of(tmp_path)
    assert first["skipped_steps"] == last["skipped_steps"] == 1 and first["step"] == 2
    apart = trainer_of(tmp_path / "apart", max_steps=1)
    apart.train()
    assert first["loss"] == log_of(tmp_path / "apart")[0]["loss"]  # of the step that was taken
    assert "first in what its 'model.layers.0.mlp' gives. The step is not taken" in caplog.text
    assert "step 2, rows row-" in caplog.text and "(1 in a row, of at most 3)" in caplog.text


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_a_resumed_one_goes_on_counting(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "nan": "skip"}
    whole = trainer_of(tmp_path / "whole", BadAt([1, 2, 4]), max_steps=5, nan_skips=2, **saving)
    whole.train()
    weights = whole.student.state_dict()
    for step in (1, 2):
        again = trainer_of(tmp_path / "whole", BadAt([1, 2, 4]), max_steps=5, nan_skips=2, **saving)
        again.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}")
        assert all(torch.equal(value, weights[name]) for name, value in again.student.state_dict().items())
        assert again._finite.skipped == 3
    resumed = trainer_of(tmp_path / "whole", BadAt([3]), max_steps=5, nan_skips=2, **saving)
    with pytest.raises(
        Halted, match=r"step 3.* 3 steps in a row were not finite, and training\.nan_skips is 2"
    ) as error:
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoints" / "checkpoint-2")
    assert "the last good checkpoint, checkpoint-2, is kept" in str(error.value)


@pytest.mark.parametrize(("whose", "remedy"), [("teacher", "take a copy of it that is whole"), ("student", "lower")])
def test_weights_that_are_broken_are_never_left_out(tmp_path: Path, whose: str, remedy: str) -> None:
    trainer = trainer_of(tmp_path, nan="skip")
    poison(trainer.student if whose == "student" else trainer.teacher.model, "model.norm.weight")
    with pytest.raises(Halted, match=rf"{whose} weight 'model\.norm\.weight'.*there is no checkpoint yet\.") as error:
        trainer.train()
    assert remedy in str(error.value) and (whose == "student" or "learning rate" not in str(error.value))


def test_broken_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for whose in ("model", "teacher"):
        models = {"model": tiny.llama(1), "teacher": tiny.llama(9)}
        poison(models[whose], "model.norm.weight")
        with pytest.raises(
            DrklError, match=rf"^The {whose.replace('model', 'student')}, a LlamaFor.*model\.norm\.weight"
        ):
            make_trainer(tmp_path / "new", rows(3), **models)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_state_of_the_optimiser_and_a_rate_that_are_no_numbers(tmp_path: Path) -> None:
    def spoil(optimizer: Any, **kwargs: Any) -> None:
        next(iter(optimizer.state.values()))["exp_avg"][0] = math.nan

    def no_rate(optimizer: Any, **kwargs: Any) -> None:
        optimizer.param_groups[0]["lr"] = math.nan

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(
        Halted, match=r"After step 2 .*not saved.*optimiser's state exp_avg of 'model\.\S+, and so the st"
    ):
        trainer_of(tmp_path / "a", OnStep(2, spoil), **saving).train()
    assert not list((tmp_path / "a").rglob("checkpoint-*"))
    with pytest.raises(Halted, match=r"Step 3 cannot be taken.*the learning rate, \[nan.*checkpoint-2, is kept"):
        trainer_of(tmp_path / "b", OnStep(3, no_rate), **saving).train()


def test_a_student_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    poison(trainer.student, "model.norm.weight")
    with pytest.raises(
        Halted, match=r"After step 1 the student is not finite, and is not saved.*'model\.norm\.weight'"
    ):
        trainer.save_model()
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("bad", "skipped", "scale"), [([1, 2, 3, 4], 4, 2**12), ([2], 1, 2**15), ([2, 3, 4, 5], 0, 0)])
def test_steps_that_fp16_leaves_out_are_counted(tmp_path: Path, bad: list[int], skipped: int, scale: float) -> None:
    """A scaler on the CPU: the first steps, in which its scale falls, are as many as it needs."""
    trainer = trainer_of(tmp_path, max_steps=6)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    overflows = lambda grad: grad * math.inf if trainer.state.global_step + 1 in bad else grad  # noqa: E731
    trainer.student.model.norm.weight.register_hook(overflows)
    if not scale:
        with pytest.raises(Halted, match=r"step 5.*4 steps in a row.*precision=bf16, or fp32, has the range"):
            trainer.train()
        return
    trainer.train()
    assert scaler.get_scale() == scale and log_of(tmp_path)[-1]["skipped_steps"] == skipped
    assert trainer.lr_scheduler.last_epoch == 6 - skipped


def test_what_is_no_setting() -> None:
    for values in ({"nan": "none"}, {"nan_skips": 0}, {"nan_skips": 1.5}):
        with pytest.raises(DrklError, match=next(iter(values)) + r" is .*; expected "):
            DistillationConfig(output_dir="x", **values)
        with pytest.raises(ValueError, match="nan"):
            TrainingConfig(**values)
    with pytest.raises(DrklError, match="DeepSpeed takes a step before it can be left out"):
        DistillationConfig(output_dir="x", nan="skip", deepspeed={"zero_optimization": {"stage": 1}})


def test_the_first_tensor_is_named() -> None:
    student, objective = tiny.llama(1), make_objective("fkl")
    hidden = torch.zeros(2, 16)
    overflow = (LMHead(torch.full((8, 16), 3e38)), None)
    assert (
        "student logits" in find_fault(Way(student, torch.full((2, 16), 2.0), None, None, objective, overflow)).tensor
    )
    assert "srkl" in find_fault(Way(student, hidden, None, None, objective)).remedy
    student.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output * math.nan)
    ids = torch.tensor([[5, 6]])
    assert "'model.layers.0.mlp'" in first_module(student, lambda: student(ids))
    assert first_module(student, lambda: 1 / 0) == ""  # type: ignore[arg-type,return-value]


def test_the_first_gradient_and_a_state_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert "numbers are finite by themselves" in gradient_fault(model).tensor and not state_faults(optimizer, model)
    model[0].weight.grad[0] = model[1].weight.grad[0] = math.nan  # type: ignore[index,union-attr]
    assert gradient_fault(model).tensor == "the gradient of '1.weight' (and 1 of 5 others)"
    optimizer.state[model[1].bias]["exp_avg_sq"][0] = math.inf
    assert state_faults(optimizer, model) == ["exp_avg_sq of '1.bias'"]
