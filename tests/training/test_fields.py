"""Every field of `TrainingArguments` is read, or refused with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from drkl.errors import DrklError
from drkl.training import needs
from drkl.training.arguments import DistillationConfig
from drkl.training.config import OWNED
from drkl.training.fields import REFUSED

READ = set(
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile "
    "torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy "
    "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id hub_private_repo eval_strategy eval_steps eval_delay per_device_eval_batch_size "
    "eval_on_start save_only_model save_strategy save_steps save_total_limit load_best_model_at_end "
    "restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config "
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug "
    "skip_memory_metrics do_train do_eval".split()
)
"""Fields that have an effect, alone or beside another one that is asked for; tests/faults/test_settings.py shows it."""
FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]
ODD: list[Any] = ["banana", -1, 0, 2.5, float("nan"), True, ["x"], {"a": 1}, object]


def make(**fields: Any) -> DistillationConfig:
    return DistillationConfig(**{"output_dir": "x", "use_cpu": True} | fields)


def test_every_field_is_read_or_refused() -> None:
    """A field that is new in transformers has to be put into one of the two."""
    assert sorted(READ | REFUSED.keys()) == sorted(FIELDS)
    assert not READ & REFUSED.keys()
    assert OWNED.keys() <= set(FIELDS)


@pytest.mark.parametrize("name", [name for name in FIELDS if not name.startswith(("torch_compile", "gradient_check"))])
def test_an_odd_value_is_taken_or_refused_by_name(name: str) -> None:
    for value in ODD:
        try:
            make(**{name: value})
        except DrklError as error:
            assert len(str(error).splitlines()) == 1


def test_arguments_make_the_same_arguments_again() -> None:
    config = make(lr_scheduler_type="linear", report_to="none", activation_checkpointing=True)
    values = {name: value for name, value in config.to_dict().items() if name in config.__dataclass_fields__}
    assert make(**values).to_dict() == config.to_dict() == dataclasses.replace(config).to_dict()


def test_a_token_is_not_shown() -> None:
    with pytest.raises(DrklError, match=r"^hub_token means nothing here: ") as caught:
        make(hub_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_an_optimiser_works_or_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "is_there", lambda module: False)
    if name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        assert make(optim=name).optim == name
        return
    with pytest.raises(DrklError, match=r"pip install|neither clipped nor checked") as caught:
        make(optim=name)
    assert repr(name) in str(caught.value)


def test_memory_that_runs_out_in_a_trial_is_not_the_settings_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    with pytest.raises(DrklError, match=r"The memory ran out as the settings .* were tried") as caught:
        make(optim="sgd")
    assert "refuses" not in str(caught.value)


@pytest.mark.parametrize(("name", "takes"), needs._OPTIM_ARGS.items())
def test_optim_args_are_those_that_transformers_reads(name: str, takes: tuple[str, ...]) -> None:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

    asked: list[str] = []

    class Asked(dict[str, str]):
        def __bool__(self) -> bool:
            return True

        def __contains__(self, key: object) -> bool:
            asked.append(str(key))
            return False

    context = OptimizerContext(make(optim=name), None, {}, {}, Asked())
    _OPTIMIZER_HANDLERS[name](context)
    assert sorted(asked) == sorted(takes)


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found.")

    monkeypatch.setattr("torch.compile", refuse)
    needs._try_compiler.cache_clear()
    with pytest.raises(DrklError, match=r"torch\.compile does not work here: .*No working C\+\+ compiler found\. The"):
        make(torch_compile=True)


def test_a_schedule_without_a_warm_up_has_no_warm_up_steps(tmp_path: Path) -> None:
    assert make(lr_scheduler_type="constant").get_warmup_steps(200) == 0
    assert make(lr_scheduler_type="constant", max_steps=200, warmup_steps=10).get_warmup_steps(200) == 0  # written out
    with pytest.raises(DrklError, match="Set lr_scheduler_type: constant_with_warmup, which has one"):
        make(lr_scheduler_type="constant", max_steps=200, warmup_steps=3)
