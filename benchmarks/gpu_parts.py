"""The parts of `benchmarks.gpu_day`: each yields rows as it measures them, and runs in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

import drkl
from benchmarks.fused_loss import Case
from benchmarks.fused_loss_gpu import Variant, measured, of_drkl, of_peers
from benchmarks.quickstart_pair import single_turns
from benchmarks.rows import Row
from drkl.config import load_config
from drkl.data.config import NO_ROWS, TokenizerConfig
from drkl.data.tokenizer import learn_tokenizer
from drkl.losses import fused
from drkl.runs import RunFolder
from drkl.training.estimate import estimate

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = [
    f"tests/losses/test_{name}.py"
    for name in ("on_the_device", "products", "kernel_statistics", "kernel_steps", "row_kernel")
]
SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
"""The shape of SmolLM2-135M, the quickstart's teacher."""
QWEN: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_15: dict[str, Any] = QWEN | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12
}  # fmt: skip
QWEN_05: dict[str, Any] = QWEN | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14
}  # fmt: skip
"""The shapes of Qwen2.5-1.5B and Qwen2.5-0.5B."""
TINY: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
Shapes = tuple[dict[str, Any], dict[str, Any]]
"""Of a teacher and a student."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    device: str
    positions: int
    vocab: int
    hidden: int
    rounds: int
    small: Shapes
    """Of the quickstart's shape."""
    large: Shapes
    tokens_per_step: tuple[int, int]
    """Of the small pair and of the large one."""
    steps: int
    max_tokens: int
    answers: int
    """Prompts in an on-policy step, and in an evaluation."""
    max_new_tokens: int
    on_policy_steps: int
    rows: int
    cached_rows: int


GPU = Sizes(
    device="cuda", positions=8192, vocab=151936, hidden=896, rounds=7,
    small=(SMOLLM2, SMOLLM2 | {"num_hidden_layers": 10}), large=(QWEN_15, QWEN_05), tokens_per_step=(32768, 16384),
    steps=30, max_tokens=1024, answers=64, max_new_tokens=128, on_policy_steps=5, rows=1000, cached_rows=512,
)  # fmt: skip
CPU = Sizes(
    device="cpu", positions=3, vocab=64, hidden=16, rounds=2,
    small=(SMOLLM2 | TINY, SMOLLM2 | TINY | {"num_hidden_layers": 2}),
    large=(QWEN | TINY, QWEN | TINY | {"num_hidden_layers": 2, "hidden_size": 16}), tokens_per_step=(256, 256),
    steps=6, max_tokens=96, answers=4, max_new_tokens=8, on_policy_steps=2, rows=40, cached_rows=8,
)  # fmt: skip
"""Everything shrunk, to see that it runs."""


def made(shape: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model with random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype)
    return model.eval()


def model_config(shape: dict[str, Any]) -> Any:
    """The config of a model of a shape."""
    fields = {name: value for name, value in shape.items() if name not in ("model_type", "rope_theta")}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    return AutoConfig.for_model(shape["model_type"], **fields, bos_token_id=0, eos_token_id=0)


