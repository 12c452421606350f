"""The figures of a toy sweep: per setting the paths, the end points and an animation, and one map of the end points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkl.disk import writing
from drkl.reporting.plotting import COLORS, GRID, INK, MUTED, PAPER, new_figure, plot_style, svg_text, tidy
from drkl.runs import write_text
from drkl.toy.dynamics import ToySetting
from drkl.toy.map import can_map, write_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Key = tuple[str, Any]

# Okabe and Ito's palette. Other objectives take the colours that are left over.
HIGHLIGHTS: dict[Key, str] = {
    ("rkl", ""): "#d55e00", ("fkl", ""): "#0072b2", ("gjs", ""): "#56b4e9", ("drkl", 0.1): "#009e73",
    ("rkl+fkl", 0.1): "#cc79a7", ("rkl+gjs", 0.5): "#e69f00",
}  # fmt: skip
PATHS = {"q_t": "probability of the teacher's top token", "entropy": "entropy, nats", "agreement": "agreement"}
ENDS = {"q_t": "q: target, rival (open)", "entropy": "entropy", "agreement": "agreement", "fkl": "KL(p || q)",
        "rkl": "KL(q || p)"}  # fmt: skip
FRAMES_HELD = 8
"""Frames for which the animation stays on the last step."""


def draw(rows: Sequence[Row], ends: Sequence[Row], settings: Sequence[ToySetting], folder: Path) -> None:
    """Write ``SETTING.svg`` and ``SETTING.gif`` for each setting, and ``map-KIND.svg`` where there is enough for a map.

    Args:
        rows: what `drkl.toy.sweep.sweep` returned.
        ends: what `drkl.toy.sweep.ends` makes of them.
        settings: those of the sweep.
        folder: the output folder.

    Raises:
        DrklError: the folder cannot be written to.
    """
    for kind in dict.fromkeys(setting.kind for setting in settings):
        teachers = {setting.name: (setting.init, setting.entropy) for setting in settings if setting.kind == kind}
        of_kind = [end for end in ends if end["setting"] in teachers]
        if can_map(of_kind):
            write_map(of_kind, teachers, folder / f"map-{kind}.svg")
    for setting in settings:
        of_setting = [row for row in rows if row["setting"] == setting.name]
        write_figure(of_setting, setting.entropy, folder / f"{setting.name}.svg")
        write_animation(of_setting, setting.entropy, folder / f"{setting.name}.gif")


def _name(key: Key) -> str:
    objective, gamma = key
    return objective if gamma == "" else f"{objective}, γ {gamma:g}"


def write_figure(rows: Sequence[Row], teacher_entropy: float, path: Path) -> None:
    """Draw one setting's rows to an svg: paths above, the end points of every objective below.

    The open marks are the rival, the student's most probable token apart from the teacher's top token. Where it is to
    the right of the full mark, it has overtaken the target.

    Raises:
        DrklError: the file cannot be written.
    """
    series = _by_objective(rows)
    colors = _colors(list(series))
    with plot_style(text_as_paths=True):
        figure, (above, below) = _axes(len(series))
        for ax, (metric, title) in zip(above, PATHS.items(), strict=True):
            for key, color in colors.items():
                _draw_path(ax, series[key], metric, color)
            _draw_teacher(ax, metric, rows, teacher_entropy, along="y")
            _finish(ax, title, "step")
        for ax, (metric, title) in zip(below, ENDS.items(), strict=True):
            for place, (key, members) in enumerate(series.items()):
                color = colors.get(key, COLORS["before"])
                if metric == "q_t":
                    _draw_end(ax, members, "rival_q", place, color, open_mark=True)
                _draw_end(ax, members, metric, place, color)
            _draw_teacher(ax, metric, rows, teacher_entropy, along="x")
            _finish(ax, title, "", grid="both")
            ax.set_ylim(len(series) - 0.5, -0.5)
            ax.set_yticks(range(len(series)), [_name(key) for key in series])
            ax.tick_params(labelleft=ax is below[0])
        _legend(figure, colors, f"{rows[0]['setting']}, bands: lowest to highest of the seeds; dashed: the teacher")
        text = svg_text(figure)
    write_text(path, text)


def write_animation(rows: Sequence[Row], teacher_entropy: float, path: Path) -> None:
    """Draw the path of each highlighted objective through entropy and target probability, as a gif.

    Raises:
        DrklError: the file cannot be written.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    series = _by_objective(rows)
    colors = _colors(list(series))
    with plot_style():
        figure, ax = new_figure(620, 440)
        _opaque(figure)
        walks = {}
        for key, color in colors.items():
            steps, x = _means(series[key], "entropy")
            _, y = _means(series[key], "q_t")
            (trail,) = ax.plot([], [], color=color, linewidth=1.4, alpha=0.6)
            (dot,) = ax.plot([], [], "o", color=color, markersize=8, label=_name(key))
            walks[key] = (x, y, trail, dot)
        _, target = _means(rows, "p_t")
        ax.plot([teacher_entropy], [target[-1]], "x", color=INK, markersize=12, markeredgewidth=2.5, label="teacher")
        _finish(ax, "probability of the teacher's top token", "entropy, nats")
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        ax.set_xlim(0, max(max(x) for x, *_ in walks.values()) * 1.05)
        ax.set_ylim(0, max(*target, *(max(y) for _, y, *_ in walks.values())) * 1.1)
        ax.legend(loc="upper right", frameon=False, fontsize=10, labelcolor=INK)
        clock = ax.text(0.02, 0.03, "", transform=ax.transAxes, color=MUTED, fontsize=11)

        figure.draw_without_rendering()
        # The layout is computed once: it takes longer than drawing a frame.
        figure.set_layout_engine("none")

        def draw_frame(frame: int) -> list[Any]:
            last = min(frame, len(steps) - 1)
            clock.set_text(f"step {steps[last]}")
            for x, y, trail, dot in walks.values():
                trail.set_data(x[: last + 1], y[: last + 1])
                dot.set_data(x[last : last + 1], y[last : last + 1])
            return []

        animation = FuncAnimation(figure, draw_frame, frames=len(steps) + FRAMES_HELD, blit=False)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            animation.save(path, writer=PillowWriter(fps=8), dpi=72)


