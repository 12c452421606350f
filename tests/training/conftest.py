from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import logging

from drkl.cli import main
from tests.training import tiny_runs


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    """One thread, so that sums are the same in every process; no bars in the output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every held-out loss is worse than the one before it: the first is the best."""
    tiny_runs.plant_heldout_losses(monkeypatch, float)


@pytest.fixture
def drkl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line, in this process; returns what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.setenv("COLUMNS", "150")
        monkeypatch.setattr(sys, "argv", ["drkl", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert not left.value.code, captured.err
        return captured.out

    return call
