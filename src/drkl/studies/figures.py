"""Figures of a study, as inline svg: every seed a dot, and means with their intervals over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from drkl.display import ABSENT, number
from drkl.evaluation.declared import METRICS, Metric
from drkl.evaluation.result import SCALED
from drkl.reporting.plotting import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAPER,
    Line,
    Picture,
    new_figure,
    percent_axis,
    plot_style,
    tidy,
    to_svg,
)
from drkl.reporting.tables import PlainTable, show_interval
from drkl.reporting.text import short
from drkl.studies.cells import Verdict
from drkl.studies.curves import BinMean, Mean, SweepMean, mean_of, reliability_means, sweep_means, teacher_of
from drkl.studies.kinds import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_NAME = 22
"""Characters of a name beside an axis."""
_ROW = 26
_DASHED = (0, (4, 2))


def name_in_figure(label: str) -> str:
    """A name that fits beside an axis, cut in its middle: names of variants differ at their ends."""
    line = short(label, 400)
    return line if len(line) <= LONGEST_NAME else f"{line[:10]}\N{HORIZONTAL ELLIPSIS}{line[-11:]}"


def lines_of(kinds: Sequence[Kind]) -> list[Line]:
    """The line of each kind of cell, and the teacher's last."""
    return [*(Line.of_run(place, kind.label) for place, kind in enumerate(kinds)), Line.of_model("teacher", "Teacher")]


def strip(kinds: Sequence[Kind], metric: Metric, teacher: float | None, place: int) -> Picture | None:
    """Every cell a dot, those of a seed joined, the mean with its t interval; None without a value."""
    shown = [(row, kind, kind.by_seed(metric.key)) for row, kind in enumerate(kinds)]
    shown = [(row, kind, values) for row, kind, values in shown if values]
    if not shown:
        return None
    ideal = {"zero": 0.0, "teacher": teacher}.get(metric.better)
    with plot_style():
        figure, ax = new_figure(356, _ROW * len(shown) + 38)
        tidy(ax, grid="x")
        if ideal is not None:
            ax.axvline(ideal * metric.scale, color=COLORS["teacher"], linewidth=1.4, linestyle=_DASHED, zorder=1)
        _join_seeds(ax, [values for _, _, values in shown], metric.scale)
        for at, (row, kind, values) in enumerate(shown):
            _row_of_dots(ax, -at, Line.of_run(row, kind.label), [value * metric.scale for value in values.values()])
        ax.set_yticks([-at for at in range(len(shown))], [name_in_figure(kind.label) for _, kind, _ in shown])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(-len(shown) + 0.4, 0.6)
        ax.margins(x=0.06)
        ax.locator_params(axis="x", nbins=4)
        words = [f"{kind.label} {_mean_in_words(list(values.values()), metric)}" for _, kind, values in shown]
        goal = {"zero": " Dashed: 0, the ideal.", "teacher": " Dashed: the teacher."}.get(metric.better, "")
        alt = f"{metric.title}, every seed a dot; mean with its 95 % interval over seeds: {'; '.join(words)}."
        caption = f"{metric.unit or metric.key}, {_way(metric, ideal)}" if _way(metric, ideal) else metric.unit
        return Picture(to_svg(figure, f"strip-{place}", alt + (goal if ideal is not None else "")), metric.title,
                       caption, alt)  # fmt: skip


def _way(metric: Metric, ideal: float | None) -> str:
    aims = {"lower": "lower is better", "higher": "higher is better", "zero": "dashed: 0 is ideal"}
    return aims.get(metric.better, "dashed: the teacher, the ideal" if ideal is not None else "")


def _mean_in_words(values: Sequence[float], metric: Metric) -> str:
    mean = mean_of(values)
    assert mean is not None
    shown = metric.fine_enough(mean.value)
    span = f" ({shown.show(mean.interval[0])} to {shown.show(mean.interval[1])})" if mean.interval else ""
    return shown.show(mean.value) + span


def _join_seeds(ax: Axes, rows: Sequence[dict[Any, float]], scale: float) -> None:
    """Join what has the same seed: whether the lines run alike says what pairing gains."""
    for seed in dict.fromkeys(seed for values in rows for seed in values):
        known = [(values[seed] * scale, -at) for at, values in enumerate(rows) if seed in values]
        ax.plot([x for x, _ in known], [y for _, y in known], color=MUTED, linewidth=0.8, alpha=0.35, zorder=1)