def _by_objective(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    series: dict[Key, list[Row]] = {}
    for row in rows:
        series.setdefault((str(row["objective"]), row["gamma"]), []).append(row)
    return series


def _colors(keys: list[Key]) -> dict[Key, str]:
    """The colours of at most six objectives: those of `HIGHLIGHTS` that are present, then the first of the others."""
    colors = {key: color for key, color in HIGHLIGHTS.items() if key in keys}
    spare = [color for key, color in HIGHLIGHTS.items() if key not in keys]
    return colors | dict(zip((key for key in keys if key not in colors), spare, strict=False))


def _per_step(rows: Sequence[Row], metric: str) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(int(row["step"]), []).append(float(row[metric]))
    return values


def _means(rows: Sequence[Row], metric: str) -> tuple[list[int], list[float]]:
    values = _per_step(rows, metric)
    return list(values), [sum(seeds) / len(seeds) for seeds in values.values()]


def _draw_path(ax: Axes, rows: Sequence[Row], metric: str, color: str) -> None:
    values = _per_step(rows, metric)
    steps, means = _means(rows, metric)
    ax.fill_between(steps, [min(v) for v in values.values()], [max(v) for v in values.values()], color=color, alpha=0.2,
                    linewidth=0)  # fmt: skip
    ax.plot(steps, means, color=color, linewidth=1.6)


def _draw_end(ax: Axes, rows: Sequence[Row], metric: str, place: int, color: str, *, open_mark: bool = False) -> None:
    values = _per_step(rows, metric)
    last = values[max(values)]
    ax.plot([min(last), max(last)], [place, place], color=color, linewidth=2.5, alpha=0.6, solid_capstyle="round")
    ax.plot([sum(last) / len(last)], [place], "o", color=color, markersize=5.5,
            markerfacecolor=PAPER if open_mark else color)  # fmt: skip


def _draw_teacher(ax: Axes, metric: str, rows: Sequence[Row], teacher_entropy: float, *, along: str) -> None:
    _, target = _means(rows, "p_t")
    value = {"q_t": target[-1], "entropy": teacher_entropy}.get(metric)
    if value is not None:
        draw = ax.axhline if along == "y" else ax.axvline
        draw(value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))


def _axes(num_objectives: int) -> tuple[Figure, tuple[list[Axes], list[Axes]]]:
    """Three panels above, five below (hence 15 columns); each objective's name takes 17 pixels."""
    below = 60 + 17 * num_objectives
    figure, unused = new_figure(1000, 60 + 250 + below)
    unused.remove()
    _opaque(figure)
    figure.get_layout_engine().set(rect=(0.005, 0.005, 0.99, 1 - 66 / (310 + below)))  # type: ignore[union-attr,call-arg]
    grid = figure.add_gridspec(2, 15, height_ratios=[250, below])
    above = [figure.add_subplot(grid[0, 5 * i : 5 * i + 5]) for i in range(len(PATHS))]
    return figure, (above, [figure.add_subplot(grid[1, 3 * i : 3 * i + 3]) for i in range(len(ENDS))])


def _opaque(figure: Figure) -> None:
    figure.patch.set_alpha(1)
    figure.patch.set_facecolor(PAPER)


def _finish(ax: Axes, title: str, below: str, grid: str = "y") -> None:
    tidy(ax, grid=grid)
    ax.set_title(title, loc="left", fontsize=12, color=INK)
    ax.set_xlabel(below)


def _legend(figure: Figure, colors: Mapping[Key, str], title: str) -> None:
    from matplotlib.lines import Line2D

    height = figure.get_figheight() * 72
    figure.text(0.012, 1 - 12 / height, title, fontsize=13, color=INK, fontweight="bold", va="top")
    lines = [Line2D([], [], color=color, linewidth=3) for color in colors.values()]
    figure.legend(
        lines, [_name(key) for key in colors], loc="upper left", bbox_to_anchor=(0.012, 1 - 34 / height),
        frameon=False, borderaxespad=0, borderpad=0, ncols=len(colors), fontsize=12, labelcolor=MUTED, handlelength=1.2,
        columnspacing=1.6,
    )  # fmt: skip
