from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from pydantic import ValidationError
from torch import device

from drkl.errors import DrklError
from drkl.teachers.config import TeacherConfig
from drkl.training import loading
from drkl.training.arguments import DistillationConfig
from drkl.training.sharding import check_deepspeed, check_fsdp, check_kind
from tests.models import tiny
from tests.training import tiny_runs
from tests.training.test_trainer import make_trainer, rows

NOT_HERE = "is set and the device is the CPU, where accelerate does not shard"


@pytest.mark.parametrize("fsdp", [True, "full_shard"])
def test_fsdp_on_a_cpu_is_refused_by_name(tmp_path: Path, fsdp: Any) -> None:
    with pytest.raises(DrklError, match=f"^fsdp {NOT_HERE}"):
        DistillationConfig(output_dir=str(tmp_path / "run"), use_cpu=True, fsdp=fsdp)


def test_fsdp_of_the_launcher_on_a_cpu_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DrklError, match=r"ACCELERATE_USE_FSDP \(accelerate launch --use_fsdp\) " + NOT_HERE):
        DistillationConfig(output_dir=str(tmp_path / "run"), use_cpu=True)


def test_fsdp_in_a_config_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    values = tiny_runs.config(tmp_path)
    values["training"]["arguments"] |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    with pytest.raises(DrklError, match=f"training: fsdp {NOT_HERE}"):
        tiny_runs.train(values)
    assert not (tmp_path / "runs").exists()


def on_a_gpu(version: int | None, kind: DistributedType = DistributedType.MULTI_GPU) -> Any:
    plugin = None if version is None else {"fsdp_version": version, "cpu_ram_efficient_loading": True}
    state = SimpleNamespace(distributed_type=kind)
    return SimpleNamespace(fsdp_plugin_args=plugin, distributed_state=state, device=device("cuda"), process_index=0)


def test_version_1_of_fsdp_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fsdp(on_a_gpu(2))
    with pytest.raises(DrklError, match=r"^fsdp asks for FSDP version 1, .* Set fsdp_version: 2"):
        check_fsdp(on_a_gpu(1))
    check_fsdp(on_a_gpu(None))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DrklError, match=r"ACCELERATE_USE_FSDP .* asks for FSDP version 1"):
        check_fsdp(on_a_gpu(None))
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_fsdp(on_a_gpu(None))


def test_fsdp_in_one_process_without_a_launcher_is_refused_by_name() -> None:
    with pytest.raises(DrklError, match="fsdp is set and there is one process, started without a launcher"):
        check_fsdp(on_a_gpu(2, DistributedType.NO))


def test_weights_are_loaded_in_every_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    args = on_a_gpu(2)
    check_fsdp(args)
    assert args.fsdp_plugin_args["cpu_ram_efficient_loading"] is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"
    assert "cpu_ram_efficient_loading is turned off" in caplog.text


def test_checkpoints_of_accelerates_fsdp_and_of_others_are_told_apart(tmp_path: Path) -> None:
    check_kind(tmp_path, by_accelerate=False)
    with pytest.raises(DrklError, match="written by a run without fsdp"):
        check_kind(tmp_path, by_accelerate=True)
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    check_kind(tmp_path, by_accelerate=True)
    with pytest.raises(DrklError, match="written by a run that accelerate sharded"):
        check_kind(tmp_path, by_accelerate=False)


@pytest.mark.parametrize(("elsewhere", "where"), [({"cache": "x"}, "cache"), ({"server": "http://a/v1"}, "server")])
def test_a_teacher_elsewhere_is_not_sharded(elsewhere: dict[str, str], where: str) -> None:
    with pytest.raises(ValidationError, match=f"shard spreads a teacher's weights .* this one is in a {where}"):
        TeacherConfig(model="m", shard=True, **elsewhere)  # type: ignore[arg-type]


def test_one_process_has_the_whole_teacher_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, rows(3), teacher_shard=True)
    assert "teacher_shard has no effect: there is one process" in caplog.text
    assert trainer.config.teacher_shard


def test_an_adapter_is_added_before_sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_sharded", lambda model: True)
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(DrklError, match=r"sharded already, .* Call peft.get_peft_model first"):
        loading.make_trainable(tiny.llama(layers=1), None, args, {"r": 2})


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_stages_of_deepspeed_that_leave_the_weights_whole_are_taken(stage: int | None) -> None:
    check_deepspeed(None if stage is None else SimpleNamespace(zero_stage=stage))


def test_stage_3_of_deepspeed_is_refused() -> None:
    with pytest.raises(DrklError, match=r"ZeRO stage 3.*Use stage 1 or 2, or FSDP2"):
        check_deepspeed(SimpleNamespace(zero_stage=3))
