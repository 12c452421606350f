"""Where the time of a quickstart step goes on a CPU: `python -m benchmarks.step_profile [--help]`.

The quickstart's pair, rows and steps, its teacher running in each; torch.profiler's own times of operations, added up
by what they are for. What no operation takes (Python, the data, the log, the profiler itself) is the rest of the
clock's time. Rows go to ``benchmarks/results/step_profile.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

import drkl
from benchmarks.quickstart_pair import single_turns, write_pair
from benchmarks.rows import commit, processor, write_rows
from benchmarks.teacher_cache import arguments
from drkl.models.load import quiet_transformers

RESULTS = Path(__file__).parent / "results" / "step_profile.csv"
SETTINGS = ("precision", "threads")
WARM_UP = 3
"""Steps before the profile begins."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
CLIPPING = ("aten::linalg_vector_norm", "aten::mul_", "aten::_foreach_norm", "aten::_foreach_mul_")
"""Operations that nothing but the clipping of gradients calls outside of the loss and the optimiser."""
PARTS = (
    "matrix products", "loss beside its products", "attention", "norms, activations and rotations", "optimiser",
    "clipping of gradients", "Python, data and log",
)  # fmt: skip


class Profiled(TrainerCallback):
    """Profiles the steps after the warm-up; ``seconds`` is the time of these steps by the clock."""

    def __init__(self, steps: int) -> None:
        self._last = WARM_UP + steps
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin or end."""
        if state.global_step == WARM_UP:
            self.profile.start()
            self._since = time.perf_counter()
        elif state.global_step == self._last:
            self.seconds = time.perf_counter() - self._since
            self.profile.stop()


def part_of(event: Any) -> str:
    """The part of a step that an event's own time belongs to."""
    around = event
    while around is not None:
        if around.name.startswith("_FusedSum"):
            return PARTS[0] if event.name in PRODUCTS else PARTS[1]
        if around.name.startswith("Optimizer."):
            return PARTS[4]
        around = around.cpu_parent
    if event.name in PRODUCTS:
        return PARTS[0]
    if "scaled_dot_product" in event.name:
        return PARTS[2]
    if event.name in CLIPPING:
        return PARTS[5]
    return PARTS[3] if event.name.startswith("aten::") else PARTS[6]


def shares(found: Profiled) -> dict[str, float]:
    """The share of each part in the time by the clock."""
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    events: Any = found.profile.events()
    for event in events:
        parts[part_of(event)] += event.self_cpu_time_total / 1e6
    parts[PARTS[6]] += max(0.0, found.seconds - sum(parts.values()))
    return {name: parts[name] / sum(parts.values()) for name in PARTS}


def main() -> None:
    """Profile, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens-per-step", type=int, default=384)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows at the same settings are replaced in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_transformers()
    found = Profiled(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_pair(options.folder)
        args = arguments(options)
        args.max_steps, args.logging_steps = WARM_UP + options.steps, 10
        rows = json.loads(json.dumps(single_turns()[: options.rows]))
        drkl.DistillationTrainer(
            str(options.folder / "student"), str(options.folder / "teacher"), args, rows, callbacks=[found]
        ).train()
    about = {
        "processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
        "drkl": drkl.__version__, "commit": commit(),
    }  # fmt: skip
    about |= {key: str(getattr(options, key)) for key in SETTINGS}
    each = found.seconds / options.steps
    written = [
        {"part": name, "share": f"{share:.4f}", "s_per_step": f"{share * each:.4f}"} | about
        for name, share in shares(found).items()
    ]
    for row in written:
        print(f"{float(row['share']):6.1%} {row['s_per_step']} s {row['part']}")
    write_rows(options.output, written, ("part", *SETTINGS))


if __name__ == "__main__":
    main()
