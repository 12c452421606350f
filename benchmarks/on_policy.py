"""Time and memory of on-policy steps: drkl beside TRL's trainers: `python -m benchmarks.on_policy [--help]`.

SmolLM2-135M-Instruct teaches the ten layers of it that the quickstart starts from (or ``--student``). Every trainer has
the same pair, prompts (of the bundled Dolly slice), length of answers, objective (reverse KL), optimiser, precision and
number of threads, no gradient checkpointing, and a process of its own, whose peak of resident memory is read at its
end. Each reads every prompt once, in its own order. Trained tokens are those of the answers, as long as the student
writes them; no step is left out. TRL's trainers run where TRL is installed (`benchmarks/requirements.txt`). Rows go to
``benchmarks/results/on_policy.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import drkl
from benchmarks.quickstart_pair import single_turns, write_pair
from benchmarks.rows import Row, commit, own_memory_kib, own_process, processor, spread, write_rows
from drkl.losses import IGNORE_INDEX
from drkl.models.load import load_model, load_tokenizer, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "on_policy.csv"
SETTINGS = ("student", "prompts", "max_new_tokens", "precision", "threads")
LEARNING_RATE = 1e-5
LONGEST_PROMPT = 600
"""In characters."""


class Meter(TrainerCallback):
    """Seconds and trained tokens of each optimiser step, and the seconds of it that answers take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.generating: list[float] = []
        self.tokens: list[int] = []
        self._tokens, self._generating, self._since = 0, 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step that ends."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.generating.append(self._generating)
        self.tokens.append(self._tokens)
        self._tokens, self._generating, self._since = 0, 0.0, now

    def timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as generating."""

        def run(*arguments: Any, **words: Any) -> Any:
            started = time.perf_counter()
            try:
                return generate(*arguments, **words)
            finally:
                self._generating += time.perf_counter() - started

        return run

    def count(self, mask: Any) -> None:
        """Count the tokens that a micro-batch trains on."""
        self._tokens += int(mask.sum())


def shared_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What all trainers are told alike."""
    return {
        "output_dir": str(options.folder / "run"), "max_steps": options.steps, "use_cpu": True, "report_to": [],
        "per_device_train_batch_size": options.prompts, "learning_rate": LEARNING_RATE, "disable_tqdm": True,
        "bf16": options.precision == "bf16", "save_strategy": "no", "eval_strategy": "no", "seed": 0,
        "logging_steps": 10,
    }  # fmt: skip