def _row_of_dots(ax: Axes, y: float, line: Line, values: Sequence[float]) -> None:
    """The seeds as dots, and above them the mean with its interval."""
    color, mean = COLORS[line.color], mean_of(values)
    assert mean is not None
    ax.plot(values, [y] * len(values), line.marker, markersize=6, color=color, alpha=0.6, markeredgewidth=0, zorder=3)
    if mean.interval:
        above = y + 0.3
        ax.plot(mean.interval, [above, above], color=color, linewidth=2, solid_capstyle="butt", zorder=3)
        ax.plot([mean.value], [above], "|", markersize=9, markeredgewidth=2.2, color=color, zorder=4)


def difference(row: Verdict, metric: Metric, place: int) -> Picture | None:
    """A comparison's difference: every seed a dot, the mean with its interval, and 0; None where there is none."""
    if row.difference is None:
        return None
    values = [value * metric.scale for value in row.by_seed.values()]
    with plot_style():
        figure, ax = new_figure(190, 54)
        tidy(ax, grid="x", size=11)
        ax.axvline(0, color=MUTED, linewidth=1.2, zorder=1)
        style: dict[str, Any] = {"markersize": 6.5, "alpha": 0.6, "markeredgewidth": 0}
        ax.plot(values, [0] * len(values), "o", color=COLORS["student"], **style)
        if row.interval:
            ends = [end * metric.scale for end in row.interval]
            ax.plot(ends, [1, 1], color=INK, linewidth=2, solid_capstyle="butt", zorder=3)
        ax.plot([row.difference * metric.scale], [1], "|", markersize=9, markeredgewidth=2.2, color=INK, zorder=4)
        ax.set_ylim(-0.7, 1.7)
        ax.set_yticks([])
        ax.margins(x=0.08)
        ax.locator_params(axis="x", nbins=3)
        seeds = ", ".join(number(value, metric.digits + 1, signed=True) for value in values)
        alt = f"Difference of each seed: {seeds}."
        return Picture(to_svg(figure, f"difference-{place}", alt), metric.title, "", alt)


def frontier(kinds: Sequence[Kind], lines: Sequence[Line]) -> Picture | None:
    """ROUGE-L against Distinct-2 over the sampling temperatures; None where nothing was sampled."""
    drawn = [(line, sweep_means(kind.evaluations)) for line, kind in zip(lines, kinds, strict=False)]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return None
    if teacher := teacher_of(kinds, sweep_means):
        drawn.append((lines[-1], teacher))
    with plot_style():
        figure, ax = new_figure(500, 400)
        tidy(ax, size=12, grid="both")
        for line, points in drawn:
            _whiskers(ax, line, points)
            x, y = [p.variety.value for p in points], [p.fidelity.value for p in points]
            line.plot(ax, x, y, zorder=4 if line.key == "teacher" else 3)
        ax.margins(0.06, 0.09)
        ax.set_ylabel("ROUGE-L", color=MUTED, fontsize=12)
        ax.set_xlabel("Distinct-2   (right: more varied \N{BLACK RIGHT-POINTING SMALL TRIANGLE})")
        _name_temperatures(ax, drawn)
        alt = "ROUGE-L and Distinct-2, means over seeds. " + " ".join(_curve_in_words(*one) for one in drawn)
        title = "Like the references, and as varied: ROUGE-L against Distinct-2"
        caption = "each point a sampling temperature, mean over seeds; hairlines: 95 % t intervals over seeds"
        return Picture(to_svg(figure, "frontier", alt), title, caption, alt, wide=True)


def _whiskers(ax: Axes, line: Line, points: Sequence[SweepMean]) -> None:
    style: dict[str, Any] = {"color": COLORS[line.color], "linewidth": 1.2, "alpha": 0.4, "zorder": 2}
    for p in points:
        if p.variety.interval:
            line.claim(ax.hlines([p.fidelity.value], *p.variety.interval, **style))
        if p.fidelity.interval:
            line.claim(ax.vlines([p.variety.value], *p.fidelity.interval, **style))


