"""The answers that a run sampled: their numbers over the steps, and how the answer to one prompt changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drkl.display import as_number
from drkl.reporting.curves import Panel, beside, picture_of
from drkl.reporting.inputs import Run
from drkl.reporting.plotting import Picture, plot_style
from drkl.reporting.text import Clipped, clip, count
from drkl.rollouts.config import PREFIX
from drkl.rollouts.health import DRAWN

PROMPTS = 6
"""Prompts whose answers are on the page."""
STEPS_OPEN = 4
"""Answers to one prompt that stand open; the others are folded."""
STEPS = 24
TEXT_LIMIT, FOLDED_FROM = 1_500, 400
"""Characters of a text on the page, and of one that stands open whole."""
_DATA = "; dashed: the data's responses"
PANELS: list[Panel] = [
    (PREFIX + key, title, caption)
    for key, title, caption in [
        ("finished", "Answers that end", "share within max_new_tokens"),
        ("length", "Length of an answer", "tokens, its end included"),
        ("ends_per_1000", "Ends", "end tokens per 1,000 tokens"),
        ("distinct2", "Distinct-2", f"different ones among {DRAWN} bigrams of all answers" + _DATA),
        ("repeated4", "Repetition inside an answer", "share of the 4-grams that it had before" + _DATA),
        ("entropy", "Entropy on the answers", "nats; the teacher is dashed"),
        ("rkl", "Reverse KL on the answers", "KL(q‖p), nats, log scale"),
        ("fkl", "Forward KL on the answers", "KL(p‖q), nats, log scale"),
    ]
]
_WRITERS = {"mixed": "by student and teacher together", "teacher": "by the teacher"}


@dataclass(frozen=True)
class Written:
    """What was written after so many steps; ``opening`` is the beginning of a long text, else empty."""

    step: int
    text: Clipped
    opening: str
    note: str


@dataclass(frozen=True)
class History:
    """The answers to one prompt, by step: some that stand open, and all where these are not all."""

    prompt: Clipped
    unfolded: list[Written]
    every: list[Written]


@dataclass(frozen=True)
class Section:
    """What the page says of the answers that a run sampled."""

    writer: str
    pictures: list[Picture]
    histories: list[History]
    left_out: int
    """Prompts that are in the file only."""


def section(run: Run) -> Section | None:
    """The section of a run; None where it sampled no answers."""
    pictures = _pictures(run)
    histories = histories_of(run)
    if not pictures and not histories:
        return None
    writer = _WRITERS.get(str(run.section("rollouts").get("source")), "by the student")
    return Section(writer, pictures, histories[:PROMPTS], max(0, len(histories) - PROMPTS))


def _pictures(run: Run) -> list[Picture]:
    losses = {"loss": "data's responses", f"{PREFIX}loss": "own answers"}
    seconds = {"seconds_generating": "writing", "seconds_learning": "learning"}
    if not sampled(run):
        return []
    with plot_style():
        pictures = [picture_of(run, *panel) for panel in PANELS]
        if _has_responses(run):
            policies = "the objective, off-policy and on-policy"
            pictures.append(beside(run, losses, "Held-out loss", policies, heldout=True))
        pictures.append(beside(run, seconds, "Time of a step", "seconds"))
    return [picture for picture in pictures if picture]


def sampled(run: Run) -> bool:
    """Whether the log of a run has numbers of sampled answers."""
    return any(f"{PREFIX}answers" in row or f"eval_{PREFIX}answers" in row for row in _rows(run))


def _has_responses(run: Run) -> bool:
    """Whether the held-out prompts have responses; without them the held-out loss is that of the answers."""
    return any("eval_fkl" in row for row in _rows(run) if f"eval_{PREFIX}loss" in row)


def _rows(run: Run) -> list[dict[str, Any]]:
    return [row for stage in run.stages for row in (*stage.train, *stage.heldout)]


def histories_of(run: Run) -> list[History]:
    """The answers to each held-out prompt that were written as training went on."""
    texts: dict[tuple[str, str], dict[int, Written]] = {}
    for stage in run.stages:
        for row in stage.texts:
            step = as_number(row.get("step"))
            if step is not None and "text" in row:
                # A resumed run repeats the steps after its last checkpoint: the later line is the true one.
                by_step = texts.setdefault((str(row.get("id")), str(row.get("prompt"))), {})
                by_step[int(step) + stage.start] = _written(row, int(step) + stage.start)
    histories = []
    for (_, prompt), by_step in texts.items():
        every = [by_step[step] for step in sorted(by_step)]
        shown = [every[place] for place in _spread(len(every), STEPS)]
        unfolded = [shown[place] for place in _spread(len(shown), STEPS_OPEN)]
        histories.append(History(clip(prompt, TEXT_LIMIT), unfolded, shown if len(shown) > len(unfolded) else []))
    return histories


def _spread(length: int, most: int) -> list[int]:
    """At most so many places among ``length``, evenly spread, the first and the last among them."""
    if length <= most:
        return [*range(length)]
    return [round(place * (length - 1) / (most - 1)) for place in range(most)]


def _written(row: Mapping[str, Any], step: int) -> Written:
    text = clip(str(row["text"]), TEXT_LIMIT)
    tokens = as_number(row.get("num_tokens"))
    note = "" if tokens is None else count(tokens, "token")
    if row.get("finished") is False:
        note += ", cut" if note else "cut"
    opening = text.text[:FOLDED_FROM].rsplit(" ", 1)[0] + " …" if len(text.text) > FOLDED_FROM else ""
    return Written(step, text, opening, note)