def run_drkl(options: argparse.Namespace, rows: list[Row], meter: Meter) -> Any:
    """`drkl.DistillationTrainer` with ``rollout_share=1``."""
    args = drkl.DistillationConfig(
        objective=options.objective, teacher_model_init_kwargs={"dtype": "float32"}, rollout_share=1.0,
        rollout_max_new_tokens=options.max_new_tokens, rollout_refresh_every=options.refresh_every,
        **shared_arguments(options),
    )  # fmt: skip
    trainer = drkl.DistillationTrainer(
        str(options.folder / "student"), str(options.folder / "teacher"), args, train_dataset=rows, callbacks=[meter]
    )
    on_policy: Any = trainer._on_policy
    on_policy.micro_batches = meter.timed(on_policy.micro_batches)
    loss = trainer.compute_loss

    def counted(model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
        meter.count(inputs["labels"] != IGNORE_INDEX)
        return loss(model, inputs, *arguments, **words)

    trainer.compute_loss = counted  # type: ignore[method-assign]
    return trainer


def run_trl(options: argparse.Namespace, rows: list[Row], meter: Meter) -> Any:
    """TRL's DistillationTrainer, which is on-policy."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Metered(DistillationTrainer):
        def _generate(self, *arguments: Any, **words: Any) -> Any:
            return meter.timed(super()._generate)(*arguments, **words)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
            meter.count(inputs["completion_mask"])
            return super().compute_loss(model, inputs, *arguments, **words)

    args = DistillationConfig(
        beta=1.0,
        max_completion_length=options.max_new_tokens,
        gradient_checkpointing=False,
        **shared_arguments(options),
    )
    prompts = [{"prompt": row["messages"][:1]} for row in rows]
    return Metered(
        student(options), teacher(options), args, Dataset.from_list(prompts), callbacks=[meter],
        processing_class=load_tokenizer(str(options.folder / "student")),
    )  # fmt: skip


def run_gkd(options: argparse.Namespace, rows: list[Row], meter: Meter) -> Any:
    """TRL's GKDTrainer with every batch the student's."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Metered(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
            meter.count(inputs["labels"] != IGNORE_INDEX)
            return super().compute_loss(model, inputs, *arguments, **words)

    Metered.generate_on_policy_outputs = staticmethod(meter.timed(GKDTrainer.generate_on_policy_outputs))
    args = GKDConfig(
        beta=1.0, lmbda=1.0, temperature=1.0, max_new_tokens=options.max_new_tokens, gradient_checkpointing=False,
        **shared_arguments(options),
    )  # fmt: skip
    return Metered(
        student(options), teacher(options), args, train_dataset=Dataset.from_list(rows), callbacks=[meter],
        processing_class=load_tokenizer(str(options.folder / "student")),
    )  # fmt: skip


def student(options: argparse.Namespace) -> Any:
    """The student of a trainer of TRL's, in fp32; bf16 is autocast."""
    return load_model(str(options.folder / "student"), "fp32")


def teacher(options: argparse.Namespace) -> Any:
    """The teacher, likewise."""
    return load_model(str(options.folder / "teacher"), "fp32")


REFRESH_EVERY = 4
"""Steps whose answers are written at once in the variant that does so; TRL's trainers have no such setting."""
VARIANTS: dict[str, tuple[Callable[..., Any], str, int]] = {
    "drkl": (run_drkl, "rkl", 1),
    "drkl, objective drkl": (run_drkl, "drkl", 1),
    "TRL DistillationTrainer": (run_trl, "rkl", 1),
    "TRL GKDTrainer, lmbda 1": (run_gkd, "rkl", 1),
    f"drkl, refresh_every {REFRESH_EVERY}": (run_drkl, "rkl", REFRESH_EVERY),
}


def make_pair(options: argparse.Namespace) -> None:
    """Write student, teacher and rows into the folder that every process reads."""
    write_pair(options.folder, options.student)
    rows = [row for row in single_turns() if len(row["messages"][0]["content"]) <= LONGEST_PROMPT]
    (options.folder / "rows.json").write_text(json.dumps(rows[: options.prompts * options.steps]))


def measure(name: str, options: argparse.Namespace) -> None:
    """Train, and print what was measured as json."""
    torch.set_num_threads(options.threads)
    quiet_transformers()
    run, options.objective, options.refresh_every = VARIANTS[name]
    meter = Meter()
    trainer = run(options, json.loads((options.folder / "rows.json").read_text()), meter)
    trainer.train()
    peak = own_memory_kib("VmHWM") / 1024
    print(json.dumps({"peak": peak} | {key: getattr(meter, key) for key in ("seconds", "generating", "tokens")}))


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a process of its own."""
    return own_process(
        "benchmarks.on_policy", name, options, ("prompts", "steps", "max_new_tokens", "precision", "threads")
    )


def row_of(name: str, found: dict[str, Any], options: argparse.Namespace) -> Row:
    """The row of a variant, printed too."""
    total, tokens = sum(found["seconds"]), sum(found["tokens"])
    steps = len(found["seconds"])
    generating = sum(found["generating"]) / steps
    row = {
        "variant": name, "tokens_per_second": f"{tokens / total:.1f}",
        **spread(found["seconds"], "s_per_step"), "generating_s_per_step": f"{generating:.4f}",
        "learning_s_per_step": f"{total / steps - generating:.4f}",
        "tokens_per_step": f"{statistics.mean(found['tokens']):.1f}", "peak_mib": f"{found['peak']:.0f}",
    }  # fmt: skip
    print(
        f"{name:<26} {row['tokens_per_second']:>8} tokens/s {total / steps:>7.2f} s a step, of which generating "
        f"{generating:.2f}; {row['tokens_per_step']} tokens a step; peak {row['peak_mib']} MiB",
        flush=True,
    )
    return row


def main() -> None:
    """Measure each trainer in turn and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", default="pruned", help="pruned: ten layers, untrained; or a student's folder")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows at the same settings are replaced in it")
    parser.add_argument("--measure", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options)
        return
    names = [name for name in options.only if name.startswith("drkl") or find_spec("trl") is not None]
    if len(names) < len(options.only):
        print("TRL is not installed: its trainers are left out", file=sys.stderr)
    about = {
        "processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__,
        "drkl": drkl.__version__, "commit": commit(),
    }  # fmt: skip
    settings = {key: str(getattr(options, key)) for key in SETTINGS}
    settings["student"] = Path(options.student).name
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_pair(options)
        rows = [row_of(name, measured(name, options), options) for name in names]
    write_rows(options.output, [row | settings | {"steps": str(options.steps)} | about for row in rows],
               ("variant", *SETTINGS))  # fmt: skip


if __name__ == "__main__":
    main()
