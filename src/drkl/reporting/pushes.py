"""What pushed the target while a run was trained, where that was watched."""

from __future__ import annotations

from typing import Any

from drkl.reporting.plotting import INK, MUTED, PAPER, RUN_COLORS, Picture, new_figure, tidy, to_svg
from drkl.reporting.record import Curve, RunRecord, Stage, thin

PUSHES: dict[str, tuple[str, str, Any]] = {
    "target term": (RUN_COLORS[2], "s", (0, (5, 1.6))), "tail": (RUN_COLORS[1], "^", (0, (1, 1.4))),
    "both": (INK, "o", (0, ())),
}  # fmt: skip
"""Colour, mark and dashes of each curve."""


def picture(record: RunRecord) -> Picture | None:
    """What was watched of the pushes on the target's logit: the target term's, the tail's, and both together."""
    figure, ax = new_figure(356, 220)
    tidy(ax)
    ax.axhline(0, color=MUTED, linewidth=1)
    told = []
    for name, (color, marker, dash) in PUSHES.items():
        values: list[float] = []
        for stage in record.stages:
            curve = thin(_push(stage, name))
            every = max(1, len(curve.steps) // 12)
            ax.plot(
                curve.steps, curve.values, color=color, linewidth=1.8, linestyle=dash, marker=marker, markevery=every,
                markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.5,
                label=name if stage is record.stages[0] else None,
            )  # fmt: skip
            values += curve.values
        if not values:
            return None
        told.append(f"{name} from {values[0]:.3g} to {values[-1]:.3g}")
    ax.set_xlim(-0.03 * max(record.num_steps, 1), max(record.num_steps, 1) * 1.02)
    ax.set_xlabel("optimiser step")
    ax.locator_params(axis="x", nbins=5, integer=True)
    ax.locator_params(axis="y", nbins=6)
    for stage in record.stages[1:]:
        ax.axvline(stage.start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=11, labelcolor=INK, borderaxespad=0.2,
        borderpad=0, handlelength=2.4, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    alt = f"Mean pushes on the target's logit over {record.num_steps} optimiser steps: {', '.join(told)}."
    caption = "on the target\N{RIGHT SINGLE QUOTATION MARK}s logit, mean over held-out positions; below 0: it is raised"
    return Picture(to_svg(figure, "curve-push", alt), "What pushes the target", caption, alt)


def _push(stage: Stage, name: str) -> Curve:
    target, tail = stage.curve("watch_target_push"), stage.curve("watch_tail_push")
    if name != "both":
        return target if name == "target term" else tail
    tails = dict(zip(tail.steps, tail.values, strict=True))
    both = {step: value + tails[step] for step, value in zip(target.steps, target.values, strict=True) if step in tails}
    return Curve([*both], [*both.values()])
