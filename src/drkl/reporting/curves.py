"""Figures of the training log: every stage on one axis, and what pushed the target where that was watched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drkl.reporting.inputs import Curve, Run, Stage
from drkl.reporting.plotting import (
    COLORS,
    INK,
    MUTED,
    Line,
    Picture,
    new_figure,
    percent_axis,
    plot_style,
    tidy,
    to_svg,
)
from drkl.reporting.text import short
from drkl.rollouts.config import PREFIX as SAMPLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 356, 220
_LOG_SCALE = ("rkl", "fkl", "loss", "nll")
_ON_LOG_SCALE = ", log scale"
_FROM_ZERO = ("agreement", "entropy", "learning_rate", "tokens_per_second", "length", "ends_per_1000")
_SHARES = ("finished", "distinct2", "repeated4")
Panel = tuple[str, str, str]
"""A key of the log, and the title and the caption of its figure."""
PUSHES: dict[str, dict[str, Any]] = {
    "target term": {"color": COLORS["run-2"], "marker": "s", "linestyle": (0, (5, 1.6)), "zorder": 3},
    "tail": {"color": COLORS["run-1"], "marker": "^", "linestyle": (0, (1, 1.4)), "zorder": 4},
    # Wide and below: where the tail pushes nothing, this is the target term's curve.
    "both": {"color": INK, "marker": "o", "linewidth": 5, "alpha": 0.3, "solid_capstyle": "round", "zorder": 2},
}
"""Style of each curve of the gradients on the target's logit."""


def training_curves(run: Run) -> tuple[list[Picture], list[Picture]]:
    """The curves of losses and distances, and those of the optimiser."""
    loss = ("loss", "Loss", "each stage has its own loss: not comparable across stages")
    optimiser = [
        ("grad_norm", "Gradient norm", "before clipping"),
        ("learning_rate", "Learning rate", "as scheduled"),
        ("tokens_per_second", "Speed", "input tokens per second"),
    ]
    masses = {"teacher_tail_mass": "of its tail", "teacher_mass": "of all"}
    with plot_style():
        groups = [[picture_of(run, *panel) for panel in group] for group in ([*distances(run), loss], optimiser)]
        what = "share of its mass in the k tokens; the tail is without the top one"
        groups[0] += [pushes(run), beside(run, masses, "What is seen of the teacher", what, shares=True)]
        fed = {"idle_share": "waiting", "padding_share": "padding"}
        what = "padding: share of the positions that are fed; waiting: for the process with the most of them"
        groups[1].append(beside(run, fed, "Padding and waiting", what, shares=True))
    return [p for p in groups[0] if p], [p for p in groups[1] if p]


def distances(run: Run) -> list[Panel]:
    """What says how near the student is to its teacher and the data."""
    classifies = run.task == "classification"
    unit, observed = ("texts", "class") if classifies else ("tokens", "token")
    return [
        ("rkl", "Reverse KL to the teacher", "KL(q‖p), nats, log scale"),
        ("fkl", "Forward KL to the teacher", "KL(p‖q), nats, log scale"),
        ("agreement", "Agreement" if classifies else "Top-token agreement", f"share of the {unit}"),
        ("entropy", "Entropy", "nats" + ("; the teacher is dashed" if run.has_teacher else "")),
        ("nll", "Negative log-likelihood", f"of the observed {observed}, nats, log scale"),
    ]


def picture_of(run: Run, key: str, title: str, caption: str) -> Picture | None:
    """One logged quantity over all stages; None if it was not logged. Needs ``plot_style``."""
    figure, ax = new_figure(WIDTH, HEIGHT)
    if not draw_curve(ax, run, key):
        return None
    alt = f"{title} over {run.num_steps} optimiser steps"
    heldout = [stage.curve(_log_key(key), heldout=True) for stage in run.stages]
    if ends := [(curve.values[0], curve.values[-1]) for curve in heldout if curve]:
        alt += f"; on held-out rows from {ends[0][0]:.3g} at the first check to {ends[-1][1]:.3g} at the last"
    return Picture(
        to_svg(figure, f"curve-{key}", alt + "."), title, _as_drawn(_of_classes([run], key, caption), ax), alt
    )


def _of_classes(runs: Sequence[Run], key: str, caption: str) -> str:
    """The caption where the teacher was known on k tokens and the rest."""
    known = [run.on_classes for run in runs]
    if not any(known):
        return caption
    classes = "of k + 1 classes" if all(known) else "some of k + 1 classes"
    quantity = key.removeprefix(SAMPLED)
    if quantity in ("fkl", "rkl"):
        return caption.replace(", nats", f" {classes}, nats", 1)
    dashed = "the teacher is dashed"
    return caption.replace(dashed, f"{dashed}, {classes}: a lower bound") if quantity == "entropy" else caption


