"""Runs whose rows come from a stream: the batches, weights and logs of one that reads all rows first, or is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from drkl.errors import DrklError
from drkl.runs import RunFolder
from drkl.training.config import TrainingConfig
from drkl.training.run import Listener
from drkl.training.streaming import STATE, check_streaming
from tests.models import tiny
from tests.training import tiny_runs
from tests.training.test_resume import Killed, assert_equal, comparable, cut_off, kill_at_step, killed_by_signal
from tests.training.test_trainer import make_trainer, rows


def config(root: Path, **sections: Any) -> dict[str, Any]:
    """A run of 10 steps over windows of 7 rows, of which there are 40."""
    if not (root / "eval.jsonl").exists():
        root.mkdir(exist_ok=True)
        tiny_runs.write_rows(root / "eval.jsonl", 6)
    data = {"streaming": True, "shuffle_buffer": 7, "eval_path": str(root / "eval.jsonl")} | sections.pop("data", {})
    training = {"max_steps": 10} | sections.pop("training", {})
    return tiny_runs.config(root, data=data, training=training, **sections)


def named(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {**values, "run": {**values["run"], "name": name}}


def reference(root: Path, **sections: Any) -> tuple[dict[str, Any], RunFolder]:
    values = config(root, **sections)
    return values, tiny_runs.train(named(values, "whole"))


def without_account(run: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("rows_")} for line in comparable(run)]


SIZES = [{}, {"per_device_train_batch_size": 3, "tokens_per_step": None}]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=["tokens", "rows"])
def test_rows_that_fit_into_the_buffer_have_the_batches_of_a_run_that_reads_them_first(
    tmp_path: Path, size: dict[str, Any]
) -> None:
    values = config(tmp_path, data={"shuffle_buffer": 40}, training={"max_steps": 30} | size)  # two passes and a half
    streamed = tiny_runs.train(values)
    plain = {name: value for name, value in values["data"].items() if name not in ("streaming", "shuffle_buffer")}
    first = tiny_runs.train(named(values | {"data": plain}, "first"))
    assert tiny_runs.weights(streamed) == tiny_runs.weights(first)
    assert without_account(streamed) == without_account(first)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=["tokens", "rows"])
@pytest.mark.parametrize("step", [1, 3, 4, 5, 9])
def test_cut_off_anywhere_in_a_window(tmp_path: Path, step: int, size: dict[str, Any]) -> None:
    values, whole = reference(tmp_path, training=size)
    cut_off(values, kill_at_step("r", step))
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("log r/checkpoints", 5), ("checkpoint r/checkpoints", 6)])
def test_killed_by_signal(tmp_path: Path, moment: str, step: int) -> None:
    values, whole = reference(tmp_path)
    killed_by_signal(values, tmp_path / "c.yaml", moment, step)
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_cut_off_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = reference(tmp_path)

    def killed(*args: Any, **words: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("drkl.training.trainer.RunRecord.trained", killed)
        cut_off(values, Listener())
    assert_equal(tiny_runs.train(values, "resume"), whole)


@pytest.mark.slow
def test_a_bad_row_deep_in_the_stream_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    values, whole = reference(tmp_path)
    data = Path(values["data"]["path"])
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:30], '{"prompt": 7, "response": "w1"}\n', *lines[31:]]))
    with pytest.raises(DrklError, match=rf"^{re.escape(str(data))}:31: prompt must be text"):
        tiny_runs.train(values)
    run = RunFolder(Path(values["run"]["dir"]) / "r")
    assert [line["step"] for line in run.read_train_log() if "loss" in line][-1] == 7, "28 rows in windows of 7"
    assert (run.checkpoints_path / "checkpoint-6" / STATE).is_file()
    data.write_text("".join(lines))
    assert_equal(tiny_runs.train(values, "resume"), whole)
