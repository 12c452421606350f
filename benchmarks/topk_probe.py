"""What a cache of a teacher's k most probable tokens loses: `python -m benchmarks.topk_probe`.

`drkl cache CONFIG --probe` in one thread: the student that the config starts from or, with ``--student``, another. Rows
go to ``benchmarks/results/topk_probe.csv``: a row for each objective and k.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.rows import Row, commit, processor, write_rows
from drkl._version import __version__
from drkl.analysis.probe import probe_specs
from drkl.config import load_config
from drkl.evaluation.bootstrap import Estimate
from drkl.models.load import quiet_transformers

RESULTS = Path(__file__).parent / "results" / "topk_probe.csv"
SETTINGS = ("config", "student", "objective", "k", "temperature")


def columns(name: str, estimate: Estimate) -> Row:
    """A number and the ends of its interval."""
    ends = estimate.interval or (None, None)
    values = {name: estimate.value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return {key: "" if value is None else f"{value:.6g}" for key, value in values.items()}


def main() -> None:
    """Probe, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--student", default=None)
    parser.add_argument("--positions", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    started = time.perf_counter()
    found = probe_specs(load_config(options.config)[0].specs(), student=options.student, positions=options.positions)
    seconds = time.perf_counter() - started
    rows: list[Row] = []
    for one in found.objectives:
        for mass in found.masses:
            if mass.temperature != one.temperature or mass.k not in one.kept:
                continue
            loss = one.kept[mass.k]
            rows.append(
                {
                    "config": options.config,
                    "student": "start" if options.student is None else Path(options.student).name,
                    "objective": one.name, "k": str(mass.k), "temperature": f"{one.temperature:g}",
                    "on_classes": str(one.on_classes), "bytes_per_position": str(mass.bytes_per_position),
                    "hidden_bytes": str(found.hidden_bytes), "rows": str(found.rows),
                    "positions": str(found.positions), **columns("mass", mass.mass),
                    **columns("tail_mass", mass.tail_mass), **columns("nats", one.value),
                    **columns("share", loss.share), **columns("degrees", loss.angle), "seconds": f"{seconds:.0f}",
                    "processor": processor(), "torch": torch.__version__, "drkl": __version__, "commit": commit(),
                }
            )  # fmt: skip
    write_rows(RESULTS, rows, SETTINGS)


if __name__ == "__main__":
    main()