def _as_drawn(caption: str, ax: Axes) -> str:
    return caption if ax.get_yscale() == "log" else caption.removesuffix(_ON_LOG_SCALE)


def _log_key(key: str) -> str:
    return key.replace("entropy", "student_entropy") if key.endswith("entropy") else key


def draw_curve(ax: Axes, run: Run, key: str, *, size: float = 11, names: bool = True) -> bool:
    """One quantity over all stages: thin = training batches, dots = held-out rows. False if nothing was logged."""
    seen: list[float] = []
    tidy(ax, size=size)
    for stage in run.stages:
        color = COLORS[stage.model]
        train, heldout = stage.curve(_log_key(key)).thinned(), stage.curve(_log_key(key), heldout=True)
        ax.plot(train.steps, train.values, color=color, linewidth=1, alpha=0.45 if heldout else 0.9)
        size_of_dot = 5 if len(heldout.steps) == 1 else 3.5
        ax.plot(heldout.steps, heldout.values, color=color, linewidth=2, marker="o", markersize=size_of_dot)
        seen += train.values + heldout.values
    if not seen:
        return False
    seen += _draw_goal(ax, run, key)
    # That is over the whole vocabulary, and on another scale than a log of k + 1 classes.
    before = None if run.on_classes and key in ("fkl", "rkl") else run.value("before", key)
    if before is not None:
        ax.plot([0], [before], marker="o", markersize=6, color=COLORS["before"], clip_on=False, zorder=5)
        seen.append(before)
    _scale(ax, key, seen)
    _step_axis(ax, run)
    _name_stages(ax, run, size=size, names=names)
    return True


def curves_of_runs(runs: Sequence[Run], lines: Sequence[Line], panel: Panel) -> Picture | None:
    """One logged quantity of several runs; None if none logged it. Needs ``plot_style``.

    Held-out rows; of a run that was not checked on any, the training batches.

    Args:
        runs: the runs.
        lines: their styles, in the same order.
        panel: what to draw.
    """
    key, title, caption = panel
    figure, ax = new_figure(WIDTH, HEIGHT)
    tidy(ax)
    seen: list[float] = []
    ends = []
    for run, line in zip(runs, lines, strict=True):
        curves = [stage.curve(_log_key(key), heldout=True) or stage.curve(_log_key(key)) for stage in run.stages]
        steps = [step for curve in curves for step in curve.thinned().steps]
        values = [value for curve in curves for value in curve.thinned().values]
        if values:
            line.plot(ax, steps, values, size=4.5, linewidth=1.6)
            ends.append(f"{line.title} from {values[0]:.3g} to {values[-1]:.3g}")
        seen += values
    if not seen:
        return None
    if key == f"{SAMPLED}entropy":  # each run's answers have a teacher's entropy of their own
        caption = "nats"
    else:
        seen += next((goal for run in runs if (goal := _draw_goal(ax, run, key))), [])
    _scale(ax, key, seen)
    _step_axis(ax, max(runs, key=lambda run: run.num_steps), stages=False)
    alt = f"{title} over the optimiser steps: {'; '.join(ends)}."
    return Picture(to_svg(figure, f"runs-curve-{key}", alt), title, _as_drawn(_of_classes(runs, key, caption), ax), alt)


def _draw_goal(ax: Axes, run: Run, key: str) -> list[float]:
    quantity = key.removeprefix(SAMPLED)
    if quantity == "entropy":
        return _draw_dashed(ax, run, key.replace("entropy", "teacher_entropy"))
    return _draw_dashed(ax, run, f"response_{quantity}") if key != quantity and quantity in _SHARES else []


def _scale(ax: Axes, key: str, seen: Sequence[float]) -> None:
    quantity = key.removeprefix(SAMPLED)
    if quantity in _LOG_SCALE and min(seen) > 0 and max(seen) > 2 * min(seen):
        _log_axis(ax, min(seen), max(seen))
    elif quantity in _SHARES:
        ax.set_ylim(-0.02, 1.02)
    elif quantity in _FROM_ZERO:
        ax.set_ylim(0, max(seen) * 1.12 or 1)
        ax.locator_params(axis="y", nbins=6)
    if quantity in ("agreement", *_SHARES):
        percent_axis(ax.yaxis)


def _draw_dashed(ax: Axes, run: Run, key: str) -> list[float]:
    # The teacher, or the data, is the same in every stage, so its line runs through.
    steps, values = [], []
    for stage in run.stages:
        curve = stage.curve(key, heldout=True) or stage.curve(key).thinned()
        steps += curve.steps
        values += curve.values
    ax.plot(steps, values, color=COLORS["teacher"], linewidth=1.6, linestyle=(0, (4, 2)))
    return values


