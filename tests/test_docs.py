"""The examples in the docs run, and every objective has its page."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import drkl
from drkl.evaluation.declared import CLASS_KEYS, KEYS
from scripts import oracles, write_docs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_objective_of_ones_own() -> None:
    failed, tried = doctest.testfile(str(DOCS / "new-objective.md"), module_relative=False)
    assert tried > 5 and failed == 0


def test_the_loop_of_ones_own() -> None:
    failed, tried = doctest.testfile(str(DOCS / "own-loop.md"), module_relative=False)
    assert tried > 10 and failed == 0


def test_the_articles_statements() -> None:
    failed, tried = doctest.testfile(str(DOCS / "article.md"), module_relative=False)
    assert tried > 30 and failed == 0


def test_pages_are_of_objectives_and_the_table_lists_all() -> None:
    pages = {path.name: path.read_text() for path in (DOCS / "objectives").glob("*.md")}
    table = pages.pop("README.md")
    for name, text in pages.items():
        assert set(re.findall(r"`(\w+)`", text.splitlines()[0])) <= drkl.OBJECTIVES.keys(), name
        assert f"({name})" in table
    assert all(f"| `{name}` |" in table for name in drkl.OBJECTIVES)


def test_what_is_written_from_the_program_and_the_rows_is_current() -> None:
    for path, text in write_docs.pages().items():
        assert path.read_text() == text, f"{path.name} is not what `make docs` writes."


@pytest.mark.parametrize(("keys", "found"), [(KEYS, oracles.ORACLES), (CLASS_KEYS, oracles.CLASS_ORACLES)])
def test_every_metric_has_an_oracle_and_a_test_that_is_there(
    keys: tuple[str, ...], found: Mapping[str, oracles.Oracle]
) -> None:
    assert sorted(found) == sorted(keys)
    for key, oracle in found.items():
        name, function = oracle.test.split("::")
        tree = ast.parse((DOCS.parent / oracles.TESTS / name).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, key


def test_every_figure_of_the_docs_is_there() -> None:
    for path in DOCS.rglob("*.md"):
        for name in re.findall(r"\]\(([^)]+\.(?:svg|gif|png))\)", path.read_text()):
            assert (path.parent / name).is_file(), name


def test_a_mark_is_replaced_and_nothing_else() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert write_docs.put_between(text, "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
