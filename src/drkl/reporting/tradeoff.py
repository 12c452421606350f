"""Fidelity against diversity over the sampling temperatures: the picture, its table, and what it says in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drkl.display import ABSENT, as_number, number
from drkl.reporting.lines import Line, lines_of
from drkl.reporting.metrics import METRICS, span_of, value_of
from drkl.reporting.plotting import INK, MUTED, Picture, new_figure, plot_style, tidy, to_svg
from drkl.reporting.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[float, float]
QUALITY = "rouge_l"
VARIETIES = ("distinct_2", "self_bleu")
SWEPT = (QUALITY, *VARIETIES)


@dataclass(frozen=True)
class SweepPoint:
    """One model at one temperature; of ``x`` more is more varied, so Self-BLEU stands there with a minus."""

    temperature: float | None
    x: float
    y: float
    x_span: Span | None = None
    y_span: Span | None = None


@dataclass(frozen=True)
class SweepRow:
    """A line of the table: a value and its interval per metric of ``SWEPT``."""

    line: Line
    temperature: str
    cells: list[tuple[str, str]]


def sweep_rows(record: RunRecord, model: str) -> list[Mapping[str, Any]]:
    """The sweep of a model, coolest first; without one, its numbers at the temperature of the evaluation."""
    sweep = (record.evaluation or {}).get("sweep")
    rows = sweep.get(model) if isinstance(sweep, Mapping) else None
    found: dict[float, Mapping[str, Any]] = {}
    for row in rows if isinstance(rows, list) else []:
        temperature = as_number(row.get("sampling_temperature")) if isinstance(row, Mapping) else None
        if temperature is not None:
            found[temperature] = row
    if found:
        return [found[temperature] for temperature in sorted(found)]
    flat = {key: value_of(record.evaluation, model, key) for key in SWEPT}
    if all(value is None for value in flat.values()):
        return []
    intervals = (record.evaluation or {}).get("intervals")
    spans = intervals.get(model) if isinstance(intervals, Mapping) else None
    return [{**flat, "sampling_temperature": record.settings.get("sampling_temperature"), "intervals": spans}]


def points_of(line: Line, variety: str) -> list[SweepPoint]:
    """The curve of a model: ROUGE-L against a measure of variety."""
    points = []
    for row in sweep_rows(line.record, line.model):
        x, y = as_number(row.get(variety)), as_number(row.get(QUALITY))
        if x is None or y is None:
            continue
        span = span_of(row, "intervals", variety)
        if variety == "self_bleu":
            x, span = -x, (-span[1], -span[0]) if span else None
        temperature = as_number(row.get("sampling_temperature"))
        points.append(SweepPoint(temperature, x, y, span, span_of(row, "intervals", QUALITY)))
    return points


def frontier(curves: Mapping[str, Sequence[SweepPoint]]) -> list[tuple[str, SweepPoint]]:
    """The points that no other one equals or beats on both sides (and beats on one), from left to right."""
    every = [(key, point) for key, points in curves.items() for point in points]
    kept = [
        (key, one)
        for key, one in every
        if not any(other.x >= one.x and other.y >= one.y and (other.x > one.x or other.y > one.y) for _, other in every)
    ]
    return sorted(kept, key=lambda item: (item[1].x, item[1].y))


def pictures(records: Sequence[RunRecord]) -> list[Picture]:
    """ROUGE-L against Distinct-2, and against Self-BLEU turned round; empty where nothing was sampled."""
    lines = lines_of(records)
    drawn = []
    with plot_style():
        for variety in VARIETIES:
            curves = {line.key: points for line in lines if (points := points_of(line, variety))}
            if any(key != "teacher" for key in curves):
                drawn.append(_picture([line for line in lines if line.key in curves], curves, variety))
    return drawn


def _picture(lines: Sequence[Line], curves: Mapping[str, list[SweepPoint]], variety: str) -> Picture:
    figure, ax = new_figure(440, 370)
    tidy(ax, size=12, grid="both")
    # An untrained student writes the most varied text of all, and would always be on the frontier for that.
    best = frontier({line.key: curves[line.key] for line in lines if line.key not in ("teacher", "before")})
    if len(best) > 1:
        ax.plot([p.x for _, p in best], [p.y for _, p in best], color=MUTED, linewidth=7, alpha=0.2, zorder=1)
    for place, line in enumerate(lines):
        points = curves[line.key]
        _whiskers(ax, line, points)
        line.plot(ax, [p.x for p in points], [p.y for p in points], zorder=4 if line.is_teacher else 3)
        _temperatures(ax, line, points, above=place % 2 == 0)
        ringed = [p for key, p in best if key == line.key]
        if ringed:
            line.claim(
                ax.scatter([p.x for p in ringed], [p.y for p in ringed], s=170, facecolors="none", edgecolors=INK,
                           linewidths=1.1, zorder=5)
            )  # fmt: skip
    goal = next((_goal(curves[line.key]) for line in lines if line.is_teacher), None)
    if goal:
        line = next(line for line in lines if line.is_teacher)
        line.plot(ax, [goal.x], [goal.y], size=20, marker="*", linestyle="none", zorder=6)
    ax.margins(0.09, 0.11)
    ax.set_ylabel("ROUGE-L", color=MUTED, fontsize=12)
    name = "Distinct-2" if variety == "distinct_2" else "\N{MINUS SIGN}Self-BLEU"
    ax.set_xlabel(f"{name}   (right: more varied \N{BLACK RIGHT-POINTING SMALL TRIANGLE})")
    ax.locator_params(nbins=6)
    digits = 2 if variety == "distinct_2" else 0
    alt = f"ROUGE-L against {name}. " + " ".join(_in_words(line, curves[line.key], digits) for line in lines)
    title = f"Like the references, and as varied: ROUGE-L against {name}"
    caption = "upwards: more like the references; to the right: more varied"
    return Picture(to_svg(figure, f"tradeoff-{variety}", alt), title, caption, alt)


def _whiskers(ax: Axes, line: Line, points: Sequence[SweepPoint]) -> None:
    for spans, draw in (
        ([(p.y, p.x_span) for p in points], ax.hlines),
        ([(p.x, p.y_span) for p in points], ax.vlines),
    ):
        known = [(at, span) for at, span in spans if span]
        if known:
            at, low, high = [at for at, _ in known], [span[0] for _, span in known], [span[1] for _, span in known]
            line.claim(draw(at, low, high, color=line.color, linewidth=1.3, alpha=0.4, zorder=2))


def _temperatures(ax: Axes, line: Line, points: Sequence[SweepPoint], *, above: bool) -> None:
    for point in points:
        if point.temperature is not None:
            line.claim(
                ax.annotate(
                    f"{point.temperature:g}", (point.x, point.y), (7, 6 if above else -6),
                    textcoords="offset points", va="bottom" if above else "top", fontsize=10.5, color=MUTED,
                )
            )  # fmt: skip


def _goal(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """The teacher at temperature 1, its own distribution."""
    return next((point for point in points if point.temperature == 1.0), points[0] if len(points) == 1 else None)


def _in_words(line: Line, points: Sequence[SweepPoint], digits: int) -> str:
    shown = [
        (f"at {point.temperature:g}: " if point.temperature is not None else "")
        + f"{number(point.y, 1)} and {number(point.x, digits)}"
        for point in points
    ]
    return f"{line.title}: {'; '.join(shown)}."


def table(records: Sequence[RunRecord]) -> list[SweepRow]:
    """Every point of the picture in numbers."""
    rows = []
    for line in lines_of(records):
        for row in sweep_rows(line.record, line.model):
            temperature = as_number(row.get("sampling_temperature"))
            cells = []
            for key in SWEPT:
                span = span_of(row, "intervals", key)
                shown = f"{METRICS[key].show(span[0])} to {METRICS[key].show(span[1])}" if span else ""
                cells.append((METRICS[key].show(row.get(key)), shown))
            rows.append(SweepRow(line, ABSENT if temperature is None else f"{temperature:g}", cells))
    return rows


def at_diversity(points: Sequence[SweepPoint], x: float) -> tuple[float, Span | None] | None:
    """ROUGE-L and its interval where a curve comes to a variety of ``x``; between temperatures by a straight line.

    None where the curve does not come there. Where it comes there more than once, the best of them.
    """
    found: list[tuple[float, Span | None]] = [(p.y, p.y_span) for p in points if p.x == x]
    for a, b in itertools.pairwise(points):
        if min(a.x, b.x) < x < max(a.x, b.x):
            share = (x - a.x) / (b.x - a.x)
            span = None
            if a.y_span and b.y_span:
                low, high = ((1 - share) * one + share * other for one, other in zip(a.y_span, b.y_span, strict=True))
                span = (low, high)
            found.append(((1 - share) * a.y + share * b.y, span))
    return max(found, key=lambda item: item[0], default=None)


def teacher_diversity(points: Sequence[SweepPoint]) -> float | None:
    """The teacher's variety at temperature 1, between its temperatures by a straight line."""
    for point in points:
        if point.temperature == 1.0:
            return point.x
    for a, b in itertools.pairwise(points):
        if a.temperature is not None and b.temperature is not None and a.temperature < 1.0 < b.temperature:
            return a.x + (1.0 - a.temperature) / (b.temperature - a.temperature) * (b.x - a.x)
    return None