def _name_temperatures(ax: Axes, drawn: Sequence[tuple[Line, Sequence[SweepMean]]]) -> None:
    """Write the temperatures beside the points where there is room: on no other text, no point and no line."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr] # lays the axes out: places are in pixels
    curves = [ax.transData.transform([(p.variety.value, p.fidelity.value) for p in points]) for _, points in drawn]
    taken = np.concatenate([_along(curve) for curve in curves])
    for (line, points), curve in zip(drawn, curves, strict=True):
        for p, (x, y) in zip(points, curve, strict=True):
            text = f"{p.temperature:g}"
            wide, high = 7.0 * len(text), 10.0
            for dx, dy in (
                (7, 6),
                (8, -4),
                (7, -16),
                (-wide / 2, 9),
                (-wide / 2, -19),
                (-7 - wide, 6),
                (-8 - wide, -16),
            ):
                low, top = np.array([x + dx - 1, y + dy - 1]), np.array([x + dx + wide + 1, y + dy + high])
                if not ((taken > low) & (taken < top)).all(axis=1).any():
                    grid = [(a, b) for a in np.linspace(low[0], top[0], 8) for b in np.linspace(low[1], top[1], 5)]
                    taken = np.concatenate([taken, grid])
                    place: dict[str, Any] = {"xytext": (dx, dy), "textcoords": "offset points", "fontsize": 10.5}
                    at = (p.variety.value, p.fidelity.value)
                    line.claim(ax.annotate(text, at, color=MUTED, **place))
                    break


def _along(curve: np.ndarray) -> np.ndarray:
    """Points along a line through ``curve`` `[n, 2]`, 3 pixels apart, and around each of its marks."""
    parts = [curve + offset for offset in ((0, 0), (4, 4), (4, -4), (-4, 4), (-4, -4))]
    for start, end in itertools.pairwise(curve):
        steps = max(2, int(np.hypot(*(end - start)) / 3))
        parts.append(start + (end - start) * np.linspace(0, 1, steps)[:, None])
    return np.concatenate(parts)


def sweep_table(kinds: Sequence[Kind]) -> PlainTable:
    """Every point of the frontier in numbers."""
    named = [(kind.label, sweep_means(kind.evaluations)) for kind in kinds]
    rows: list[list[str | tuple[str, str]]] = [
        [name, f"{point.temperature:g}", *(_cell(key, mean) for key, mean in point.by_metric)]
        for name, points in [*named, ("Teacher", teacher_of(kinds, sweep_means))]
        for point in points
    ]
    return PlainTable(["Cells", "Temperature", "ROUGE-L", "Distinct-2"], rows)


def _cell(key: str, mean: Mean) -> tuple[str, str]:
    metric = METRICS[key]
    return metric.show(mean.value), show_interval(metric, mean.interval)


def _curve_in_words(line: Line, points: Sequence[SweepMean]) -> str:
    values = [f"at {p.temperature:g}: {number(p.fidelity.value, 1)} and {number(p.variety.value, 2)}" for p in points]
    return f"{line.title}: {'; '.join(values)}."


def reliability(kinds: Sequence[Kind], lines: Sequence[Line]) -> list[tuple[Kind, Picture]]:
    """A reliability diagram for each kind of cell, beside the teacher's."""
    teacher = teacher_of(kinds, reliability_means)
    pictures = []
    with plot_style():
        for place, (line, kind) in enumerate(zip(lines, kinds, strict=False)):
            if bins := reliability_means(kind.evaluations):
                own = teacher or teacher_of([kind], reliability_means)
                pictures.append((kind, _reliability(line, bins, own, kind, place)))
    return pictures


