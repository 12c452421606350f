"""Everything that needs a GPU, in order of worth: `scripts/gpu_day.sh [--help]`.

Each part runs in a process of its own with a time limit, and its rows are written to ``gpu_day.jsonl`` in the output
folder as soon as they are measured. A part that fails leaves a row that says why, and the next one runs. What was cut
off goes on where it was: parts that are done are not run again. `scripts/gpu_day.sh check FOLDER` puts the rows into
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_machine import PACKED, ROOT, unpack
from benchmarks.rows import Row, append_json, read_json, write_rows

RESULTS = Path(__file__).parent / "results"
LIMITS = {
    "kernel tests": 130, "fused loss": 110, "small pair": 60, "large pair": 75, "on-policy": 90,
    "large pair, FSDP2": 75, "cache capture": 60, "evaluation": 60, "fused loss, others": 75,
}  # fmt: skip
"""The parts in order of worth, and the seconds that each may take on a GPU."""
CPU_LIMIT = 300
"""Seconds of a part on a CPU, where it is shrunk."""
LEAST_SECONDS = 15
"""A part is not begun with less time than this."""
ABOUT = ("size", "gpu", "python", "torch", "cuda", "triton", "transformers", "accelerate", "drkl", "commit")
COLUMNS = (
    "part", "variant", "status", "s", "s_per_step", "tokens_per_second", "trained_tokens_per_step",
    "seconds_generating", "seconds_learning", "peak_mib", "predicted_mib", "steps", "first_loss", "last_loss",
    "positions_per_second", "bytes_per_position", "rkl", "passed", "failed", "skipped", "tokens_per_step",
    "answers", "max_new_tokens", "rows", "positions", "prompts", "samples_per_prompt", "error", *ABOUT,
)  # fmt: skip
"""Of ``gpu_day.csv``."""
FUSED = ("fused loss", "fused loss, others")
FUSED_COLUMNS = (
    "variant", "median_ms", "p20_ms", "p80_ms", "x_floor", "extra_peak_mib", "extra_peak_mib_2n", "positions", "vocab",
    "hidden", "rounds", "note", "gpu", "torch", "cuda", "drkl", "commit",
)  # fmt: skip
"""Of ``fused_loss_gpu.csv``."""
ENDINGS = ("done", "failed", "cut off")
PART = [sys.executable, "-m", "benchmarks.gpu_part"]


def described(row: Row) -> str:
    """A row in a line, without where it comes from."""
    known = ("part", "variant", "status", *ABOUT)
    figures = (f"{name} {value}" for name, value in row.items() if name not in known and value)
    return ", ".join([*filter(None, (row.get("variant"), row["status"])), *figures])


def found_here(environment: dict[str, str], size: str) -> Row:
    """Where rows of this machine come from; what it has is printed. Exits with a message where that is not enough."""
    done = subprocess.run([*PART, "about", size], capture_output=True, text=True, cwd=ROOT, env=environment)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        sys.exit(f"{sys.executable} cannot run drkl here:\n{done.stderr}")
    shared: Row = found["about"]
    last = {"GPU": shared.get("gpu"), "CUDA of torch": shared.get("cuda"), "commit": shared.get("commit")}
    for name, value in (found["versions"] | last).items():
        print(f"  {name:<16} {value or 'missing'}", flush=True)
    if found["error"]:
        sys.exit(f"drkl cannot run here: {found['error']}. `scripts/gpu_day.sh pack` packs all but torch.")
    if size == "gpu" and not shared["gpu"]:
        sys.exit("torch sees no CUDA GPU here, so nothing is measured; --cpu runs every part shrunk")
    return shared


def run_parts(names: list[str], shared: Row, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run the parts that are not done, each within its limit and what is left of the time."""
    rows_path = options.output / "gpu_day.jsonl"
    for name in names:
        if any(_is_done(row, name, shared) for row in read_json(rows_path)):
            print(f"{name}: done before", flush=True)
            continue
        limit = min(CPU_LIMIT if options.cpu else LIMITS[name], options.ends - time.monotonic())
        if limit < LEAST_SECONDS:
            print(f"{name}: left out, of {options.minutes:g} minutes none are left", flush=True)
            continue
        print(f"{name}, {limit:.0f} s at most", flush=True)
        before = len(read_json(rows_path))
        command = [*PART, name, shared["size"], str(rows_path)]
        status = ended_within(limit, command, environment, options.output / "gpu_day.log")
        rows = read_json(rows_path)[before:]
        if not any(row["status"] in ("done", "failed") for row in rows):
            why = f"not done in {limit:.0f} s" if status is None else f"ended with status {status}"
            rows.append({"part": name, "status": "cut off", "error": why, **shared})
            append_json(rows_path, rows[-1])
        for row in rows:
            print(f"  {described(row)}", flush=True)


