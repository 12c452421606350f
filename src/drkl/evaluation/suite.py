"""Runs every metric on every model and gives one table, ``eval.json``, with the samples it rests on."""

from __future__ import annotations

import gc
import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from drkl._version import __version__
from drkl.data.tokenize import Row
from drkl.evaluation import text
from drkl.evaluation.config import EvaluationConfig
from drkl.evaluation.declared import KEYS, definitions
from drkl.evaluation.positions import HeldOutStates, bin_edges, compare, held_out_states
from drkl.models.generate import Generation, sample_texts
from drkl.runs import RunFolder, write_json, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Progress = Callable[[str, int, int], None]

MODELS = ("teacher", "before", "warmup", "after")


@dataclass
class Evaluation:
    """What is filled in model by model."""

    tables: dict[str, dict[str, float | None]] = field(default_factory=dict)
    counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    teacher: HeldOutStates | None = None
    vocab_size: int = 0


def evaluate(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationConfig,
    *,
    pad_id: int,
    device: str | torch.device = "cpu",
    data: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what ``eval.json`` holds and the rows of ``samples.jsonl``.

    Args:
        models: loaders by name, of ``MODELS``; each is called once and its model dropped before the next one is called
            (of the teacher its head and its hidden states stay). Without a teacher, what is measured against it is
            None.
        tokenizer: the one that the rows were made with, and that all the models share.
        rows: the held-out rows; the teacher-forced metrics use them all, sampling the prompts of some.
        settings: how many are sampled, and how.
        pad_id: fills batches.
        device: each model is moved there.
        data: where the rows come from, for the record.
        vocab_size: how many ids, from 0, the models are compared on where their padding differs; None for all.
        on_progress: called with ("teacher: sampling", done, total); the unit is that of the total.

    Raises:
        DrklError: vocabularies that differ, or a prompt that leaves no room in a model's context.
    """
    assert models and set(models) <= set(MODELS), f"models are named {MODELS}"
    started = time.perf_counter()
    prompts = choose_prompts(rows, settings.prompts)
    result = Evaluation()
    for name in (model for model in MODELS if model in models):
        result.seconds[name] = {}
        report = reporter(name, on_progress)
        with timed(result.seconds[name], "load"):
            model: Any = models[name]()
            model.to(device).eval()
        metrics = _read(name, model, rows, pad_id, vocab_size, result, report)
        with timed(result.seconds[name], "samples"):
            answers = _sample(model, tokenizer, prompts, settings, report)
        # Two students at once may not fit.
        del model
        free_memory(device)
        with timed(result.seconds[name], "text"):
            table = {**metrics, **text_metrics(prompts, answers)}
        result.tables[name] = {key: finite(table.get(key)) for key in KEYS}
        result.samples += _sample_rows(name, prompts, answers, settings.sampling_temperature)
    seconds = {name: {part: round(value, 2) for part, value in parts.items()} for name, parts in result.seconds.items()}
    evaluation = {
        "settings": _describe(settings, prompts, rows, device, data),
        **result.tables,
        "distributions": {"edges": bin_edges(result.vocab_size), **result.counts},
        "timing": {**seconds, "total": round(time.perf_counter() - started, 2)},
    }
    return evaluation, result.samples


def write_evaluation(run: RunFolder, evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Write ``samples.jsonl`` and then ``eval.json``, each whole or not at all."""
    write_jsonl(run.samples_path, [dict(row) for row in samples])
    write_json(run.eval_path, dict(evaluation))


def choose_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """Return ``count`` rows (all, if there are fewer) picked by a hash of their ids, in the order of the rows.

    A file sorted by subject would otherwise give the first subject only; the choice does not depend on any seed.
    """
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].id.encode("utf-8", "surrogatepass")).digest())
    return [rows[i] for i in sorted(order[:count])]


def text_metrics(prompts: Sequence[Row], answers: Sequence[Sequence[Generation]]) -> dict[str, float | None]:
    """Return ROUGE-L, Distinct-1 and -2, and Self-BLEU of the answers to each prompt."""
    pools = [[answer.text for answer in pool] for pool in answers]
    return {
        "rouge_l": text.rouge_l(pools, [row.example.response for row in prompts]),
        "distinct_1": text.distinct_n(pools, 1),
        "distinct_2": text.distinct_n(pools, 2),
        "self_bleu": text.self_bleu(pools),
    }


def _read(
    name: str,
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad_id: int,
    vocab_size: int | None,
    result: Evaluation,
    report: Callable[[str, int], Callable[[int], None] | None],
) -> dict[str, float | None]:
    """The teacher-forced metrics of one model; the teacher's states stay for those that follow."""
    with timed(result.seconds[name], "teacher_forced"):
        states = held_out_states(
            model, rows, pad_id=pad_id, vocab_size=vocab_size, progress=report("reading", len(rows))
        )
        if name == "teacher":
            result.teacher = states
        metrics = compare(states, result.teacher, progress=report("comparing", len(states.labels)))
    result.vocab_size = states.head.vocab_size
    result.counts[name] = metrics.distributions(result.vocab_size)
    return metrics.compute()


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Row],
    settings: EvaluationConfig,
    report: Callable[[str, int], Callable[[int], None] | None],
) -> list[list[Generation]]:
    if not prompts:
        return []
    return sample_texts(
        model,
        tokenizer,
        [row.sampling_ids for row in prompts],
        samples_per_prompt=settings.samples_per_prompt,
        sampling_temperature=settings.sampling_temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        batch_size=settings.batch_size,
        keys=[row.id for row in prompts],
        progress=report("sampling", len(prompts) * settings.samples_per_prompt * settings.max_new_tokens),
    )


def _sample_rows(
    name: str, prompts: Sequence[Row], answers: Sequence[Sequence[Generation]], temperature: float
) -> Iterator[dict[str, Any]]:
    for row, pool in zip(prompts, answers, strict=True):
        for number, answer in enumerate(pool):
            yield {
                "model": name,
                "prompt_id": row.id,
                "prompt": row.example.prompt_text,
                "sampling_temperature": temperature,
                "sample": number,
                "text": answer.text,
                "reference": row.example.response,
                "num_tokens": answer.num_tokens,
            }


def _describe(
    settings: EvaluationConfig,
    prompts: Sequence[Row],
    rows: Sequence[Row],
    device: str | torch.device,
    data: Mapping[str, Any] | None,
) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "numpy", "rouge-score", "sacrebleu")
    return {
        **settings.model_dump(),
        "prompts": len(prompts),
        "data": {**(data or {}), "heldout_rows": len(rows)},
        "decoding": "sampling from the whole distribution at sampling_temperature (no top-k, top-p or penalties)",
        "device": str(device),
        "versions": {
            "drkl": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "definitions": definitions("generation"),
    }


def reporter(name: str, on_progress: Progress | None) -> Callable[[str, int], Callable[[int], None] | None]:
    """Of (part, total) make what a loop calls with the number of things it has done."""

    def part(what: str, total: int) -> Callable[[int], None] | None:
        if on_progress is None:
            return None
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            on_progress(f"{name}: {what}", done, total)

        on_progress(f"{name}: {what}", 0, total)
        return advance

    return part


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long the block takes."""
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def finite(value: float | None) -> float | None:
    """The value, or None for what is not finite."""
    # Json has no infinity; a distance is infinite where one model excludes a token that the other does not.
    return value if value is None or math.isfinite(value) else None


def free_memory(device: str | torch.device) -> None:
    """Give back what a dropped model held."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
