"""The examples run as they are printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_own_loop_learns() -> None:
    losses = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]()
    assert losses[-1] < 0.9 * losses[0]
    source = (EXAMPLES / "own_loop.py").read_text()
    assert [int(number) for number in re.findall(r"  # (\d+)", source)] == [1, 2]


@pytest.mark.slow
def test_the_quickest_way_takes_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / "quickest.py").read_text()
    assert len([line for line in source.splitlines()[1:] if line.strip()]) <= 15
    names = runpy.run_path(str(EXAMPLES / "quickest.py"))
    before, after = names["before"], names["after"]
    assert after["rkl"].value != before["rkl"].value and after["rkl"].interval is not None
    run = tmp_path / "runs" / "quickest"
    assert (run / "student" / "config.json").is_file() and (run / "config.yaml").is_file()
    assert (tmp_path / "runs" / "quickest.html").is_file()


@pytest.mark.slow
def test_a_student_learns_on_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(EXAMPLES / "on_policy.py"))["trainer"].run
    distances = [line["eval_rollout_rkl"] for line in run.read_train_log() if "eval_rollout_rkl" in line]
    assert len(distances) == 3 and distances[-1] < distances[0]
    assert run.is_finished() and run.read_rollouts()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL's own
def test_trls_trainer_with_another_loss(tmp_path: Any) -> None:
    pytest.importorskip("trl.experimental.gkd")
    example = runpy.run_path(str(EXAMPLES / "gkd_trainer.py"))
    tiny.save(tiny.llama(), tmp_path / "teacher")
    tiny.save(tiny.llama(seed=1), tmp_path / "student")
    done = example["train"](
        str(tmp_path / "teacher"), str(tmp_path / "student"), output_dir=str(tmp_path / "gkd"), use_cpu=True
    )
    assert done.global_step == 3
