"""The training of several runs: one figure for each number, and the texts that each run wrote as it learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drkl.reporting.curves import Panel, curves_of_runs, distances
from drkl.reporting.inputs import Run, run_labels
from drkl.reporting.plotting import Line, Picture, plot_style
from drkl.reporting.rollouts import PANELS, History, histories_of

PROMPTS = 2
"""Prompts of each run whose answers are on the page."""


@dataclass(frozen=True)
class Together:
    """What the page of several runs says of their training."""

    lines: list[Line]
    curves: list[Picture]
    sampled: list[Picture]
    """Numbers of the answers that the runs sampled."""
    written: list[tuple[str, list[History]]]
    """For each run that wrote answers: its name, and how they changed."""


def trained_together(runs: Sequence[Run]) -> Together | None:
    """The training of several runs in one; None for one run, and where none was trained."""
    trained = [(place, run, label) for place, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True))]
    trained = [(place, run, label) for place, run, label in trained if run.stages]
    if len(runs) < 2 or not trained:
        return None
    lines = [Line.of_run(place, label) for place, _, label in trained]
    shown = [run for _, run, _ in trained]

    def drawn(panels: Sequence[Panel]) -> list[Picture]:
        with plot_style():
            pictures = [curves_of_runs(shown, lines, panel) for panel in panels]
        return [picture for picture in pictures if picture]

    written = [(label, histories_of(run)[:PROMPTS]) for _, run, label in trained]
    return Together(
        lines, drawn(distances(shown[0])), drawn(PANELS), [(label, texts) for label, texts in written if texts]
    )
