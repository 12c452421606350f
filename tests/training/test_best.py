"""The best weights of a run, where some of them are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import TrainerState

from drkl.training.best import Best, find_best, heldout_loss_at
from tests.training.test_checkpoints import make

LOSSES = {5: 3.0, 10: 1.0, 15: 2.0, 20: 2.5}


def state() -> TrainerState:
    """Of a run whose best step is 10."""
    log = [{"step": step, "eval_loss": loss, "epoch": 1.0} for step, loss in LOSSES.items()]
    return TrainerState(
        global_step=20, best_global_step=10, best_metric=1.0, log_history=[{"step": 1, "loss": 4.0}, *log]
    )


def test_the_best_stays_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 10, 20)
    for read in (False, True):
        assert find_best(tmp_path, state(), read=read, ended=False) == Best(10, 1.0, tmp_path / "checkpoint-10")
    assert not caplog.messages
    assert heldout_loss_at(state(), 15) == 2.0 and heldout_loss_at(state(), 1) is None


def test_without_it_the_next_best_that_is_there_and_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 5, 10, 15, 20, 25)
    (tmp_path / "checkpoint-15" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("another")
    wanted = Best(20, 2.5, tmp_path / "checkpoint-20")  # nobody has measured step 25 yet
    assert find_best(tmp_path, state(), read=True, ended=False) == wanted
    assert find_best(tmp_path, state(), read=True, ended=False, whole=tmp_path / "checkpoint-10").step == 10
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert find_best(tmp_path, state(), read=True, ended=False) == wanted
    assert caplog.messages == [
        "Warning: checkpoint-10, which had the lowest held-out loss (1.0000), is damaged (model.safetensors has 7 "
        "bytes in place of 28); step 20 has it now, 2.5000.",
        "Warning: checkpoint-10, which had the lowest held-out loss (1.0000), is gone; step 20 has it now, 2.5000.",
    ]


def test_at_the_end_the_weights_in_memory_take_part(tmp_path: Path) -> None:
    assert find_best(tmp_path, state(), read=True, ended=True) == Best(20, 2.5, None)
    make(tmp_path, 15, 20)
    assert find_best(tmp_path, state(), read=True, ended=True) == Best(15, 2.0, tmp_path / "checkpoint-15")


def test_none_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 12)
    assert find_best(tmp_path, state(), read=True, ended=False) == Best()
    assert caplog.messages[0].endswith("is gone; no other is left.")
