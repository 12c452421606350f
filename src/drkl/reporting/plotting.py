"""The style of figures: colours and line styles of the models, the axes, and svg that fits into a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from drkl.display import clean

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for the colour-blind; the teacher is ink, the untrained student grey.
COLORS = {"teacher": "#1d1c1a", "before": "#98948a", "warmup": "#d98a00", "student": "#0068a8", "scaled": "#7a4fa3",
          "run-1": "#c85200", "run-2": "#008a64", "run-3": "#b0568c", "run-4": "#6d6a00"}  # fmt: skip
RUN_COLORS = ("student", "run-1", "run-2", "run-3", "run-4", "warmup")
"""Names in ``COLORS``, in the order in which runs side by side take them."""
INK, MUTED, GRID, PAPER = "#2b2a27", "#6c6860", "#e3dfd6", "#fffefb"

_VARIABLES = {color: name for name, color in COLORS.items()}
_VARIABLES |= {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "panel"}

_SOLID = (0, ())
STYLES: dict[str, tuple[str, Any]] = {
    "teacher": ("D", (0, (5, 2))),
    "before": ("v", (0, (1, 1.6))),
    "warmup": ("s", (0, (5, 1.6, 1, 1.6))),
    "student": ("o", _SOLID),
    "scaled": ("P", (0, (3, 1.4))),
}
"""Marker and dashes of each model, so that colour is not needed to tell them apart."""
_RUN_MARKERS = "os^vPXDp"
_RUN_DASHES: tuple[Any, ...] = (_SOLID, (0, (6, 1.6)), (0, (5, 1.6, 1, 1.6)), (0, (1, 1.4)), (0, (3, 1.2)))
# As matplotlib draws the markers, in a box of 10 x 10 around the origin.
_SHAPES = {
    "o": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "s": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "D": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "^": "M0-5L5 5H-5Z",
    "v": "M0 5L5-5H-5Z",
    "P": "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    "X": "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0Z",
    "p": "M0-5L4.8-1.5L2.9 4H-2.9L-4.8-1.5Z",
}


@dataclass(frozen=True)
class Picture:
    """A figure on the page; ``alt`` says in words what it shows."""

    svg: Markup
    title: str
    caption: str
    alt: str
    wide: bool = False


@dataclass
class Line:
    """The line style of a model, or of the student of a run; ``color`` is a name in ``COLORS`` and a CSS variable."""

    key: str
    title: str
    subtitle: str
    color: str
    marker: str
    dash: Any
    _drawn: int = field(default=0, repr=False)

    @classmethod
    def of_model(cls, model: str, title: str, subtitle: str = "") -> Line:
        """A model of one run, in its own colour."""
        return cls(model, title, subtitle, model, *STYLES[model])

    @classmethod
    def of_run(cls, place: int, label: str) -> Line:
        """The student of the run at ``place`` among several."""
        color, marker, dash = (cycle[place % len(cycle)] for cycle in (RUN_COLORS, _RUN_MARKERS, _RUN_DASHES))
        return cls(f"run-{place}", label, "", color, marker, dash)

    @property
    def sign(self) -> Markup:
        """A piece of the curve, for legends."""
        dashes = " ".join(f"{length:g}" for length in self.dash[1])
        return Markup(
            '<svg class="sign" viewBox="-17 -7 34 14" aria-hidden="true"><path d="M-17 0H17" fill="none" '
            'stroke="var(--{0})" stroke-width="2" stroke-dasharray="{1}"/><path d="{2}" fill="var(--{0})"/></svg>'
        ).format(self.color, dashes or "none", Markup(_SHAPES[self.marker]))

    def claim(self, *artists: Artist) -> None:
        """Mark artists as this curve's, so that the page can hide them with it."""
        for artist in artists:
            self._drawn += 1
            artist.set_gid(f"series:{self.key}:{self._drawn}")

    def plot(self, ax: Axes, x: Sequence[float], y: Sequence[float], *, size: float = 7, **more: Any) -> None:
        """Draw the curve in its own style."""
        style: dict[str, Any] = {"color": COLORS[self.color], "marker": self.marker, "linestyle": self.dash}
        style |= {"linewidth": 2, "markersize": size, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
        self.claim(*ax.plot(x, y, **(style | more)))


@contextmanager
def plot_style(*, text_as_paths: bool = False) -> Iterator[None]:
    """matplotlib settings for drawing and saving: same bytes for the same data, user text never read as maths."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "drkl",
        "svg.fonttype": "path" if text_as_paths else "none",
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": "DejaVu Sans",
        "axes.unicode_minus": True,
    }
    # A run's name may hold letters that matplotlib's own font lacks; the browser's has them.
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` CSS pixels and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    figure.get_layout_engine().set(w_pad=2 / 72, h_pad=3 / 72)  # type: ignore[union-attr,call-arg]
    figure.patch.set_alpha(0)
    return figure, figure.subplots(**subplots)


def tidy(ax: Axes, *, size: float = 11, grid: str = "y") -> None:
    """Quiet axes: one hairline grid, no box, small grey numbers."""
    ax.set_facecolor("none")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(length=0, labelsize=size, labelcolor=MUTED, pad=4, which="both")
    ax.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.xaxis.label.set_color(MUTED)
    ax.xaxis.label.set_fontsize(size)


def percent_axis(axis: Any, scale: float = 100) -> None:
    """Label an axis in per cent; ``scale`` turns its values into them."""
    axis.set_major_formatter(lambda value, _: f"{scale * value:g} %")


def reliability_diagram(
    figure_size: tuple[float, float], series: Sequence[tuple[Line, Sequence[Sequence[float | None]]]]
) -> tuple[Figure, Axes]:
    """Accuracy against confidence; the area of a mark is the share of its bin.

    Args:
        figure_size: width and height in CSS pixels.
        series: curves, each with its bins ``(count, mean confidence, accuracy)``; empty bins are left out.
    """
    figure, ax = new_figure(*figure_size)
    tidy(ax)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    for line, rows in series:
        bins = [row for row in rows if row[0] and row[1] is not None and row[2] is not None]
        total = sum(row[0] or 0 for row in bins)
        x, y = [row[1] for row in bins], [row[2] for row in bins]
        color = COLORS[line.color]
        ax.plot(x, y, color=color, linewidth=1.4, alpha=0.7, linestyle=line.dash)
        sizes = [14 + 500 * (row[0] or 0) / total for row in bins]
        ax.scatter(x, y, s=sizes, color=color, alpha=0.55, linewidths=0, marker=line.marker, label=line.title)
    ax.set_xlim(0, 1.04)
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("confidence, max q")
    percent_axis(ax.yaxis)
    return figure, ax


def histogram(ax: Axes, edges: Sequence[float], counts: Sequence[float], *, filled: bool, **style: Any) -> None:
    """The shares of ``counts`` over their bins, as an outline or as a pale shape."""
    total = sum(counts)
    color = style.pop("color")
    if filled:
        style = {"facecolor": color, "edgecolor": color, "fill": True, "alpha": 0.16} | style
    else:
        style = {"color": color, "linewidth": 2} | style
    ax.stairs([value / total for value in counts], edges, **style)
    ax.set_ylim(0, None, auto=True)  # another histogram on the same axes may be higher
    percent_axis(ax.yaxis)


def svg_text(figure: Figure, **saving: Any) -> str:
    """The figure as the text of an svg file: no date, no trailing blanks, the same ids every time.

    matplotlib makes ids from a hash of coordinates whose last bits the layout solver leaves to chance; here they are
    numbers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **saving)
    text = re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.M)
    hashed = dict.fromkeys(re.findall(r'\bid="(\w*[0-9a-f]{10})"', text))
    names = {old: f"{old[:-10]}{number}" for number, old in enumerate(hashed)}
    return re.sub(r'(\bid="|#)(\w*[0-9a-f]{10})\b', lambda m: m[1] + names.get(m[2], m[2]), text)


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an inline ``<svg>``: no fixed size, the page's fonts and colours, ids of its own, a label."""
    text = re.sub(r"<metadata>.*?</metadata>", "", svg_text(figure, transparent=True), flags=re.S)
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    body = re.sub(r"font: (?:[a-z0-9]+ )*([\d.]+px) [^;\"]*", r"font-size: \1", body)
    # An artist's gid "series:KEY:N" says to which curve it belongs, so that the page's script can hide it.
    body = re.sub(r'\bid="series:([\w-]+):(\d+)"', r'data-series="\1" id="series-\1-\2"', body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    # matplotlib can write a colour only as a number; as a CSS variable the same svg serves light, dark and print.
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", _variable, body)
    label = escape(clean(alt))
    # matplotlib escapes the text that it draws.
    return Markup(f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">{body.strip()}')


def _variable(match: re.Match[str]) -> str:
    name = _VARIABLES.get(match[0])
    return f"var(--{name})" if name else match[0]
