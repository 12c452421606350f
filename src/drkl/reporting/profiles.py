"""Figures of what one number hides: calibration by confidence, the teacher's ranks, what more samples bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drkl.display import as_number, number
from drkl.reporting.lines import Line, lines_of
from drkl.reporting.metrics import MODELS, metrics_of, value_of
from drkl.reporting.plotting import MUTED, Picture, new_figure, plot_style, tidy, to_svg
from drkl.reporting.record import RunRecord

Bins = list[tuple[float, float, float | None, float | None]]


def reliability_tables(record: RunRecord) -> dict[str, Bins]:
    """By model, per bin: its left edge, how many fell into it, their confidence and accuracy; only whole tables."""
    found = (record.evaluation or {}).get("reliability")
    found = found if isinstance(found, dict) else {}
    counted = "rows" if record.task == "classification" else "tokens"
    edges = found.get("edges")
    tables: dict[str, Any] = {}
    for model in MODELS:
        table = found.get(model)
        if not isinstance(edges, list) or not isinstance(table, dict):
            continue
        columns = [edges[:-1], *(table.get(name) for name in (counted, "confidence", "accuracy"))]
        if not all(isinstance(column, list) and len(column) == len(edges) - 1 for column in columns):
            continue
        bins = [tuple(as_number(value) for value in row) for row in zip(*columns, strict=True)]
        whole = all(row[0] is not None and row[1] is not None and row[1] >= 0 for row in bins)
        if whole and any(row[1] for row in bins):
            tables[model] = bins
    return tables


def reliability(record: RunRecord) -> Picture | None:
    """Accuracy against confidence for student and teacher; None without the student's table. Needs ``plot_style``."""
    tables = reliability_tables(record)
    if "after" not in tables:
        return None
    figure, ax = new_figure(356, 300)
    tidy(ax)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    shown_models = [line for line in lines_of([record]) if line.model in ("teacher", "after") and line.model in tables]
    for line in shown_models:
        bins = [row for row in tables[line.model] if row[1] and row[2] is not None and row[3] is not None]
        total = sum(row[1] for row in bins)
        x, y = [row[2] for row in bins], [row[3] for row in bins]
        ax.plot(x, y, color=line.color, linewidth=1.4, alpha=0.7, linestyle=line.dash)
        sizes = [14 + 500 * row[1] / total for row in bins]
        ax.scatter(x, y, s=sizes, color=line.color, alpha=0.55, linewidths=0, marker=line.marker)
    ax.set_xlim(0, 1.04)
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("confidence (max q)")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ece = metrics_of(record.task)["ece"]
    shown = ", ".join(
        f"{line.title} {ece.show(value_of(record.evaluation, line.model, 'ece'))}" for line in shown_models
    )
    alt = f"Accuracy by confidence in {len(tables['after'])} bins. Calibration error: {shown}."
    return Picture(to_svg(figure, "reliability", alt), "Is it right as often as it is sure?", f"ECE: {shown}", alt)


def tail(records: Sequence[RunRecord]) -> Picture | None:
    """Mean probability of the token at each of the teacher's ranks; both axes are logarithmic."""
    curves = []
    for line in lines_of(records):
        found = (line.record.evaluation or {}).get("tail")
        found = found if isinstance(found, Mapping) else {}
        pairs = [(x, y) for x, y in _pairs(found.get("ranks"), found.get(line.model)) if x > 0 and y > 0]
        if len(pairs) > 1:
            curves.append((line, pairs))
    if all(line.is_teacher for line, _ in curves):
        return None
    with plot_style():
        figure, ax = new_figure(356, 300)
        tidy(ax, grid="both")
        ax.set_xscale("log")
        ax.set_yscale("log")
        _draw(ax, curves, size=5)
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.9f}".rstrip("0"))
        ax.set_xlabel("the teacher's rank")
        ends = "; ".join(
            f"{line.title}: {pairs[0][1]:.3g} at rank {pairs[0][0]:g}, {pairs[-1][1]:.2g} at rank {pairs[-1][0]:g}"
            for line, pairs in curves
        )
        alt = f"Mean probability of the token at the teacher's rank. {ends}."
        caption = "mean probability, log scales; where a curve lies below the teacher's, that part is given up"
        return Picture(to_svg(figure, "tail", alt), "What becomes of the teacher's tail", caption, alt)


def coverage(records: Sequence[RunRecord]) -> list[Picture]:
    """What more samples for a prompt bring: the best ROUGE-L of k, and how many of k differ."""
    drawn = []
    with plot_style():
        for key, title, caption, digits in (
            ("rouge_l_best", "The best of k answers", "ROUGE-L of the best of k samples, mean over prompts", 1),
            ("distinct_answers", "Different answers among k", "expected number; the hairline is all of them", 2),
        ):
            curves = []
            for line in lines_of(records):
                found: Any = (line.record.evaluation or {}).get("coverage")
                found = found.get(line.model) if isinstance(found, Mapping) else None
                found = found if isinstance(found, Mapping) else {}
                pairs = list(_pairs(found.get("samples"), found.get(key)))
                if len(pairs) > 1:
                    curves.append((line, pairs))
            if all(line.is_teacher for line, _ in curves):
                continue
            figure, ax = new_figure(356, 300)
            tidy(ax)
            if key == "distinct_answers":
                far = max(pairs[-1][0] for _, pairs in curves)
                ax.plot([1, far], [1, far], color=MUTED, linewidth=1)
            _draw(ax, curves, size=6)
            ax.set_xlabel("k, samples for a prompt")
            ax.locator_params(axis="x", nbins=8, integer=True)
            shown = "; ".join(
                f"{line.title} {number(pairs[0][1], digits)} with {pairs[0][0]:g}, "
                f"{number(pairs[-1][1], digits)} with {pairs[-1][0]:g}"
                for line, pairs in curves
            )
            alt = f"{title}, {caption}: {shown}."
            drawn.append(Picture(to_svg(figure, f"coverage-{key}", alt), title, caption, alt))
    return drawn


def _draw(ax: Any, curves: Sequence[tuple[Line, list[tuple[float, float]]]], *, size: float) -> None:
    for line, pairs in curves:
        line.plot(ax, [x for x, _ in pairs], [y for _, y in pairs], size=size)


def _pairs(xs: Any, ys: Any) -> list[tuple[float, float]]:
    if not isinstance(xs, list) or not isinstance(ys, list):
        return []
    both = [(as_number(x), as_number(y)) for x, y in zip(xs, ys, strict=False)]
    return sorted((x, y) for x, y in both if x is not None and y is not None)
