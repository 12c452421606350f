"""TRL's names: each is mapped, is a field here too, or is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import HfArgumentParser

from drkl import DistillationConfig
from drkl.errors import DrklError
from drkl.training.trl import REFUSED, RENAMED

DISTILLATION: dict[str, Any] = {
    "learning_rate": 1e-6, "model_init_kwargs": None, "trust_remote_code": False, "teacher_model_name_or_path": None,
    "teacher_model_revision": None, "teacher_model_init_kwargs": None, "disable_dropout": False,
    "remove_unused_columns": False, "max_completion_length": 512, "ds3_gather_for_generation": True,
    "shuffle_dataset": True, "pad_to_multiple_of": "auto", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None,
    "generation_kwargs": None, "chat_template_kwargs": None, "repetition_penalty": 1.0, "cache_implementation": None,
    "use_vllm": False, "vllm_mode": "colocate", "vllm_model_impl": "vllm", "vllm_enable_sleep_mode": False,
    "vllm_structured_outputs_regex": None, "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000, "vllm_server_timeout": 240.0, "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "beta": 1.0,
    "max_tool_calling_iterations": None, "log_completions": False, "num_completions_to_print": None,
    "log_unique_prompts": False, "logging_steps": 10, "bf16": None,
    "lr_scheduler_kwargs": None, "use_liger_kernel": False, "torch_empty_cache_steps": None,
}  # fmt: skip
"""The fields that DistillationConfig of TRL 1.16 declares, with their defaults."""
GKD: dict[str, Any] = {
    "temperature": 0.9, "lmbda": 0.5, "beta": 0.5, "max_new_tokens": 128, "teacher_model_name_or_path": None,
    "teacher_model_init_kwargs": None, "disable_dropout": True, "seq_kd": False, "learning_rate": 2e-5,
    "model_init_kwargs": None, "trust_remote_code": False, "router_aux_loss_coef": None, "chat_template_path": None,
    "dataset_text_field": "text", "dataset_kwargs": None, "dataset_num_proc": None, "eos_token": None,
    "truncation_mode": "keep_start", "packing": False, "packing_strategy": "bfd", "padding_free": False,
    "pad_to_multiple_of": "auto", "eval_packing": None, "completion_only_loss": None, "assistant_only_loss": False,
    "loss_type": "nll", "activation_offloading": False, "pad_token": None,
}  # fmt: skip
"""The same of GKDConfig, but for max_length and shuffle_dataset, whose defaults ask for something else."""


def make(**fields: Any) -> DistillationConfig:
    return DistillationConfig("x", use_cpu=True, precision="fp32", **fields)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "drkl"]


def test_every_default_of_trl_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    config = make(**DISTILLATION)
    assert (config.objective, config.rollouts.share, config.rollouts.max_new_tokens) == ("rkl", 0.0, 512)
    assert said(caplog) == [
        "Warning: rollout_share is 0, so that no answer is sampled and max_completion_length, vllm_server_timeout have "
        "no effect. TRL's DistillationTrainer samples every answer, as rollout_share=1.0 does here (GKDTrainer half: "
        "0.5)."
    ]
    config = make(**GKD)
    assert (config.objective, config.rollouts.share, config.rollouts.max_new_tokens) == ("gjs", 0.5, 128)
    for end in (0, -1):
        assert make(**{name: values[end] for name, (_, values) in REFUSED.items()}).objective == "drkl"


MAPPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_completion_length": 64}, {"max_new_tokens": 64}),
    ({"max_new_tokens": 64}, {"max_new_tokens": 64}),
    ({"max_completion_length": None, "max_new_tokens": 9}, {"max_new_tokens": 9}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"lmbda": 0.25}, {"share": 0.25}),
    ({"lmbda": 0.0}, {"share": 0.0}),
    ({"lmbda": 1}, {"share": 1}),
    ({"lmbda": 1.0, "seq_kd": True}, {"share": 1.0, "source": "student"}),
    ({"lmbda": 0.0, "seq_kd": True}, {"share": 1.0, "source": "teacher"}),
    ({"rollout_share": 0.3, "seq_kd": True}, {"share": 0.3, "source": "teacher"}),
    ({"seq_kd": True}, {"share": 0.0, "source": "teacher"}),
    ({"seq_kd": False}, {"source": "student"}),
    ({"use_vllm": False}, {"generator": "builtin"}),
    ({"use_vllm": True}, {"generator": "vllm", "server": None}),
    ({"use_vllm": True, "vllm_server_base_url": "http://h:1"}, {"generator": "vllm", "server": "http://h:1"}),
    ({"use_vllm": True, "vllm_mode": "server"}, {"server": "http://127.0.0.1:8000"}),
    ({"vllm_mode": "server"}, {"server": None, "generator": "builtin"}),
    ({"vllm_mode": "colocate"}, {"server": None, "generator": "builtin"}),
    ({"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 9}, {"server": "http://127.0.0.1:9"}),
    ({"use_vllm": True, "vllm_server_host": "h", "vllm_server_port": 9}, {"server": "http://h:9"}),
    ({"use_vllm": True, "vllm_server_host": "::"}, {"server": "http://[::1]:8000"}),
    ({"use_vllm": True, "vllm_server_host": "[::1]"}, {"server": "http://[::1]:8000"}),
    ({"vllm_server_base_url": "http://h:1", "vllm_server_host": "other"}, {"server": "http://h:1"}),
    ({"vllm_server_timeout": 3}, {"server_timeout": 3.0}),
]


@pytest.mark.parametrize(("given", "expected"), MAPPED, ids=str)
def test_a_name_of_trl_is_mapped(given: dict[str, Any], expected: dict[str, Any]) -> None:
    rollouts = make(**given).rollouts
    assert {name: getattr(rollouts, name) for name in expected} == expected


def test_every_name_that_is_mapped_is_tried() -> None:
    assert set(RENAMED) <= {name for given, _ in MAPPED for name in given}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_vllm": True, "vllm_mode": "colocate"},
            "vllm_mode='colocate' is TRL's, and not taken here: vLLM runs as",
        ),
        ({"beta": 1.0, "objective": "drkl"}, "beta is TRL's name for an objective and stands in its place"),
        ({"beta": 0.5, "objective": "rkl"}, "beta is TRL's name for an objective and stands in its place"),
        ({"vllm_mode": "inside"}, "vllm_mode is 'inside'; expected 'server'"),
        ({"use_vllm": "yes"}, "use_vllm is 'yes'; expected True or False"),
        ({"seq_kd": 1}, "seq_kd is 1; expected True or False"),
        ({"lmbda": 1.5}, "lmbda is 1.5; expected a number in [0, 1]"),
        ({"lmbda": True}, "lmbda is True; expected a number in [0, 1]"),
        ({"lmbda": "half"}, "lmbda is 'half'; expected a number in [0, 1]"),
        ({"lmbda": 0.5, "seq_kd": True}, "the student writes some of the answers and the teacher all others"),
        ({"lmbda": 0.5, "rollout_share": 0.5}, "lmbda is TRL's name for rollout_share, which is given already"),
        ({"lmbda": 0, "seq_kd": True, "rollout_source": "teacher"}, "seq_kd is TRL's name for rollout_source"),
        ({"max_completion_length": 4, "max_new_tokens": 4}, "max_new_tokens is TRL's name for rollout_max_new_tokens"),
        ({"top_p": 0.5, "rollout_top_p": 0.5}, "top_p is TRL's name for rollout_top_p"),
        ({"use_vllm": False, "rollout_generator": "vllm"}, "use_vllm is TRL's name for rollout_generator"),
        ({"max_completion_length": 0}, "rollout_max_new_tokens is 0: input should be greater than or equal to 1."),
        ({"max_completion_length": 0}, "(max_completion_length in TRL.)"),
        ({"vllm_server_base_url": "h:1"}, "rollout_server is 'h:1': expected an address"),
        ({"vllm_server_host": "http://h"}, "expected an address such as http://127.0.0.1:8000. (vllm_server_host in"),
        ({"vllm_server_host": "h/v1"}, "rollout_server is 'http://h/v1:8000': expected an address"),
        ({"use_vllm": True, "lmbda": 1.0}, "rollout_generator is 'vllm', but rollout_server names no address"),
        ({"use_vllm": True, "vllm_mode": "server", "lmbda": 0.0, "seq_kd": True}, "the server holds the student"),
        ({"top_k": 50}, "top_k=50 is TRL's, and not taken here: answers are sampled from the whole distribution"),
        ({"min_p": 0.1}, "min_p=0.1 is TRL's"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is TRL's"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs={'num_beams': 2} is TRL's"),
        ({"steps_per_generation": 4}, "rollout_refresh_every counts the steps"),
        ({"num_generations": 8}, "a prompt is answered once in each pass"),
        ({"vllm_gpu_memory_utilization": 0.5}, "`vllm serve` takes it as --gpu-memory-utilization"),
        ({"log_completions": True}, "rollouts.jsonl in the run folder keeps answers"),
        ({"max_length": 1024}, "max_tokens counts prompt and response, max_prompt_tokens the prompt alone"),
        ({"packing": True}, "rows are tokenised, cut to max_tokens"),
        ({"teacher_model_server_url": "http://h:1"}, "passed as teacher_model=drkl.ServedTeacher"),
        ({"trust_remote_code": True}, "drkl never runs code that comes with a model"),
        ({"shuffle_dataset": False}, "the rows are shuffled"),
        ({"max_completion_lenght": 5}, "has no field 'max_completion_lenght'"),
    ],
    ids=str,
)
def test_a_name_of_trl_that_says_something_else_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError) as raised:
        make(**given)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_reason_is_given_for_each(name: str) -> None:
    with pytest.raises(DrklError, match=f"{name}='something' is TRL's, and not taken here: [a-z`].*\\. Leave it out"):
        make(**{name: "something"})


BOTH = "TRL's DistillationTrainer uses the one number for both, its GKDTrainer for the sampling alone: set the two."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, None),
        ({"temperature": 0.9}, None),
        ({"temperature": 0.9, "rollout_share": 1.0}, None),
        ({"temperature": 0.9, "lmbda": 1.0}, BOTH),
        ({"temperature": 0.9, "rollout_share": 1.0, "max_completion_length": 9}, BOTH),
        ({"temperature": 0.9, "rollout_sampling_temperature": 0.9, "lmbda": 1.0}, None),
        ({"temperature": 1.0, "lmbda": 1.0}, None),
        ({"lmbda": 0.0, "temperature": 0.9}, None),
        (
            {"max_completion_length": 9},
            "rollout_share is 0, so that no answer is sampled and max_completion_length has",
        ),
        (
            {"use_vllm": True, "temperature": 0.9},
            "rollout_share is 0, so that no answer is sampled and use_vllm has no",
        ),
        ({"use_vllm": False, "top_p": 1.0, "top_k": 0}, None),
        (
            {"rollout_share": 0, "max_new_tokens": 9},
            "rollout_share is 0, so that no answer is sampled: rollout_max_new",
        ),
        ({"rollout_share": 1, "vllm_server_timeout": 9}, "rollout_server_timeout has no effect: rollout_generator is"),
    ],
    ids=str,
)
def test_what_trl_would_do_beyond_is_said_in_one_line(
    given: dict[str, Any], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    make(**given)
    assert len(said(caplog)) == (words is not None)
    assert words is None or words in said(caplog)[0]


def test_a_command_line_says_which_of_trls_names_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--output_dir", "x", "--use_cpu", "--rollout_share", "1", "--beta", "0.5", "--rollout_max_new_tokens", "8"]
    (config,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(line)
    assert (config.objective, config.rollouts.share, config.rollouts.max_new_tokens) == ("gjs", 1.0, 8)
    with pytest.raises(ValueError, match="max_completion_length"):
        HfArgumentParser(DistillationConfig).parse_args_into_dataclasses([*line, "--max_completion_length", "8"])
