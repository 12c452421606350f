"""Time and memory of the fused loss on a GPU: `python -m benchmarks.fused_loss_gpu [--help]`.

Forward and backward, to the hidden states and the head, bf16. The floor is the four matrix products alone, in the same
chunks; `eager rkl` is the usual line of autograd code on whole logits, `compiled rkl` the same under torch.compile,
`eager drkl` the definition on whole logits. Peers (TRL, Liger-Kernel) are timed where they are installed
(`benchmarks/requirements.txt`). Times are CUDA events, medians over rounds, each round running every variant once; the
peak is torch's, above what the inputs take. Rows go to ``benchmarks/results/fused_loss_gpu.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import drkl
from benchmarks.fused_loss import Case, dense
from benchmarks.rows import Row, commit, spread, write_rows
from drkl.losses import fused as fused_module
from drkl.training.forward import STATISTICS_POSITIONS, StatisticsSums

RESULTS = Path(__file__).parent / "results" / "fused_loss_gpu.csv"
SETTINGS = ("positions", "vocab", "hidden")
Variant = Callable[[Case], None]


def floor(case: Case) -> None:
    """The four matrix products, in the chunks of the fused loss."""
    hidden, head = case.student_hidden.detach(), case.student_head.detach()
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
    size = fused_module.CUDA_CHUNK_BYTES // (head.shape[0] * head.element_size())
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits = hidden[rows] @ head.T
        case.teacher_hidden[rows] @ case.teacher_head.T
        grad_hidden[rows] = logits @ head
        grad_head += logits.T @ hidden[rows]


def usual_rkl(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Reverse KL as it is usually written."""
    student = (student_hidden @ student_head.T).float().log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head.T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="batchmean")


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head


def fused(name: str, kernel: bool = True, stats: bool = False) -> Variant:
    """`drkl.fused_distillation_loss`, with its Triton kernel or without."""

    def run(case: Case) -> None:
        fused_module.KERNEL_DEVICES = ("cuda",) if kernel else ()
        observe = StatisticsSums(max(1, len(case.labels) // STATISTICS_POSITIONS)) if stats else None
        drkl.fused_distillation_loss(*tensors(case), case.labels, objective=name, observe=observe).backward()

    return run


def trl_rkl() -> Variant:
    """TRL's chunked divergence, at beta = 1 (its reverse KL)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(case: Case) -> None:
        hidden, head, teacher_hidden, teacher_head = tensors(case)
        values, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 1.0)
        values.mean().backward()

    return run


def liger_rkl(compiled: bool) -> Callable[[], Variant]:
    """Liger-Kernel's fused linear JSD, at beta = 1 (its reverse KL), chunks as it has them."""

    def make() -> Variant:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)

        def run(case: Case) -> None:
            hidden, head, teacher_hidden, teacher_head = tensors(case)
            loss(hidden, head, teacher_hidden, teacher_head, case.labels).backward()

        return run

    return make


def of_drkl() -> dict[str, Variant]:
    """The floor, the usual code and every objective of drkl."""
    return {
        "floor": floor,
        "eager rkl": lambda case: usual_rkl(*tensors(case)).backward(),
        **{f"fused {name}": fused(name) for name in drkl.OBJECTIVES},
        "fused drkl, stats": fused("drkl", stats=True),
        "fused drkl, no kernel": fused("drkl", kernel=False),
        "eager drkl": dense("drkl"),
    }


def compiled_rkl() -> Variant:
    """`usual_rkl` under torch.compile."""
    compiled = torch.compile(usual_rkl)
    return lambda case: compiled(*tensors(case)).backward()


def of_peers() -> dict[str, Variant]:
    """The floor, and what others have, as far as it can be made here."""
    peers: dict[str, Callable[[], Variant]] = {
        "compiled rkl": compiled_rkl,
        "liger rkl": liger_rkl(False),
        "liger rkl, compiled": liger_rkl(True),
        "trl rkl": trl_rkl,
    }
    made: dict[str, Variant] = {"floor": floor}
    for name, make in peers.items():
        try:
            made[name] = make()
        except Exception as error:  # a peer that is not installed, or does not fit the other versions here
            _left_out(name, error)
    return made


def _left_out(name: str, error: Exception) -> None:
    print(f"{name}: left out ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)


def milliseconds(variant: Variant, case: Case) -> float:
    """Of one forward and backward, by the GPU's own clock where there is one."""
    case.clear()
    if not case.student_hidden.is_cuda:
        started = time.perf_counter()
        variant(case)
        return 1000 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    variant(case)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def extra_peak_mib(variant: Variant, case: Case) -> float:
    """What a run needs at most, above the inputs; the gradients it leaves are counted in. NaN without a GPU."""
    if not case.student_hidden.is_cuda:
        return float("nan")
    case.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant(case)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured(made: dict[str, Variant], case: Case, rounds: int) -> list[Row]:
    """A row for each variant that runs here, after two times that warm it up."""
    taken: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name, variant in made.items():
        try:
            milliseconds(variant, case)
            milliseconds(variant, case)
            peaks[name], taken[name] = extra_peak_mib(variant, case), []
        except Exception as error:  # out of memory, or a peer that cannot run: the others still count
            _left_out(name, error)
    for _ in range(rounds):
        for name, values in taken.items():
            values.append(milliseconds(made[name], case))
    size = {"positions": len(case.labels), "vocab": len(case.student_head), "hidden": case.student_head.shape[1]}
    settings = {name: str(value) for name, value in size.items()} | {"rounds": str(rounds)}
    return [
        {"variant": name, **spread(values, "ms"), "extra_peak_mib": f"{peaks[name]:.0f}", **settings}
        for name, values in taken.items()
    ]


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    case = Case(arguments.positions, arguments.vocab, arguments.hidden, torch.bfloat16, "cuda")
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "drkl": drkl.__version__,
        "commit": commit(),
    }
    rows = measured(of_drkl() | of_peers(), case, arguments.rounds)
    base = statistics.median(float(row["median_ms"]) for row in rows if row["variant"] == "floor")
    print(f"{'variant':<22} {'median ms':>9} {'p20':>8} {'p80':>8} {'x floor':>8} {'extra MiB':>10}")
    for row in rows:
        median, low, high = (float(row[f"{key}_ms"]) for key in ("median", "p20", "p80"))
        peak = row["extra_peak_mib"]
        print(f"{row['variant']:<22} {median:>9.2f} {low:>8.2f} {high:>8.2f} {median / base:>8.2f} {peak:>10}")
    write_rows(arguments.output, [row | about for row in rows], ("variant", *SETTINGS, "gpu"))


if __name__ == "__main__":
    main()
