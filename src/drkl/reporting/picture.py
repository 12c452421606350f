"""A picture of one run for a README: what the numbers were, and how they came about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from drkl.errors import DrklError
from drkl.reporting.figures import draw_bars, draw_curve
from drkl.reporting.metrics import MODELS, metrics_of, value_of
from drkl.reporting.plotting import COLORS, GRID, INK, MUTED, PAPER, new_figure, plot_style, svg_text
from drkl.reporting.record import RunRecord, read_run
from drkl.reporting.text import short
from drkl.runs import RunFolder, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 1000, 560
PANELS = ("rkl", "fkl", "agreement", "entropy")


def write_picture(run: RunFolder, path: str | Path) -> Path:
    """Draw a wide picture of an evaluated run, ``.svg`` or ``.png``, with text as paths: the same wherever it is shown.

    Returns:
        The path written.

    Raises:
        DrklError: another file type, a run without a teacher or without ``eval.json``, or a path nobody can write to.
    """
    target = Path(path)
    if target.suffix not in (".svg", ".png"):
        raise DrklError(f"{str(target)!r} should end in .svg or .png: a picture is written as one of these.")
    record = read_run(run)
    if record.evaluation is None:
        raise DrklError(f"{str(run.root)!r} has no eval.json to draw; `drkl evaluate {run.root}` makes it.")
    if value_of(record.evaluation, "after", "rkl") is None:
        raise DrklError(f"{str(run.root)!r} has no distance to a teacher to draw: it was made without one.")
    with plot_style(text_as_paths=True):
        figure = _draw(record)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".png":
                figure.savefig(target, format="png", dpi=144, metadata={"Software": None})
            else:
                write_text(target, svg_text(figure))
        except OSError as error:
            raise DrklError(f"Cannot write the picture to {str(target)!r}: {error.strerror}.") from error
    return target


def _draw(record: RunRecord) -> Figure:
    figure, axes = new_figure(WIDTH, HEIGHT, nrows=2, ncols=4, height_ratios=[1, 1.45])
    figure.patch.set_alpha(1)
    figure.patch.set_facecolor(PAPER)
    figure.get_layout_engine().set(w_pad=7 / 72, h_pad=10 / 72, rect=(0.012, 0.01, 0.976, 0.83))  # type: ignore[union-attr,call-arg]
    for column, key in enumerate(PANELS):
        metric = metrics_of(record.task)[key]
        values = {model: value for model in MODELS if (value := value_of(record.evaluation, model, key)) is not None}
        if key != "entropy":
            values.pop("teacher", None)
        top, bottom = axes[0][column], axes[1][column]
        unit = "%" if metric.unit == "%" else metric.unit
        if values:
            draw_bars(top, metric, values, record.titles, size=14)
        else:
            top.axis("off")
        top.set_title(f"{metric.title}, {unit}", loc="left", fontsize=15, color=INK, fontweight="bold", pad=8)
        if not draw_curve(bottom, record, key, size=13, names=False):
            bottom.axis("off")
    _head(figure, record)
    return figure


def _head(figure: Figure, record: RunRecord) -> None:
    from matplotlib.lines import Line2D

    figure.text(0.018, 0.965, _title(record), fontsize=17, color=INK, fontweight="bold", va="top")
    shown: list[str] = [model for model in ("before", "warmup", "after", "teacher") if model in record.models]
    dots = [Line2D([], [], linestyle="", marker="o", markersize=10, color=COLORS[model]) for model in shown]
    details = record.subtitles | {"teacher": ""}
    names = [record.titles[model] + (f": {short(details[model], 24)}" if details[model] else "") for model in shown]
    figure.legend(
        dots, names, loc="upper left", bbox_to_anchor=(0.018, 0.905), borderaxespad=0, borderpad=0, ncols=len(shown),
        frameon=False, fontsize=14, labelcolor=MUTED, handlelength=1, handletextpad=0.4, columnspacing=2,
    )  # fmt: skip
    figure.add_artist(Line2D([0.018, 0.982], [0.855, 0.855], transform=figure.transFigure, color=GRID, linewidth=1))


def _title(record: RunRecord) -> str:
    teacher = short(record.teacher or "the teacher", 36)
    unit = "texts" if record.task == "classification" else "answers"
    return f"{short(record.name, 24)}: {teacher} distilled with {record.objective}, on held-out {unit}"
