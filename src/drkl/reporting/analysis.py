"""Figures and tables of an analysis, for the page, the terminal and svg files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkl.display import as_number, number, shell_word
from drkl.evaluation.bootstrap import Interval
from drkl.kept import MARK, student_mark
from drkl.reporting.inputs import Run, of_analysis_json
from drkl.reporting.plotting import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAPER,
    Line,
    Picture,
    histogram,
    new_figure,
    percent_axis,
    plot_style,
    reliability_diagram,
    svg_text,
    tidy,
    to_svg,
)
from drkl.reporting.tables import PlainTable
from drkl.reporting.text import short
from drkl.runs import check_no_link, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Analysis = Mapping[str, Any]
Value = Mapping[str, Any]
TARGET, TAIL = COLORS["student"], COLORS["run-1"]
WIDTH, HEIGHT = 356, 260
SYMBOLS = {
    "B": ("B, the target's part", "KL of the pairs (target, rest), nats"),
    "K": ("K, the tail's divergence", "KL of the renormalised tails, nats"),
    "D": ("D, the target's log-odds gap", "logit q_t minus logit p_t, nats; above 0 the student is more confident"),
}
NAMES = ("push", "rest", *SYMBOLS, "gamma", "objectives", "sure", "reliability")
"""The figures' files."""


@dataclass(frozen=True)
class Drawn:
    """A figure with its words; ``name`` is its file's."""

    name: str
    figure: Figure
    title: str
    caption: str
    alt: str
    wide: bool = False

    def picture(self) -> Picture:
        """The figure for the page."""
        svg = to_svg(self.figure, f"analysis-{self.name}", self.alt)
        return Picture(svg, self.title, self.caption, self.alt, self.wide)


@dataclass(frozen=True)
class Section:
    """The figures and tables of an analysis on the page; ``notice`` warns if it measured other models."""

    notice: str
    pictures: list[Picture]
    table: PlainTable
    note: str


@of_analysis_json
def section(run: Run) -> Section | None:
    """The figures and the table of a run's analysis; None without one.

    Raises:
        DrklError: the analysis is not what `drkl analyze` writes.
    """
    if (analysis := run.analysis) is None:
        return None
    with plot_style():
        pictures = [drawn.picture() for drawn in _drawn(analysis)]
    settings = analysis["settings"]
    counts = settings["differentiated"]
    models = " beside ".join(short(str(settings["models"][name]), 60) for name in ("student", "teacher"))
    note = (
        f"{models}: {number(settings['positions'], 0)} positions of {number(settings['rows'], 0)} rows, temperature "
        f"{settings['temperature']:g}. Each objective was differentiated at {number(counts['evenly'], 0)} evenly "
        f"spaced positions and at {number(counts['matched'], 0)} more with a matched target ({settings['matched']}). "
        "A push is the gradient on the logit of the teacher's top token: a negative one raises it. In brackets: 95 % "
        "intervals over rows."
    )
    return Section(_notice(run, analysis), pictures, table(analysis), note)


def _notice(run: Run, analysis: Analysis) -> str:
    """A warning where the analysis is not of what the page is about."""
    analysed = analysis["settings"]["models"]
    if run.is_pair and run.evaluation is not None and run.pair_names:
        names = [str(run.pair_names.get(model)) for model in ("student", "teacher")]
        if names != [str(analysed.get(model)) for model in ("student", "teacher")]:
            return "This analysis is of other models than the evaluation on this page; they are named below."
    if run.folder is not None and _is_of_another(analysis, run.env):
        again = f"`drkl analyze {shell_word(run.folder.root)}`"
        return f"The student was trained again after this analysis; {again} analyses the new one."
    return ""


def _is_of_another(analysis: Analysis, env: Mapping[str, Any]) -> bool:
    """Whether the student of a run is not the one that was analysed: by its files; by the clock in runs of before."""
    then, now = analysis["settings"].get(MARK), student_mark(env)
    if then is not None and now is not None:
        return bool(then != now)
    done, trained = (analysis.get("timing") or {}).get("finished"), env.get("finished")
    return isinstance(done, str) and isinstance(trained, str) and done < trained


