"""Settings that need what is not there, that cannot work, and that nothing would read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tests.faults import tiny_run
from tests.faults.conftest import Injected
from tests.faults.forked import Ended, Runner

NEEDS_KWARGS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}
NEEDS: list[tuple[dict[str, Any], str]] = [
    *(({"report_to": name}, "pip install") for name in (
        "wandb", "tensorboard", "mlflow", "comet_ml", "neptune", "trackio", "codecarbon", "clearml", "dagshub", "flyte",
        "dvclive", "swanlab", "azure_ml", "all", ["tensorboard", "wandb"])),
    ({"report_to": "kubeflow"}, "KUBEFLOW_TRAINER_SERVER_URL"),
    ({"report_to": "nothing-there"}, "nothing-there"),
    ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "pip install deepspeed"),
    ({"debug": "tpu_metrics_debug"}, "pip install torch_xla"),
    ({"tf32": True}, "tf32"),
    ({"torch_compile_backend": "banana"}, "banana"),
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optim_args": "nonsense=1"}, "nonsense"),
    ({"optim_args": "banana"}, "banana"),
    ({"optim": "sgd", "optim_args": "momentum=x"}, "sgd"),
    ({"optim": "sgd", "optim_args": "nesterov=maybe"}, "nesterov"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "sgd"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1"),
    ({"optim": "adagrad", "adam_epsilon": 0.5}, "adam_epsilon"),
    ({"optim": "banana"}, "banana"),
    ({"optim_target_modules": "all-linear"}, "optim_target_modules"),
    ({"adam_beta1": 2}, "beta"), ({"adam_beta2": -0.1}, "beta"), ({"adam_epsilon": -1}, "epsilon"),
    ({"lr_scheduler_kwargs": {"bad": 1}}, "bad"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}}, "lr_end"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "warm-up"),
    ({"lr_scheduler_type": "banana"}, "banana"),
    ({"deepspeed": {}}, "deepspeed"), ({"deepspeed": "nofile.json"}, "nofile.json"),
    ({"accelerator_config": "nofile.json"}, "nofile.json"),
    ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "gradient_accumulation_kwargs"),
    ({"accelerator_config": {"even_batches": False}}, "even_batches"),
    ({"fsdp": True}, "fsdp"), ({"fsdp_config": {"fsdp_version": 2}}, "fsdp"),
    ({"parallelism_config": {"tp_size": 2}}, "parallelism_config"),
    ({"ddp_backend": "gloo"}, "launcher"), ({"ddp_timeout": 5}, "ddp_timeout"),
    ({"logging_steps": -1}, "logging_steps"), ({"neftune_noise_alpha": -5}, "neftune_noise_alpha"),
    ({"log_level": "banana"}, "log_level"), ({"log_level_replica": "banana"}, "log_level_replica"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
    ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
    ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor"),
    ({"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "banana"}, "banana"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    ({"dataloader_in_order": False}, "dataloader_in_order"), ({"dataloader_drop_last": True}, "dataloader_drop_last"),
    ({"data_seed": -1}, "data_seed"), ({"eval_delay": -1}, "eval_delay"),
    ({"logging_first_step": "false"}, "logging_first_step"), ({"adam_beta1": "0.9"}, "adam_beta1"),
    ({"torch_compile_mode": "banana"}, "banana"), ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "checkpointing"),
    ({"include_num_input_tokens_seen": "banana"}, "include_num_input_tokens_seen"),
    ({"debug": "banana"}, "banana"), ({"hub_strategy": "banana"}, "hub_strategy"),
    *(({name: value}, name) for name, value in {
        "enable_jit_checkpoint": True, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
        "label_names": ["x"], "length_column_name": "x", "run_name": "x", "project": "x", "trackio_space_id": "x",
        "hub_model_id": "x", "hub_token": "x", "hub_strategy": "end", "hub_always_push": True, "hub_revision": "x",
        "hub_private_repo": True, "push_to_hub": True, "prediction_loss_only": True, "batch_eval_metrics": True,
        "include_for_metrics": ["loss"], "eval_do_concat_batches": False, "eval_use_gather_object": True,
        "eval_accumulation_steps": 2, "do_predict": True, "fp16_full_eval": True, "bf16_full_eval": True,
        "use_cache": True, "save_on_each_node": True, "average_tokens_across_devices": False, "local_rank": 3,
        "ignore_data_skip": True, "label_smoothing_factor": 0.1, "auto_find_batch_size": True,
        "save_total_limit": 1, "trackio_bucket_id": "x", "trackio_static_space_id": "x",
        "resume_from_checkpoint": "x", "train_sampling_strategy": "group_by_length", "remove_unused_columns": True,
        "metric_for_best_model": "x", "greater_is_better": True, "save_only_model": True,
    }.items()),
]  # fmt: skip
WORKS: list[tuple[dict[str, Any], str]] = [
    ({"optim": "sgd"}, ""), ({"optim": "adafactor"}, ""), ({"optim": "adagrad"}, ""), ({"optim": "rmsprop"}, ""),
    ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"}, "sgd"), ({"optim": "adamw_torch"}, "rounded"),
    ({"adam_beta1": 0.5}, ""), ({"adam_beta2": 0.9}, ""), ({"adam_epsilon": 0.1}, ""), ({"weight_decay": 0.9}, ""),
    ({"max_grad_norm": 0.001}, ""), ({"data_seed": 7}, ""), ({"gradient_accumulation_steps": 2}, "rounding"),
    ({"neftune_noise_alpha": 5}, ""), ({"warmup_steps": 3}, ""), ({"lr_scheduler_kwargs": {"num_cycles": 3}}, ""),
    *(({"lr_scheduler_type": name.value}, "") for name in SchedulerType
      if name.value not in NEEDS_KWARGS | {"cosine", "cosine_with_restarts"}),
    ({"lr_scheduler_type": "cosine_with_restarts"}, "same"),  # with one cycle it is the cosine
    ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, ""),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}}, ""),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.005}}, ""),
    *(({name: value}, "same") for name, value in {
        "torch_empty_cache_steps": 1, "logging_strategy": "no", "logging_first_step": True, "log_on_each_node": False,
        "include_num_input_tokens_seen": "all", "log_level": "error", "disable_tqdm": False, "eval_on_start": True,
        "dataloader_num_workers": 1, "dataloader_pin_memory": False, "ddp_bucket_cap_mb": 5, "do_train": True,
        "debug": "underflow_overflow", "skip_memory_metrics": False, "full_determinism": True, "tf32": False,
        "restore_callback_states_from_checkpoint": True, "eval_delay": 2, "save_strategy": "best",
    }.items()),
]  # fmt: skip
"""What is taken: it changes the weights, or leaves them the same."""
_BRING = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
_IN_BACKWARD = ("_layerwise", "lomo")
OPTIMIZERS = [
    ({"optim": name.value}, "pip install" if not name.value.endswith(_IN_BACKWARD) else "gradients")
    for name in OptimizerNames
    if name.value not in _BRING
]
SCHEDULES = [({"lr_scheduler_type": name}, "lr_scheduler_kwargs") for name in sorted(NEEDS_KWARGS)]
ALL_NEEDS = [*NEEDS, *OPTIMIZERS, *SCHEDULES]


def some(rows: list[Any]) -> Any:
    """Some of the rows, drawn with a fixed seed, in a quick test; all of them in a slow one."""
    quick = pytest.param(random.Random(1).sample(rows, 8), id="some")
    return pytest.mark.parametrize("rows", [quick, pytest.param(rows, id="all", marks=pytest.mark.slow)])


def refuse_all(rows: list[Any], runner: Runner, root: Path, injected: Injected) -> None:
    config = tiny_run.write(root)
    for number, (arguments, word) in enumerate(rows):
        words = [tiny_run.override(f"training.arguments.{name}", value) for name, value in arguments.items()]
        with injected(arguments):
            done = runner.call("distill", config, f"run.name=r{number}", *words)
            tiny_run.check_refused(done, root / "runs" / f"r{number}", word)


@pytest.mark.fault(
    group="Settings",
    fault="A setting needs a package, a device or a value that is not there",
    does="One message with the line that installs it, before the teacher is loaded and before anything is written.",
)
@some(ALL_NEEDS)
def test_what_is_not_there(rows: list[Any], runner: Runner, tmp_path: Path, injected: Injected) -> None:
    refuse_all(rows, runner, tmp_path, injected)


@pytest.mark.fault(
    group="Settings",
    fault="A setting of transformers that cannot work with drkl, that nothing reads, or whose value is none of its own",
    does="Refused by name, with the reason, before the teacher is loaded and before anything is written.",
)
@some(REFUSED)
def test_what_cannot_work(rows: list[Any], runner: Runner, tmp_path: Path, injected: Injected) -> None:
    refuse_all(rows, runner, tmp_path, injected)


@pytest.mark.slow
@pytest.mark.fault(
    group="Settings",
    fault="A setting of transformers that works",
    does="It has its effect: on the weights, or on the log and nothing else.",
)
def test_what_works_has_its_effect(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = tiny_run.write(tmp_path)
    weights = {}
    for number, (arguments, kind) in enumerate([({}, "base"), ({"optim": "sgd"}, "sgd"), *WORKS]):
        words = [tiny_run.override(f"training.arguments.{name}", value) for name, value in arguments.items()]
        words.append("training.max_steps=5")  # so that schedules differ
        with injected(arguments):
            tiny_run.check_done(runner.call("distill", config, f"run.name=r{number}", *words))
            found = (tmp_path / "runs" / f"r{number}" / "student" / "model.safetensors").read_bytes()
            if number < 2:
                weights[kind] = found
            elif kind == "same":
                assert found == weights["base"], "other weights"
            elif kind != "rounded":
                assert found != weights.get(kind, weights["base"]), "without an effect"


PEFT: list[dict[str, Any]] = [
    {"r": 0}, {"r": "eight"}, {"r": True}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": "x"},
    {"lora_dropout": -1}, {"lora_dropout": 1.0}, {"alpha": 4}, {"peft_type": "IA3"}, {"revision": "main"},
    {"inference_mode": True}, {"target_modules": ["nothing"]}, {"target_modules": "["}, {"target_modules": ["lm_head"]},
    {"layers_to_transform": [99]}, {"layers_to_transform": "x"}, {"rank_pattern": {"nothing": 4}},
    {"rank_pattern": {"[": 4}}, {"rank_pattern": {"q_proj": -4}}, {"alpha_pattern": {"nothing": 4}},
    {"exclude_modules": ["nothing"]}, {"exclude_modules": "["}, {"exclude_modules": ".*"},
    {"modules_to_save": ["nothing"]}, {"modules_to_save": "norm"}, {"target_parameters": ["nothing"]},
    {"trainable_token_indices": [10**6]}, {"fan_in_fan_out": True}, {"eva_config": {"rho": 2}},
    {"init_lora_weights": "banana"}, {"bias": "banana"}, {"task_type": "banana"}, {"megatron_config": {"a": 1}},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault(
    group="Settings",
    fault="A field of `peft` that names what the student has not, is outside its domain, or would do nothing",
    does="Refused by one message before anything is written.",
)
def test_adapters_that_cannot_be(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = tiny_run.write(tmp_path)
    for number, fields in enumerate(PEFT):
        with injected(fields):
            done = runner.call("distill", config, f"run.name=r{number}", tiny_run.override("peft", fields))
            check_one_message(done, tmp_path / "runs" / f"r{number}", "peft")


def check_one_message(done: Ended, run: Path, word: str) -> None:
    """Refused in one line that has the word, with nothing written."""
    lines = done.err.strip().splitlines()
    assert done.code == 2, f"status {done.code}: {done.err[-300:]}"
    assert len(lines) == 1 and lines[0].startswith("Error: ") and word in lines[0], done.err[-500:]
    assert not run.exists(), "the run folder is there"


@pytest.mark.slow
@pytest.mark.fault(
    group="Settings",
    fault="A server of answers, or of the teacher, that cannot be reached as a run begins",
    does="One message with its address before anything is written, so that the same command can be given again.",
)
def test_servers_that_are_not_there(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config, address = tiny_run.write(tmp_path), "http://127.0.0.1:9"
    answers = {"share": 1.0, "generator": "vllm", "server": address, "server_timeout": 1}
    teacher = {
        "model": "big",
        "server": address,
        "server_timeout": 1,
        "top_k": 8,
        "tokenizer": str(tmp_path / "teacher"),
    }
    for key, value in (("rollouts", answers), ("teacher", teacher)):
        with injected(key):
            words = [tiny_run.override(key, value)]
            if key == "teacher":
                words.append(tiny_run.override("student", {"init": "pretrained", "model": str(tmp_path / "teacher")}))
            check_one_message(runner.call("distill", config, *words), tmp_path / "runs" / "r", address)


MODELS = [
    ("teacher.model_init_kwargs", {"attn_implementation": "flash_attention_2"}, "pip install flash-attn"),
    ("student.model_init_kwargs", {"attn_implementation": "flash_attention_2"}, "pip install flash-attn"),
    ("teacher.model_init_kwargs", {"attn_implementation": "flash_attention_3"}, "pip install kernels"),
    ("teacher.model_init_kwargs", {"attn_implementation": "banana"}, "banana"),
    ("student.model_init_kwargs", {"attn_implementation": "banana"}, "banana"),
    ("teacher.model_init_kwargs", {"attn_implementation": "kernels-community/flash-attn"}, "code on the hub"),
    ("teacher.model_init_kwargs", {"quantization_config": {"load_in_4bit": True}}, "pip install bitsandbytes"),
    ("teacher.model_init_kwargs", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "pip install"),
    ("teacher.model_init_kwargs", {"quantization_config": {"quant_method": "banana"}}, "banana"),
    ("teacher.model_init_kwargs", {"load_in_4bit": True}, "load_in_4bit"),
    ("training.precision", "fp16", "fp16"),
    ("run.device", "cuda", "cuda"),
    ("run.device", "mps", "mps"),
]  # fmt: skip


@pytest.mark.fault(
    group="Settings",
    fault="How a model is to be loaded needs a package or a device that is not there",
    does="One message with the line that installs it, before the teacher is loaded and before anything is written.",
)
def test_models_that_need_something(runner: Runner, tmp_path: Path, injected: Injected) -> None:
    config = tiny_run.write(tmp_path)
    for number, (key, value, word) in enumerate(MODELS):
        with injected(f"{key}: {value}"):
            done = runner.call("distill", config, f"run.name=r{number}", tiny_run.override(key, value))
            tiny_run.check_refused(done, tmp_path / "runs" / f"r{number}", word)