def made_tokenizer(vocab_size: int) -> Any:
    """A tokenizer learnt from the bundled text, with tokens that no text has up to the size of the vocabulary."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    texts = (message["content"] for row in single_turns() for message in row["messages"])
    learnt = learn_tokenizer(TokenizerConfig(vocab_size=min(8192, vocab_size)), texts)
    parts = json.loads(learnt.backend_tokenizer.to_str())
    words: dict[str, int] = parts["model"]["vocab"]
    words |= {f"<unused {number}>": number for number in range(len(words), vocab_size)}
    special = {name: learnt.eos_token for name in ("bos_token", "eos_token", "pad_token")}
    whole = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=whole, clean_up_tokenization_spaces=False, **special)


def made_rows(count: int, tokenizer: Any, max_tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and responses of many lengths, cut out of the bundled text; the longest have about ``max_tokens``."""
    text = " ".join(message["content"] for row in single_turns() for message in row["messages"])
    some = text[:20_000]
    characters = int(0.9 * max_tokens * len(some) / len(tokenizer(some)["input_ids"]))
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        start = chance.randrange(len(text) - characters)
        length = chance.randrange(characters // 4, characters)
        cut = start + length // 3
        rows.append({"id": f"row{number}", "prompt": text[start:cut], "response": text[cut : start + length]})
    return rows


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._since = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step that ends."""
        self.seconds.append(now() - self._since)
        self._since = now()


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def start_peak() -> None:
    """Forget what was before, so that `peak_mib` is of what comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> Row:
    """The most memory that torch had on the device since `start_peak`; nothing on a CPU."""
    return {"peak_mib": f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"} if torch.cuda.is_available() else {}


def config(sizes: Sizes, folder: str, changes: dict[str, Any]) -> drkl.DistillationConfig:
    """How every part trains; ``changes`` have the last word."""
    settings: dict[str, Any] = {
        "output_dir": f"{folder}/run", "precision": "bf16", "use_cpu": sizes.device == "cpu", "template": "plain",
        "max_tokens": sizes.max_tokens, "max_prompt_tokens": sizes.max_tokens // 2, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    return drkl.DistillationConfig(**(settings | changes))


def trained(variant: str, sizes: Sizes, shapes: Shapes, shown: Row, **settings: Any) -> Iterator[Row]:
    """Train a pair for some steps by `drkl.DistillationTrainer`: what its log says after its first line.

    The row comes twice, the second time with the memory that is predicted, which takes some seconds.
    """
    start_peak()
    teacher = made(shapes[0], sizes.device, torch.bfloat16, 0)
    student = made(shapes[1], sizes.device, torch.float32, 1)
    settings = {"max_steps": sizes.steps, "logging_steps": max(1, sizes.steps // 6)} | settings
    meter = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = config(sizes, folder, settings)
        tokenizer = made_tokenizer(shapes[1]["vocab_size"])
        rows = made_rows(sizes.rows, tokenizer, sizes.max_tokens)
        trainer = drkl.DistillationTrainer(student, teacher, args, rows, processing_class=tokenizer, callbacks=[meter])
        trainer.train()
        lines = [line for line in RunFolder(Path(folder) / "run").read_train_log() if "loss" in line]
    found = {
        "variant": variant,
        "steps": str(len(meter.seconds)),
        "s_per_step": f"{statistics.median(meter.seconds[1:]):.4f}",
        "trained_tokens_per_step": f"{trainer.num_tokens_seen / len(meter.seconds):.0f}",
        "first_loss": f"{lines[0]['loss']:.4f}",
        "last_loss": f"{lines[-1]['loss']:.4f}",
    }
    logged = {"tokens_per_second": 0, "seconds_generating": 4, "seconds_learning": 4}
    for name, digits in logged.items():
        values = [line[name] for line in lines[1:] if name in line]
        if values:
            found[name] = f"{statistics.median(values):.{digits}f}"
    found |= peak_mib() | shown
    yield found
    yield found | predicted(sizes, shapes, tokenizer, rows, settings)


def predicted(
    sizes: Sizes, shapes: Shapes, tokenizer: Any, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> Row:
    """The memory that ``drkl distill --dry-run`` says of such a run; nothing where it cannot say."""
    rollouts = {name.removeprefix("rollout_"): value for name, value in settings.items() if name.startswith("rollout_")}
    own = {name: settings[name] for name in ("tokens_per_step", "per_device_train_batch_size") if name in settings}
    others = {
        name: settings[name] for name in ("gradient_accumulation_steps", "fsdp", "fsdp_config") if name in settings
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in zip(("teacher", "student"), shapes, strict=True):
            model_config(shape).save_pretrained(f"{folder}/{name}")
            tokenizer.save_pretrained(f"{folder}/{name}")
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {
            "run": {"name": "run", "dir": folder, "device": sizes.device},
            "teacher": {"model": f"{folder}/teacher", "dtype": "bf16"},
            "student": {"init": "pretrained", "model": f"{folder}/student"},
            "data": {
                "path": f"{folder}/rows.jsonl", "eval_path": NO_ROWS, "template": "plain",
                "max_tokens": sizes.max_tokens,
                "max_prompt_tokens": settings.get("max_prompt_tokens", sizes.max_tokens // 2),
            },
            "training": {"max_steps": settings["max_steps"], "precision": "bf16", "arguments": others, **own},
            "rollouts": rollouts,
        }  # fmt: skip
        try:
            stage = estimate(load_config(values)[0].specs())["stages"][-1]
        except Exception:  # what was measured counts without it
            traceback.print_exc()
            return {}
    return {"predicted_mib": f"{stage['memory']['peak_bytes'] / 2**20:.0f}"}


def kernel_tests(sizes: Sizes) -> Iterator[Row]:
    """The tests of the Triton kernel and of the fused loss on this device; on a CPU some of them, interpreted."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Not the checkout's own settings: they ask for packages that are no part of these tests.
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT)]
        command += ["-p", "no:cacheprovider", "--import-mode=importlib", f"--junitxml={report}"]
        # On a GPU each is compiled: the longest walks are for the interpreter.
        command += ["-k", "wide_sums or waits or head" if sizes.device == "cpu" else "not in_every_way"]
        done = subprocess.run([*command, *(str(ROOT / name) for name in KERNEL_TESTS)], cwd=ROOT)
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode} and wrote no report")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [case.get("name", "") for case in suite.iter("testcase") if case.find("failure") is not None]
    failed = counts["failures"] + counts["errors"]
    yield {
        "variant": "pytest", "passed": str(counts["tests"] - failed - counts["skipped"]), "failed": str(failed),
        "skipped": str(counts["skipped"]), "error": "; ".join(bad)[:1000],
    }  # fmt: skip
    if failed or done.returncode:
        raise RuntimeError(f"{failed} of {counts['tests']} tests failed: {', '.join(bad)[:300]}")


def fused_rows(make: Callable[[], dict[str, Variant]]) -> Callable[[Sizes], Iterator[Row]]:
    """A part that times variants of the loss."""

    def part(sizes: Sizes) -> Iterator[Row]:
        if sizes.device == "cpu":
            fused.KERNEL_DEVICES = ("cuda", "cpu")  # in Triton's interpreter
        shape = sizes.vocab, sizes.hidden, torch.bfloat16, sizes.device
        yield from measured(make(), Case(sizes.positions, *shape), Case(2 * sizes.positions, *shape), sizes.rounds)

    return part


def small_pair(sizes: Sizes) -> Iterator[Row]:
    """Distil a pair of the quickstart's shape."""
    settings = {"tokens_per_step": sizes.tokens_per_step[0]}
    yield from trained("135M to 10 layers", sizes, sizes.small, as_text(settings), **settings)


def large_pair(sizes: Sizes) -> Iterator[Row]:
    """Distil 1.5B to 0.5B."""
    settings = {"tokens_per_step": sizes.tokens_per_step[1]}
    yield from trained("1.5B to 0.5B", sizes, sizes.large, as_text(settings), **settings)


def sharded(sizes: Sizes) -> Iterator[Row]:
    """The same, the student under FSDP2 in a group of one process."""
    if sizes.device == "cpu":
        yield {"variant": "1.5B to 0.5B, FSDP2", "status": "left out", "error": "accelerate shards on a GPU alone"}
        return
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in (group | {"MASTER_PORT": 29507}).items()}
    settings = {"tokens_per_step": sizes.tokens_per_step[1]}
    plugin = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    sharding = {"fsdp": True, "fsdp_config": plugin}
    yield from trained("1.5B to 0.5B, FSDP2", sizes, sizes.large, as_text(settings), **settings, **sharding)


def on_policy(sizes: Sizes) -> Iterator[Row]:
    """Steps on the student's own answers; random weights end none before it is as long as it may be."""
    settings = {
        "max_steps": sizes.on_policy_steps, "logging_steps": 1, "per_device_train_batch_size": sizes.answers // 2,
        "gradient_accumulation_steps": 2, "rollout_share": 1.0, "rollout_max_new_tokens": sizes.max_new_tokens,
        "rollout_batch_size": sizes.answers, "max_prompt_tokens": sizes.max_tokens - 2 * sizes.max_new_tokens,
    }  # fmt: skip
    shown = as_text({"answers": sizes.answers, "max_new_tokens": sizes.max_new_tokens})
    for name, shapes in (("135M to 10 layers", sizes.small), ("1.5B to 0.5B", sizes.large)):
        yield from trained(name, sizes, shapes, shown, **settings)


def cache_capture(sizes: Sizes) -> Iterator[Row]:
    """Write what the large teacher knows of some rows, as hidden states and as its largest logits."""
    shapes, device = sizes.large, sizes.device
    teacher, student = made(shapes[0], device, torch.bfloat16, 0), made(shapes[1], "cpu", torch.bfloat16, 1)
    tokenizer = made_tokenizer(shapes[1]["vocab_size"])
    rows = made_rows(sizes.cached_rows, tokenizer, sizes.max_tokens)
    for kind, k in (("hidden", None), ("topk", 64)):
        with tempfile.TemporaryDirectory() as folder:
            args = config(sizes, folder, {"tokens_per_step": sizes.tokens_per_step[1]})
            start_peak()
            started = now()
            cache = drkl.cache_teacher(
                teacher, rows, model=student, output_dir=f"{folder}/cache", args=args, processing_class=tokenizer,
                kind=kind, k=k,
            )  # fmt: skip
            seconds = now() - started
            assert cache is not None
            positions = int(cache.manifest["positions"])
            size = sum(path.stat().st_size for path in Path(folder, "cache").rglob("*") if path.is_file())
        name = kind if k is None else f"top-{k}"
        yield {
            "variant": name, "s": f"{seconds:.2f}", "rows": str(len(rows)), "positions": str(positions),
            "positions_per_second": f"{positions / seconds:.0f}", "bytes_per_position": f"{size / positions:.0f}",
            **peak_mib(),
        }  # fmt: skip


def evaluation(sizes: Sizes) -> Iterator[Row]:
    """Evaluate the large pair: teacher-forced, and with answers of both where the metrics of texts are installed."""
    shapes, device = sizes.large, sizes.device
    teacher, student = made(shapes[0], device, torch.bfloat16, 0), made(shapes[1], device, torch.bfloat16, 1)
    tokenizer = made_tokenizer(shapes[1]["vocab_size"])
    rows = made_rows(sizes.answers, tokenizer, sizes.max_tokens, seed=1)
    lengths: dict[str, Any] = {
        "max_tokens": sizes.max_tokens,
        "max_prompt_tokens": sizes.max_tokens - 2 * sizes.max_new_tokens,
    }
    answers: dict[str, Any] = {
        "prompts": sizes.answers // 4,
        "samples_per_prompt": 4,
        "max_new_tokens": sizes.max_new_tokens,
    }
    for name, settings in (("teacher-forced", {"prompts": 0}), ("with answers", answers)):
        start_peak()
        started = now()
        result = drkl.evaluate(student, teacher, rows, tokenizer, template="plain", sweep=(), **lengths, **settings)
        row = {"variant": name, "s": f"{now() - started:.2f}", "rows": str(len(rows))}
        yield row | {"rkl": f"{result['rkl'].value:.4f}"} | as_text(settings) | peak_mib()


def as_text(values: dict[str, Any]) -> Row:
    """The values as a row has them."""
    return {name: str(value) for name, value in values.items()}


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "kernel tests": kernel_tests,
    "fused loss": fused_rows(of_drkl),
    "small pair": small_pair,
    "large pair": large_pair,
    "on-policy": on_policy,
    "large pair, FSDP2": sharded,
    "cache capture": cache_capture,
    "evaluation": evaluation,
    "fused loss, others": fused_rows(of_peers),
}
"""By their names in `benchmarks.gpu_day`."""
