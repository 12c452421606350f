"""Tokens per second: the answers that training samples, next to transformers' `generate` on one batch of all prompts.

    python -m benchmarks.rollouts STUDENT [--prompts N] [--max-new-tokens N] [--precision P] [--repeats N]

Both answer N prompts of the bundled Dolly slice once at temperature 1 from the whole distribution, in the precision of
a training on this machine, with the student's own stop tokens. STUDENT is the folder of a trained student: one that
was only pruned hardly ever stops. What counts is the tokens up to each answer's stop. The two take turns, each time
with another seed; a row has the median over the repeats, and the ratio of two neighbours in time. Rows go to
benchmarks/results/rollouts.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.rows import Row, commit, processor, spread, write_rows
from drkl._version import __version__
from drkl.data.collate import collate_prompts
from drkl.data.examples import read_examples
from drkl.data.tokenize import Row as Prompt
from drkl.data.tokenize import tokenize_examples
from drkl.models.ends import stops_of
from drkl.models.load import load_model, load_tokenizer, quiet_transformers
from drkl.models.precision import DTYPES, pick_device, resolve_dtype
from drkl.rollouts.answers import Request
from drkl.rollouts.builtin import BuiltInWriter

RESULTS = Path(__file__).parent / "results" / "rollouts.csv"


class Case:
    """A student, the prompts it answers, and how."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = pick_device("auto")
        self.precision = resolve_dtype(options.precision, device)
        self.limit = options.max_new_tokens
        self.model: Any = load_model(options.student, "fp32").to(device)  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(options.student)
        self.stops = stops_of(self.model, self.tokenizer)
        examples = read_examples("bundled:dolly")
        rows, _ = tokenize_examples(examples, self.tokenizer, max_prompt_tokens=256, max_tokens=320)
        self.rows: list[Prompt] = rows[: options.prompts]

    def ours(self, seed: int) -> int:
        """The number of tokens that the writer of a training writes."""
        writer = BuiltInWriter(self.model, stops=self.stops, precision=self.precision, batch_size=len(self.rows))
        asked = [Request(row.id, 0, row.sampling_ids, row.sampling_ids, self.limit) for row in self.rows]
        return sum(len(answer.token_ids) for answer in writer.write(asked, seed=seed))

    def batched(self, seed: int) -> int:
        """The number of tokens that `generate` writes to all prompts in a batch."""
        torch.manual_seed(seed)
        pad = self.stops[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        batch = collate_prompts([row.sampling_ids for row in self.rows], pad_id=pad)
        device = self.model.device
        with torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            out = self.model.generate(
                batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.limit, eos_token_id=self.stops,
                pad_token_id=pad,
            )  # fmt: skip
        answers = out[:, batch["input_ids"].shape[1] :].tolist()
        return sum(next((i + 1 for i, t in enumerate(ids) if t in self.stops), len(ids)) for ids in answers)


def measured(write: Callable[[int], int], seed: int) -> tuple[int, float, float]:
    """Tokens written, and tokens per second of wall time and of processor time."""
    wall, before = time.perf_counter(), os.times()
    written = write(seed)
    wall, after = time.perf_counter() - wall, os.times()
    return written, written / wall, written / (after.user + after.system - before.user - before.system)


def main() -> None:
    """Time the two in turns and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("student")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    quiet_transformers()
    case = Case(options)
    variants: dict[str, Callable[[int], int]] = {"drkl": case.ours, "transformers, batched": case.batched}
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in variants}
    case.ours(0), case.batched(0)
    for seed in range(options.repeats):
        for name, write in variants.items():
            found[name].append(measured(write, seed))
    rows: list[Row] = []
    for name, numbers in found.items():
        ratios = [own[1] / base[1] for own, base in zip(numbers, found["transformers, batched"], strict=True)]
        by_processor = [own[2] / base[2] for own, base in zip(numbers, found["transformers, batched"], strict=True)]
        rows.append(
            {
                "variant": name, **spread([rate for _, rate, _ in numbers], "tokens_per_second"),
                "tokens_per_processor_second": f"{statistics.median(rate for *_, rate in numbers):.2f}",
                "ratio": f"{statistics.median(ratios):.2f}",
                "processor_ratio": f"{statistics.median(by_processor):.2f}",
                "tokens": str(round(statistics.mean(written for written, *_ in numbers))),
                "prompts": str(len(case.rows)), "max_new_tokens": str(case.limit), "precision": case.precision,
                "model": Path(options.student).parent.name or options.student,
                "parameters": str(sum(p.numel() for p in case.model.parameters())),
                "threads": str(torch.get_num_threads()), "repeats": str(options.repeats), "processor": processor(),
                "torch": torch.__version__, "transformers": transformers.__version__, "drkl": __version__,
                "commit": commit(),
            }
        )  # fmt: skip
        print(f"{name}: {rows[-1]['median_tokens_per_second']} tokens a second, {rows[-1]['ratio']} of transformers'")
    write_rows(RESULTS, rows, ("variant", "prompts", "max_new_tokens", "precision", "model", "threads", "processor"))


if __name__ == "__main__":
    main()
