"""Answers per minute: drkl's sampling next to transformers' `generate`, prompt by prompt.

    python -m benchmarks.generation [--model NAME] [--prompts N] [--samples K] [--max-new-tokens N]

Both draw K answers to each of N held-out prompts of the bundled Dolly slice at temperature 1 from the whole
distribution, with a KV cache, in the model's own dtype. `generate` is called once per prompt with
num_return_sequences = K, and once more for every single answer, as a plain loop does it. Rows go to
benchmarks/results/generation.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.rows import Row, commit, processor, write_rows
from drkl._version import __version__
from drkl.data.examples import read_examples
from drkl.data.tokenize import Row as Prompt
from drkl.data.tokenize import tokenize_examples
from drkl.evaluation.tasks import choose_prompts
from drkl.models.generate import sample_texts
from drkl.models.load import load_model, load_tokenizer, quiet_transformers
from drkl.models.precision import pick_device, resolve_dtype

RESULTS = Path(__file__).parent / "results" / "generation.csv"


def ours(model: Any, tokenizer: Any, prompts: list[Prompt], options: argparse.Namespace) -> int:
    """All prompts in batches of like length; the number of tokens written."""
    answers = sample_texts(
        model,
        tokenizer,
        [row.sampling_ids for row in prompts],
        samples_per_prompt=options.samples,
        max_new_tokens=options.max_new_tokens,
        keys=[row.id for row in prompts],
    )
    return sum(answer.num_tokens for pool in answers for answer in pool)


def prompt_by_prompt(
    model: Any, tokenizer: Any, prompts: list[Prompt], options: argparse.Namespace, *, at_once: int
) -> int:
    """`generate` called for each prompt, ``at_once`` answers at a time."""
    torch.manual_seed(0)
    written = 0
    for row in prompts:
        ids = torch.tensor([row.sampling_ids], device=model.device)
        for _ in range(options.samples // at_once):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=at_once, max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            written += int((out[:, ids.shape[1] :] != tokenizer.pad_token_id).sum())
    return written


def main() -> None:
    """Time the three and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    quiet_transformers()
    device = pick_device("auto")
    dtype = resolve_dtype("auto", device)
    model: Any = load_model(options.model, dtype).to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(options.model)
    rows, _ = tokenize_examples(read_examples("bundled:dolly-eval"), tokenizer, max_prompt_tokens=256, max_tokens=512)
    prompts = choose_prompts(rows, options.prompts)
    variants: dict[str, Callable[[], int]] = {
        "drkl, batched": lambda: ours(model, tokenizer, prompts, options),
        "transformers, a call per prompt": lambda: prompt_by_prompt(
            model, tokenizer, prompts, options, at_once=options.samples
        ),
        "transformers, a call per answer": lambda: prompt_by_prompt(model, tokenizer, prompts, options, at_once=1),
    }
    found: list[Row] = []
    for name, run in variants.items():
        started = time.perf_counter()
        written = run()
        seconds = time.perf_counter() - started
        answers = len(prompts) * options.samples
        found.append(
            {
                "variant": name, "answers_per_minute": f"{60 * answers / seconds:.1f}", "seconds": f"{seconds:.1f}",
                "tokens": str(written), "prompts": str(len(prompts)), "samples": str(options.samples),
                "max_new_tokens": str(options.max_new_tokens), "model": Path(options.model).name,
                "parameters": str(sum(p.numel() for p in model.parameters())), "dtype": dtype,
                "threads": str(torch.get_num_threads()), "processor": processor(), "torch": torch.__version__,
                "transformers": transformers.__version__, "drkl": __version__, "commit": commit(),
            }
        )  # fmt: skip
        print(f"{name}: {found[-1]['answers_per_minute']} answers a minute ({seconds:.1f} s)")
    write_rows(RESULTS, found, ("variant", "prompts", "samples", "max_new_tokens", "model", "processor"))


if __name__ == "__main__":
    main()
