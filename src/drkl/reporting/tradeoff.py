"""Fidelity against diversity over the sampling temperatures: the picture and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drkl.display import ABSENT, as_number, number
from drkl.evaluation.bootstrap import Interval
from drkl.evaluation.declared import METRICS
from drkl.evaluation.result import SweepPoint
from drkl.reporting.figures import lines_of
from drkl.reporting.inputs import Run
from drkl.reporting.plotting import COLORS, INK, MUTED, Line, Picture, new_figure, plot_style, tidy, to_svg
from drkl.reporting.tables import PlainTable, show_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUALITY = "rouge_l"
VARIETIES = ("distinct_2", "self_bleu")
HEAD = ["Model", "Temperature", "ROUGE-L ↑", "Distinct-2 → T", "Self-BLEU → T"]


@dataclass(frozen=True)
class Point:
    """One model at one sampling temperature; a larger ``x`` is more varied, so Self-BLEU is negated."""

    temperature: float | None
    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None


def sweep_of(run: Run, model: str) -> list[SweepPoint]:
    """The sweep of a model, lowest temperature first; without one, its numbers at the evaluation's temperature."""
    if run.evaluation is None:
        return []
    if model in run.evaluation.sweep:
        return run.evaluation.sweep[model]
    keys = (QUALITY, *VARIETIES)
    values: dict[str, float | None] = {key: value for key in keys if (value := run.value(model, key)) is not None}
    intervals = {key: ends for key in values if (ends := run.interval(model, key)) is not None}
    temperature = as_number(run.settings.get("sampling_temperature"))
    # NaN: an older file may not say at which temperature it sampled.
    return [SweepPoint(float("nan") if temperature is None else temperature, values, intervals)] if values else []


def _temperature(point: SweepPoint) -> float | None:
    return as_number(point.sampling_temperature)


def points_of(run: Run, model: str, variety: str) -> list[Point]:
    """The curve of a model: ROUGE-L against a measure of variety."""
    points = []
    for row in sweep_of(run, model):
        x, y, span = row.values.get(variety), row.values.get(QUALITY), row.intervals.get(variety)
        if x is None or y is None:
            continue
        if variety == "self_bleu":
            x, span = -x, (-span[1], -span[0]) if span else None
        points.append(Point(_temperature(row), x, y, span, row.intervals.get(QUALITY)))
    return points


def frontier(curves: Mapping[str, Sequence[Point]]) -> list[tuple[str, Point]]:
    """The points that no other point equals or beats on both axes (and beats on one), from left to right."""
    every = [(key, point) for key, points in curves.items() for point in points]
    kept = [
        (key, point)
        for key, point in every
        if not any(p.x >= point.x and p.y >= point.y and (p.x > point.x or p.y > point.y) for _, p in every)
    ]
    return sorted(kept, key=lambda item: (item[1].x, item[1].y))


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """ROUGE-L against Distinct-2 and against negated Self-BLEU; empty where nothing was sampled."""
    figures = []
    with plot_style():
        for variety in VARIETIES:
            curves = [(line, points_of(run, model, variety)) for line, run, model in lines_of(runs)]
            curves = [(line, points) for line, points in curves if points]
            if any(line.key != "teacher" for line, _ in curves):
                figures.append(_picture(curves, variety))
    return figures


def _picture(curves: Sequence[tuple[Line, list[Point]]], variety: str) -> Picture:
    figure, ax = new_figure(440, 370)
    tidy(ax, size=12, grid="both")
    # An untrained student writes the most varied text of all, and would always be on the frontier for that.
    best = frontier({line.key: points for line, points in curves if line.key not in ("teacher", "before")})
    if len(best) > 1:
        ax.plot([p.x for _, p in best], [p.y for _, p in best], color=MUTED, linewidth=7, alpha=0.2, zorder=1)
    for place, (line, points) in enumerate(curves):
        _whiskers(ax, line, points)
        line.plot(ax, [p.x for p in points], [p.y for p in points], zorder=4 if line.key == "teacher" else 3)
        _temperatures(ax, line, points, above=place % 2 == 0)
        if ringed := [p for key, p in best if key == line.key]:
            ring: dict[str, Any] = {"s": 170, "facecolors": "none", "edgecolors": INK, "linewidths": 1.1, "zorder": 5}
            line.claim(ax.scatter([p.x for p in ringed], [p.y for p in ringed], **ring))
        if line.key == "teacher" and (goal := _goal(points)):
            line.plot(ax, [goal.x], [goal.y], size=20, marker="*", linestyle="none", zorder=6)
    ax.margins(0.09, 0.11)
    ax.set_ylabel("ROUGE-L", color=MUTED, fontsize=12)
    name = "Distinct-2" if variety == "distinct_2" else "\N{MINUS SIGN}Self-BLEU"
    ax.set_xlabel(f"{name}   (right: more varied \N{BLACK RIGHT-POINTING SMALL TRIANGLE})")
    ax.locator_params(nbins=6)
    digits = 2 if variety == "distinct_2" else 0
    alt = f"ROUGE-L against {name}. " + " ".join(_in_words(line, points, digits) for line, points in curves)
    title = f"Like the references, and as varied: ROUGE-L against {name}"
    caption = "upwards: more like the references; to the right: more varied"
    return Picture(to_svg(figure, f"tradeoff-{variety}", alt), title, caption, alt)


def _whiskers(ax: Axes, line: Line, points: Sequence[Point]) -> None:
    for spans, draw in (
        ([(p.y, p.x_interval) for p in points], ax.hlines),
        ([(p.x, p.y_interval) for p in points], ax.vlines),
    ):
        known = [(at, span) for at, span in spans if span]
        if known:
            at, low, high = [at for at, _ in known], [span[0] for _, span in known], [span[1] for _, span in known]
            line.claim(draw(at, low, high, color=COLORS[line.color], linewidth=1.3, alpha=0.4, zorder=2))


def _temperatures(ax: Axes, line: Line, points: Sequence[Point], *, above: bool) -> None:
    place: dict[str, Any] = {"xytext": (7, 6 if above else -6), "va": "bottom" if above else "top"}
    for point in points:
        if point.temperature is not None:
            text = f"{point.temperature:g}"
            at = (point.x, point.y)
            line.claim(ax.annotate(text, at, textcoords="offset points", fontsize=10.5, color=MUTED, **place))


def _goal(points: Sequence[Point]) -> Point | None:
    """The teacher at temperature 1, its own distribution."""
    return next((point for point in points if point.temperature == 1.0), points[0] if len(points) == 1 else None)


def _in_words(line: Line, points: Sequence[Point], digits: int) -> str:
    values = [
        (f"at {point.temperature:g}: " if point.temperature is not None else "")
        + f"{number(point.y, 1)} and {number(point.x, digits)}"
        for point in points
    ]
    return f"{line.title}: {'; '.join(values)}."


def table(runs: Sequence[Run]) -> PlainTable:
    """Every point of the picture in numbers."""
    rows: list[list[str | tuple[str, str]]] = []
    for line, run, model in lines_of(runs):
        for point in sweep_of(run, model):
            temperature = _temperature(point)
            cells = [
                (METRICS[key].show(point.values.get(key)), show_interval(METRICS[key], point.intervals.get(key)))
                for key in (QUALITY, *VARIETIES)
            ]
            rows.append([line.title, ABSENT if temperature is None else f"{temperature:g}", *cells])
    return PlainTable(HEAD, rows)
