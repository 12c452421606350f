from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drkl.config import load_config
from drkl.errors import DrklError
from drkl.rollouts.config import RolloutsConfig, in_words_of_config
from drkl.training.arguments import DistillationConfig
from drkl.training.trainer import DistillationTrainer
from tests.command_line import Cli
from tests.models import tiny
from tests.training import tiny_runs

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
    (
        {"source": "teacher", "generator": "vllm"},
        r"^rollouts\.source is .* rollouts\.generator .* the server holds",
    ),
    ({"share": 1.0, "generator": "vllm"}, r"^rollouts\.generator is .*, but rollouts\.server names no address"),
    ({"server": "http://me:word@host"}, r"^rollouts\.server has a name or a password in it"),
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


def test_a_message_has_the_names_of_a_config() -> None:
    for name in RolloutsConfig.model_fields:
        assert in_words_of_config(f"(rollout_{name}=3), xrollout_{name}") == f"(rollouts.{name}=3), xrollout_{name}"
    kept = "rollouts.jsonl has rollout_length and rollout_finished; rollouts.share: 1 (in Python rollout_share=1)"
    assert in_words_of_config(kept) == kept


def test_an_error_of_training_is_in_the_words_of_the_one_who_asked(cli: Cli, tmp_path: Path) -> None:
    rollouts = {"share": 1.0, "max_new_tokens": 4000}
    values = tiny_runs.config(tmp_path, rollouts=rollouts)
    done = cli("distill", tiny_runs.write_config(values, tmp_path / "c.yaml"))
    assert done.code == 2 and "rollouts.max_new_tokens (4000)" in done.err and "rollout_" not in done.err
    words = {f"rollout_{name}": value for name, value in rollouts.items()}
    args = DistillationConfig(str(tmp_path / "x"), use_cpu=True, **words)
    with pytest.raises(DrklError, match=r"rollout_max_new_tokens \(4000\)"):
        DistillationTrainer(tiny.llama(0), tiny.llama(1), args, [{"prompt": "w1"}], processing_class=tiny.tokenizer())


SOURCE = Path(__file__).resolve().parents[2] / "src" / "drkl"
CONFIGS = ("config.py", "cli.py", "training/run.py", "training/memory.py", "training/settings.py")
"""Files that only a config leads into, and the list of its names."""


def texts(path: Path) -> Iterator[str]:
    """The texts of a file that are no docstrings, each whole."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source if "rollouts." in source else "")
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def test_messages_below_the_config_have_the_names_of_python() -> None:
    setting = re.compile(rf"\brollouts\.({'|'.join(RolloutsConfig.model_fields)})\b")
    wrong = {
        f"{path.relative_to(SOURCE)}: {text}"
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).as_posix() not in CONFIGS
        for text in texts(path)
        if any(f"in Python rollout_{name}" not in text for name in setting.findall(text))
    }
    # What follows a command is a word for a shell, beside the other two.
    assert {text for text in wrong if "stops.py: rollouts.stop_map={}" not in text} == set()
