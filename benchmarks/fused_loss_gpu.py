"""Time and memory of the fused loss on a GPU: `python -m benchmarks.fused_loss_gpu [--help]`.

Forward and backward, to the hidden states and the head, bf16, with the statistics that training logs. The floor is the
four matrix products alone, in the same chunks and into buffers that are kept; `eager rkl` is the usual line of autograd
code on whole logits, `compiled rkl` the same under torch.compile, `eager drkl` and `compiled drkl` the definition on
whole logits. Peers (TRL, Liger-Kernel) are timed where they are installed (`benchmarks/requirements.txt`). Times are
CUDA events, medians over rounds, each round running every variant once; the peak is torch's, above what the inputs
take, and once more with twice the positions. Rows go to ``benchmarks/results/fused_loss_gpu.csv``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import drkl
from benchmarks.fused_loss import Case, dense
from benchmarks.rows import Row, commit, spread, write_rows
from drkl import LMHead, TopK
from drkl.losses import fused as fused_module
from drkl.losses import kernel_steps
from drkl.losses.products import add_product_
from drkl.objectives.divergences import ReverseKL
from drkl.training.forward import STATISTICS_POSITIONS, StatisticsSums

RESULTS = Path(__file__).parent / "results" / "fused_loss_gpu.csv"
SETTINGS = ("positions", "vocab", "hidden")
FIGURES = ("median_ms", "p20_ms", "p80_ms", "x_floor", "extra_peak_mib", "extra_peak_mib_2n")
TOP_K = 64
Variant = Callable[[Case], None]


class Floor:
    """The four matrix products, in the chunks of the fused loss, into buffers that are made once for a case."""

    def __init__(self) -> None:
        self._chunk_bytes = fused_module.CUDA_CHUNK_BYTES
        self._case: Case | None = None
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(self, case: Case) -> None:
        fused_module.CUDA_CHUNK_BYTES = self._chunk_bytes
        hidden, head = case.student_hidden.detach(), case.student_head.detach()
        size = fused_module.even(len(hidden), fused_module.chunk_rows(head, head.element_size()))
        if case is not self._case:
            both = [head.new_empty(size, len(head)) for _ in range(2)]
            self._case = case
            self._buffers = (*both, torch.empty_like(hidden), torch.empty_like(head, dtype=torch.float32))
        ours, theirs, grad_hidden, grad_head = self._buffers
        grad_head.zero_()
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            states = hidden[rows]
            logits = torch.mm(states, head.T, out=ours[: len(states)])
            torch.mm(case.teacher_hidden[rows], case.teacher_head.T, out=theirs[: len(states)])
            torch.mm(logits, head, out=grad_hidden[rows])
            add_product_(grad_head, logits.T, states)


def usual_rkl(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Reverse KL as it is usually written."""
    student = (student_hidden @ student_head.T).float().log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head.T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(teacher, student, log_target=True, reduction="batchmean")


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.student_hidden, case.student_head, case.teacher_hidden, case.teacher_head


@functools.lru_cache(maxsize=2)
def top_k_of(case: Case) -> TopK:
    """The teacher's largest logits at every position."""
    parts = case.teacher_hidden.split(256)
    return TopK.cat([TopK.of_logits((part @ case.teacher_head.T).float(), TOP_K) for part in parts])


@dataclass(frozen=True)
class OwnReverseKL(ReverseKL):
    """An objective that drkl does not know, with a closed form."""

    name = "own_rkl"


