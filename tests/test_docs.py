"""The examples in the docs run, and every objective has its page."""

from __future__ import annotations

import doctest
from pathlib import Path

import drkl

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_objective_of_ones_own() -> None:
    failed, tried = doctest.testfile(str(DOCS / "new-objective.md"), module_relative=False)
    assert tried > 5 and failed == 0


def test_every_objective_has_a_page() -> None:
    pages = {path.name: path.read_text() for path in (DOCS / "objectives").glob("*.md")}
    for name in drkl.OBJECTIVES:
        assert any(f"`{name}`" in text.splitlines()[0] for text in pages.values()), name
    for name in pages:
        assert name == "README.md" or f"({name})" in pages["README.md"]
