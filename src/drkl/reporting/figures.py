"""Figures of an evaluation, as inline svg."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from drkl.display import as_number, number
from drkl.evaluation.declared import Metric, metrics_of
from drkl.evaluation.result import MODELS, SCALED
from drkl.reporting.inputs import STUDENTS, TITLES, Run, run_labels
from drkl.reporting.plotting import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAPER,
    STYLES,
    Line,
    Picture,
    histogram,
    new_figure,
    plot_style,
    reliability_diagram,
    tidy,
    to_svg,
)
from drkl.reporting.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pairs = list[tuple[float, float]]
# At zero distance from itself the teacher says nothing, except where its own value is a goal.
_TEACHER_BARS = ("nll", "accuracy", "rouge_l", "macro_f1", "ece")
_SMALL, _SQUARE = (356, 220), (356, 300)


def lines_of(runs: Sequence[Run]) -> list[tuple[Line, Run, str]]:
    """The curves that several figures share, each with its run and model.

    Of one run: its evaluated models. Of several: the first run's teacher, and the student of each.
    """
    first = runs[0]
    if len(runs) == 1:
        return [(Line.of_model(model, TITLES[model], first.subtitles[model]), first, model) for model in first.models]
    lines = [(Line.of_model("teacher", TITLES["teacher"], first.teacher or ""), first, "teacher")]
    lines = [line for line in lines if "teacher" in first.models]
    for place, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        if "student" in run.models:
            lines.append((Line.of_run(place, label), run, "student"))
    return lines


def bars(run: Run, metric: Metric) -> Picture | None:
    """The models' values as horizontal bars; None without the student's."""
    values = {model: value for model in MODELS if (value := run.value(model, metric.key)) is not None}
    if metric.better in ("lower", "higher") and metric.key not in _TEACHER_BARS:
        values.pop("teacher", None)
    if "student" not in values:
        return None
    with plot_style():
        figure, ax = new_figure(250, 26 * len(values) + 8)
        draw_bars(ax, metric, values)
        alt = f"{metric.title}: " + ", ".join(f"{TITLES[m]} {metric.show(v)}" for m, v in values.items())
        return Picture(to_svg(figure, f"bars-{metric.key}", alt), metric.title, metric.definition, alt)


def draw_bars(ax: Axes, metric: Metric, values: Mapping[str, float], *, size: float = 12) -> None:
    """Horizontal bars from zero, each with its name and value."""
    rows = list(range(len(values)))[::-1]
    scaled = [value * metric.scale for value in values.values()]
    ax.barh(rows, scaled, height=0.5, color=[COLORS[model] for model in values])
    ax.set_yticks(rows, [TITLES[model] for model in values])
    tidy(ax, size=size)
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xticks([])
    lowest = min(*scaled, 0.0)
    widest = max(*scaled, 0.0) - lowest or 1.0
    ax.set_xlim(lowest * 1.35, widest * 1.3 + lowest)
    for row, (model, value) in zip(rows, values.items(), strict=True):
        ax.annotate(
            metric.show(value),
            (max(value * metric.scale, 0.0), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=INK,
            fontweight="bold" if model == "student" else "normal",
        )


def confidence(run: Run) -> list[Picture]:
    """Return the figures of confidence: histograms, and the student's gaps to the teacher or its reliability."""
    if run.evaluation is None:
        return []
    pictures: list[Picture | None] = []
    with plot_style():
        if (bins := run.evaluation.reliability) is not None and run.task == "classification":
            shown = ("teacher", "student", SCALED)
            counts: Counts = {model: bins.width[model].counts for model in shown if model in bins.width}
            words = ("Probability of the top class", _HISTOGRAMS["confidence"][1])
            pictures += [reliability(run), _histogram(run, "confidence", words, bins.edges, counts)]
        for key, words in _HISTOGRAMS.items():
            if (tables := run.evaluation.distributions) is None:
                break
            counts = {model: own[key] for model, own in tables.counts.items() if key in own}
            pictures.append(_histogram(run, key, words, tables.edges.get(key, []), counts))
        if run.task != "classification":
            pictures.append(_gaps(run))
    return [picture for picture in pictures if picture]


Counts = dict[str, list[int]]
_HISTOGRAMS = {
    "entropy": ("Entropy per token", "nats; left: confident, right: uncertain"),
    "confidence": ("Probability of the top token", "max q; left: uncertain, right: confident"),
    "target": ("Probability of the teacher's top token", "q_t; the teacher's own is p_t"),
}
"""The title and the axis of each."""