@of_analysis_json
def write_figures(analysis: Analysis, folder: Path) -> list[Path]:
    """Write every figure as an svg file into ``folder``; those that an earlier analysis left there are replaced.

    Raises:
        DrklError: nobody can write there, or the analysis is not what `drkl analyze` writes.
    """
    check_no_link(folder)
    written = []
    with plot_style(text_as_paths=True):
        for drawn in _drawn(analysis):
            drawn.figure.patch.set(facecolor=PAPER, alpha=1.0)
            drawn.figure.suptitle(drawn.title, x=0.02, ha="left", fontsize=12, color=INK, fontweight="bold")
            path = folder / f"{drawn.name}.svg"
            write_text(path, svg_text(drawn.figure))
            written.append(path)
    for name in NAMES:  # an earlier analysis may have drawn what this one has not
        if (old := folder / f"{name}.svg") not in written:
            old.unlink(missing_ok=True)
    return written


@of_analysis_json
def numbers(analysis: Analysis) -> list[tuple[str, float, Interval | None]]:
    """Name, value and interval of every mean over all positions, and of every objective's.

    Raises:
        DrklError: the analysis is not what `drkl analyze` writes.
    """
    named = {f"analysis {name}": entry for name, entry in analysis["totals"].items()}
    for row in analysis["objectives"]:
        entries = {name: entry for name, entry in row.items() if isinstance(entry, Mapping)}
        named |= {f"analysis {row['objective']} {name}": entry for name, entry in entries.items()}
    rows = []
    for name, entry in named.items():
        if (value := as_number(entry["value"])) is not None:
            ends = entry["interval"]
            rows.append((name, value, None if ends is None else (float(ends[0]), float(ends[1]))))
    return rows


_PUSHES = {
    "target_push": "target's push",
    "tail_push": "tail's push",
    "matched_target_push": "target's push, matched",
    "matched_tail_push": "tail's push, matched",
    "tail_force": "norm of the tail term's gradient",
}


@of_analysis_json
def table(analysis: Analysis) -> PlainTable:
    """Every objective's pushes on the target's logit.

    Raises:
        DrklError: the analysis is not what `drkl analyze` writes.
    """
    rows: list[list[str | tuple[str, str]]] = []
    for row in analysis["objectives"]:
        sure = as_number(row["sure"]["value"])
        share = f"{number(None if sure is None else 100 * sure, 1)} %"
        rows.append([short(str(row["objective"]), 60), *(_with_interval(row[key]) for key in _PUSHES), share])
    return PlainTable(["objective", *_PUSHES.values(), "loss from p_t > .99"], rows)


def _with_interval(entry: Value) -> tuple[str, str]:
    ends = entry["interval"]
    return _value(entry), "" if ends is None else f"[{number(ends[0], 4)}, {number(ends[1], 4)}]"


def _drawn(analysis: Analysis) -> list[Drawn]:
    makers = (_push, _rest, *(_histogram(name) for name in SYMBOLS), _gamma, _objectives, _sure, _reliability)
    return [drawn for make in makers if (drawn := make(analysis))]


MatchedBin = tuple[float, float, Interval | None, int]
"""Mean p_t, value, interval and number of the matched positions in one bin of p_t."""


def _matched_bins(analysis: Analysis, key: str) -> list[MatchedBin]:
    bins = []
    for row in analysis["by_target"]:
        x, y = as_number(row["p_t"]["value"]), as_number(row[key]["value"])
        if row["matched"] and x is not None and y is not None:
            bins.append((x, y, row[key]["interval"], int(row["matched"])))
    return bins


def _push(analysis: Analysis) -> Drawn | None:
    bins = _matched_bins(analysis, "force")
    if not bins:
        return None
    figure, ax = _axes("q_t (1-q_t) K")
    _draw_bins(ax, bins)
    ax.set_ylim(0, max(max(y, (ends or (y, y))[1]) for _, y, ends, _ in bins) * 1.1 or 1)
    values = ", ".join(f"{y:.3f} at p_t {x:.2f} ({count})" for x, y, _, count in bins)
    alt = f"Mean upward force of reverse KL's tail where the target is matched: {values}."
    caption = "mean of q_t (1-q_t) K, upwards; DRKL's is 0. The area of a dot is the number of positions"
    return Drawn("push", figure, "How hard reverse KL pushes a matched target up", caption, alt)


