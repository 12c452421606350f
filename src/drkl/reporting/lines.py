"""The curves that several figures share: one per model of a run, or one per run; told apart without colour too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from drkl.reporting.answer import run_labels
from drkl.reporting.plotting import COLORS, PAPER, RUN_COLORS
from drkl.reporting.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_SOLID = (0, ())
STYLES: dict[str, tuple[str, Any]] = {
    "teacher": ("D", (0, (5, 2))), "before": ("v", (0, (1, 1.6))), "warmup": ("s", (0, (5, 1.6, 1, 1.6))),
    "after": ("o", _SOLID),
}  # fmt: skip
_RUN_MARKERS = "os^vPXDp"
_RUN_DASHES: tuple[Any, ...] = (_SOLID, (0, (6, 1.6)), (0, (5, 1.6, 1, 1.6)), (0, (1, 1.4)), (0, (3, 1.2)))
# As matplotlib draws them, in a box of 10 x 10 around the origin.
_SHAPES = {
    "o": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z", "s": "M-4.5-4.5H4.5V4.5H-4.5Z", "D": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "^": "M0-5L5 5H-5Z", "v": "M0 5L5-5H-5Z", "P": "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    "X": "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0Z",
    "p": "M0-5L4.8-1.5L2.9 4H-2.9L-4.8-1.5Z",
}  # fmt: skip


@dataclass
class Line:
    """One model of one run; ``key`` names it in the page, ``variable`` is its colour there."""

    key: str
    title: str
    subtitle: str
    record: RunRecord
    model: str
    color: str
    variable: str
    marker: str
    dash: Any
    _drawn: int = field(default=0, repr=False)

    @property
    def is_teacher(self) -> bool:
        return self.model == "teacher"

    @property
    def sign(self) -> Markup:
        """A piece of the curve, for legends."""
        dashes = " ".join(f"{length:g}" for length in self.dash[1])
        return Markup(
            '<svg class="sign" viewBox="-17 -7 34 14" aria-hidden="true"><path d="M-17 0H17" fill="none" '
            'stroke="var(--{0})" stroke-width="2" stroke-dasharray="{1}"/><path d="{2}" fill="var(--{0})"/></svg>'
        ).format(self.variable, dashes or "none", Markup(_SHAPES[self.marker]))

    def claim(self, *artists: Artist) -> None:
        """Mark artists as this curve's, so that they can be hidden with it."""
        for artist in artists:
            self._drawn += 1
            artist.set_gid(f"series:{self.key}:{self._drawn}")

    def plot(self, ax: Axes, x: Sequence[float], y: Sequence[float], *, size: float = 7, **more: Any) -> None:
        """Draw it in its own style."""
        style: dict[str, Any] = {"color": self.color, "marker": self.marker, "linestyle": self.dash, "linewidth": 2}
        style |= {"markersize": size, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
        self.claim(*ax.plot(x, y, **(style | more)))


def lines_of(records: Sequence[RunRecord]) -> list[Line]:
    """The evaluated models of one run; of several, the first run's teacher and the trained student of each."""
    first = records[0]
    if len(records) == 1:
        return [_model_line(first, model) for model in first.models]
    lines = [_model_line(first, "teacher")] if "teacher" in first.models else []
    for place, (record, label) in enumerate(zip(records, run_labels(records), strict=True)):
        if "after" in record.models:
            color = place % len(RUN_COLORS)
            variable = {0: "after", 5: "warmup"}.get(color, f"run-{color}")
            marker, dash = _RUN_MARKERS[place % len(_RUN_MARKERS)], _RUN_DASHES[place % len(_RUN_DASHES)]
            lines.append(Line(f"run-{place}", label, "", record, "after", RUN_COLORS[color], variable, marker, dash))
    return lines


def _model_line(record: RunRecord, model: str) -> Line:
    marker, dash = STYLES[model]
    title, subtitle = record.titles[model], record.subtitles[model]
    return Line(model, title, subtitle, record, model, COLORS[model], model, marker, dash)
