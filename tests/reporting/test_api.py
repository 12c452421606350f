"""`drkl.report` on evaluations of models in memory, as a notebook calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

import drkl
from tests.evaluation.test_api import QUICK, pairs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", pytest.param("classifier", marks=pytest.mark.slow)])
def test_evaluations_in_memory_become_a_page(kind: str, tmp_path: Path) -> None:
    student, teacher, tokenizer, rows = pairs(kind)
    a = drkl.evaluate(student, teacher, rows, processing_class=tokenizer, **QUICK)
    b = drkl.evaluate(teacher, teacher, rows, processing_class=tokenizer, **QUICK)
    assert drkl.report(a, tmp_path / "one.html") == tmp_path / "one.html"
    assert drkl.report([a, b], str(tmp_path / "two.html")) == tmp_path / "two.html"
    text = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert "The runs side by side" in text and 'data-finding="b_better_agreement"' in text
    assert "How did training go?" not in text and "drkl report" not in text
    assert drkl.report([a.save(tmp_path / "saved"), b], tmp_path / "mixed.md").read_text().startswith("# saved")
    assert len(drkl.report((a, b), tmp_path / "two.csv").read_text().splitlines()) > 20