def _rest(analysis: Analysis) -> Drawn | None:
    bins = _matched_bins(analysis, "rests_at")
    if not bins:
        return None
    figure, ax = _axes("q_t at rest")
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    for x, y, _, _ in bins:
        ax.plot([x, x], [x, y], color=TAIL, linewidth=1, alpha=0.6)
    _draw_bins(ax, bins)
    ax.set_ylim(0, 1.04)
    values = ", ".join(f"{y:.2f} for {x:.2f}" for x, y, _, _ in bins)
    alt = f"The target probability at which reverse KL comes to rest with the tail as it is: {values}."
    caption = "with the tail held fixed; dashed: the teacher's own probability, where DRKL comes to rest"
    return Drawn("rest", figure, "Where reverse KL comes to rest", caption, alt)


def _histogram(symbol: str) -> Callable[[Analysis], Drawn | None]:
    def draw(analysis: Analysis) -> Drawn | None:
        entry = analysis["distributions"][symbol]
        if entry["histogram"] is None:
            return None
        figure, ax = _axes("share of positions", 200)
        counts = entry["histogram"]["positions"]
        histogram(ax, entry["histogram"]["edges"], counts, filled=True, color=TARGET, alpha=0.55, edgecolor="none")
        quantiles = entry["quantiles"]
        ax.axvline(quantiles["0.5"], color=INK, linewidth=1.4)
        ax.set_xlabel("nats")
        ax.locator_params(axis="x", nbins=6)
        title, meaning = SYMBOLS[symbol]
        quarters = f"a quarter below {quantiles['0.25']:.2f}, a quarter above {quantiles['0.75']:.2f}"
        alt = f"{title}: median {quantiles['0.5']:.2f}, {quarters} nats."
        beyond = f"; infinite at {entry['infinite']} positions" if entry["infinite"] else ""
        centre = f"median {number(quantiles['0.5'], 2)}, mean {number(as_number(entry['mean']), 2)}"
        return Drawn(symbol, figure, title, f"{meaning}; line: {centre}{beyond}", alt)

    return draw


def _gamma(analysis: Analysis) -> Drawn:
    rows, gamma = analysis["gammas"], float(analysis["settings"]["gamma"])
    figure, ax = _axes("share of positions")
    x, stronger = [row["gamma"] for row in rows], [row["stronger"] for row in rows]
    ax.fill_between(x, stronger, color=TARGET, alpha=0.4, linewidth=0)
    ax.fill_between(x, stronger, 1, color=TAIL, alpha=0.3, linewidth=0)
    ax.plot(x, stronger, color=TARGET, linewidth=1.6)
    ax.axvline(gamma, color=INK, linewidth=1.4)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    percent_axis(ax.yaxis)
    ax.set_xlabel("\N{GREEK SMALL LETTER GAMMA}")
    ax.text(0.96, 0.06, "stronger than reverse KL", ha="right", color=INK, fontsize=11)
    ax.text(0.04, 0.9, "weaker", color=INK, fontsize=11)
    shares = [100 * float(analysis["totals"][name]["value"]) for name in ("stronger", "weaker")]
    alt = f"At gamma {gamma:g} DRKL's tail is stronger at {shares[0]:.0f} % and weaker at {shares[1]:.0f} %."
    caption = f"share of positions on each side of 1-q_t = \N{GREEK SMALL LETTER GAMMA}; line: {gamma:g}"
    return Drawn("gamma", figure, "Where DRKL supervises the tail harder", caption, alt)


def _objectives(analysis: Analysis) -> Drawn:
    rows = analysis["objectives"]
    height = 84 + 22 * len(rows)
    figure, axes = new_figure(1090, height, ncols=2, sharey=True)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 26 / height))  # type: ignore[union-attr,call-arg]
    kinds = (("target_push", "from the target", TARGET, "o", -0.16), ("tail_push", "from the tail", TAIL, "D", 0.16))
    panels = (("matched_", "where the target is matched"), ("", "at all positions"))
    for ax, (prefix, title) in zip(axes, panels, strict=True):
        tidy(ax, grid="x")
        ax.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            for key, _, color, marker, offset in kinds:
                _estimate(ax, row[prefix + key], place + offset, color, marker)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set_xlabel("\N{LEFTWARDS ARROW} raises the target  |  lowers it \N{RIGHTWARDS ARROW}")
        _name_rows(ax, [_name(row) for row in rows])
    handles = [axes[1].plot([], [], marker, color=c, markersize=5.5, label=name)[0] for _, name, c, marker, _ in kinds]
    corner: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    figure.legend(handles=handles, ncols=2, frameon=False, fontsize=11, labelcolor=INK, **corner)
    pushes = [
        f"{_name(row)} {_value(row['matched_target_push'])} and {_value(row['matched_tail_push'])}" for row in rows
    ]
    alt = (
        f"Mean push on the target's logit where it is matched, from the target and from the tail: {'; '.join(pushes)}."
    )
    caption = "mean gradient on the logit of the teacher's top token; hairlines are 95 % intervals"
    return Drawn("objectives", figure, "What every objective would do to the target", caption, alt, wide=True)


