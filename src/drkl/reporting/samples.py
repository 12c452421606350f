"""Samples side by side: grouped by prompt; some stand in the page, more in the prompt picker's data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from drkl.display import as_number
from drkl.reporting.answer import run_labels
from drkl.reporting.lines import lines_of
from drkl.reporting.metrics import MODELS
from drkl.reporting.record import RunRecord
from drkl.reporting.text import Clipped, clean, clip, short

PROMPTS_OPEN = 8
TEXT_LIMIT = 1_500
# Bytes: of the prompts that stand in the page, and of the picker's data.
PAGE_BUDGET = 450_000
PICKER_BUDGET = 1_800_000


@dataclass(frozen=True)
class Column:
    """Whose answers: a model of the run, or a run's trained student; ``variable`` is its colour in the page."""

    key: str
    title: str
    subtitle: str
    variable: str


@dataclass(frozen=True)
class Sample:
    """One generated text; ``note`` says its length, and that it was stopped by the limit."""

    text: Clipped
    note: str


@dataclass
class PromptSamples:
    """What all models wrote for one prompt; ``answers`` by column and temperature."""

    prompt: Clipped
    references: list[Clipped]
    suite: str = ""
    answers: dict[str, dict[float | None, list[Sample]]] = field(default_factory=dict)

    def at(self, temperature: float | None) -> dict[str, list[Sample]]:
        """The answers at one temperature; of a model that has none there, those it has."""
        found = {key: by.get(temperature) or next(iter(by.values())) for key, by in self.answers.items()}
        return {key: samples for key, samples in found.items() if samples}


@dataclass(frozen=True)
class SampleTable:
    """``shown`` stands open, ``folded`` can be opened, ``left_out`` prompts are only in the file or the picker.

    ``main`` is the temperature at which answers stand in the page; ``picker`` the data of the rest, safe inside a
    ``<script>``, and ``picker_note`` what of the file it does not hold.
    """

    columns: dict[str, Column]
    main: float | None
    shown: list[PromptSamples]
    folded: list[PromptSamples]
    left_out: int
    temperatures: list[float]
    picker: Markup
    picker_note: str

    @property
    def main_shown(self) -> str:
        """The temperature of the page in words."""
        return "" if self.main is None else f"{self.main:g}"


def sample_table(
    records: Sequence[RunRecord], *, budget: int = PAGE_BUDGET, picker_budget: int = PICKER_BUDGET
) -> SampleTable:
    """Group the rows of ``samples.jsonl`` by prompt, in the file's order, up to so many bytes.

    Of several runs: the first run's teacher and the trained student of each, for the prompts with the same id and text.
    """
    columns = _columns(records)
    groups: dict[Any, PromptSamples] = {}
    temperatures: set[float] = set()
    for record, row, column in _rows(records):
        key = (str(row.get("suite")), str(row.get("prompt_id")), row.get("prompt") if len(records) > 1 else None)
        group = groups.setdefault(str(key), _new_group(row))
        temperature = as_number(row.get("sampling_temperature"))
        temperatures |= {temperature} - {None}  # type: ignore[arg-type]
        limit = as_number(record.settings.get("max_new_tokens"))
        group.answers.setdefault(column, {}).setdefault(temperature, []).append(_sample(row, limit))
    for group in groups.values():
        group.answers = {key: group.answers[key] for key in columns if key in group.answers}
    main = _main_temperature(records[0], temperatures)
    kept: list[PromptSamples] = []
    used = 0
    for group in groups.values():
        used += _size(group, main)
        if used > budget and kept:
            break
        kept.append(group)
    present = {key: one for key, one in columns.items() if any(key in group.answers for group in groups.values())}
    picker, note = _picker(list(groups.values()), present, sorted(temperatures), main, picker_budget)
    return SampleTable(
        columns=present,
        main=main,
        shown=kept[:PROMPTS_OPEN],
        folded=kept[PROMPTS_OPEN:],
        left_out=len(groups) - len(kept),
        temperatures=sorted(temperatures),
        picker=picker,
        picker_note=note,
    )


def _columns(records: Sequence[RunRecord]) -> dict[str, Column]:
    if len(records) == 1:
        titles, subtitles = records[0].titles, records[0].subtitles
        details = subtitles | {"teacher": "", "before": ""}
        return {model: Column(model, titles[model], details[model], model) for model in MODELS}
    columns = {"teacher": Column("teacher", "Teacher", "", "teacher")}
    colors = {line.key: line.variable for line in lines_of(records)}
    for place, label in enumerate(run_labels(records)):
        columns[f"run-{place}"] = Column(f"run-{place}", label, "", colors.get(f"run-{place}", "before"))
    return columns


