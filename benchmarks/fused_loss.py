"""Time and memory of the fused loss beside the dense one: `python -m benchmarks.fused_loss [--help]`.

Forward and backward, to the hidden states and the head. The floor is the four matrix products alone (both logits, the
gradients on hidden states and head), into memory that is there already; `eager rkl` is the usual line of autograd code,
`eager drkl` the definition on whole logits. Peers (TRL's chunked divergence and Liger-Kernel's chunked loss, each at
its reverse KL) are timed where they are installed (`benchmarks/requirements.txt`). Each round runs every variant once,
in one process; times are the least and the median of the rounds. The extra peak memory of a variant is measured in a
process of its own (on Linux), at 1,024 positions and more. Rows go to ``benchmarks/results/fused_loss.csv``.

The vector instructions follow the processor; the same with fewer of them:
`ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.fused_loss`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import drkl
from benchmarks.rows import Row, commit, own_memory_kib, processor, spread, write_rows
from drkl.training.forward import STATISTICS_POSITIONS, StatisticsSums

RESULTS = Path(__file__).parent / "results" / "fused_loss.csv"
SETTINGS = ("positions", "vocab", "hidden", "dtype", "threads")
MEMORY_FROM = 1024
"""Positions from which on the extra memory is measured."""
CHUNK = 256
"""Positions of a chunk of the floor."""
Variant = Callable[["Case"], None]


class Case:
    """One layer's worth of inputs: hidden states with gradients, heads, labels."""

    def __init__(self, positions: int, vocab: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return (torch.randn(rows, hidden, generator=generator) * scale).to(device, dtype)

        self.student_hidden = normal(positions, 1.0).requires_grad_()
        self.student_head = normal(vocab, 3 / hidden**0.5).requires_grad_()
        self.teacher_hidden = normal(positions, 1.0)
        self.teacher_head = normal(vocab, 3 / hidden**0.5)
        self.labels = torch.randint(0, vocab, (positions,), generator=generator).to(device)
        self._kept: list[Tensor] = []

    def kept(self) -> list[Tensor]:
        """What the floor writes to: both logits of a chunk, the gradients on hidden states and head."""
        if not self._kept:
            hidden, head = self.student_hidden.detach(), self.student_head.detach()
            logits = [head.new_empty(min(len(hidden), CHUNK), len(head)) for _ in range(2)]
            self._kept = [*logits, torch.empty_like(hidden), torch.empty_like(head)]
        return self._kept

    def clear(self) -> None:
        """Drop the gradients."""
        self.student_hidden.grad = self.student_head.grad = None


def floor(case: Case) -> None:
    """The four matrix products, in the chunks that keep memory flat."""
    hidden, head = case.student_hidden.detach(), case.student_head.detach()
    *logits, grad_hidden, grad_head = case.kept()
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden)))
        student, teacher = (buffer[: rows.stop - start] for buffer in logits)
        torch.mm(hidden[rows], head.T, out=student)
        torch.mm(case.teacher_hidden[rows], case.teacher_head.T, out=teacher)
        torch.mm(student, head, out=grad_hidden[rows])
        torch.addmm(grad_head, student.T, hidden[rows], beta=1 if start else 0, out=grad_head)


def eager_rkl(case: Case) -> None:
    """Reverse KL as it is usually written."""
    student = (case.student_hidden @ case.student_head.T).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (case.teacher_hidden @ case.teacher_head.T).float().log_softmax(-1)
    torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="batchmean").backward()


def dense(name: str) -> Variant:
    """`drkl.distillation_loss` on whole logits."""

    def run(case: Case) -> None:
        student, teacher = case.student_hidden @ case.student_head.T, case.teacher_hidden @ case.teacher_head.T
        drkl.distillation_loss(student, teacher, case.labels, objective=name).backward()

    return run


def fused(name: str) -> Variant:
    """`drkl.fused_distillation_loss`."""

    def run(case: Case) -> None:
        drkl.fused_distillation_loss(
            case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head, case.labels, objective=name
        ).backward()

    return run


