"""A step with the teacher itself, with its states remembered, and from caches: `python -m benchmarks.teacher_cache`.

SmolLM2-135M-Instruct teaches the quickstart's ten layers of it on rows of the bundled Dolly slice, in the quickstart's
steps. Each variant has a process of its own and trains the same batches three times; the seconds are those of the steps
of the last two epochs, in which "remembered" runs no teacher at all. "cold" is the first epoch, after the files of the
cache were dropped from the page cache; everything else is warm. Two variants beside them are computed: the bytes of a
position for a teacher of 4,096 hidden units and 151,936 tokens. Rows go to ``benchmarks/results/teacher_cache.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import drkl
from benchmarks.quickstart_pair import single_turns, write_pair
from benchmarks.rows import Row, commit, own_memory_kib, own_process, processor, spread, write_rows
from drkl.models.load import quiet_transformers
from drkl.teachers.stored import StoredStates, StoredTopK

RESULTS = Path(__file__).parent / "results" / "teacher_cache.csv"
SETTINGS = ("rows", "tokens_per_step", "precision", "threads")
KS = (16, 64, 256)
CACHES = ("hidden", *(f"top-{k}" for k in KS))
VARIANTS = ("live", "remembered", *CACHES, "hidden, cold")
EPOCHS = 3
LARGE = {"hidden units": 4096, "vocabulary": 151_936}


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step that ends."""
        self.seconds.append(time.perf_counter() - self._since)


def arguments(options: argparse.Namespace, **fields: Any) -> drkl.DistillationConfig:
    """The quickstart's steps."""
    return drkl.DistillationConfig(
        str(options.folder / "run"), objective="drkl", use_cpu=True, report_to=[], disable_tqdm=True,
        eval_strategy="no", save_strategy="no", tokens_per_step=options.tokens_per_step, num_train_epochs=EPOCHS,
        same_batches=True, precision=options.precision, freeze_embeddings=True,
        teacher_model_init_kwargs={"dtype": "float32"}, max_prompt_tokens=256, max_tokens=320, logging_steps=1000,
        **fields,
    )  # fmt: skip


def make_parts(options: argparse.Namespace) -> list[Row]:
    """Write student, teacher, rows and caches; return what the caches cost."""
    write_pair(options.folder)
    rows = single_turns()
    (options.folder / "rows.json").write_text(json.dumps(rows[: options.rows]))
    return [make_cache(name, rows[: options.rows], options) for name in CACHES]


def make_cache(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> Row:
    """Write one cache."""
    started = time.perf_counter()
    what: dict[str, Any] = {} if name == "hidden" else {"kind": "topk", "k": k_of(name)}
    cache = drkl.cache_teacher(
        str(options.folder / "teacher"), rows, model=str(options.folder / "student"), args=arguments(options),
        output_dir=options.folder / name, **what,
    )  # fmt: skip
    assert cache is not None
    states = sum(file["bytes"] for file_name, file in cache.manifest["files"].items() if file_name.startswith("values"))
    return {
        "variant": f"the pass, {name}", "total_s": f"{time.perf_counter() - started:.2f}",
        "positions": str(cache.manifest["positions"]),
        "bytes_per_position": f"{states / cache.manifest['positions']:.0f}",
    }  # fmt: skip


def k_of(name: str) -> int:
    """The number of a variant's tokens."""
    return int(name.removeprefix("top-"))


def of_a_large_teacher() -> list[Row]:
    """The bytes of a position where hidden states and vocabulary are those of today's larger teachers, computed."""
    width, vocabulary = LARGE.values()
    sizes = {
        "full logits, bf16": 2 * vocabulary,
        "hidden, bf16": StoredStates(width, torch.bfloat16, True).bytes_per_position,
    }
    sizes |= {f"top-{k}": StoredTopK(k, (1.0,), vocabulary, torch.bfloat16).bytes_per_position for k in KS}
    about = ", ".join(f"{value:,} {name}" for name, value in LARGE.items())
    return [{"variant": f"{name} ({about})", "bytes_per_position": str(size)} for name, size in sizes.items()]


def drop_from_page_cache(folder: Path) -> None:
    """Let the system forget the files of a folder, so that the next read goes to the disk."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(name: str, options: argparse.Namespace) -> None:
    """Train, and print what was measured as json."""
    torch.set_num_threads(options.threads)
    quiet_transformers()
    clock = Clock()
    teacher: Any = str(options.folder / "teacher")
    args = arguments(options, teacher_remember_mb=4096 if name == "remembered" else 0)
    cold = name.endswith(", cold")
    if name.removesuffix(", cold") in CACHES:
        args.teacher_model_init_kwargs = None
        folder = options.folder / name.removesuffix(", cold")
        teacher = drkl.TeacherCache.open(folder)
        if cold:
            drop_from_page_cache(folder)
    trainer = drkl.DistillationTrainer(
        str(options.folder / "student"), teacher, args, json.loads((options.folder / "rows.json").read_text()),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    per_epoch = len(clock.seconds) // EPOCHS
    seconds = clock.seconds[:per_epoch] if cold else clock.seconds[per_epoch:]
    print(json.dumps({"seconds": seconds, "peak": own_memory_kib("VmHWM") / 1024}))


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a process of its own."""
    shared = ("tokens_per_step", "precision", "threads")
    return own_process("benchmarks.teacher_cache", name, options, shared)


def main() -> None:
    """Measure each variant in turn and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--tokens-per-step", type=int, default=384)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows at the same settings are replaced in it")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options)
        return
    about = {
        "processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
        "drkl": drkl.__version__, "commit": commit(),
    }  # fmt: skip
    settings = {key: str(getattr(options, key)) for key in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        rows = [*make_parts(options), *of_a_large_teacher()]
        for name in VARIANTS:
            found = measured(name, options)
            rows.append(
                {"variant": name, **spread(found["seconds"], "s_per_step"), "peak_mib": f"{found['peak']:.0f}",
                 "total_s": f"{sum(found['seconds']):.2f}"}
            )  # fmt: skip
            print(f"{name:<12} {statistics.median(found['seconds']):.3f} s a step, peak {found['peak']:.0f} MiB")
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in columns} | settings | about for row in rows]
    write_rows(options.output, rows, ("variant", *SETTINGS))


if __name__ == "__main__":
    main()
