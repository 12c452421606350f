"""Memory of training as it is predicted and as it is measured: `python -m benchmarks.memory [--only NAME ...]`.

Every case is a run of a few steps as `drkl distill` makes it, held-out loss and saved student included, in a
process of its own on the CPU. Measured is how far the peak of resident memory (VmHWM) rises above what the process
holds after its imports and a tiny run, which loads what a first run loads. The peak counts pages of files too: weights
that are read from a mapped file are memory that a run needs; ``anonymous_mib`` is the peak of RssAnon alone, sampled
every ten milliseconds, as the system keeps no peak of it. ``MALLOC_*`` settings give freed memory back to the system at
once: without them the C library keeps pages for later, and the peak holds some that nothing needs. Predicted is what
`drkl distill --dry-run` prints for the same config. Rows go to ``benchmarks/results/memory.csv``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (loaded before the first measurement)
import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config

from benchmarks.rows import Row, commit, own_memory_kib, processor, write_rows
from drkl.config import load_config
from drkl.models.load import model_class, quiet_transformers
from drkl.training.estimate import memory_of
from drkl.training.memory import Memory
from drkl.training.run import Listener, cache_states, distill
from tests.data.tiny_tokenizers import build
from tests.training import tiny_runs

RESULTS = Path(__file__).parent / "results" / "memory.csv"
LABELS = ("good", "bad", "neither")
STEPS = 2
WORDS = "the model learns to write what its teacher would write and where it is not sure it says so".split()
ALLOCATOR = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}

SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
"""The shape of SmolLM2-135M."""
VOCABULARY = 8192
PAIR: dict[str, Any] = {
    "teacher": {"model": "llama-12", "dtype": "fp32"},
    "student": {"init": "prune", "layers": 6},
    "training": {"tokens_per_step": 96},
}


def pair(**changes: Any) -> dict[str, Any]:
    """`PAIR` with other settings in its sections."""
    task = {"task": changes.pop("task")} if "task" in changes else {}
    return task | {name: PAIR.get(name, {}) | changes.get(name, {}) for name in dict.fromkeys((*PAIR, *changes))}


def shallow(**changes: Any) -> dict[str, Any]:
    """Two layers that read 1,024 tokens at once."""
    training = {"tokens_per_step": 1024} | changes.pop("training", {})
    return pair(teacher={"model": "llama-2"}, student={"layers": 2} | changes.pop("student", {}), training=training)


SAME = {"init": "pretrained", "model": "llama-12", "layers": None}
FROZEN = {"freeze_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "6 of 12 layers": pair(),
    "frozen embeddings": pair(student=FROZEN),
    "LoRA on all 12 layers": pair(student=SAME, peft={"r": 16, "target_modules": "all-linear"}),
    "bf16 weights, both": pair(student={"dtype": "bf16"}, teacher={"dtype": "bf16"}),
    "1,024 tokens, 2 layers": shallow(),
    "the same, gradient checkpointing": shallow(training={"gradient_checkpointing": True}),
    "teacher cached, hidden": pair(student=FROZEN, cache={"kind": "hidden"}),
    "teacher cached, top 64": pair(student=FROZEN, cache={"kind": "topk"}),
    "adafactor": pair(training={"optim": "adafactor"}),
    "sgd": pair(training={"optim": "sgd"}),
    "T5, 3 + 3 of 6 + 6 layers": pair(teacher={"model": "t5-6"}, student={"layers": 3}),
    "classifier, 4 of 8 layers": pair(task="classification", teacher={"model": "bert-8"}, student={"layers": 4}),
    "two processes, DDP": pair(student=FROZEN, processes={"count": 2}),
    "V = 49,152": pair(teacher={"model": "v49152-4"}, student={"layers": 2}),
    "135M student": pair(student={"init": "pretrained", "model": "smollm2-30", "layers": None}),
    "teacher remembered": pair(student=FROZEN, teacher={"remember_mb": 64}, training={"same_batches": True}),
    "answers written": pair(student=FROZEN, rollouts={"share": 1.0, "max_new_tokens": 16, "batch_size": 8}),
    "4 micro-batches": shallow(training={"accumulate": 4}),
    "eager attention": shallow(student={"model_init_kwargs": {"attn_implementation": "eager"}}),
    "bf16 autocast": shallow(training={"precision": "bf16"}),
    "V = 151,936": pair(teacher={"model": "v151936-2"}, student={"layers": 1}),
    "the quickstart's shape, 10 of 30 layers": pair(
        teacher={"model": "smollm2-30"}, student=FROZEN | {"layers": 10}, training={"save": True}
    ),
}


def write_model(name: str, folder: Path) -> None:
    """A model with random weights, and a tokenizer."""
    kind, layers = name.split("-")
    tokenizer = build(extra=sorted(set(WORDS)))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vocabulary = {"smollm2": 49_152, "v49152": 49_152, "v151936": 151_936}.get(kind, VOCABULARY)
    common: dict[str, Any] = {"vocab_size": vocabulary} | ids
    config: Any
    if kind == "t5":
        config = T5Config(**common | {"decoder_start_token_id": ids["pad_token_id"]}, num_layers=int(layers))
    elif kind == "bert":
        labels = dict(enumerate(LABELS))
        config = BertConfig(**common, num_hidden_layers=int(layers), id2label=labels,
                            label2id={label: number for number, label in labels.items()})  # fmt: skip
    else:
        shape = SMOLLM2 if kind == "smollm2" else SMALL
        config = LlamaConfig(**common | shape, num_hidden_layers=int(layers), tie_word_embeddings=True)
    model = model_class(config, classifier=kind == "bert").from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(path: Path, *, labelled: bool) -> None:
    """Rows of 10 to 40 words, each a token as the blanks between them are."""
    lines = []
    for number in range(96):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(10 + number * 7 % 30)]
        if labelled:
            row = {"text": " ".join(words), "label": LABELS[number % 3]}
        else:
            row = {"prompt": " ".join(words[: len(words) // 3]), "response": " ".join(words[len(words) // 3 :])}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The config of a case's run, its models and rows beside it."""
    case = {section: dict(value) if isinstance(value, dict) else value for section, value in CASES[name].items()}
    training, cache = case["training"], case.pop("cache", None)
    case.pop("processes", None)
    own = {"optim": training.pop("optim", None), "gradient_accumulation_steps": training.pop("accumulate", None)}
    arguments = {key: value for key, value in own.items() if value is not None} | {"report_to": []}
    arguments |= {} if training.pop("save", False) else {"save_strategy": "no"}
    case["run"] = {"name": re.sub(r"\W+", "-", name), "dir": str(folder / "runs"), "device": "cpu"}
    case["training"] = {
        "max_steps": STEPS, "eval_every": STEPS, "save_every": STEPS, "eval_rows": 2, "precision": "fp32",
        "logging_steps": 1, "arguments": arguments,
    } | training  # fmt: skip
    case["data"] = {"path": str(folder / ("texts.jsonl" if "task" in case else "rows.jsonl"))}
    for section in ("teacher", "student"):
        if (model := case[section].get("model")) is not None:
            case[section]["model"] = str(folder / model)
    if cache is not None:
        case["teacher"]["cache"] = str(folder / cache["kind"])
    return case


