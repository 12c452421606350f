"""The rooms' public names, after `import drkl` alone."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("room", "names"),
    [
        ("data", ("DataConfig", "Example", "Row", "rows_from")),
        ("models", ("StudentConfig", "load_model", "load_tokenizer", "prune", "sample_texts")),
        ("teachers", ("LiveTeacher", "TeacherConfig")),
        ("analysis", ("Analysis", "AnalysisConfig", "GradientWatch", "Probe", "decompose", "terms")),
    ],
)
def test_the_names_of_a_room_are_reachable(room: str, names: tuple[str, ...]) -> None:
    code = f"import drkl; print([getattr(drkl.{room}, name) for name in {names!r}])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
