"""Time and memory of the fused loss beside the dense one: `python -m benchmarks.fused_loss [--help]`.

Forward and backward, to the hidden states and the head. The floor is the four matrix products alone (both logits, the
gradients on hidden states and head); `eager rkl` is the usual line of autograd code, `eager drkl` the definition on
whole logits. Peers (TRL's chunked divergence and Liger-Kernel's chunked loss, each at its reverse KL) are timed where
they are installed (`benchmarks/requirements.txt`). Times are medians over rounds, each round running every variant
once, in one process; the extra peak memory of a variant is measured in a process of its own (on Linux). Rows go to
``benchmarks/results/fused_loss.csv``.
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

    def clear(self) -> None:
        """Drop the gradients."""
        self.student_hidden.grad = self.student_head.grad = None


def floor(case: Case) -> None:
    """The four matrix products, in the chunks that keep memory flat."""
    hidden, head = case.student_hidden.detach(), case.student_head.detach()
    grad_head = torch.zeros_like(head)
    for rows in torch.arange(hidden.shape[0]).split(256):
        logits = hidden[rows] @ head.T
        case.teacher_hidden[rows] @ case.teacher_head.T
        logits @ head
        grad_head.addmm_(logits.T, hidden[rows])


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


def extra_peak_mb(name: str, arguments: argparse.Namespace) -> float:
    """MiB by which the peak memory of a process of its own grows while it runs the variant, gradients included."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--memory-of", name]
    for option in SETTINGS:
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


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows at the same settings are replaced in it")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = Case(arguments.positions, arguments.vocab, arguments.hidden, getattr(torch, arguments.dtype))
    if arguments.memory_of:
        print_own_extra_peak(arguments.memory_of, case)
        return
    about = {"processor": processor(), "torch": torch.__version__, "drkl": drkl.__version__, "commit": commit()}
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS if name in arguments.only and runs_here(name)}
    for round_number in range(arguments.rounds + 1):
        for name in taken:
            value = seconds(VARIANTS[name], case)
            if round_number:  # the first one warms up
                taken[name].append(value)
        print(f"round {round_number} of {arguments.rounds}", file=sys.stderr)
    del case
    settings = {key: str(getattr(arguments, key)) for key in SETTINGS}
    rows: list[Row] = []
    base = statistics.median(taken["floor"]) if "floor" in taken else float("nan")
    print(f"{'variant':<18} {'median s':>9} {'p20':>8} {'p80':>8} {'x floor':>8} {'extra MiB':>10}")
    for name, values in taken.items():
        row = {"variant": name, **spread(values, "s"), "extra_peak_mib": f"{extra_peak_mb(name, arguments):.0f}"}
        ratio = statistics.median(values) / base
        print(
            f"{name:<18} {float(row['median_s']):>9.3f} {float(row['p20_s']):>8.3f} {float(row['p80_s']):>8.3f} "
            f"{ratio:>8.2f} {row['extra_peak_mib']:>10}"
        )
        rows.append(row | settings | {"rounds": str(arguments.rounds)} | about)
    write_rows(arguments.output, rows, ("variant", *SETTINGS))


if __name__ == "__main__":
    main()
