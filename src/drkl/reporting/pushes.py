"""What pushed the target while a run was trained, where that was watched."""

from __future__ import annotations

from typing import Any

from drkl.reporting.plotting import INK, MUTED, RUN_COLORS, Picture, new_figure, tidy, to_svg
from drkl.reporting.record import Curve, RunRecord, Stage, thin

PUSHES: dict[str, dict[str, Any]] = {
    "target term": {"color": RUN_COLORS[2], "marker": "s", "linestyle": (0, (5, 1.6)), "zorder": 3},
    "tail": {"color": RUN_COLORS[1], "marker": "^", "linestyle": (0, (1, 1.4)), "zorder": 4},
    # Wide and below: where the tail pushes nothing, it is the target term's curve.
    "both": {"color": INK, "marker": "o", "linewidth": 5, "alpha": 0.3, "solid_capstyle": "round", "zorder": 2},
}
"""How each curve is drawn."""


def picture(record: RunRecord) -> Picture | None:
    """What was watched of the pushes on the target's logit: the target term's, the tail's, and both together."""
    figure, ax = new_figure(356, 220)
    tidy(ax)
    ax.axhline(0, color=MUTED, linewidth=1)
    told = []
    for name, style in PUSHES.items():
        values: list[float] = []
        for stage in record.stages:
            curve = thin(_push(stage, name))
            marks = {"markevery": max(1, len(curve.steps) // 12), "markersize": 4.5, "markeredgewidth": 0}
            label = name if stage is record.stages[0] else None
            ax.plot(curve.steps, curve.values, label=label, **({"linewidth": 1.8} | marks | style))
            values += curve.values
        if not values:
            return None
        first, last = (round(value, 4) + 0.0 for value in (values[0], values[-1]))
        told.append(f"{name} from {first:g} to {last:g}")
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
    caption = "gradient on its logit, mean over held-out positions; below 0: training raises it"
    return Picture(to_svg(figure, "curve-push", alt), "What pushes the target", caption, alt)


def _push(stage: Stage, name: str) -> Curve:
    target, tail = stage.curve("watch_target_push"), stage.curve("watch_tail_push")
    if name != "both":
        return target if name == "target term" else tail
    tails = dict(zip(tail.steps, tail.values, strict=True))
    both = {step: value + tails[step] for step, value in zip(target.steps, target.values, strict=True) if step in tails}
    return Curve([*both], [*both.values()])