def fused(
    objective: Any,
    *,
    top_k: bool = False,
    softcap: float | None = None,
    stats: bool = True,
    chunk_mib: int | None = None,
    overlapped: bool = False,
    **words: Any,
) -> Variant:
    """`drkl.fused_distillation_loss` with the statistics of training."""
    chunk_bytes = fused_module.CUDA_CHUNK_BYTES

    def run(case: Case) -> None:
        fused_module.CUDA_CHUNK_BYTES = chunk_bytes if chunk_mib is None else chunk_mib * 2**20
        kernel_steps.OVERLAPPED = overlapped
        every = max(1, len(case.labels) // STATISTICS_POSITIONS)
        ours, theirs = (LMHead(head, softcap=softcap) for head in (case.student_head, case.teacher_head))
        states, head = (top_k_of(case), None) if top_k else (case.teacher_hidden, theirs)
        observe = StatisticsSums(every) if stats else None
        drkl.fused_distillation_loss(
            case.student_hidden, ours, states, head, case.labels, objective=objective, observe=observe, **words
        ).backward()

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
    """The floor, the usual code, every objective of drkl, and the variants of some."""
    drkl_with = functools.partial(drkl.make_objective, "drkl")
    return {
        "floor": Floor(),
        **{f"fused {name}": fused(name) for name in drkl.OBJECTIVES},
        "fused drkl, no statistics": fused("drkl", stats=False),
        "fused drkl, skew 0.1": fused(drkl_with(skew=0.1)),
        "fused drkl, tail fkl": fused(drkl_with(tail="fkl")),
        "fused drkl, tail gjs": fused(drkl_with(tail="gjs")),
        "fused drkl, weight student": fused(drkl_with(weight="student")),
        "fused drkl, kd_weight 0.7": fused("drkl", kd_weight=0.7),
        "fused drkl, temperature 2, kd_weight 0.7": fused("drkl", temperature=2.0, kd_weight=0.7, t2_scaling=True),
        f"fused drkl, top-{TOP_K} teacher": fused("drkl", top_k=True),
        "fused drkl, merged ids": fused("drkl", merged_ids=(1, 2)),
        "fused drkl, soft-cap 30": fused("drkl", softcap=30.0),
        "fused drkl, chunks of 256 MiB": fused("drkl", chunk_mib=256),
        "fused drkl, chunks of 1024 MiB": fused("drkl", chunk_mib=1024),
        "fused drkl, two streams": fused("drkl", overlapped=True),
        "fused own_rkl, compiled closed form": fused(OwnReverseKL()),
        "eager rkl": lambda case: usual_rkl(*tensors(case)).backward(),
        "eager drkl": dense("drkl"),
    }


def compiled(loss: Callable[..., Tensor]) -> Variant:
    """A loss of hidden states and heads on whole logits, under torch.compile."""
    made = torch.compile(loss)
    return lambda case: made(*tensors(case)).backward()


def usual_drkl(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """`drkl.distillation_loss` on whole logits."""
    return drkl.distillation_loss(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T)


def of_peers() -> dict[str, Variant]:
    """The floor, and what others have, as far as it can be made here."""
    peers: dict[str, Callable[[], Variant]] = {
        "compiled rkl": lambda: compiled(usual_rkl),
        "liger rkl, compiled": liger_rkl(True),
        "compiled drkl": lambda: compiled(usual_drkl),
        "liger rkl": liger_rkl(False),
        "trl rkl": trl_rkl,
    }
    made: dict[str, Variant] = {"floor": Floor()}
    for name, make in peers.items():
        try:
            made[name] = make()
        except Exception as error:  # a peer that is not installed, or does not fit the other versions here
            made[name] = _failing(error)
    return made


def _failing(error: Exception) -> Variant:
    def run(case: Case) -> None:
        raise error

    return run


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


def warmed(variant: Variant, case: Case) -> str:
    """Run a variant twice, which compiles it; what it warned of, such as that the kernel does not run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        milliseconds(variant, case)
        milliseconds(variant, case)
    said = dict.fromkeys(" ".join(str(one.message).split()) for one in caught if "drkl" in one.filename)
    return "; ".join(said)[:300]


def measured(made: dict[str, Variant], case: Case, twice: Case, rounds: int) -> Iterator[Row]:
    """A row for each variant, after what warms it up; one that does not run here has a row that says why.

    Args:
        made: the variants, the floor among them.
        case: what they run on.
        twice: the same with twice the positions, for the memory of what does not need it whole.
        rounds: how often each is timed.
    """
    size = {"positions": len(case.labels), "vocab": len(case.student_head), "hidden": case.student_head.shape[1]}
    settings = {name: str(value) for name, value in size.items()} | {"rounds": str(rounds)}
    taken: dict[str, list[float]] = {}
    about: dict[str, Row] = {}
    for name, variant in made.items():
        try:
            note = warmed(variant, case)
            about[name] = {"extra_peak_mib": f"{extra_peak_mib(variant, case):.0f}", "note": note}
            if name.startswith("fused"):
                milliseconds(variant, twice)
                about[name]["extra_peak_mib_2n"] = f"{extra_peak_mib(variant, twice):.0f}"
            taken[name] = []
        except Exception as error:  # out of memory, or a peer that cannot run: the others still count
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield {"variant": name, "status": "left out", "error": why, **settings}
    for _ in range(rounds):
        for name, values in taken.items():
            values.append(milliseconds(made[name], case))
    base = statistics.median(taken["floor"])
    for name, values in taken.items():
        ratio = {"x_floor": f"{statistics.median(values) / base:.3f}"}
        yield {"variant": name, **spread(values, "ms"), **ratio, **about[name], **settings}


def shown(row: Row) -> str:
    """A row as a line of the printed table."""
    if "error" in row:
        return f"{row['variant']:<42} {row['status']}: {row['error']}"
    figures = " ".join(f"{float(row.get(name, 'nan')):>9.2f}" for name in FIGURES)
    return f"{row['variant']:<42} {figures}  {row['note']}"


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chunk-mib", type=int, help="the logits of one model at a time; default that of the loss")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="the floor is always measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    if arguments.chunk_mib:
        fused_module.CUDA_CHUNK_BYTES = arguments.chunk_mib * 2**20
    case, twice = (
        Case(count * arguments.positions, arguments.vocab, arguments.hidden, torch.bfloat16, "cuda") for count in (1, 2)
    )
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "drkl": drkl.__version__,
        "commit": commit(),
    }
    made = of_drkl() | of_peers()
    if arguments.only:
        made = {name: variant for name, variant in made.items() if name in ("floor", *arguments.only)}
    print(f"{'variant':<42} " + " ".join(f"{name.removeprefix('extra_'):>9}" for name in FIGURES))
    rows = []
    for row in measured(made, case, twice, arguments.rounds):
        print(shown(row))
        rows.append(row | about)
    found = [row for row in rows if "error" not in row]
    write_rows(arguments.output, found, ("variant", *SETTINGS, "gpu"))


if __name__ == "__main__":
    main()