def _log_axis(ax: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(low / 1.12, high * 1.2)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [leading * 10.0**power for power in powers for leading in range(1, 10)]
    inside = [tick for tick in ticks if low / 1.12 <= tick <= high * 1.2]
    for leading in ((1, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        if len(inside) > 6:
            inside = [tick for tick in inside if round(tick / 10 ** math.floor(math.log10(tick) + 1e-9)) in leading]
    ax.yaxis.set_major_locator(FixedLocator(inside))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _step_axis(ax: Axes, run: Run, *, stages: bool = True) -> None:
    ax.set_xlim(-0.03 * max(run.num_steps, 1), max(run.num_steps, 1) * 1.02)
    ax.set_xlabel("optimiser step")
    ax.locator_params(axis="x", nbins=5, integer=True)
    for stage in run.stages[1:] if stages else ():
        ax.axvline(stage.start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))


def _name_stages(ax: Axes, run: Run, *, size: float, names: bool) -> None:
    for stage in run.stages:
        steps = stage.end - stage.start
        if not names or len(run.stages) == 1 or steps < 0.2 * run.num_steps:
            continue
        name = stage.title if stage.title == stage.objective else f"{stage.title}: {stage.objective}"
        letters = int(30 * steps / max(run.num_steps, 1)) + 2
        ax.annotate(
            short(name, max(letters, 4)),
            (stage.start, 1.0),
            (4 if stage.start else 8, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="bottom",
            fontsize=size,
            color=COLORS[stage.model],
        )


def pushes(run: Run) -> Picture | None:
    """The mean gradients on the target's logit: the target term's, the tail's, and their sum; None if not watched."""
    figure, ax = new_figure(WIDTH, HEIGHT)
    tidy(ax)
    ax.axhline(0, color=MUTED, linewidth=1)
    ends = []
    for name, style in PUSHES.items():
        values: list[float] = []
        for stage in run.stages:
            curve = _push(stage, name).thinned()
            marks = {"markevery": max(1, len(curve.steps) // 12), "markersize": 4.5, "markeredgewidth": 0}
            label = name if stage is run.stages[0] else None
            ax.plot(curve.steps, curve.values, label=label, **({"linewidth": 1.8} | marks | style))
            values += curve.values
        if not values:
            return None
        first, last = (round(value, 4) + 0.0 for value in (values[0], values[-1]))
        ends.append(f"{name} from {first:g} to {last:g}")
    _step_axis(ax, run)
    ax.locator_params(axis="y", nbins=6)
    _legend(ax)
    alt = f"Mean gradient on the target's logit over {run.num_steps} optimiser steps: {', '.join(ends)}."
    caption = "gradient on its logit, mean over held-out positions; below 0: training raises it"
    return Picture(to_svg(figure, "curve-push", alt), "What pushes the target", caption, alt)


def _legend(ax: Axes) -> None:
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize=11,
        labelcolor=INK,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=2.4,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def beside(
    run: Run, names: dict[str, str], title: str, caption: str, *, heldout: bool = False, shares: bool = False
) -> Picture | None:
    """Two logged quantities in one figure; None where the second was not logged. Needs ``plot_style``.

    Args:
        run: whose log.
        names: the keys of the log, each with its name in the legend.
        title: of the figure.
        caption: of the figure.
        heldout: whether they are measured on held-out rows.
        shares: whether they are shares, from 0 to 1.
    """
    figure, ax = new_figure(WIDTH, HEIGHT)
    tidy(ax)
    ends = []
    styles: list[dict[str, Any]] = [{"color": COLORS["run-2"], "linestyle": (0, (5, 1.6))}, {"color": COLORS["run-1"]}]
    for (key, name), style in zip(names.items(), styles, strict=True):
        curves = [stage.curve(key, heldout=heldout).thinned() for stage in run.stages]
        marks = {"marker": "o", "markersize": 3.5} if heldout else {}
        for place, curve in enumerate(curves):
            label = None if place else name
            ax.plot(curve.steps, curve.values, label=label, linewidth=2, **(style | marks))
        if values := [value for curve in curves for value in curve.values]:
            ends.append(f"{name} from {values[0]:.3g} to {values[-1]:.3g}")
    if len(ends) < len(names):
        return None
    ax.set_ylim(bottom=0, top=1.02 if shares else None)
    ax.locator_params(axis="y", nbins=6)
    if shares:
        percent_axis(ax.yaxis)
    _step_axis(ax, run)
    _legend(ax)
    alt = f"{title} over {run.num_steps} optimiser steps: {'; '.join(ends)}."
    return Picture(to_svg(figure, f"beside-{next(iter(names))}", alt), title, caption, alt)


def _push(stage: Stage, name: str) -> Curve:
    target, tail = stage.curve("watch_target_push"), stage.curve("watch_tail_push")
    if name != "both":
        return target if name == "target term" else tail
    tails = dict(zip(tail.steps, tail.values, strict=True))
    both = {step: value + tails[step] for step, value in zip(target.steps, target.values, strict=True) if step in tails}
    return Curve([*both], [*both.values()])
