"""Samples side by side: grouped by prompt, cut to what a page can hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from drkl.display import as_number
from drkl.reporting.metrics import MODELS
from drkl.reporting.record import RunRecord
from drkl.reporting.text import Clipped, clip

PROMPTS_OPEN = 8
TEXT_LIMIT = 1_500
PAGE_BUDGET = 600_000


@dataclass(frozen=True)
class Sample:
    """One generated text; ``note`` says its length, and that it was stopped by the limit."""

    text: Clipped
    note: str


@dataclass
class PromptSamples:
    """What all models wrote for one prompt."""

    prompt: Clipped
    reference: Clipped | None
    answers: dict[str, list[Sample]] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleTable:
    """``shown`` stands open, ``folded`` can be opened, ``left_out`` prompts are only in the file."""

    shown: list[PromptSamples]
    folded: list[PromptSamples]
    left_out: int
    temperatures: str


def sample_table(record: RunRecord, *, budget: int = PAGE_BUDGET) -> SampleTable:
    """Group the rows of ``samples.jsonl`` by prompt, in the file's order, up to ``budget`` characters."""
    settings = (record.evaluation or {}).get("settings")
    limit = as_number(settings.get("max_new_tokens")) if isinstance(settings, dict) else None
    groups: dict[str, PromptSamples] = {}
    for row in record.samples:
        if row.get("model") not in MODELS:
            continue
        group = groups.setdefault(str(row.get("prompt_id")), _new_group(row))
        group.answers.setdefault(row["model"], []).append(_sample(row, limit))
    kept: list[PromptSamples] = []
    used = 0
    for group in groups.values():
        used += _size(group)
        if used > budget and kept:
            break
        group.answers = {model: group.answers[model] for model in MODELS if model in group.answers}
        kept.append(group)
    found = (as_number(row.get("sampling_temperature")) for row in record.samples)
    temperatures = sorted({value for value in found if value is not None})
    return SampleTable(
        shown=kept[:PROMPTS_OPEN],
        folded=kept[PROMPTS_OPEN:],
        left_out=len(groups) - len(kept),
        temperatures=", ".join(f"{value:g}" for value in temperatures),
    )


def _new_group(row: dict[str, Any]) -> PromptSamples:
    reference = row.get("reference")
    return PromptSamples(
        prompt=clip(_text(row.get("prompt")), TEXT_LIMIT),
        reference=None if reference is None else clip(_text(reference), TEXT_LIMIT),
    )


def _sample(row: dict[str, Any], limit: float | None) -> Sample:
    tokens = as_number(row.get("num_tokens"))
    note = "" if tokens is None else f"{tokens:.0f} token" + ("" if tokens == 1 else "s")
    if tokens is not None and limit is not None and tokens >= limit:
        note += ", stopped by the limit"
    return Sample(clip(_text(row.get("text")), TEXT_LIMIT), note)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _size(group: PromptSamples) -> int:
    texts: Iterable[Clipped] = (
        group.prompt,
        *([group.reference] if group.reference else []),
        *(sample.text for samples in group.answers.values() for sample in samples),
    )
    # Markup around a text weighs about as much as a short answer.
    return sum(len(text.text.encode("utf-8", "replace")) + 200 for text in texts)
