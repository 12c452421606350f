from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import tiny_runs
from tests.training.test_trainer import assert_same, first_gradients, rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "accumulation"), [(8, 1), (8, 2), (3, 4)])
def test_two_processes_take_the_step_that_one_takes(tmp_path: Path, count: int, accumulation: int) -> None:
    environment = tiny_runs.environment()
    environment["PYTHONPATH"] += f":{ROOT}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "tests" / "training" / "two_processes.py"), tmp_path, count, accumulation]
    done = subprocess.run([*launch, *map(str, script)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    alone, trainer = first_gradients(tmp_path, rows(count), 1)
    assert found["world"] == 2
    assert found["tokens"] == trainer.num_tokens_seen
    assert found["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)
    assert_same(found["gradients"], alone)