def write_parts(name: str, folder: Path) -> None:
    """Models, rows, and the teacher's cache."""
    case = CASES[name]
    for model in {case["teacher"]["model"], case["student"].get("model", case["teacher"]["model"])}:
        if not (folder / model).exists():
            write_model(model, folder / model)
    for file, labelled in (("rows.jsonl", False), ("texts.jsonl", True)):
        write_data(folder / file, labelled=labelled)
    if (cache := case.get("cache")) is not None:
        config = config_of(name, folder)
        del config["teacher"]["cache"]
        cache_states(load_config(config)[0].specs(), folder / cache["kind"], kind=cache["kind"])


def predicted(name: str, folder: Path) -> Memory:
    """What a dry run prints."""
    processes = CASES[name].get("processes", {}).get("count")
    return memory_of(load_config(config_of(name, folder))[0].specs(), processes)[-1]


class Sampler(threading.Thread):
    """The peak of anonymous memory, which the system does not keep."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_kib = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._done.wait(0.01):
            self.peak_kib = max(self.peak_kib, own_memory_kib("RssAnon"))

    def stop(self) -> int:
        """The peak, in KiB."""
        self._done.set()
        self.join()
        return self.peak_kib


def measure(name: str, folder: Path) -> None:
    """Run the case in this process and print what it took, as json."""
    rank = os.environ.get("RANK", "0")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, anonymous = own_memory_kib("VmRSS"), own_memory_kib("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    sampler = Sampler()
    sampler.start()
    started = time.perf_counter()
    distill(load_config(config_of(name, folder))[0].specs(), mode="new", listener=Listener())
    found = {
        "peak_kib": own_memory_kib("VmHWM") - before,
        "anonymous_kib": sampler.stop() - anonymous,
        "seconds": time.perf_counter() - started,
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def warm_up() -> None:
    """A run of a tiny model, by this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        training = {"max_steps": 2, "eval_every": 2, "save_every": 2}
        values = tiny_runs.config(Path(folder), training=training)
        distill(load_config(values)[0].specs(), mode="new", listener=Listener())


