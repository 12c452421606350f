"""The section `rollouts`: both front doors take it, refuse what is wrong in one line, and say what has no effect."""

from __future__ import annotations

import json
import logging
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import HfArgumentParser

from drkl import DistillationConfig
from drkl.config import describe_keys, load_config
from drkl.errors import DrklError
from drkl.rollouts.config import RolloutsConfig, ShareRamp

GIVEN: dict[str, Any] = {
    "share": 0.25, "source": "mixed", "teacher_share": 0.5, "sampling_temperature": 0.7, "top_p": 0.9,
    "max_new_tokens": 12, "refresh_every": 3, "replay": 0.5, "replay_memory": 10, "generator": "vllm",
    "server": "http://localhost:8000", "server_folder": "weights", "server_timeout": 5.0, "stop_map": {"a": "b"},
    "batch_size": 7, "eval_prompts": 5, "keep_texts": 2,
}  # fmt: skip
"""A value of each field that is not its default."""


def python(**rollouts: Any) -> DistillationConfig:
    return DistillationConfig("x", use_cpu=True, **{f"rollout_{name}": value for name, value in rollouts.items()})


def file(**rollouts: Any) -> Any:
    return load_config({"data": {"path": "bundled:dolly"}, "student": {"layers": 2}, "rollouts": rollouts})


