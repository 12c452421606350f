"""More rows than memory: the first start, which tokenises, the next one, and what a training process holds.

    python -m benchmarks.data_scale --rows 1000000 --folder data-scale

Rows of about 300 tokens are generated into the folder, in which the cache of tokenised rows lies too; a part that is
finished is not measured again, so the command goes on where it was ended. Beside the first start stands
``tokenizer(list_of_texts)`` on all cores, over the same texts as its template writes them. Anonymous memory (RssAnon)
is that of the process before it reads rows, at its third training step, and the most in between: mapped files do not
count. ``--code`` measures another checkout of drkl in the same way. Rows go to benchmarks/results/data_scale.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import transformers

import drkl
from benchmarks.rows import Row, commit, own_memory_kib, processor, write_rows

RESULTS = Path(__file__).parent / "results" / "data_scale.csv"
SAME = ("code", "rows", "processor", "cores")
SAMPLE = 20_000
"""Texts that the tokenizer's own speed is measured on."""
ROOT = Path(__file__).resolve().parents[1]


def generate(path: Path, count: int, seed: int = 0) -> None:
    """Write rows of a prompt of about 100 tokens and a response of about 200, of the words of the bundled data."""
    from drkl.data.examples import read_examples

    words = [word for example in read_examples("bundled:dolly") for word in example.response.split()]
    choice = random.Random(seed)
    partial = path.with_suffix(".part")
    with partial.open("w", encoding="utf-8") as file:
        for number in range(count):
            parts = []
            for length in (choice.randint(35, 95), choice.randint(70, 190)):
                start = choice.randrange(len(words) - length)
                parts.append(" ".join(words[start : start + length]))
            file.write(json.dumps({"id": f"r{number}", "prompt": parts[0], "response": parts[1]}) + "\n")
    partial.rename(path)


def make_model(folder: Path) -> None:
    """Save a very small model with a tokenizer of 49,152 tokens and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from drkl.models.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Peak(threading.Thread):
    """The most anonymous memory of this process, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.kib = 0

    def run(self) -> None:
        while True:
            self.kib = max(self.kib, own_memory_kib("RssAnon"))
            time.sleep(0.02)


def measure(folder: Path, count: int) -> None:
    """Start a run once, take three steps, and print what it took."""
    from drkl.config import load_config
    from drkl.models.load import quiet_transformers
    from drkl.training.run import Listener, prepare

    config = {
        "run": {"name": "scale", "dir": str(folder / "runs"), "device": "cpu"},
        "teacher": None,
        "student": {"init": "pretrained", "model": str(folder / "model")},
        "data": {"path": str(folder / f"rows-{count}.jsonl"), "max_prompt_tokens": 512, "max_tokens": 1024},
        "objective": {"name": "ce"},
        "training": {"num_train_epochs": 1, "max_steps": None, "tokens_per_step": 1024, "eval_rows": 4,
                     "eval_every": 10**6, "save_every": 10**6},
    }  # fmt: skip
    (folder / "scale.yaml").write_text(json.dumps(config))
    quiet_transformers()
    specs = load_config(folder / "scale.yaml", [])[0].specs()
    before = own_memory_kib("RssAnon")
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    prepared = prepare(specs, Listener(on_message=lambda text: print(text, file=sys.stderr)))
    read = time.perf_counter() - started
    trainer = prepared.trainer(prepared.specs[-1])
    planned = time.perf_counter() - started
    found: dict[str, Any] = {"rows_seconds": read, "start_seconds": planned, "before_kib": before}

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 3

    trainer.add_callback(Stop())
    trainer.train()
    rows: Any = trainer.rows
    some = [len(rows[number].all_ids) for number in range(min(1000, len(rows)))]
    found |= {"after_kib": own_memory_kib("RssAnon"), "peak_kib": peak.kib, "kept": len(rows)}
    print(json.dumps(found | {"tokens_per_row": sum(some) / len(some)}))


