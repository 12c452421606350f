"""Each setting of a config moves a number of a run, and is compared, or stands in the list of what may change."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from drkl.config import describe_keys
from drkl.training.settings import (
    BY_CONTENT,
    CHOOSES_BEST,
    DIVIDES,
    MAY_CHANGE,
    changed,
    changes,
    counted,
    has_other_sources,
    of_configs,
)

LISTS = (MAY_CHANGE, DIVIDES, CHOOSES_BEST, BY_CONTENT)
KEYS = {name.partition("[]")[0] for name, _, _ in describe_keys()}
COUNTED = {
    "run.seed", "task", "teacher.top_k", "teacher.model_init_kwargs", "student.freeze_embeddings",
    "student.disable_dropout", "student.model_init_kwargs", "data.streaming", "data.shuffle_buffer", "data.src_lang",
    "data.tgt_lang", "data.max_prompt_tokens", "data.max_tokens", "objective.name", "loss.temperature",
    "loss.kd_weight", "loss.t2_scaling", "training.max_steps", "training.num_train_epochs", "training.tokens_per_step",
    "training.same_batches", "training.learning_rate", "training.lr_scheduler_type", "training.warmup_steps",
    "training.weight_decay", "training.max_grad_norm", "training.precision", "training.padding_free",
    "training.early_stop_patience", "training.arguments", "rollouts.share", "rollouts.source",
    "rollouts.teacher_share", "rollouts.sampling_temperature", "rollouts.top_p", "rollouts.max_new_tokens",
    "rollouts.refresh_every", "rollouts.replay", "rollouts.replay_memory", "rollouts.generator", "rollouts.stop_map",
}  # fmt: skip


def test_every_setting_is_compared_or_listed() -> None:
    """A new setting is compared; one that moves no number belongs into a list, and into the docs."""
    listed = {key for key in KEYS if any(fnmatchcase(key, pattern) for patterns in LISTS for pattern in patterns)}
    assert KEYS - listed == COUNTED


def test_the_lists_name_settings_that_there_are_and_none_twice() -> None:
    names = KEYS | {f"training.arguments.{field.name}" for field in dataclasses.fields(TrainingArguments)}
    patterns = [pattern for listed in LISTS for pattern in listed if ".model_init_kwargs." not in pattern]
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in names) or pattern.startswith("training.nan"), pattern
    exact = [pattern for pattern in patterns if "*" not in pattern]
    assert len(set(exact)) == len(exact)


def test_the_docs_list_what_may_change() -> None:
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for pattern in (*MAY_CHANGE, *DIVIDES, *CHOOSES_BEST):
        assert f"`{pattern}`" in text, pattern


CONFIG: dict[str, Any] = {
    "run": {"name": "r", "dir": "runs", "seed": 0, "device": "cpu"},
    "student": {"layers": 2, "model": "a", "disable_dropout": False, "model_init_kwargs": {"revision": "main"}},
    "training": {
        "max_steps": 10, "warmup_steps": None, "eval_every": 5, "logging_steps": 10, "gradient_checkpointing": False,
        "arguments": {"adam_beta1": 0.9, "data_seed": 3, "report_to": "none"},
    },
    "stages": [{"name": "warmup", "training": {}}],
}  # fmt: skip


def test_settings_are_sorted() -> None:
    assert counted(CONFIG, chooses_best=True) == {
        "settings": {
            "run.seed": 0, "student.disable_dropout": False, "training.max_steps": 10, "training.warmup_steps": None,
            "training.arguments.data_seed": 3, "the stages before": ["warmup"],
        },
        "best": {"training.eval_every": 5},
        "divides": {"training.gradient_checkpointing": False},
        "content": {"student.layers": 2},
    }  # fmt: skip
    assert counted(CONFIG, chooses_best=False)["best"] == {}


def test_objects_in_memory_are_known_without_their_address() -> None:
    config = {
        "peft": {"x": "in memory: <X object at 0x7f01>"},
        "student": {"model_init_kwargs": {"device_map": Path("a")}},
    }
    settings = counted(config, chooses_best=True)["settings"]
    assert settings["peft.x"] == "in memory: <X object>"
    assert settings["student.model_init_kwargs.device_map"] == "a"


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"training.arguments.adam_beta1": 0.8}, {}, ["training.arguments.adam_beta1: 0.8 then, 0.9 now"]),
        ({}, {"loss.temperature": 1.0}, []),
        ({}, {"loss.temperature": 2.0}, ["loss.temperature: 1.0 then, 2.0 now"]),
        ({"peft.r": 8}, {}, ["peft.r: 8 then, not set now"]),
        ({"a": "x" * 99}, {"a": True}, [f"a: '{'x' * 75} ... then, true now"]),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
    ],
)
def test_what_is_left_out_has_its_default(then: Any, now: Any, expected: list[str]) -> None:
    assert list(changes(then, now)) == expected


def test_configs_are_compared_before_anything_is_loaded() -> None:
    other = {**CONFIG, "run": {"name": "q", "dir": "x", "seed": 0, "device": "auto"}}
    other["training"] = CONFIG["training"] | {"warmup_steps": 3, "arguments": {"data_seed": 3, "adam_beta2": 0.5}}
    assert of_configs(CONFIG, other) == []  # the first one's warm-up and arguments were not written yet
    assert not has_other_sources(CONFIG, other)
    other["student"] = CONFIG["student"] | {"model": "b"}
    other["training"] = other["training"] | {"max_steps": 20, "eval_every": 1}
    assert of_configs(CONFIG, other) == ["training.max_steps: 10 then, 20 now", "training.eval_every: 5 then, 1 now"]
    assert has_other_sources(CONFIG, other)


def test_the_message_names_what_changed_and_the_two_ways_out() -> None:
    assert str(changed("runs/r", ["training rows: 40 then, 30 now", "objective.gamma: 0.5 then, 0.3 now"])) == (
        "The run in 'runs/r' began with other inputs than it is to go on with: training rows: 40 then, 30 now; "
        "objective.gamma: 0.5 then, 0.3 now. Put them back as they were, or start a new run: choose another run.name, "
        "or replace this one."
    )