def verdict(records: Sequence[RunRecord]) -> str:
    """Which student is more like the references where all are as varied as the teacher; empty without a teacher."""
    lines = lines_of(records)
    curves = {line.key: points_of(line, "distinct_2") for line in lines}
    goal = teacher_diversity(curves.get("teacher", []))
    students = [line for line in lines if not line.is_teacher and curves[line.key]]
    if goal is None or not students:
        return ""
    if not any(len(curves[line.key]) > 1 for line in students):
        return "There is no sweep over sampling temperatures here, so nothing can be compared at matched diversity."
    reached = {line.key: at for line in students if (at := at_diversity(curves[line.key], goal))}
    # A model that was not swept has one point, which says nothing of where its curve would go.
    away = [line for line in students if line.key not in reached and len(curves[line.key]) > 1]
    parts = []
    if reached:
        shown = [f"{line.title} {_shown(*reached[line.key])}" for line in students if line.key in reached]
        own = at_diversity(curves["teacher"], goal)
        theirs = f"; the teacher's own is {_shown(*own)}" if own else ""
        parts.append(
            f"At matched diversity (the teacher's Distinct-2 at temperature 1, {number(goal, 3)}) ROUGE-L is: "
            f"{', '.join(shown)}{theirs}."
        )
        parts += [_decision(students, reached)] if len(reached) > 1 else []
    for line in away:
        ends = [point.x for point in curves[line.key]]
        parts.append(
            f"{line.title} does not come to the teacher's Distinct-2 of {number(goal, 3)} at any temperature tried "
            f"(its own: {number(min(ends), 3)} to {number(max(ends), 3)})."
        )
    return " ".join(parts)


def _decision(students: Sequence[Line], reached: Mapping[str, tuple[float, Span | None]]) -> str:
    ranked = sorted((line for line in students if line.key in reached), key=lambda line: -reached[line.key][0])
    first, rest = ranked[0], ranked[1:]
    top = reached[first.key][1]
    if top is None or any(reached[line.key][1] is None for line in rest):
        return f"{first.title} has the highest number there, but without intervals nobody can say whether it is higher."
    close = [line.title for line in rest if (span := reached[line.key][1]) and span[1] >= top[0]]
    if not close:
        word = "higher" if len(rest) == 1 else "highest"
        return f"{first.title} has the {word} ROUGE-L there: its interval stands clear of the others'."
    names = ", ".join([first.title, *close[:-1]]) + f" and {close[-1]}"
    return f"Between {names} the data do not decide: their intervals overlap."


def _shown(value: float, span: Span | None) -> str:
    return number(value, 1) + (f" ({number(span[0], 1)} to {number(span[1], 1)})" if span else "")