def test_every_field_has_its_argument_in_python() -> None:
    assert set(GIVEN) == set(RolloutsConfig.model_fields)
    config = DistillationConfig("x", use_cpu=True)
    for name in GIVEN:
        assert hasattr(config, f"rollout_{name}"), name
    assert config.rollouts == RolloutsConfig() and not config.rollouts.is_on


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_command_line_of_transformers_sets_every_field(name: str) -> None:
    value = GIVEN[name]
    text = '{"a": "b"}' if name == "stop_map" else str(value)
    line = ["--output_dir", "x", "--use_cpu", f"--rollout_{name}", text]
    (config,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(line)
    assert getattr(config.rollouts, name) == value


def test_python_takes_paths_and_numbers_of_other_libraries() -> None:
    config = python(share=np.float32(0.5), max_new_tokens="7", server_folder=Path("weights"), stop_map={np.int64(4): 2})
    assert config.rollouts.stop_map == {"4": "2"} and config.rollouts.server_folder == "weights"
    assert json.loads(config.to_json_string())["rollout_share"] == 0.5
    assert config.rollout_max_new_tokens == 7


def test_a_ramp_on_every_way_in() -> None:
    line = ["--output_dir", "x", "--use_cpu", "--rollout_share", '{"from": 0.5, "to": 1, "steps": 4}']
    (parsed,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(line)
    ramp = {"from": 0.5, "to": 1, "steps": 4}
    ways = [parsed.rollouts, python(share=ramp).rollouts, file(share=ramp)[0].rollouts]
    assert len(set(map(str, ways))) == 1
    assert [ways[0].share_at(step) for step in (0, 2, 4, 9)] == [0.5, 0.75, 1.0, 1.0]
    assert ways[0].needs_responses and ways[0].is_on


def test_what_is_written_down_is_read_again() -> None:
    config = file(share={"to": 1, "steps": 4})[0]
    written = yaml.safe_load(yaml.safe_dump(config.specs()[-1].resolved))["rollouts"]
    assert written["share"] == {"from": 0.0, "to": 1.0, "steps": 4}
    assert RolloutsConfig.model_validate(written) == config.rollouts
    assert python(**written).rollouts == config.rollouts
    stages = [{"name": "a", "rollouts": {"share": {"to": 0.5, "steps": 2}}}]
    first, last = load_config(
        {"data": {"path": "bundled:dolly"}, "student": {"layers": 2}, "stages": stages, "rollouts": {"top_p": 0.5}}
    )[0].specs()
    assert isinstance(first.rollouts.share, ShareRamp) and first.rollouts.top_p == 0.5
    assert not last.rollouts.is_on


SHARE = r"expected a number in [0, 1], or {from: 0, to: 1, steps: 200}"
PAIRS = "expected {student's token: teacher's token}, each by its text or id"
WRONG: list[tuple[str, Any, str]] = [
    ("share", "half", SHARE),
    ("share", 1.5, SHARE),
    ("share", -0.1, SHARE),
    ("share", float("nan"), SHARE),
    ("share", None, SHARE),
    ("share", [0, 1], SHARE),
    ("share", True, "no setting of rollouts is true or false"),
    ("share", {}, "to: field required"),
    ("share", {"to": 1}, "steps: field required"),
    ("share", {"from": True, "to": 1, "steps": 5}, "from: no setting of rollouts is true or false"),
    ("share", {"from": 0, "to": 2, "steps": 5}, "to: input should be less than or equal to 1"),
    ("share", {"from": 0, "to": 1, "steps": 0}, "steps: input should be greater than or equal to 1"),
    ("share", {"to": 1, "steps": 5, "until": 3}, "until: extra inputs are not permitted"),
    ("source", "students", "'student', 'mixed' or 'teacher'"),
    ("source", None, "'student', 'mixed' or 'teacher'"),
    ("teacher_share", 0, "greater than 0"),
    ("teacher_share", 1, "less than 1"),
    ("sampling_temperature", 0, "greater than 0"),
    ("sampling_temperature", float("inf"), "finite number"),
    ("sampling_temperature", "hot", "valid number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("max_new_tokens", 0, "greater than or equal to 1"),
    ("max_new_tokens", 2.5, "valid integer"),
    ("max_new_tokens", True, "no setting of rollouts is true or false"),
    ("refresh_every", 0, "greater than or equal to 1"),
    ("replay", 1, "less than 1"),
    ("replay", -1, "greater than or equal to 0"),
    ("replay_memory", 0, "greater than or equal to 1"),
    ("generator", "sglang", "'builtin' or 'vllm'"),
    ("server", "localhost:8000", "expected an address such as http://127.0.0.1:8000"),
    ("server", "http://", "expected an address"),
    ("server", "http://a:b", "expected an address"),
    ("server", 8000, "valid string"),
    ("server", "http://http://h:8000", "expected an address"),
    ("server", "http://h:8000/v1?key=secret", "expected an address"),
    ("server", "http://h:8000/#models", "expected an address"),
    ("server", "http://h:8000\n", "expected an address"),
    ("server", "http://h h:8000", "expected an address"),
    ("server", "http://h:8000/é", "expected an address"),
    ("server", "http://h..x:8000", "expected an address"),
    ("server", "http://.:8000", "expected an address"),
    ("server", "http://h\0:8000", "expected an address"),
    ("server", "http://::1:8000", "expected an address"),
    ("server_folder", 3, "valid string"),
    ("server_timeout", 0, "greater than 0"),
    ("server_timeout", float("inf"), "finite number"),
    ("server_timeout", 1e9, "less than or equal to 1000000"),
    ("stop_map", 3, PAIRS),
    ("stop_map", {"a": 5.5}, PAIRS),
    ("stop_map", {"a": ["b"]}, PAIRS),
    ("stop_map", {True: "a"}, PAIRS),
    ("stop_map", ["a", "b"], PAIRS),
    ("batch_size", 0, "greater than or equal to 1"),
    ("eval_prompts", -1, "greater than or equal to 0"),
    ("keep_texts", "all", "valid integer"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_named_on_both_ways_in(name: str, value: Any, message: str) -> None:
    with pytest.raises(DrklError) as raised:
        python(**{name: value})
    text = str(raised.value)
    assert text.startswith(f"rollout_{name} is {value!r}: ") and message in text and "\n" not in text
    with pytest.raises(DrklError) as raised:
        file(**{name: value})
    text = str(raised.value)
    assert text.startswith(f"rollouts.{name}: ") and text.endswith(f", got {reprlib.repr(value)}") and "\n" not in text
    assert message in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 1, "generator": "vllm"}, "{0}generator is 'vllm', but {0}server names no address"),
        ({"generator": "vllm", "source": "mixed"}, "{0}source is 'mixed' and {0}generator 'vllm'"),
        ({"generator": "vllm", "source": "teacher"}, "the server holds the student"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    for way, prefix in ((python, "rollout_"), (file, "rollouts.")):
        with pytest.raises(DrklError) as raised:
            way(**fields)
        assert message.format(prefix) in str(raised.value)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    for way in (python, file):
        with pytest.raises(DrklError, match=r"server has a name or a password in it.*VLLM_API_KEY") as raised:
            way(server="https://me:secret@gpu.example:8000")
        assert "secret" not in str(raised.value)


def test_text_that_is_no_yaml_is_no_share() -> None:
    with pytest.raises(DrklError, match=r"rollout_share is '\{': expected a number"):
        python(share="{")


NOTES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"share": 0.5, "top_p": 0.5}, None),
    ({"top_p": 0.5}, "share is 0, so that no answer is sampled: .top_p has no effect."),
    (
        {"top_p": 0.5, "generator": "vllm"},
        "share is 0, so that no answer is sampled: .top_p, .generator have no effect.",
    ),
    ({"share": 1, "teacher_share": 0.3}, "teacher_share has no effect: .source is 'student', not 'mixed'."),
    ({"share": 1, "teacher_share": 0.3, "source": "mixed"}, None),
    ({"share": 1, "replay_memory": 5}, "replay_memory has no effect: .replay is 0."),
    ({"share": 1, "replay_memory": 5, "replay": 0.5}, None),
    ({"share": 1, "server": "http://a:1"}, "server has no effect: .generator is 'builtin'."),
    ({"share": 1, "server": "http://a:1", "generator": "vllm"}, None),
    ({"share": 1, "keep_texts": 2, "eval_prompts": 0}, "keep_texts has no effect: .eval_prompts is 0."),
]


@pytest.mark.parametrize(("fields", "note"), NOTES)
def test_a_setting_without_effect_is_said_once(
    fields: dict[str, Any], note: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "drkl"):
        config = python(**fields)
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if note is None else [f"Warning: rollout_{note.replace(' .', ' rollout_')}"])
    caplog.clear()
    loaded, notes = file(**fields)
    assert notes == ([] if note is None else [f"rollouts.{note.replace(' .', ' rollouts.')}"])
    # Said by the config already; the arguments made of it are silent.
    with caplog.at_level(logging.WARNING, "drkl"):
        again = DistillationConfig("x", use_cpu=True, **loaded.rollouts.as_arguments())
    assert not caplog.records or not config.rollouts.is_on
    assert again.rollouts.is_on == config.rollouts.is_on


def test_a_stage_may_read_what_the_last_one_does_not(tmp_path: Path) -> None:
    values = {
        "data": {"path": "bundled:dolly"}, "student": {"layers": 2}, "rollouts": {"top_p": 0.5},
        "stages": [{"name": "a", "rollouts": {"share": 1}}],
    }  # fmt: skip
    assert load_config(values)[1] == []
    values["stages"] = [{"name": "a", "rollouts": {"top_p": 0.4}}]
    assert load_config(values | {"rollouts": {"share": 1}})[1] == [
        "stages.0.rollouts has no share, so that its stage samples no answer: top_p has no effect."
    ]


def test_the_list_of_keys_has_the_share_itself() -> None:
    keys = {key: (default, meaning) for key, default, meaning in describe_keys()}
    assert {f"rollouts.{name}" for name in GIVEN} == {key for key in keys if key.startswith("rollouts.")}
    assert keys["rollouts.share"][0] == "0.0" and "{from: 0, to: 1, steps: 200}" in keys["rollouts.share"][1]
