"""The report's figures, as inline svg."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drkl.display import as_number, number
from drkl.reporting import pushes
from drkl.reporting.lines import STYLES, lines_of
from drkl.reporting.metrics import METRICS, MODELS, STUDENTS, Metric, metrics_of, value_of
from drkl.reporting.plotting import COLORS, GRID, INK, MUTED, PAPER, Picture, new_figure, plot_style, tidy, to_svg
from drkl.reporting.record import RunRecord, thin
from drkl.reporting.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bars(record: RunRecord, key: str) -> Picture | None:
    """Teacher, before, warm-up and after as bars with their values."""
    metric = metrics_of(record.task)[key]
    values = {model: value for model in MODELS if (value := value_of(record.evaluation, model, key)) is not None}
    # At zero distance from itself the teacher says nothing, except where its own value is the yardstick.
    if metric.better in ("lower", "higher") and key not in ("nll", "accuracy", "rouge_l", "macro_f1", "ece"):
        values.pop("teacher", None)
    if "after" not in values:
        return None
    with plot_style():
        figure, ax = new_figure(250, 26 * len(values) + 8)
        draw_bars(ax, metric, values, record.titles)
        alt = f"{metric.title}: " + ", ".join(f"{record.titles[m]} {metric.show(v)}" for m, v in values.items())
        return Picture(to_svg(figure, f"bars-{key}", alt), metric.title, metric.definition, alt)


def draw_bars(
    ax: Axes, metric: Metric, values: Mapping[str, float], titles: Mapping[str, str], *, size: float = 12
) -> None:
    """Horizontal bars from zero, each with its name and value."""
    rows = list(range(len(values)))[::-1]
    shown = [value * metric.scale for value in values.values()]
    ax.barh(rows, shown, height=0.5, color=[COLORS[model] for model in values])
    ax.set_yticks(rows, [titles[model] for model in values])
    tidy(ax, size=size)
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xticks([])
    widest = max(max(shown), 0.0) - min(min(shown), 0.0) or 1.0
    ax.set_xlim(min(min(shown), 0.0) * 1.35, widest * 1.3 + min(min(shown), 0.0))
    for row, model, value in zip(rows, values, shown, strict=True):
        ax.annotate(
            metric.show(values[model]), (max(value, 0.0), row), (4, 0), textcoords="offset points", va="center",
            fontsize=size, color=INK, fontweight="bold" if model == "after" else "normal",
        )  # fmt: skip


def training_curves(record: RunRecord) -> tuple[list[Picture], list[Picture]]:
    """The curves that answer a question, and those that only tell how the optimiser fared."""
    top, unit, seen = "Top-token agreement", "tokens", "token"
    if record.task == "classification":
        top, unit, seen = "Agreement", "texts", "class"
    wanted = [
        ("rkl", "Reverse KL to the teacher", "KL(q‖p), nats, log scale"),
        ("fkl", "Forward KL to the teacher", "KL(p‖q), nats, log scale"),
        ("agreement", top, f"of the {unit}"),
        ("entropy", "Entropy", "nats" + ("; the teacher is dashed" if record.has_teacher else "")),
        ("nll", "Negative log-likelihood", f"of the observed {seen}, nats, log scale"),
        ("loss", "Loss", "each stage's own, not comparable across stages"),
    ]
    rest = [
        ("grad_norm", "Gradient norm", "before clipping"),
        ("learning_rate", "Learning rate", "of the schedule"),
        ("tokens_per_second", "Speed", "input tokens per second"),
    ]
    with plot_style():
        drawn = [[_curve_picture(record, *item) for item in group] for group in (wanted, rest)]
        drawn[0].append(pushes.picture(record))
    return [p for p in drawn[0] if p], [p for p in drawn[1] if p]


def _curve_picture(record: RunRecord, key: str, title: str, caption: str) -> Picture | None:
    figure, ax = new_figure(356, 220)
    if not draw_curve(ax, record, key):
        return None
    alt = f"{title} over {record.num_steps} optimiser steps"
    heldout = [stage.curve(_log_key(key), heldout=True) for stage in record.stages]
    ends = [(curve.values[0], curve.values[-1]) for curve in heldout if curve]
    if ends:
        alt += f"; on held-out rows from {ends[0][0]:.3g} at the first check to {ends[-1][1]:.3g} at the last"
    return Picture(to_svg(figure, f"curve-{key}", alt + "."), title, caption, alt)


def _log_key(key: str) -> str:
    return "student_entropy" if key == "entropy" else key


def draw_curve(ax: Axes, record: RunRecord, key: str, *, size: float = 11, names: bool = True) -> bool:
    """One quantity over all stages: thin = training batches, dots = held-out rows. False if nothing was logged."""
    seen: list[float] = []
    tidy(ax, size=size)
    for stage in record.stages:
        color = COLORS[stage.model]
        train, heldout = stage.curve(_log_key(key)), stage.curve(_log_key(key), heldout=True)
        many = thin(train)
        ax.plot(many.steps, many.values, color=color, linewidth=1, alpha=0.45 if heldout else 0.9)
        alone = len(heldout.steps) == 1
        ax.plot(heldout.steps, heldout.values, color=color, linewidth=2, marker="o", markersize=5 if alone else 3.5)
        seen += many.values + heldout.values
    if not seen:
        return False
    if key == "entropy":
        seen += _draw_teacher_entropy(ax, record)
    before = value_of(record.evaluation, "before", key)
    if before is not None and seen:
        ax.plot([0], [before], marker="o", markersize=6, color=COLORS["before"], clip_on=False, zorder=5)
        seen.append(before)
    if key in ("rkl", "fkl", "loss", "nll") and min(seen) > 0 and max(seen) > 2 * min(seen):
        _log_axis(ax, min(seen), max(seen))
    elif key in ("agreement", "entropy", "learning_rate", "tokens_per_second"):
        ax.set_ylim(0, max(seen) * 1.12 or 1)
        ax.locator_params(axis="y", nbins=6)
    if key == "agreement":
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.set_xlim(-0.03 * max(record.num_steps, 1), max(record.num_steps, 1) * 1.02)
    ax.set_xlabel("optimiser step")
    ax.locator_params(axis="x", nbins=5, integer=True)
    _mark_stages(ax, record, size=size, names=names)
    return True


def _draw_teacher_entropy(ax: Axes, record: RunRecord) -> list[float]:
    # The teacher does not change from stage to stage, so its line runs through.
    steps, values = [], []
    for stage in record.stages:
        curve = stage.curve("teacher_entropy", heldout=True) or thin(stage.curve("teacher_entropy"))
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


def _mark_stages(ax: Axes, record: RunRecord, *, size: float, names: bool) -> None:
    for stage in record.stages:
        if stage.start:
            ax.axvline(stage.start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        if not names or len(record.stages) == 1 or stage.end - stage.start < 0.2 * record.num_steps:
            continue
        name = stage.title if stage.title == stage.objective else f"{stage.title}: {stage.objective}"
        room = int(30 * (stage.end - stage.start) / max(record.num_steps, 1)) + 2
        ax.annotate(
            short(name, max(room, 4)),
            (stage.start, 1.0),
            (4 if stage.start else 8, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="bottom",
            fontsize=size,
            color=COLORS[stage.model],
        )


def distributions(record: RunRecord) -> list[Picture]:
    """Over held-out tokens: how often each entropy and each top probability occurs, student against teacher."""
    pictures = []
    with plot_style():
        for key, title, axis in (
            ("entropy", "Entropy per token", "nats; left is sure, right is undecided"),
            ("confidence", "Probability of the top token", "max q; left is undecided, right is sure"),
            ("target", "Probability of the teacher's top token", "q_t; the teacher's own is p_t"),
        ):
            shares = _shares(record, key)
            if "after" not in shares:
                continue
            figure, ax = new_figure(356, 220)
            tidy(ax)
            edges = record.evaluation["distributions"]["edges"][key]  # type: ignore[index]
            for model, values in shares.items():
                style: dict[str, Any] = {
                    "color": COLORS[model], "linewidth": 1.4 if model == "before" else 2, "linestyle": STYLES[model][1]
                }  # fmt: skip
                if model == "teacher":
                    style = {"facecolor": COLORS[model], "edgecolor": COLORS[model], "fill": True, "alpha": 0.16}
                ax.stairs([100 * value for value in values], edges, **style)
            ax.set_ylim(0, None)
            ax.set_xlim(edges[0], edges[-1])
            ax.set_xlabel(axis)
            ax.tick_params(axis="x", pad=7)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            gamma = as_number(record.settings.get("gamma")) if key == "target" else None
            if gamma is not None and 0 < gamma < 1:
                ax.axvline(1 - gamma, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            means = ", ".join(f"{record.titles[m]} {number(_mean(record, m, key), 3)}" for m in shares)
            alt = f"Histogram of {title[0].lower() + title[1:]} over held-out tokens. Means: {means}."
            pictures.append(
                Picture(
                    to_svg(figure, f"dist-{key}", alt),
                    title,
                    "share of held-out tokens"
                    + ("; the teacher is filled" if "teacher" in shares else "")
                    + ("; dotted: 1 − γ" if gamma is not None else ""),
                    alt,
                )
            )
        gaps = _gap_picture(record)
    return [*pictures, *([gaps] if gaps else [])]


def _mean(record: RunRecord, model: str, key: str) -> float | None:
    if key != "target":
        return value_of(record.evaluation, model, key)
    # E[q_t] = E[q_t - p_t] + E[p_t], and of the teacher p_t is its confidence.
    sure, gap = (value_of(record.evaluation, m, k) for m, k in (("teacher", "confidence"), (model, "target_gap")))
    return sure if model == "teacher" else None if sure is None or gap is None else sure + gap


def _shares(record: RunRecord, key: str) -> dict[str, list[float]]:
    """Histogram counts as shares, for the models whose histogram is whole."""
    found = (record.evaluation or {}).get("distributions")
    tables = found if isinstance(found, dict) else {}
    edges = tables.get("edges", {}).get(key) if isinstance(tables.get("edges"), dict) else None
    shares = {}
    for model in MODELS:
        counts = tables[model].get(key) if isinstance(tables.get(model), dict) else None
        if isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 and _rise(edges):
            numbers = [as_number(value) or 0.0 for value in counts]
            if sum(numbers) > 0:
                shares[model] = [value / sum(numbers) for value in numbers]
    return shares


def _rise(edges: list[Any]) -> bool:
    numbers = [as_number(edge) for edge in edges]
    return all(b is not None and a is not None and b > a for a, b in itertools.pairwise(numbers))


def _gap_picture(record: RunRecord) -> Picture | None:
    rows = [
        ("confidence_gap", "Each one's top token\n(confidence gap)"),
        ("target_gap", "The teacher's top token\n(target gap)"),
        ("overconfidence", "The student's top token\n(overconfidence)"),
    ]
    values = {
        (key, model): value
        for key, _ in rows
        for model in STUDENTS
        if (value := value_of(record.evaluation, model, key)) is not None
    }
    if not values:
        return None
    figure, ax = new_figure(356, 220)
    tidy(ax, grid="x")
    ax.axvline(0, color=COLORS["teacher"], linewidth=1.6, linestyle=(0, (4, 2)))
    for row, (key, _) in enumerate(rows):
        present = {model: values[key, model] for model in STUDENTS if (key, model) in values}
        if len(present) > 1:
            ax.plot([min(present.values()), max(present.values())], [-row, -row], color=GRID, linewidth=2, zorder=1)
        for model, value in present.items():
            ax.plot([value], [-row], STYLES[model][0], markersize=9 if model == "after" else 7, color=COLORS[model],
                    markeredgecolor=PAPER, zorder=4 if model == "after" else 3)  # fmt: skip
    ax.set_yticks([-row for row in range(len(rows))], [label for _, label in rows])
    ax.tick_params(axis="y", labelcolor=INK, labelsize=10.5)
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    reach = max(0.05, *(abs(value) for value in values.values())) * 1.15
    ax.set_xlim(-reach, reach)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("less sure  ◂  teacher  ▸  surer")
    shown = "; ".join(
        f"{METRICS[key].title}: "
        + ", ".join(f"{record.titles[m]} {METRICS[key].show(values[key, m])}" for m in STUDENTS if (key, m) in values)
        for key, _ in rows
    )
    caption = "probability by the student minus by the teacher, mean"
    return Picture(to_svg(figure, "gaps", shown), "Surer or less sure than the teacher", caption, shown)


def run_comparison(records: Sequence[RunRecord], labels: Sequence[str]) -> list[Picture]:
    """A dot per run for each of four numbers, with the teacher's where it is the yardstick."""
    pictures = []
    classifies = records[0].task == "classification"
    lines = {line.key: line for line in lines_of(records)}
    keys = ("ece", "accuracy", "agreement", "rkl") if classifies else ("rkl", "fkl", "agreement", "entropy")
    with plot_style():
        for key in keys:
            metric = metrics_of(records[0].task)[key]
            values = [value_of(record.evaluation, "after", key) for record in records]
            known = [value * metric.scale for value in values if value is not None]
            if len(known) < 2:
                continue
            figure, ax = new_figure(250, 26 * len(records) + 34)
            tidy(ax, grid="x")
            for row, value in enumerate(values):
                line = lines.get(f"run-{row}")
                if value is not None and line:
                    ax.plot([value * metric.scale], [-row], line.marker, markersize=9, color=line.color)
            teacher = value_of(records[0].evaluation, "teacher", key)
            if metric.better == "teacher" and teacher is not None:
                known.append(teacher)
                ax.axvline(teacher, color=COLORS["teacher"], linewidth=1.6, linestyle=(0, (4, 2)))
            ax.set_yticks([-row for row in range(len(records))], [short(label, 18) for label in labels])
            ax.tick_params(axis="y", labelcolor=INK)
            ax.set_ylim(-len(records) + 0.4, 0.6)
            margin = 0.15 * (max(known) - min(known)) or 0.1
            ax.set_xlim(min(known) - margin, max(known) + margin)
            ax.locator_params(axis="x", nbins=4)
            shown = [f"{label} {metric.show(v)}" for label, v in zip(labels, values, strict=True)]
            alt = f"{metric.title} of the trained students: {', '.join(shown)}."
            caption = f"{metric.unit}, the axis does not start at 0"
            pictures.append(Picture(to_svg(figure, f"runs-{key}", alt), metric.title, caption, alt))
    return pictures