def _histogram(run: Run, key: str, words: tuple[str, str], edges: Sequence[float], counts: Counts) -> Picture | None:
    """Draw a histogram over held-out tokens or texts, with the teacher filled; None without the student's counts."""
    title, axis = words
    models = [model for model in MODELS if any(counts.get(model, ()))]
    if "student" not in models:
        return None
    figure, ax = new_figure(*(_SQUARE if run.task == "classification" else _SMALL))
    tidy(ax)
    for model in models:
        thin = {"linewidth": 1.4} if model == "before" else {}
        dash = {} if model == "teacher" else {"linestyle": STYLES[model][1]}
        histogram(ax, edges, counts[model], filled=model == "teacher", color=COLORS[model], **thin, **dash)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel(axis)
    ax.tick_params(axis="x", pad=7)
    gamma = as_number(run.settings.get("gamma")) if key == "target" else None
    if gamma is not None and 0 < gamma < 1:
        ax.axvline(1 - gamma, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    unit = "texts" if run.task == "classification" else "tokens"
    means = ", ".join(f"{TITLES[model]} {number(_mean(run, model, key), 3)}" for model in models)
    alt = f"Histogram of {title[0].lower() + title[1:]} over held-out {unit}. Means: {means}."
    caption = f"share of held-out {unit}" + ("; the teacher is filled" if "teacher" in models else "")
    caption += "" if gamma is None else "; dotted: 1 − γ"
    return Picture(to_svg(figure, f"dist-{key}", alt), title, caption, alt)


def _mean(run: Run, model: str, key: str) -> float | None:
    if key != "target":
        return run.value(model, key)
    # E[q_t] = E[q_t - p_t] + E[p_t], and p_t is the teacher's confidence.
    p_t, gap = run.value("teacher", "confidence"), run.value(model, "target_gap")
    return p_t if model == "teacher" else None if p_t is None or gap is None else p_t + gap


def reliability(run: Run) -> Picture | None:
    """Accuracy against confidence of student and teacher; None without the student's bins. Needs ``plot_style``."""
    bins = run.evaluation.reliability if run.evaluation is not None else None
    series = []
    for line, _, model in lines_of([run]):
        if bins is not None and model in ("teacher", "student", SCALED) and model in bins.width:
            own = bins.width[model]
            series.append((line, model, list(zip(own.counts, own.confidence, own.accuracy, strict=True))))
    if not any(model == "student" and any(row[0] for row in rows) for _, model, rows in series):
        return None
    figure, _ = reliability_diagram(_SQUARE, [(line, rows) for line, _, rows in series if any(r[0] for r in rows)])
    ece = metrics_of(run.task)["ece"]
    errors = ", ".join(f"{line.title} {ece.show(run.value(model, 'ece'))}" for line, model, _ in series)
    alt = f"Accuracy by confidence in {len(series[-1][2])} bins. Calibration error: {errors}."
    title = "Is its confidence equal to its accuracy?"
    return Picture(to_svg(figure, "reliability", alt), title, f"calibration error: {errors}", alt)


def _gaps(run: Run) -> Picture | None:
    rows = [
        ("confidence_gap", "Each model's own top token\n(confidence gap)"),
        ("target_gap", "The teacher's top token\n(target gap)"),
        ("overconfidence", "The student's top token\n(overconfidence)"),
    ]
    values = {
        (key, model): value for key, _ in rows for model in STUDENTS if (value := run.value(model, key)) is not None
    }
    if not values:
        return None
    figure, ax = new_figure(*_SMALL)
    tidy(ax, grid="x")
    ax.axvline(0, color=COLORS["teacher"], linewidth=1.6, linestyle=(0, (4, 2)))
    for row, (key, _) in enumerate(rows):
        present = {model: values[key, model] for model in STUDENTS if (key, model) in values}
        if len(present) > 1:
            ax.plot([min(present.values()), max(present.values())], [-row, -row], color=GRID, linewidth=2, zorder=1)
        for model, value in present.items():
            size, above = (9, 4) if model == "student" else (7, 3)
            style = {"markersize": size, "color": COLORS[model], "markeredgecolor": PAPER, "zorder": above}
            ax.plot([value], [-row], STYLES[model][0], **style)
    ax.set_yticks([-row for row in range(len(rows))], [label for _, label in rows])
    ax.tick_params(axis="y", labelcolor=INK, labelsize=10.5)
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    reach = max(0.05, *(abs(value) for value in values.values())) * 1.15
    ax.set_xlim(-reach, reach)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("less confident  ◂  teacher  ▸  more confident")
    metrics = metrics_of(run.task)
    alt = "; ".join(
        f"{metrics[key].title}: "
        + ", ".join(f"{TITLES[m]} {metrics[key].show(values[key, m])}" for m in STUDENTS if (key, m) in values)
        for key, _ in rows
    )
    caption = "probability by the student minus probability by the teacher, mean"
    return Picture(to_svg(figure, "gaps", alt), "Confidence compared with the teacher", caption, alt)


def profiles(runs: Sequence[Run]) -> list[Picture]:
    """Calibration by confidence, the probability of the teacher's ranks, and what more samples bring."""
    with plot_style():
        pictures = [reliability(runs[0]), _tail(runs)]
        pictures.append(_coverage(runs, "rouge_l_best", "The best of k answers", _BEST_CAPTION, 1))
        pictures.append(_coverage(runs, "distinct_answers", "Different answers among k", _DISTINCT_CAPTION, 2))
    return [picture for picture in pictures if picture]


_BEST_CAPTION = "ROUGE-L of the best of k samples, mean over prompts"
_DISTINCT_CAPTION = "expected number; on the hairline all are different"


def _curves(runs: Sequence[Run], of: Callable[[Run, str], Pairs]) -> list[tuple[Line, Pairs]]:
    """The curves of at least two points; none where only the teacher has one."""
    known = [(line, model, of(run, model)) for line, run, model in lines_of(runs)]
    known = [(line, model, pairs) for line, model, pairs in known if len(pairs) > 1]
    return [(line, pairs) for line, _, pairs in known] if any(model != "teacher" for _, model, _ in known) else []


def _tail(runs: Sequence[Run]) -> Picture | None:
    """Mean probability of the token at each of the teacher's ranks; both axes are logarithmic."""

    def means(run: Run, model: str) -> Pairs:
        tail = run.evaluation.tail if run.evaluation is not None else None
        pairs = zip(tail.ranks, tail.means[model], strict=True) if tail is not None and model in tail.means else ()
        return [(rank, mean) for rank, mean in pairs if mean]

    if not (curves := _curves(runs, means)):
        return None
    figure, ax = new_figure(*_SQUARE)
    tidy(ax, grid="both")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for line, pairs in curves:
        line.plot(ax, *zip(*pairs, strict=True), size=5)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.9f}".rstrip("0"))
    ax.set_xlabel("the teacher's rank")
    ends = "; ".join(
        f"{line.title}: {pairs[0][1]:.3g} at rank {pairs[0][0]:g}, {pairs[-1][1]:.2g} at rank {pairs[-1][0]:g}"
        for line, pairs in curves
    )
    alt = f"Mean probability of the token at the teacher's rank. {ends}."
    caption = "mean probability, log scales; below its curve, a student gives these tokens less than the teacher"
    return Picture(to_svg(figure, "tail", alt), "Probability along the teacher's ranks", caption, alt)


