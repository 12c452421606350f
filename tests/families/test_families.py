"""Every causal and sequence-to-sequence architecture of transformers, tiny: the table of docs/families.md."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from tests.families.builder import ARCHITECTURES, NOT_BUILT
from tests.families.checks import REFUSED, WORKS, Cell, check

CELLS = "DRKL_FAMILIES"
"""The environment variable with the folder that `make test-families` gathers the cells from."""
DOZEN = (
    "llama", "gpt2", "gemma2", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next", "bert", "qwen2_audio",
    "t5", "bart-seq2seq",
)  # fmt: skip
"""One of each kind of layer, cache and stack."""

# Many families warn of their own code, of kernels that are not installed, or of a config as it was published.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("row", DOZEN)
def test_a_dozen_work(row: str, tmp_path: Path) -> None:
    cells = check(row, tmp_path)
    assert {column: cell.message for column, cell in cells.items() if cell.status != WORKS} == {}


@pytest.mark.families
@pytest.mark.timeout(600)  # one that hangs should not take all of the others' time; most need a second
@pytest.mark.parametrize("row", [row for row in ARCHITECTURES if row not in NOT_BUILT])
def test_each_works_or_is_refused_by_name(row: str, tmp_path: Path) -> None:
    cells = check(row, tmp_path)
    keep(row, cells)
    assert {column: cell.message for column, cell in cells.items() if cell.status not in (WORKS, REFUSED)} == {}


def keep(row: str, cells: dict[str, Cell]) -> None:
    if folder := os.environ.get(CELLS):
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({column: dataclasses.asdict(cell) for column, cell in cells.items()})
        (Path(folder) / f"{row}.json").write_text(text)