def _is_done(row: Row, part: str, shared: Row) -> bool:
    """Whether a part was done before, on the same machine with the same code."""
    same = ("size", "gpu", "torch", "commit")
    return row["part"] == part and row["status"] == "done" and all(row[name] == shared[name] for name in same)


def ended_within(limit: float, command: list[str], environment: dict[str, str], log: Path) -> int | None:
    """The status that a command ends with; None where it was stopped after ``limit`` seconds, with all it started."""
    with log.open("a") as file:
        # In a group of its own it would be stopped where it looks at a terminal.
        to_log: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **to_log)
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def measure(options: argparse.Namespace) -> None:
    """Run everything."""
    options.ends = time.monotonic() + 60 * options.minutes
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        site = Path(scratch) / "packages"
        print(f"{sys.executable}: {unpack(options.packed, site)}", flush=True)
        paths = [str(site), str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "DRKL_CACHE": f"{scratch}/cache", "TMPDIR": scratch,
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        } | ({"TRITON_INTERPRET": "1"} if options.cpu else {})  # fmt: skip
        shared = found_here(environment, "cpu" if options.cpu else "gpu")
        run_parts(options.only or list(LIMITS), shared, options, environment)
    print(f"The rows are in {options.output / 'gpu_day.jsonl'}, and what the parts printed in gpu_day.log beside it")


def newest(rows: list[Row]) -> list[Row]:
    """The rows of the last try of each part on each machine, without those that say that it is done."""
    tries: dict[tuple[str, str], dict[str, Row]] = {}
    ended: set[tuple[str, str]] = set()
    for row in rows:
        key = row["part"], row["gpu"]
        if key in ended:
            tries[key] = {}
            ended.remove(key)
        if row["status"] in ENDINGS:
            ended.add(key)
        if row["status"] != "done":
            tries.setdefault(key, {})[row.get("variant", "")] = row
    return [row for found in tries.values() for row in found.values()]


def check(folder: Path, results: Path) -> None:
    """Print the rows of a folder and put them into the checkout's results; those of a CPU are only printed."""
    rows = newest(read_json(folder / "gpu_day.jsonl"))
    if not rows:
        sys.exit(f"There are no rows in {folder / 'gpu_day.jsonl'}")
    for row in rows:
        print(f"{row['part']}: {described(row)}")
    if any(row["size"] == "cpu" for row in rows):
        sys.exit("The parts were shrunk to a CPU: their rows are not put into the results")
    fused: dict[str, Row] = {}
    others: list[Row] = []
    for row in rows:
        if row["part"] in FUSED and row["status"] == "measured":
            fused.setdefault(row["variant"], {name: row.get(name, "") for name in FUSED_COLUMNS})
        else:
            others.append({name: row.get(name, "") for name in COLUMNS})
    if fused:
        same = ("variant", "positions", "vocab", "hidden", "gpu")
        write_rows(results / "fused_loss_gpu.csv", list(fused.values()), same)
    if others:
        write_rows(results / "gpu_day.csv", others, ("part", "gpu"))


def main() -> None:
    """Measure, or check what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0] + ".")
    output = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_day")
    parser.add_argument("--output", type=Path, default=output, help="of rows and log; default $OUT, else runs/gpu_day")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--cpu", action="store_true", help="run every part shrunk, on the CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=list(LIMITS), help=", ".join(LIMITS))
    parser.add_argument("--packed", type=Path, default=PACKED, help="folder of what `scripts/gpu_day.sh pack` packed")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="put the rows of a folder into benchmarks/results")
    options = parser.parse_args()
    if options.check:
        check(options.check, RESULTS)
    else:
        measure(options)


if __name__ == "__main__":
    main()