def _reliability(line: Line, bins: Sequence[BinMean], teacher: Sequence[BinMean], kind: Kind, place: int) -> Picture:
    figure, ax = new_figure(260, 240)
    tidy(ax)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=_DASHED)
    if teacher:
        ax.plot([b.confidence for b in teacher], [b.accuracy for b in teacher], color=COLORS["teacher"], linewidth=1.2,
                linestyle=(0, (1, 1.4)))  # fmt: skip
    x, y, color = [b.confidence for b in bins], [b.accuracy for b in bins], COLORS[line.color]
    ax.fill_between(x, [b.range[0] for b in bins], [b.range[1] for b in bins], color=color, alpha=0.22, linewidth=0)
    ax.plot(x, y, color=color, linewidth=1.6)
    ax.scatter(x, y, s=[10 + 320 * b.share for b in bins], color=color, alpha=0.6, linewidths=0, marker=line.marker)
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
    ax.tick_params(axis="x", pad=8)
    ax.set_xlabel("confidence, max q")
    percent_axis(ax.yaxis)
    errors = kind.values("ece")
    caption = f"ECE {_mean_in_words(errors, METRICS['ece'])}" if errors else ""
    middle = min(bins, key=lambda b: abs(b.confidence - 0.5))
    alt = (
        f"Accuracy against confidence of {kind.label}, mean over seeds: where its confidence is "
        f"{number(middle.confidence, 2)} it is right in {number(100 * middle.accuracy, 0)} %. {caption}"
    )
    return Picture(to_svg(figure, f"reliability-{place}", alt), kind.label, caption, alt)


def scaled_table(kinds: Sequence[Kind], metrics: Sequence[Metric]) -> PlainTable | None:
    """What a temperature on the logits changes, by kind: means over seeds before and after; None where none was."""
    own = [kind for kind in kinds if any(cell.scaled for cell in kind.cells)]
    moved = [metric for metric in metrics if any(_is_moved(kind, metric.key) for kind in own)]
    if not moved:
        return None
    rows: list[list[str | tuple[str, str]]] = []
    for kind in own:
        found = [one.scaling for one in kind.evaluations if one.scaling is not None]
        by_fold = [fold.temperature for scaling in found for fold in scaling.folds]
        span = f"{min(by_fold):.3g} to {max(by_fold):.3g}" if by_fold and min(by_fold) < max(by_fold) else ""
        row: list[str | tuple[str, str]] = [kind.label, (f"{np.mean(by_fold):.3g}" if by_fold else ABSENT, span)]
        for metric in moved:
            before, after = (mean_of(kind.values(metric.key, model)) for model in ("student", SCALED))
            if before is None or after is None:
                row.append(ABSENT)
                continue
            shown = metric.fine_enough(before.value, after.value)
            row.append((f"{shown.show(before.value)} \N{RIGHTWARDS ARROW} {shown.show(after.value)}",
                        show_interval(shown, after.interval)))  # fmt: skip
        rows.append(row)
    return PlainTable(["Cells", "Temperature", *(metric.title for metric in moved)], rows)


def _is_moved(kind: Kind, key: str) -> bool:
    """Whether the scaled students of a kind have other values; their top tokens, for instance, stay."""
    return any(cell.scaled.get(key) not in (None, cell.metrics.get(key)) for cell in kind.cells)


def costs(rows: Sequence[tuple[str, dict[str, float]]], parts: Sequence[str]) -> Picture | None:
    """Mean minutes of a cell by kind and part, stacked; None where nothing was timed."""
    shown = [(name, own) for name, own in rows if sum(own.values()) > 0]
    if not shown:
        return None
    tones = {"start": GRID, "train": COLORS["before"], "evaluate": MUTED}
    with plot_style():
        figure, ax = new_figure(500, _ROW * len(shown) + 44)
        tidy(ax, grid="x", size=12)
        for at, (_, own) in enumerate(shown):
            left = 0.0
            for part in parts:
                minutes = own.get(part, 0.0) / 60
                ax.barh([-at], [minutes], left=left, height=0.55, color=tones[part], edgecolor=PAPER)
                left += minutes
        ax.set_yticks([-at for at in range(len(shown))], [name_in_figure(name) for name, _ in shown])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(-len(shown) + 0.4, 0.6)
        ax.spines["bottom"].set_color(GRID)
        ax.set_xlabel("minutes for one cell, mean")
        words = "; ".join(f"{name} {number(sum(own.values()) / 60, 1)}" for name, own in shown)
        alt = f"Minutes for one cell by kind: {words}."
        return Picture(to_svg(figure, "costs", alt), "Time for one cell", "", alt)