def in_a_child(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, which begins as this one is: with its imports, and warm."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{arguments[0]}: the process ended with status {process.exitcode}.")


def prepare_case(name: str, folder: Path) -> None:
    """Write what the case needs, and what is predicted for it."""
    write_parts(name, folder)
    (folder / "predicted.json").write_text(json.dumps(predicted(name, folder).to_json()))


def run_case(name: str, folder: Path) -> Row:
    """Predict and measure one case."""
    in_a_child(prepare_case, name, folder)
    processes = CASES[name].get("processes", {}).get("count", 1)
    if processes == 1:
        in_a_child(measure, name, folder)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "benchmarks.memory", "--folder", str(folder), "--case", name]
        subprocess.run(command, check=True)
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]
    memory = Memory.from_json(json.loads((folder / "predicted.json").read_text()))
    peak, anonymous = (max(one[key] for one in found) / 1024 for key in ("peak_kib", "anonymous_kib"))
    parts = {part: memory.moments[memory.peak].get(part, 0) / 2**20 for part in PARTS}
    return {
        "case": name,
        "predicted_mib": f"{memory.peak_bytes / 2**20:.0f}",
        "measured_mib": f"{peak:.0f}",
        "ratio": f"{memory.peak_bytes / 2**20 / peak:.3f}",
        "anonymous_mib": f"{anonymous:.0f}",
        "moment": memory.peak,
        **{f"{part}_mib": f"{size:.0f}" for part, size in parts.items()},
        "seconds": f"{max(one['seconds'] for one in found):.0f}",
        "processor": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


PARTS = (
    "student_weights", "gradients", "optimiser", "teacher_weights", "teacher_states", "activations", "loss", "buckets",
    "answers", "start",
)  # fmt: skip


def main() -> None:
    """Run the cases, or the part of one that a process was started for."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", help="Cases, by parts of their names.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]], os.environ | ALLOCATOR)
    torch.set_num_threads(1)
    quiet_transformers()
    if options.case:  # one of several processes, in which a warm-up would be a run of all of them
        measure(options.case, options.folder)
        return
    warm_up()
    shown = ("case", "predicted_mib", "measured_mib", "ratio", "anonymous_mib", "moment", "seconds")
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            if options.only and not any(word in name for word in options.only):
                continue
            row = run_case(name, Path(folder))
            print({key: row[key] for key in shown})
            write_rows(RESULTS, [row], ("case",))


if __name__ == "__main__":
    main()
