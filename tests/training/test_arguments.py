"""`DistillationConfig`: its defaults, what contradicts itself, and what means nothing here."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

import drkl
from drkl.errors import DrklError
from drkl.training.arguments import DistillationConfig
from drkl.training.trl import objective_of


def make(tmp_path: Path, **fields: Any) -> DistillationConfig:
    return DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_it_is_a_training_arguments_with_our_defaults(tmp_path: Path) -> None:
    config = make(tmp_path)
    assert isinstance(config, TrainingArguments) and drkl.DistillationConfig is DistillationConfig
    found = {name: getattr(config, name) for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed")}
    assert found == {"learning_rate": 5e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 0}
    assert config.lr_scheduler_type == "cosine" and config.logging_steps == 10 and config.report_to == []
    assert config.tokens_per_step == 1024 and config.per_device_train_batch_size is None
    assert config.max_steps == -1 and config.num_train_epochs == 3
    assert (config.eval_steps, config.save_steps, config.save_total_limit) == (50, 100, 2)
    assert config.load_best_model_at_end is True and config.metric_for_best_model == "eval_loss"


@pytest.mark.parametrize(("steps", "warmup"), [(200, 10), (90, 4), (7, 1)])
def test_the_warm_up_is_a_twentieth_of_the_steps(tmp_path: Path, steps: int, warmup: int) -> None:
    assert make(tmp_path).get_warmup_steps(steps) == warmup
    assert make(tmp_path, warmup_steps=3).get_warmup_steps(steps) == 3
    assert make(tmp_path, warmup_steps=0).get_warmup_steps(steps) == 0


@pytest.mark.parametrize(
    ("given", "precision", "bf16", "fp16"),
    [
        ({"bf16": True}, "bf16", True, False),
        ({"bf16": False}, "fp32", False, False),
        ({"precision": "fp32"}, "fp32", False, False),
        ({"precision": "bf16"}, "bf16", True, False),
    ],
)
def test_flags_and_precision_mean_one_thing(
    tmp_path: Path, given: dict[str, Any], precision: str, bf16: bool, fp16: bool
) -> None:
    config = make(tmp_path, **given)
    assert (config.precision, config.bf16, config.fp16) == (precision, bf16, fp16)
    assert dataclasses.replace(config, learning_rate=1e-4).precision == precision


@pytest.mark.parametrize(
    ("given", "evaluate", "save", "best"),
    [
        ({}, ("steps", 50), ("steps", 100), True),
        ({"save_strategy": "no"}, ("steps", 50), ("no", 100), False),
        ({"save_strategy": "epoch"}, ("epoch", 50), ("epoch", 100), True),
        ({"eval_strategy": "no"}, ("no", 50), ("steps", 100), False),
        ({"eval_steps": 30}, ("steps", 30), ("steps", 60), True),
        ({"save_steps": 20}, ("steps", 20), ("steps", 20), True),
        ({"eval_steps": 30, "save_steps": 50}, ("steps", 30), ("steps", 50), False),
        ({"eval_strategy": "steps", "save_strategy": "epoch"}, ("steps", 50), ("epoch", 100), False),
    ],
)
def test_the_best_is_kept_where_it_is_known(
    tmp_path: Path, given: dict[str, Any], evaluate: Any, save: Any, best: bool
) -> None:
    config = make(tmp_path, **given)
    assert (config.eval_strategy, config.eval_steps) == evaluate
    assert (config.save_strategy, config.save_steps) == save
    assert config.load_best_model_at_end is best


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_device_train_batch_size": 8, "tokens_per_step": 512}, "Give rows or tokens, not both"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected a whole number of at least 1"),
        ({"tokens_per_step": -1}, "tokens_per_step is -1; expected a whole number of at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected a whole number of at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; expected a number above 0"),
        ({"max_steps": 0}, "max_steps is 0; expected a number of steps, or -1"),
        ({"objective": "rlk"}, "There is no objective 'rlk'. Did you mean 'rkl'"),
        ({"objective_params": {"gama": 1}}, "Objective 'drkl' has no parameter 'gama'"),
        ({"objective": "rkl", "beta": 0.5}, "beta is TRL's name for an objective"),
        ({"beta": 1.5}, r"beta is 1.5; expected a number in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0: input should be greater than 0"),
        ({"kd_weight": 2}, "kd_weight is 2: input should be less than or equal to 1"),
        ({"turns": "first"}, "turns is 'first'; expected 'last' or 'all'"),
        ({"max_tokens": 100, "max_prompt_tokens": 100}, r"max_tokens \(100\) must be larger than max_prompt_tokens"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both set"),
        ({"bf16": True, "precision": "fp32"}, "bf16 is set and precision is 'fp32'"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected auto, fp32, bf16 or fp16"),
        ({"precision": "fp16"}, "The precision is fp16, which needs CUDA, but the device is cpu; use bf16"),
        ({"load_best_model_at_end": True, "eval_steps": 30, "save_steps": 50}, "needs a held-out loss at every check"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 means nothing here"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True means nothing here"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True means nothing here: a resumed run goes on"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches means nothing here"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches means nothing here"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True means nothing here"),
        ({"push_to_hub": True}, "push_to_hub=True means nothing here: call save_model"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last goes with per_device_train_batch_size"),
        ({"learning_rte": 1e-3}, "has no field 'learning_rte'. Did you mean 'learning_rate'"),
        ({"lr_scheduler_type": "zigzag"}, "DistillationConfig: zigzag is not a valid SchedulerType"),
    ],
)
def test_what_is_refused_says_so(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        make(tmp_path, **fields)


def test_a_run_has_a_folder() -> None:
    with pytest.raises(DrklError, match="output_dir is missing: name the run folder"):
        DistillationConfig()


@pytest.mark.parametrize(("beta", "expected"), [(0, ("fkl", {})), (1.0, ("rkl", {})), (0.3, ("gjs", {"beta": 0.3}))])
def test_beta_of_trl_is_an_objective(tmp_path: Path, beta: float, expected: Any) -> None:
    config = make(tmp_path, beta=beta)
    assert (config.objective, config.objective_params) == expected == objective_of(beta)


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    def halves(student_logp: torch.Tensor, teacher_logp: torch.Tensor | None, labels: Any = None) -> torch.Tensor:
        assert teacher_logp is not None
        return 0.5 * (student_logp.exp() - teacher_logp.exp()).pow(2).sum(-1)

    config = make(tmp_path, objective=halves)
    logp = torch.zeros(2, 3).log_softmax(-1)
    assert config.make_objective()(logp, logp).tolist() == [0.0, 0.0]
    assert "halves" in config.to_json_string()
    assert pickle.loads(pickle.dumps(config)).output_dir == str(tmp_path)


def test_an_objective_object(tmp_path: Path) -> None:
    config = make(tmp_path, objective=drkl.make_objective("drkl", gamma=0.2))
    assert config.make_objective().gamma == 0.2 and config.to_dict()["objective"] == "drkl"


def test_a_command_line_of_transformers_is_read() -> None:
    line = "--output_dir x --objective drkl --lr_scheduler_type linear --eval_strategy no"
    params = ["--objective_params", '{"gamma": 0.1}']
    (config,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses([*line.split(), *params])
    assert config.lr_scheduler_type == "linear"
    assert config.make_objective().gamma == 0.1
    assert config.eval_strategy == "no"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1; expected a number of at least 0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"eval_steps": 0}, "eval_steps is 0; expected a number above 0"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"objective_params": "gamma"}, "objective_params is 'gamma'; expected a dict"),
        ({"metric_for_best_model": "eval_agreement"}, "the held-out loss, eval_loss, decides"),
        ({"greater_is_better": True}, "greater_is_better=True means nothing here"),
        ({"early_stop_patience": 1, "eval_strategy": "no"}, "early_stop_patience counts held-out losses"),
    ],
)
def test_numbers_outside_their_domain(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=re.escape(message)):
        DistillationConfig("x", use_cpu=True, **fields)


def test_the_loss_may_be_named_as_what_decides() -> None:
    for name in ("loss", "eval_loss", None):
        assert DistillationConfig("x", metric_for_best_model=name, greater_is_better=False).greater_is_better is False


@pytest.mark.parametrize(("fields", "rows"), [({}, None), ({"per_device_train_batch_size": 8}, 8)])
def test_deepspeed_has_a_number_of_rows_to_multiply_with(
    tmp_path: Path, fields: dict[str, Any], rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    settle = TrainingArguments.__post_init__

    def watched(self: Any) -> None:
        seen.append(self.per_device_train_batch_size)
        settle(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", watched)
    args = DistillationConfig(output_dir=str(tmp_path), **fields)
    assert (seen, args.per_device_train_batch_size) == ([rows or 1], rows)
