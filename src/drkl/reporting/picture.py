"""A picture of one run for a README: its numbers and its training curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkl.display import shell_word
from drkl.errors import DrklError
from drkl.evaluation.declared import metrics_of
from drkl.evaluation.result import MODELS, Evaluation
from drkl.reporting.curves import draw_curve
from drkl.reporting.figures import draw_bars
from drkl.reporting.inputs import TITLES, Run, read_run
from drkl.reporting.plotting import COLORS, GRID, INK, MUTED, PAPER, new_figure, plot_style, svg_text
from drkl.reporting.text import short
from drkl.runs import RunFolder, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 1000, 560
PANELS = ("rkl", "fkl", "agreement", "entropy")


def write_picture(run: str | Path | RunFolder | Evaluation, path: str | Path) -> Path:
    """Draw a wide picture of an evaluated run, ``.svg`` or ``.png``, with text as paths: the same wherever it is shown.

    Returns:
        The path of the picture.

    Raises:
        DrklError: another file type, a run without a teacher or without ``eval.json``, or a path nobody can write to.
    """
    target = Path(path)
    if target.suffix not in (".svg", ".png"):
        raise DrklError(f"{str(target)!r} should end in .svg or .png: a picture is written as one of these.")
    read = read_run(run)
    if read.evaluation is None and read.folder is not None:
        root = read.folder.root
        raise DrklError(f"{str(root)!r} has no eval.json to draw; `drkl evaluate {shell_word(root)}` makes it.")
    if read.value("student", "rkl") is None:
        raise DrklError(f"{read.title!r} has no distance to a teacher to draw: it was evaluated without one.")
    with plot_style(text_as_paths=True):
        figure = _draw(read)
        if target.suffix == ".png":
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=144, metadata={"Software": None})
            write_bytes(target, drawn.getvalue())
        else:
            write_text(target, svg_text(figure))
    return target


def _draw(run: Run) -> Figure:
    figure, axes = new_figure(WIDTH, HEIGHT, nrows=2, ncols=4, height_ratios=[1, 1.45])
    figure.patch.set_alpha(1)
    figure.patch.set_facecolor(PAPER)
    figure.get_layout_engine().set(w_pad=7 / 72, h_pad=10 / 72, rect=(0.012, 0.01, 0.976, 0.83))  # type: ignore[union-attr,call-arg]
    for column, key in enumerate(PANELS):
        metric = metrics_of(run.task)[key]
        values = {model: value for model in MODELS if (value := run.value(model, key)) is not None}
        if key != "entropy":
            values.pop("teacher", None)
        top, bottom = axes[0][column], axes[1][column]
        if values:
            draw_bars(top, metric, values, size=14)
        else:
            top.axis("off")
        top.set_title(f"{metric.title}, {metric.unit}", loc="left", fontsize=15, color=INK, fontweight="bold", pad=8)
        if not draw_curve(bottom, run, key, size=13, names=False):
            bottom.axis("off")
    _head(figure, run)
    return figure


def _head(figure: Figure, run: Run) -> None:
    from matplotlib.lines import Line2D

    figure.text(0.018, 0.965, _title(run), fontsize=17, color=INK, fontweight="bold", va="top")
    models = [model for model in (*MODELS[1:], "teacher") if model in run.models]
    dots = [Line2D([], [], linestyle="", marker="o", markersize=10, color=COLORS[model]) for model in models]
    details = run.subtitles | {"teacher": ""}
    names = [TITLES[model] + (f": {short(details[model], 24)}" if details[model] else "") for model in models]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.018, 0.905), "borderaxespad": 0, "borderpad": 0}
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 14,
        "labelcolor": MUTED,
        "handlelength": 1,
        "handletextpad": 0.4,
    }
    figure.legend(dots, names, ncols=len(models), columnspacing=2, **place, **style)
    figure.add_artist(Line2D([0.018, 0.982], [0.855, 0.855], transform=figure.transFigure, color=GRID, linewidth=1))


def _title(run: Run) -> str:
    teacher = short(run.teacher or "the teacher", 36)
    unit = "texts" if run.task == "classification" else "answers"
    how = "" if run.is_pair else f" distilled with {run.objective}"
    return f"{short(run.name, 24)}: {teacher}{how}, on held-out {unit}"
