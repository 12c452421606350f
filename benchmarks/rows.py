"""What the benchmarks share: where a row comes from, its spread, and the files that keep it."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]


def processor() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit the sources are at, marked where they differ from it; an empty text outside of a checkout.

    The rows that a benchmark has just written are no change of the sources.
    """

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here).stdout.strip()
        except OSError:  # a machine without git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def own_memory_kib(field: str) -> int:
    """A field of this process's status, in KiB: VmRSS is now, VmHWM the peak. (getrusage's starts at the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def own_process(module: str, name: str, options: argparse.Namespace, shared: Sequence[str]) -> dict[str, Any]:
    """What ``python -m MODULE --measure NAME`` prints as json in its last line; ends with what went wrong.

    Args:
        module: of the benchmark.
        name: of the variant.
        options: with ``folder``, ``threads`` and those of ``shared``.
        shared: the options that the process is told.
    """
    command = [sys.executable, "-m", module, "--measure", name, "--folder", str(options.folder)]
    for option in shared:
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float], unit: str) -> Row:
    """Median, 20th and 80th percentile, as columns."""
    low, *_, high = statistics.quantiles(values, n=5) if len(values) > 1 else values * 2
    named = {"median": statistics.median(values), "p20": low, "p80": high}
    return {f"{name}_{unit}": f"{value:.4f}" for name, value in named.items()}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[Row], same: Sequence[str]) -> None:
    """Write ``rows`` in the place of those that agree with one of them in the columns ``same``; the others stay."""
    taken = {tuple(str(row[key]) for key in same) for row in rows}
    kept = [row for row in read_rows(path) if tuple(row.get(key, "") for key in same) not in taken]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(kept + rows)
    print(f"The rows are in {path}")


def read_json(path: Path) -> list[Row]:
    """The rows of a file with one in a line, none where it is not there; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_json(path: Path, row: Row) -> None:
    """Add a row to such a file, to be there even if the machine goes away."""
    with path.open("a") as file:
        # A line of its own, whatever a process that was killed left behind.
        file.write(f"\n{json.dumps(row)}\n")
        file.flush()
        os.fsync(file.fileno())