def with_statistics(case: Case) -> None:
    """The same, and the statistics that training logs, of at most 256 positions."""
    drkl.fused_distillation_loss(
        case.student_hidden,
        case.student_head,
        case.teacher_hidden,
        case.teacher_head,
        case.labels,
        observe=StatisticsSums(max(1, len(case.labels) // STATISTICS_POSITIONS)),
    ).backward()


def trl_rkl(case: Case) -> None:
    """TRL's chunked divergence at beta = 1, which is its reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (case.student_head, None, case.teacher_hidden, case.teacher_head, None)
    values, _ = ChunkedDivergenceFunction.apply(case.student_hidden, *heads, 1.0)
    values.mean().backward()


def liger_rkl(case: Case) -> None:
    """Liger-Kernel's fused linear JSD at beta = 1, which is its reverse KL, without torch.compile."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    loss(case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head, case.labels).backward()


VARIANTS: dict[str, Variant] = {
    "floor": floor,
    "eager rkl": eager_rkl,
    "eager drkl": dense("drkl"),
    **{f"fused {name}": fused(name) for name in drkl.OBJECTIVES},
    "fused drkl, stats": with_statistics,
    "trl rkl": trl_rkl,
    "liger rkl": liger_rkl,
}


def runs_here(name: str) -> bool:
    """Whether the variant runs; a peer may not be installed, or not fit the other versions here."""
    try:
        VARIANTS[name](Case(8, 64, 16, torch.float32))
    except Exception as error:
        if name.startswith(("fused", "floor", "eager")):
            raise
        print(f"{name}: left out ({type(error).__name__}: {error})", file=sys.stderr)
        return False
    return True


def seconds(variant: Variant, case: Case) -> float:
    """Wall seconds of one forward and backward."""
    case.clear()
    started = time.perf_counter()
    variant(case)
    return time.perf_counter() - started


def extra_peak_mb(name: str, positions: int, arguments: argparse.Namespace) -> float:
    """MiB by which the peak memory of a process of its own grows while it runs the variant, gradients included."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--memory-of", name, "--positions", str(positions)]
    for option in SETTINGS[1:]:
        command += [f"--{option}", str(getattr(arguments, option))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_own_extra_peak(name: str, case: Case) -> None:
    """Run a variant once, after a small one that loads the libraries, and print how far the peak rose, in MiB.

    Above what is in use before the run: the peak so far, of making the inputs, would hide some of it.
    """
    VARIANTS[name](Case(8, 64, 16, case.student_head.dtype))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = own_memory_kib("VmRSS")
    VARIANTS[name](case)
    print((own_memory_kib("VmHWM") - before) / 1024)


def measured(case: Case, arguments: argparse.Namespace) -> list[Row]:
    """A row for each variant at one number of positions; they are printed, too."""
    positions = len(case.labels)
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS if name in arguments.only and runs_here(name)}
    for round_number in range(arguments.rounds + 1):
        for name in taken:
            value = seconds(VARIANTS[name], case)
            if round_number:  # the first one warms up
                taken[name].append(value)
        print(f"{positions} positions: round {round_number} of {arguments.rounds}", file=sys.stderr)
    case.clear()
    floors = taken.get("floor", [float("nan")])
    rows: list[Row] = []
    print(
        f"{f'{positions} positions':<20} {'least s':>8} {'x floor':>8} {'median s':>9} {'x floor':>8} {'extra MiB':>10}"
    )
    for name, values in taken.items():
        peak = f"{extra_peak_mb(name, positions, arguments):.0f}" if positions >= MEMORY_FROM else ""
        least, median = min(values), statistics.median(values)
        ratios = least / min(floors), median / statistics.median(floors)
        print(f"{name:<20} {least:>8.4f} {ratios[0]:>8.2f} {median:>9.4f} {ratios[1]:>8.2f} {peak:>10}")
        row = {"variant": name, "least_s": f"{least:.4f}", **spread(values, "s"), "extra_peak_mib": peak}
        rows.append(row | {"positions": str(positions)})
    return rows


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 128, 256, 1024])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--code", default="today", help="name of the code that is measured, where it is not today's")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows at the same settings are replaced in it")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.vocab, arguments.hidden, getattr(torch, arguments.dtype)
    if arguments.memory_of:
        print_own_extra_peak(arguments.memory_of, Case(arguments.positions[0], *size))
        return
    shared = {key: str(getattr(arguments, key)) for key in SETTINGS[1:]} | {
        "instructions": torch.backends.cpu.get_cpu_capability(), "code": arguments.code,
        "rounds": str(arguments.rounds), "processor": processor(), "torch": torch.__version__,
        "drkl": drkl.__version__, "commit": commit(),
    }  # fmt: skip
    for positions in arguments.positions:
        rows = [row | shared for row in measured(Case(positions, *size), arguments)]
        write_rows(arguments.output, rows, ("variant", *SETTINGS, "instructions", "code"))


if __name__ == "__main__":
    main()
