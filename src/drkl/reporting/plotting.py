"""How figures look: the colours of the models, the axes, and matplotlib's svg made fit for a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from drkl.reporting.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for the colour-blind; the teacher is ink, the untrained student grey.
COLORS = {"teacher": "#1d1c1a", "before": "#98948a", "warmup": "#d98a00", "after": "#0068a8"}
RUN_COLORS = (COLORS["after"], "#c85200", "#008a64", "#b0568c", "#6d6a00", COLORS["warmup"])
INK, MUTED, GRID, PAPER = "#2b2a27", "#6c6860", "#e3dfd6", "#fffefb"

# On the page every colour becomes a CSS variable, so that one svg serves light, dark and print.
_VARIABLES = {
    **{color: f"var(--{model})" for model, color in COLORS.items()},
    **{color: f"var(--run-{place})" for place, color in enumerate(RUN_COLORS) if color not in COLORS.values()},
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--panel)",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure on the page; ``alt`` says in words what it shows."""

    svg: Markup
    title: str
    caption: str
    alt: str
    wide: bool = False


@contextmanager
def plot_style(*, text_as_paths: bool = False) -> Iterator[None]:
    """matplotlib settings for drawing and saving: same bytes for the same data, user text never read as maths."""
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "drkl", "svg.fonttype": "path" if text_as_paths else "none", "text.parse_math": False,
        "font.family": "DejaVu Sans", "axes.unicode_minus": True, "text.usetex": False,
    }  # fmt: skip
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


def svg_text(figure: Figure, **saving: Any) -> str:
    """The figure as the text of an svg file: no date, no blanks at the ends of lines, the same ids every time.

    matplotlib makes an id of a hash of coordinates whose last bits the layout's solver leaves to chance; here they are
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
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    body = re.sub(r"font: (?:[a-z0-9]+ )*([\d.]+px) [^;\"]*", r"font-size: \1", body)
    # An artist's gid "series:KEY:N" says to which curve it belongs, so that the page's script can hide it.
    body = re.sub(r'\bid="series:([\w-]+):(\d+)"', r'data-series="\1" id="series-\1-\2"', body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(f": {color}", f": {variable}")
    label = escape(clean(alt))
    # matplotlib escapes the text that it draws.
    return Markup(f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">{body.strip()}')
