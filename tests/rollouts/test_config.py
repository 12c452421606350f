from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drkl.config import load_config
from drkl.errors import DrklError
from drkl.rollouts.config import RolloutsConfig
from drkl.training.arguments import DistillationConfig

RAMP = {"from": 0, "to": 1, "steps": 200}
CE = {"objective": {"name": "ce"}}
BASE = {"data": {"path": "bundled:dolly"}}


def load(**rollouts: Any) -> RolloutsConfig:
    return load_config(BASE | {"rollouts": rollouts})[0].rollouts


def test_it_is_off_by_default() -> None:
    config = load_config(BASE)[0].rollouts
    assert not config.is_on and config == RolloutsConfig()


def test_a_ramp_survives_the_resolved_config() -> None:
    config, _ = load_config(BASE, ["rollouts.share={from: 0, to: 1, steps: 200}", "rollouts.stop_map={a: b}"])
    written = config.specs()[0].resolved
    assert written["rollouts"]["share"] == RAMP and written["rollouts"]["stop_map"] == {"a": "b"}
    assert load_config(written)[0].rollouts == config.rollouts


def test_stages_train_on_the_data_unless_they_say_otherwise() -> None:
    stages = [{"name": "warmup"}, {"name": "half", "rollouts": {"share": 0.5}}]
    config, _ = load_config(BASE | {"rollouts": {"share": 1.0, "top_p": 0.9}, "stages": stages})
    assert [(spec.rollouts.share, spec.rollouts.top_p) for spec in config.specs()] == [(0, 0.9), (0.5, 0.9), (1, 0.9)]


def test_the_arguments_say_the_same(tmp_path: Path) -> None:
    config = load(share=RAMP, source="mixed", teacher_share=0.3, max_new_tokens=9, stop_map={"a": "b"})
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **config.as_arguments())
    assert args.rollouts == config
    assert set(config.as_arguments()) == {f"rollout_{name}" for name in RolloutsConfig.model_fields}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"share": 1.5}, r"rollouts\.share: expected a number in \[0, 1\].* got 1\.5"),
    ({"share": -0.1}, r"rollouts\.share: expected a number in \[0, 1\].* got -0\.1"),
    ({"share": {"from": 0, "steps": 5}}, "share"),
    ({"share": {"from": 0, "to": 2, "steps": 5}}, "less than or equal to 1"),
    ({"source": "other"}, "source"),
    ({"teacher_share": 1.0}, "teacher_share"),
    ({"top_p": 0}, "top_p"),
    ({"sampling_temperature": 0}, "sampling_temperature"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"refresh_every": 0}, "refresh_every"),
    ({"replay": 1.0}, "replay"),
    ({"source": "mixed", "generator": "vllm"}, "needs the distributions of both models token by token"),
    ({"source": "teacher", "generator": "vllm"}, "the server holds the student"),
    ({"share": 1.0, "generator": "vllm"}, "server names no address"),
    ({"shares": 1.0}, "unknown key. Did you mean 'share'"),
]


@pytest.mark.parametrize(("section", "message"), WRONG)
def test_bad_values_in_a_config(section: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        load(**section)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"teacher": None, "objective": {"name": "ce"}, "student": {"init": "pretrained", "model": "m"}},
            "teacher is null",
        ),
        ({"task": "classification", "data": {"path": "bundled:banking77"}}, "classifiers write no answers"),
    ],
)
def test_runs_that_cannot_be_answered(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DrklError, match=message):
        load_config(BASE | {"rollouts": {"share": 1.0}} | values)