def _coverage(runs: Sequence[Run], key: str, title: str, caption: str, digits: int) -> Picture | None:
    def values(run: Run, model: str) -> Pairs:
        own = run.evaluation.coverage.get(model) if run.evaluation is not None else None
        pairs = zip(own.samples, getattr(own, key), strict=True) if own is not None else ()
        return [(count, value) for count, value in pairs if value is not None]

    if not (curves := _curves(runs, values)):
        return None
    figure, ax = new_figure(*_SQUARE)
    tidy(ax)
    if key == "distinct_answers":
        most = max(pairs[-1][0] for _, pairs in curves)
        ax.plot([1, most], [1, most], color=MUTED, linewidth=1)
    for line, pairs in curves:
        line.plot(ax, *zip(*pairs, strict=True), size=6)
    ax.set_xlabel("k, samples for a prompt")
    ax.locator_params(axis="x", nbins=8, integer=True)
    ends = "; ".join(
        f"{line.title} {number(pairs[0][1], digits)} with {pairs[0][0]:g}, "
        f"{number(pairs[-1][1], digits)} with {pairs[-1][0]:g}"
        for line, pairs in curves
    )
    alt = f"{title}, {caption}: {ends}."
    return Picture(to_svg(figure, f"coverage-{key}", alt), title, caption, alt)


def run_dots(runs: Sequence[Run]) -> list[Picture]:
    """A dot for each run for each of four numbers, with the teacher's where that is the goal."""
    classifies = runs[0].task == "classification"
    keys = ("ece", "accuracy", "agreement", "rkl") if classifies else ("rkl", "fkl", "agreement", "entropy")
    with plot_style():
        pictures = [_dots(runs, metrics_of(runs[0].task)[key]) for key in keys]
    return [picture for picture in pictures if picture]


def _dots(runs: Sequence[Run], metric: Metric) -> Picture | None:
    lines = {line.key: line for line, _, _ in lines_of(runs)}
    labels = run_labels(runs)
    values = [run.value("student", metric.key) for run in runs]
    known = [value * metric.scale for value in values if value is not None]
    if len(known) < 2:
        return None
    figure, ax = new_figure(250, 26 * len(runs) + 34)
    tidy(ax, grid="x")
    for row, value in enumerate(values):
        if value is not None:
            line = lines[f"run-{row}"]
            ax.plot([value * metric.scale], [-row], line.marker, markersize=9, color=COLORS[line.color])
    teacher = runs[0].value("teacher", metric.key)
    if metric.better == "teacher" and teacher is not None:
        known.append(teacher * metric.scale)
        ax.axvline(known[-1], color=COLORS["teacher"], linewidth=1.6, linestyle=(0, (4, 2)))
    ax.set_yticks([-row for row in range(len(runs))], [short(label, 18) for label in labels])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(-len(runs) + 0.4, 0.6)
    margin = 0.15 * (max(known) - min(known)) or 0.1
    ax.set_xlim(min(known) - margin, max(known) + margin)
    ax.locator_params(axis="x", nbins=4)
    values_of = [f"{label} {metric.show(value)}" for label, value in zip(labels, values, strict=True)]
    alt = f"{metric.title} of the students: {', '.join(values_of)}."
    caption = f"{metric.unit}, the axis does not start at 0"
    return Picture(to_svg(figure, f"runs-{metric.key}", alt), metric.title, caption, alt)