def _estimate(ax: Axes, entry: Value, y: float, color: str, marker: str) -> None:
    value = as_number(entry["value"])
    if value is None:
        return
    if entry["interval"] is not None:
        ax.plot(entry["interval"], [y] * 2, color=color, linewidth=1.2, alpha=0.6)
    ax.plot([value], [y], marker, color=color, markersize=5.5)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)


def _sure(analysis: Analysis) -> Drawn | None:
    rows = [(_name(row), as_number(row["sure"]["value"]), row["sure"]["interval"]) for row in analysis["objectives"]]
    known = [(name, value, ends) for name, value, ends in rows if value is not None]
    share = as_number(analysis["totals"]["sure"]["value"])
    if not known or share is None:
        return None
    figure, ax = new_figure(WIDTH, 50 + 17 * len(known))
    tidy(ax, grid="x")
    ax.barh(range(len(known)), [value for _, value, _ in known], height=0.6, color=TARGET, alpha=0.6)
    for place, (_, _, ends) in enumerate(known):
        if ends is not None:
            ax.plot(ends, [place] * 2, color=INK, linewidth=1.2)
    ax.axvline(share, color=INK, linewidth=1.4)
    _name_rows(ax, [name for name, *_ in known])
    percent_axis(ax.xaxis)
    values = ", ".join(f"{name} {100 * value:.0f} %" for name, value, _ in known)
    alt = f"Share of each loss from positions with p_t above .99, which are {100 * share:.0f} %: {values}."
    caption = (
        f"share of the loss from p_t > .99, with 95 % intervals; line: {number(100 * share, 1)} % of the positions"
    )
    return Drawn("sure", figure, "Share of the loss where the teacher is almost certain", caption, alt)


def _reliability(analysis: Analysis) -> Drawn | None:
    tables = analysis["reliability"]
    series = []
    for name in ("teacher", "student"):
        columns = [tables[name][key] for key in ("tokens", "confidence", "accuracy")]
        if not sum(columns[0]):
            return None
        series.append((Line.of_model(name, name), list(zip(*columns, strict=True))))
    figure, ax = reliability_diagram((WIDTH, 300), series)
    ax.set_ylabel("accuracy", fontsize=11, color=MUTED)
    legend = ax.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([36])  # type: ignore[union-attr]
    errors = ", ".join(f"{name} {number(as_number(tables[name]['ece']), 3)}" for name in ("teacher", "student"))
    alt = f"Accuracy by confidence of student and teacher. Calibration error: {errors}."
    caption = f"accuracy of the top token; below the dashed line: overconfident. Calibration error: {errors}"
    return Drawn("reliability", figure, "Is their confidence equal to their accuracy?", caption, alt)


def _name(row: Value) -> str:
    return short(str(row["objective"]), 24)


def _value(entry: Value) -> str:
    return number(as_number(entry["value"]), 4)


def _axes(upwards: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure, ax = new_figure(WIDTH, height)
    tidy(ax)
    ax.set_ylabel(upwards, fontsize=11, color=MUTED)
    return figure, ax


def _draw_bins(ax: Axes, bins: Sequence[MatchedBin]) -> None:
    most = max(count for *_, count in bins)
    for x, y, ends, count in bins:
        if ends is not None:
            ax.plot([x, x], ends, color=TAIL, linewidth=1.4, alpha=0.7)
        ax.scatter([x], [y], s=16 + 130 * count / most, color=TAIL, alpha=0.75, linewidths=0, zorder=3)
    ax.plot([x for x, *_ in bins], [y for _, y, *_ in bins], color=TAIL, linewidth=1, alpha=0.5)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("p_t, the teacher's top probability")