def own_speed(folder: Path, count: int) -> None:
    """Tokenise a sample of the texts as the template writes them in one call, and print the rows per second."""
    from drkl.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    texts = []
    with (folder / f"rows-{count}.jsonl").open(encoding="utf-8") as file:
        for line, _ in zip(file, range(SAMPLE), strict=False):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    tokenizer(texts[:100], add_special_tokens=False)
    started = time.perf_counter()
    tokenizer(texts, add_special_tokens=False)
    print(json.dumps({"tokenizer_rows_per_second": len(texts) / (time.perf_counter() - started)}))


def part(name: str, options: argparse.Namespace, code: Path) -> dict[str, Any]:
    """What a part of the measurement printed, in a process of its own; kept in the folder."""
    kept = options.folder / f"{options.name}-{options.rows}-{name}.json"
    if not kept.is_file():
        if name == "first":
            shutil.rmtree(options.folder / "cache", ignore_errors=True)
        shutil.rmtree(options.folder / "runs", ignore_errors=True)
        command = [sys.executable, __file__, "--measure", name, "--rows", str(options.rows)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(code / "src"), str(ROOT)]), "TOKENIZERS_PARALLELISM": "true",
            "DRKL_CACHE": str(options.folder / "cache"),
        }  # fmt: skip
        done = subprocess.run(
            [*command, "--folder", str(options.folder)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        kept.write_text(done.stdout.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def main() -> None:
    """Measure every part that is not measured yet and write the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("data-scale"), help="rows, cache and finished parts")
    parser.add_argument("--code", type=Path, default=ROOT, help="a checkout of drkl")
    parser.add_argument("--name", default="drkl", help="what the row calls that code")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=["first", "next", "tokenizer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.measure == "tokenizer":
        own_speed(options.folder, options.rows)
        return
    if options.measure:
        measure(options.folder, options.rows)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"rows-{options.rows}.jsonl"
    if not path.is_file():
        generate(path, options.rows)
    if not (options.folder / "model" / "config.json").is_file():
        make_model(options.folder / "model")
    first, again = part("first", options, options.code), part("next", options, options.code)
    speed = part("tokenizer", options, options.code)["tokenizer_rows_per_second"]
    size = sum(file.stat().st_size for file in (options.folder / "cache").rglob("*") if file.is_file())
    rate = options.rows / first["rows_seconds"]
    row: Row = {
        "code": options.name,
        "rows": str(options.rows),
        "tokens_per_row": f"{again['tokens_per_row']:.0f}",
        "first_seconds": f"{first['rows_seconds']:.1f}",
        "first_rows_per_second": f"{rate:.0f}",
        "tokenizer_rows_per_second": f"{speed:.0f}",
        "share_of_tokenizer": f"{rate / speed:.2f}",
        "next_seconds": f"{again['start_seconds']:.1f}",
        "rss_anon_before_mb": f"{again['before_kib'] * 1.024e-3:.0f}",
        "rss_anon_grown_mb": f"{(again['after_kib'] - again['before_kib']) * 1.024e-3:.0f}",
        "rss_anon_peak_grown_mb": f"{(again['peak_kib'] - again['before_kib']) * 1.024e-3:.0f}",
        "first_rss_anon_grown_mb": f"{(first['after_kib'] - first['before_kib']) * 1.024e-3:.0f}",
        "disk_bytes_per_token": f"{size / again['kept'] / again['tokens_per_row']:.1f}",
        "cores": str(len(os.sched_getaffinity(0))),
        "load_before": f"{os.getloadavg()[2]:.1f}",
        "processor": processor(),
        "transformers": transformers.__version__,
        "drkl": drkl.__version__,
        "commit": subprocess.run(
            ["git", "-C", str(options.code), "describe", "--always"], capture_output=True, text=True
        ).stdout.strip()
        if options.code != ROOT
        else commit(),
    }
    for name, value in row.items():
        print(f"{name:<26} {value}")
    write_rows(options.output, [row], SAME)


if __name__ == "__main__":
    main()
