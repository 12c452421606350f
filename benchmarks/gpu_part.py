"""One part of `benchmarks.gpu_day` in this process, or what this machine has."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import PACKED, packed_facts, versions
from benchmarks.rows import Row, append_json, commit, processor


def about(size: str) -> Row:
    """Where rows come from."""
    import torch

    import drkl

    known = versions()
    named = {name: known[name] for name in ("python", "torch", "triton", "transformers", "accelerate")}
    on_gpu = size == "gpu" and torch.cuda.is_available()
    named |= {
        "size": size,
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "cuda": str(torch.version.cuda or ""),
    }
    return named | {"drkl": drkl.__version__, "commit": commit() or packed_facts(PACKED).get("commit", "")}


def print_about(size: str) -> None:
    """Print as json what is here, where rows come from, and why the parts cannot run."""
    found: dict[str, Any] = {"versions": versions() | {"processor": processor()}, "about": {}, "error": ""}
    try:
        import benchmarks.gpu_parts  # noqa: F401

        found["about"] = about(size)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


def run_part(name: str, size: str, output: Path) -> bool:
    """Run a part; its rows, and a last one of how it ended, are added to a file. Whether it is done."""
    from benchmarks.gpu_parts import CPU, GPU, PARTS

    shared, started = about(size), time.monotonic()
    ending: Row = {"part": name, "status": "done"}
    try:
        for row in PARTS[name](GPU if size == "gpu" else CPU):
            append_json(output, {"part": name, "status": "measured", **row, **shared})
    except Exception as error:
        traceback.print_exc()
        ending |= {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    append_json(output, {**ending, "s": f"{time.monotonic() - started:.1f}", **shared})
    return ending["status"] == "done"


def _end_with(parent: int) -> None:
    # A part that outlives what started it would still have the GPU when it is started again.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "about":
        print_about(sys.argv[2])
    else:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        sys.exit(not run_part(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
