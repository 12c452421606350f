"""Time and memory of steps on data: drkl beside TRL's trainers: `python -m benchmarks.train_step [--help]`.

SmolLM2-135M-Instruct teaches the quickstart's ten layers of it on rows of the bundled Dolly slice. Every trainer has
the same pair, token ids, batches, objective (reverse KL), optimiser, precision and number of threads, no gradient
checkpointing, and a process of its own; ``mean_loss``, over the same steps, says whether they do the same. TRL's
GKDTrainer is told to write no answers (lmbda 0), and its DistillationTrainer, which always does, is handed those of the
data in no time. TRL's trainers run where TRL is installed (`benchmarks/requirements.txt`).

The trainers take turns, round by round; the first step of a process is left out. Tokens a second are those of the
quickest round; the seconds of a step are of all rounds. Rows go to ``benchmarks/results/train_step.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

import drkl
from benchmarks.on_policy import Meter, shared_arguments, student, teacher
from benchmarks.quickstart_pair import single_turns, write_pair
from benchmarks.rows import Row, commit, own_memory_kib, own_process, processor, spread, write_rows
from drkl.losses import IGNORE_INDEX
from drkl.models.load import load_tokenizer, quiet_transformers
from drkl.training.plan import plan_run

RESULTS = Path(__file__).parent / "results" / "train_step.csv"
SETTINGS = ("prompts", "precision", "threads")
LONGEST_PROMPT, LONGEST = 256, 320
"""In tokens, as in the quickstart."""


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What all trainers are told alike."""
    return shared_arguments(options) | {"weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "linear"}


def drkl_config(options: argparse.Namespace, objective: str = "rkl") -> drkl.DistillationConfig:
    """The arguments of drkl's trainer."""
    return drkl.DistillationConfig(
        objective=objective, teacher_model_init_kwargs={"dtype": "float32"}, max_tokens=LONGEST,
        max_prompt_tokens=LONGEST_PROMPT, **arguments(options),
    )  # fmt: skip


def run_drkl(options: argparse.Namespace, rows: list[dict[str, Any]], meter: Meter) -> Any:
    """`drkl.DistillationTrainer`, which puts the rows in the order that the others are given them in."""
    known = [
        {"input_ids": row["prompt_ids"] + row["answer_ids"],
         "labels": [IGNORE_INDEX] * len(row["prompt_ids"]) + row["answer_ids"]}
        for row in rows
    ]  # fmt: skip
    trainer = drkl.DistillationTrainer(
        str(options.folder / "student"), str(options.folder / "teacher"), drkl_config(options, options.objective),
        train_dataset=known, callbacks=[meter],
    )  # fmt: skip
    loss = trainer.compute_loss

    def counted(model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
        meter.count(inputs["labels"] != IGNORE_INDEX)
        return loss(model, inputs, *arguments, **words)

    trainer.compute_loss = counted  # type: ignore[method-assign]
    return trainer


def run_gkd(options: argparse.Namespace, rows: list[dict[str, Any]], meter: Meter) -> Any:
    """TRL's GKDTrainer, every batch the data's."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Metered(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
            meter.count(inputs["labels"] != IGNORE_INDEX)
            return super().compute_loss(model, inputs, *arguments, **words)

    args = GKDConfig(
        beta=1.0, lmbda=0.0, temperature=1.0, max_length=LONGEST, gradient_checkpointing=False,
        train_sampling_strategy="sequential", **arguments(options),
    )  # fmt: skip
    known = [
        {"prompt": row["question"], "input_ids": row["prompt_ids"] + row["answer_ids"],
         "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"])}
        for row in in_order(options, rows)
    ]  # fmt: skip
    return Metered(
        student(options), teacher(options), args, train_dataset=Dataset.from_list(known), callbacks=[meter],
        processing_class=load_tokenizer(str(options.folder / "student")),
    )  # fmt: skip


def run_trl(options: argparse.Namespace, rows: list[dict[str, Any]], meter: Meter) -> Any:
    """TRL's DistillationTrainer, with the answers of the data for those that it would write."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    answers = {tuple(row["prompt_ids"]): row["answer_ids"] for row in rows}

    class Metered(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return [answers[tuple(ids)] for ids in prompt_ids]

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
            meter.count(inputs["completion_mask"])
            return super().compute_loss(model, inputs, *arguments, **words)

    args = DistillationConfig(
        beta=1.0, max_completion_length=LONGEST, gradient_checkpointing=False, shuffle_dataset=False,
        **arguments(options),
    )  # fmt: skip
    prompts = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in in_order(options, rows)]
    return Metered(
        student(options), teacher(options), args, Dataset.from_list(prompts), callbacks=[meter],
        processing_class=load_tokenizer(str(options.folder / "student")),
    )  # fmt: skip


def in_order(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as drkl puts them into steps."""
    # What is fed of a row is all but its last token.
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) - 1 for row in rows]
    steps, _ = plan_run(lengths, drkl_config(options), 1)
    return [rows[number] for step in steps for number in step]


VARIANTS: dict[str, tuple[Callable[..., Any], str]] = {
    "drkl": (run_drkl, "rkl"),
    "drkl, objective drkl": (run_drkl, "drkl"),
    "TRL DistillationTrainer": (run_trl, "rkl"),
    "TRL GKDTrainer, lmbda 0": (run_gkd, "rkl"),
}


def tokenised(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows of one question and its answer, as token ids; each question comes once."""
    tokenizer = load_tokenizer(str(folder / "student"))
    rows: dict[str, dict[str, Any]] = {}
    for row in single_turns():
        question = row["messages"][0]["content"]
        ids = [
            tokenizer(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=more))["input_ids"]
            for part, more in ((row["messages"][:1], True), (row["messages"], False))
        ]
        known = {"question": question, "prompt_ids": ids[0], "answer_ids": ids[1][len(ids[0]) :]}
        if len(ids[0]) <= LONGEST_PROMPT and len(ids[1]) <= LONGEST:
            rows[question] = known
        if len(rows) == count:
            break
    return list(rows.values())


def measure(name: str, options: argparse.Namespace) -> None:
    """Train, and print what was measured as json."""
    torch.set_num_threads(options.threads)
    quiet_transformers()
    run, options.objective = VARIANTS[name]
    meter = Meter()
    trainer = run(options, json.loads((options.folder / "rows.json").read_text()), meter)
    loss = trainer.train().training_loss
    peak = own_memory_kib("VmHWM") / 1024
    print(json.dumps({"peak": peak, "loss": loss, "seconds": meter.seconds[1:], "tokens": meter.tokens[1:]}))


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a process of its own."""
    found = own_process("benchmarks.train_step", name, options, ("prompts", "steps", "precision", "threads"))
    rate = sum(found["tokens"]) / sum(found["seconds"])
    print(f"{name:<26} {rate:>8.1f} tokens/s, peak {found['peak']:.0f} MiB, mean loss {found['loss']:.5f}", flush=True)
    return found


def row_of(name: str, rounds: list[dict[str, Any]]) -> Row:
    """The row of a variant."""
    quickest = min(rounds, key=lambda found: sum(found["seconds"]))
    return {
        "variant": name, "tokens_per_second": f"{sum(quickest['tokens']) / sum(quickest['seconds']):.1f}",
        **spread([seconds for found in rounds for seconds in found["seconds"]], "s_per_step"),
        "tokens_per_step": f"{statistics.mean(quickest['tokens']):.1f}",
        "peak_mib": f"{max(found['peak'] for found in rounds):.0f}", "mean_loss": f"{quickest['loss']:.5f}",
    }  # fmt: skip


def main() -> None:
    """Measure the trainers in turn and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=8, help="rows in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps of each process")
    parser.add_argument("--rounds", type=int, default=3)
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
    counts = {"steps": str(options.steps - 1), "rounds": str(options.rounds)}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_pair(options.folder)
        rows = tokenised(options.folder, options.prompts * options.steps)
        (options.folder / "rows.json").write_text(json.dumps(rows))
        for _ in range(options.rounds):
            for name in names:
                rounds[name].append(measured(name, options))
    rows_of_all = [row_of(name, found) | settings | counts | about for name, found in rounds.items()]
    write_rows(options.output, rows_of_all, ("variant", *SETTINGS))


if __name__ == "__main__":
    main()
