"""The map of a toy sweep: the final distance of decoupled objectives to the teacher, by entropy, γ, tail and start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkl.reporting.plotting import INK, MUTED, PAPER, new_figure, plot_style, svg_text, tidy
from drkl.runs import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

Row = Mapping[str, Any]

TAILS = {"drkl": "rkl", "rkl+fkl": "fkl", "rkl+gjs": "gjs"}
"""Decoupled objectives with reverse KL on the target, and the divergence of their tail on all tokens."""
FAR, LOW, HIGH = "#4b2a7b", "#0072b2", "#c85200"
CELL = (33, 19)
"""Width and height of a cell in pixels."""
GAP = 0.4
"""Distance, in cells, of the row that is not decoupled."""
MIN_WIDTH = 680
"""Pixels that the title needs."""


@dataclass(frozen=True)
class Metric:
    """One row of panels.

    Values are drawn from light at ``best`` to dark at ``worst``. ``best`` None means the signed difference from the
    teacher's entropy, with a colour for each sign.
    """

    key: str
    title: str
    best: float | None
    worst: float


METRICS = (
    Metric("target_error", "|q − p| at the target", 0.0, 0.5),
    Metric("entropy", "entropy, student − teacher (nats)", None, 2.0),
    Metric("agreement", "agreement of the top token", 1.0, 0.0),
    Metric("tvd", "TVD", 0.0, 0.8),
)


@dataclass(frozen=True)
class Panel:
    """The objectives of one tail from one start."""

    init: str
    decoupled: str
    alone: str


def can_map(ends: Sequence[Row]) -> bool:
    """Whether the objectives of `TAILS` have end points in more than one setting or for more than one γ."""
    return len({(end["setting"], end["gamma"]) for end in ends if end["objective"] in TAILS}) > 1


def write_map(ends: Sequence[Row], teachers: Mapping[str, tuple[str, float]], path: Path) -> None:
    """Draw end points to an svg: a panel for each metric, tail and start, a cell for each γ and teacher's entropy.

    Args:
        ends: the rows of ``ends.csv``.
        teachers: each setting's start and teacher's entropy, by the setting's name; rows of other settings are left
            out.
        path: the svg file.

    Raises:
        DrklError: the file cannot be written.
    """
    cells = {
        (*teachers[end["setting"]], end["objective"], end["gamma"]): end for end in ends if end["setting"] in teachers
    }
    entropies = sorted({entropy for _, entropy in teachers.values()})
    gammas = sorted({gamma for *_, objective, gamma in cells if objective in TAILS})
    present = {objective for *_, objective, _ in cells}
    panels = [
        Panel(init, decoupled, alone)
        for init in dict.fromkeys(init for init, _ in teachers.values())
        for decoupled, alone in TAILS.items()
        if decoupled in present
    ]
    width = max(MIN_WIDTH, 110 + len(panels) * (CELL[0] * len(entropies) + 14))
    height = 100 + len(METRICS) * (CELL[1] * (len(gammas) + 1.4) + 44)
    with plot_style(text_as_paths=True):
        figure, axes = new_figure(width, height, nrows=len(METRICS), ncols=len(panels), squeeze=False)
        figure.patch.set_alpha(1)
        figure.patch.set_facecolor(PAPER)
        rect = (6 / width, 0, 1 - 12 / width, 1 - 48 / height)
        figure.get_layout_engine().set(rect=rect)  # type: ignore[union-attr,call-arg]
        for metric, row in zip(METRICS, axes, strict=True):
            for panel, ax in zip(panels, row, strict=True):
                _fill(ax, cells, panel, metric, entropies, gammas)
                _finish(ax, panel, metric, entropies, gammas, first=ax is row[0], last=metric is METRICS[-1])
        _title(figure, height)
        text = svg_text(figure)
    write_text(path, text)


def _fill(
    ax: Axes, cells: Mapping[tuple[Any, ...], Row], panel: Panel, metric: Metric, entropies: list[float],
    gammas: list[float],
) -> None:  # fmt: skip
    lines = [(gamma, panel.decoupled, place) for place, gamma in enumerate(gammas)]
    for gamma, objective, place in [*lines, ("", panel.alone, len(gammas) + GAP)]:
        for column, entropy in enumerate(entropies):
            end = cells.get((panel.init, entropy, objective, gamma))
            if end is not None:
                _cell(ax, column, place, metric, float(end[metric.key]), entropy)


def _cell(ax: Axes, column: float, place: float, metric: Metric, value: float, entropy: float) -> None:
    from matplotlib.patches import Rectangle

    value = value - entropy if metric.best is None else value
    color = _color(metric, value)
    ax.add_patch(Rectangle((column - 0.5, place - 0.5), 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1))
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ax.text(column, place, _number(metric, value), ha="center", va="center", fontsize=9,
            color=INK if light > 0.6 else PAPER)  # fmt: skip


def _number(metric: Metric, value: float) -> str:
    """The number in few characters: ".42", "1", and a signed difference as "+.9" or "−1.3"."""
    if metric.best is None:
        text = f"{value:+.1f}".replace("-", "−")
        return "0" if text[1:] == "0.0" else text[0] + text[1:].removeprefix("0")
    text = f"{value:.2f}"
    return text.removesuffix(".00") if text.endswith(".00") else text.removeprefix("0")


def _color(metric: Metric, value: float) -> tuple[float, float, float, float]:
    if metric.best is None:
        share, far = value / metric.worst, HIGH if value > 0 else LOW
    else:
        share, far = (value - metric.best) / (metric.worst - metric.best), FAR
    return _scale(far)(min(abs(share), 1.0))


def _scale(far: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(far, ["#f3f0e8", far])


def _finish(
    ax: Axes, panel: Panel, metric: Metric, entropies: list[float], gammas: list[float], *, first: bool, last: bool
) -> None:
    tidy(ax, size=9.5)
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)
    ax.set_xlim(-0.5, len(entropies) - 0.5)
    ax.set_ylim(len(gammas) + GAP + 0.5, -0.5)
    ax.set_xticks(range(len(entropies)), [f"{entropy:g}" for entropy in entropies])
    ax.set_yticks([*range(len(gammas)), len(gammas) + GAP], [*(f"γ {gamma:g}" for gamma in gammas), "not decoupled"])
    ax.tick_params(labelleft=first, pad=2)
    ax.set_xlabel("teacher's entropy" if last else "")
    heading = f"{panel.alone} tail, {panel.init} start"
    ax.set_title(f"\n{heading}", loc="left", fontsize=10, color=INK, pad=3)
    if first:
        above = ax.annotate(metric.title, (0, 1), (0, 18), xycoords="axes fraction", textcoords="offset points",
                            fontsize=11, color=INK, fontweight="bold")  # fmt: skip
        # It may reach over the next panel; in the layout it would make its own panel narrower.
        above.set_in_layout(False)


def _title(figure: Any, height: float) -> None:
    figure.text(0.008, 1 - 10 / height, "Reverse KL on the target, another weight (γ) and divergence on the tail",
                fontsize=13, color=INK, fontweight="bold", va="top")  # fmt: skip
    figure.text(0.008, 1 - 31 / height, "Darker is farther from the teacher; blue: entropy too low, orange: too high. "
                "Not decoupled: the tail's divergence on all tokens.", fontsize=10.5, color=MUTED,
                va="top")  # fmt: skip
