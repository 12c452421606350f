"""Measure in trained students where reverse KL would push their targets; a row for each run.

`drkl analyze` of each run without its differentiated objectives: the push of reverse KL is known in closed form, from
the probabilities of the target and the divergence of the tails (docs/article.md). A run that has its row is left out,
so that the command can be given again.

    python -m scripts.measure_pushes RUN... --part instruction --output docs/results/pushes.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.rows import Row, read_rows, write_rows
from drkl.config import load_config
from drkl.run_models import analyze_run
from drkl.runs import RunFolder

TOTALS = ("matched", "matched_p_t", "matched_K", "matched_outweighs", "matched_force", "matched_overshoot",
          "target_gap", "target_above", "overconfidence", "K", "stronger", "tail_force_ratio", "sure",
          "teacher_confidence")  # fmt: skip
"""The means of an analysis that are kept; docs/analyze.md describes them."""
NAMES = ("part", "objective", "seed")
HEAD = (*NAMES, "positions", *TOTALS)


def row_of(run: Path, part: str) -> Row:
    """The row of a finished run, without its measurements."""
    config, _ = load_config(str(RunFolder.open(run).config_path))
    return {"part": part, "objective": str(config.objective.name), "seed": str(config.run.seed)}


def measured(run: Path) -> Row:
    """What is measured of a run."""
    with TemporaryDirectory() as folder:
        analysis = analyze_run(run, objectives=["rkl"], positions=1, output_dir=folder)
    values = {name: analysis[name].value for name in TOTALS}
    positions = str(analysis.tables["settings"]["positions"])
    return {"positions": positions, **{name: "" if value is None else f"{value:.6g}" for name, value in values.items()}}


def rows(runs: list[Path], part: str, there: list[Row]) -> Iterator[Row]:
    """The rows of the runs that have none."""
    known = {tuple(row[name] for name in NAMES) for row in there}
    for run in runs:
        row = row_of(run, part)
        if tuple(row.values()) not in known:
            yield row | measured(run)


def main() -> None:
    """Add to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs with their students")
    parser.add_argument("--part", required=True, help="what the table calls the pair: a part of docs/evidence.md")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    there = read_rows(asked.output)
    for row in rows(asked.runs, asked.part, there):
        write_rows(asked.output, [row], NAMES)


if __name__ == "__main__":
    main()
