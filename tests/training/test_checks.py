"""What is looked at before a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from drkl.errors import DrklError
from drkl.kept import describe_run_files
from drkl.runs import RunFolder
from drkl.training.checks import is_over


def test_a_run_that_has_ended_has_the_student_that_it_wrote(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.student_path.mkdir()
    weights = run.student_path / "model.safetensors"
    weights.write_bytes(b"weights")
    run.config_path.write_text("{}\n")
    run.write_env(describe_run_files(run))
    assert not is_over(run)
    run.write_env(describe_run_files(run) | {"finished": "2026-01-01"})
    assert is_over(run)
    weights.write_bytes(b"others!")
    with pytest.raises(
        DrklError, match=r"that its run wrote, by its env\.json: model\.safetensors has another content"
    ):
        is_over(run)