def _rows(records: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, dict[str, Any], str]]:
    for place, record in enumerate(records):
        for row in record.samples:
            model = row.get("model")
            if not isinstance(model, str) or model not in MODELS:
                continue
            if len(records) == 1:
                yield record, row, model
            elif model == "after":
                yield record, row, f"run-{place}"
            elif model == "teacher" and place == 0:
                yield record, row, model


def _main_temperature(record: RunRecord, temperatures: set[float]) -> float | None:
    wanted = as_number(record.settings.get("sampling_temperature"))
    goal = 1.0 if wanted is None else wanted
    return min(temperatures, key=lambda one: (abs(one - goal), one), default=None)


def _new_group(row: dict[str, Any]) -> PromptSamples:
    reference = row.get("reference")
    several = reference if isinstance(reference, list) else [] if reference is None else [reference]
    suite = row.get("suite")
    return PromptSamples(
        prompt=clip(_text(row.get("prompt")), TEXT_LIMIT),
        references=[clip(_text(one), TEXT_LIMIT) for one in several[:5]],
        suite=short(str(suite), 40) if suite else "",
    )


def _sample(row: dict[str, Any], limit: float | None) -> Sample:
    tokens = as_number(row.get("num_tokens"))
    note = "" if tokens is None else f"{tokens:.0f} token" + ("" if tokens == 1 else "s")
    if tokens is not None and limit is not None and tokens >= limit:
        note += ", stopped by the limit"
    return Sample(clip(_text(row.get("text")), TEXT_LIMIT), note)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _size(group: PromptSamples, main: float | None) -> int:
    answers = [sample.text for samples in group.at(main).values() for sample in samples]
    # Markup around a text weighs about as much as a short answer.
    return sum(len(escape(clean(text.text)).encode()) + 250 for text in (group.prompt, *group.references, *answers))


def _picker(
    groups: Sequence[PromptSamples],
    columns: dict[str, Column],
    temperatures: Sequence[float],
    main: float | None,
    budget: int,
) -> tuple[Markup, str]:
    """The picker's data, and a sentence on what did not fit.

    First every prompt with each model's first answer at the main temperature, then the first answers at the others,
    then the other answers; of each kind as many prompts as there is room for, so that columns stay comparable.
    """
    axis: list[float | None] = [*temperatures] or [None]
    prompts: list[dict[str, Any]] = []
    kept = 0
    for tier in range(4):
        for place, group in enumerate(groups if tier == 0 else groups[: len(prompts)]):
            added = {}
            cost = 0
            for key, temperature, samples in _of_tier(group, list(columns), axis, main, tier):
                texts = [[*_pair(sample.text), sample.note] for sample in samples]
                added[key, temperature] = texts
                cost += len(_json(texts)) + 8
            head = {} if tier else _head(group, place)
            cost += len(_json(head)) if head else 0
            if cost > budget:
                # What comes later in this tier might fit, but then which prompts are whole would be a matter of luck.
                budget = 0
                break
            budget -= cost
            if head:
                prompts.append(head | {"answers": [[[] for _ in axis] for _ in columns]})
            for (key, temperature), texts in added.items():
                prompts[place]["answers"][list(columns).index(key)][axis.index(temperature)] += texts
                kept += len(texts)
    if not prompts:
        return Markup(""), ""
    data = {
        "columns": [[clean(one.title), clean(one.subtitle), one.variable] for one in columns.values()],
        "temperatures": [f"{one:g}" for one in temperatures],
        "main": axis.index(main) if main in axis else 0,
        "prompts": prompts,
    }
    total = sum(len(samples) for group in groups for by in group.answers.values() for samples in by.values())
    note = ""
    if kept < total or len(prompts) < len(groups):
        note = (
            f"There is room here for {kept:,} of the {total:,} answers and {len(prompts):,} of the {len(groups):,} "
            "prompts: first answers before further ones, the main temperature before the others. All are in "
            "`samples.jsonl`."
        )
    return Markup(_json(data).decode()), note


def _of_tier(
    group: PromptSamples, columns: Sequence[str], axis: Sequence[float | None], main: float | None, tier: int
) -> Iterator[tuple[str, float | None, list[Sample]]]:
    for key in columns:
        for temperature, samples in group.answers.get(key, {}).items():
            if temperature in axis and (temperature != main) == bool(tier % 2):
                wanted = samples[1:] if tier >= 2 else samples[:1]
                if wanted:
                    yield key, temperature, wanted


def _head(group: PromptSamples, place: int) -> dict[str, Any]:
    suite = f"{group.suite}: " if group.suite else ""
    return {
        "label": clean(f"{place + 1}. {suite}{short(group.prompt.text, 70)}"),
        "prompt": _pair(group.prompt),
        "references": [_pair(one) for one in group.references],
    }


def _pair(text: Clipped) -> list[Any]:
    return [clean(text.text), text.hidden]


_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def _json(value: Any) -> bytes:
    """JSON that cannot end the ``<script>`` around it, nor open a comment in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES).encode()
