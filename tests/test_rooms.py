"""The rooms' public names, after `import drkl` alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOMS = {
    "data": ("DataConfig", "Example", "Row", "rows_from"),
    "models": ("StudentConfig", "load_model", "load_tokenizer", "prune", "sample_texts"),
    "teachers": ("LiveTeacher", "TeacherConfig"),
    "analysis": ("Analysis", "AnalysisConfig", "GradientWatch", "Probe", "decompose", "terms"),
}


@pytest.mark.slow
def test_the_names_of_the_rooms_are_reachable() -> None:
    code = f"import drkl; [getattr(getattr(drkl, room), name) for room, names in {ROOMS!r}.items() for name in names]"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
