"""What `drkl analyze` found, as pictures and tables: of the page, of the terminal and of files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drkl.display import as_number, number
from drkl.errors import DrklError
from drkl.reporting.answer import run_labels
from drkl.reporting.plotting import (
    COLORS,
    GRID,
    INK,
    MUTED,
    PAPER,
    RUN_COLORS,
    Picture,
    new_figure,
    plot_style,
    svg_text,
    tidy,
    to_svg,
)
from drkl.reporting.record import RunRecord
from drkl.reporting.text import short
from drkl.runs import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Analysis = Mapping[str, Any]
T = TypeVar("T")
TARGET, TAIL = COLORS["after"], RUN_COLORS[1]
ANSWERS = {"yes": "yes", "no": "no", "partly": "in part", "undecided": "not decided"}
WIDTH, HEIGHT = 356, 260
NAMES = ("push", "rest", "B", "K", "D", "gamma", "objectives", "sure", "reliability")
SYMBOLS = {
    "B": ("B, the target's part", "KL of the pairs (target, rest), nats"),
    "K": ("K, the tail's divergence", "KL of the renormalised tails, nats"),
    "D": ("D, the target's log-odds gap", "logit q_t minus logit p_t, nats; above 0 the student is surer"),
}


@dataclass(frozen=True)
class Drawn:
    """A figure with its words; ``name`` is its file's."""

    name: str
    figure: Figure
    title: str
    caption: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Finding:
    """One question of the diagnosis with its answer."""

    question: str
    answer: str
    text: str


@dataclass(frozen=True)
class Section:
    """What the page shows of an analysis; ``notice`` warns that it is of something else, ``others`` are other runs'."""

    headline: str
    notice: str
    others: list[tuple[str, str]]
    findings: list[Finding]
    pictures: list[Picture]
    head: list[str]
    rows: list[list[str]]
    note: str


def section(records: Sequence[RunRecord]) -> Section | None:
    """The page's section on the first run, with the headlines of the others that were analysed; None without any.

    Raises:
        DrklError: an analysis is not what `drkl analyze` writes.
    """
    if records[0].analysis is None:
        return None
    others = [
        (label, _checked(lambda one: str(one["headline"]), record.analysis))
        for label, record in zip(run_labels(records), records, strict=True)
        if record.analysis is not None
    ]
    found = _checked(_section, records[0].analysis)
    return replace(found, notice=_notice(records[0]), others=others if len(records) > 1 else [])


def _notice(record: RunRecord) -> str:
    """Whether the analysis is of what the page is about."""
    analysis = record.analysis or {}
    if record.is_pair and record.evaluation is not None:
        measured, here = (_of(one, "settings", "models") for one in (record.evaluation, analysis))
        names = [str(measured.get("after") or measured.get("student")), str(measured.get("teacher"))]
        if names != [str(here.get("student")), str(here.get("teacher"))]:
            return "This analysis is of other models than the evaluation on this page; its own are named below."
    done, trained = _of(analysis, "timing").get("finished"), record.env.get("finished")
    if isinstance(done, str) and isinstance(trained, str) and done < trained:
        return f"The student was trained anew after this analysis; `drkl analyze {record.run.root}` makes it anew."
    return ""


def _of(value: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def findings(analysis: Analysis) -> list[Finding]:
    """The questions and answers.

    Raises:
        DrklError: the analysis is not what `drkl analyze` writes.
    """
    return _checked(_findings, analysis)


def write_figures(analysis: Analysis, folder: Path) -> list[Path]:
    """Every figure as an svg file of its own in ``folder``; those that an earlier analysis left there are replaced.

    Raises:
        DrklError: nobody can write there, or the analysis is not what `drkl analyze` writes.
    """
    written = []
    with plot_style(text_as_paths=True):
        for drawn in _checked(_drawn, analysis):
            drawn.figure.patch.set(facecolor=PAPER, alpha=1.0)
            drawn.figure.suptitle(drawn.title, x=0.02, ha="left", fontsize=12, color=INK, fontweight="bold")
            path = folder / f"{drawn.name}.svg"
            write_text(path, svg_text(drawn.figure))
            written.append(path)
    for name in NAMES:  # an earlier analysis may have drawn what this one has not
        if (old := folder / f"{name}.svg") not in written:
            old.unlink(missing_ok=True)
    return written


def _checked(make: Callable[[Analysis], T], analysis: Analysis) -> T:
    try:
        return make(analysis)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DrklError(
            f"analysis.json is not what `drkl analyze` writes ({type(error).__name__}: {error}); run it again."
        ) from error


def _findings(analysis: Analysis) -> list[Finding]:
    return [
        Finding(str(one["question"]), ANSWERS[str(one["answer"])], str(one["text"]))
        for one in analysis["diagnosis"].values()
    ]


def _section(analysis: Analysis) -> Section:
    with plot_style():
        pictures = [
            Picture(to_svg(one.figure, f"analysis-{one.name}", one.alt), one.title, one.caption, one.alt, one.wide)
            for one in _drawn(analysis)
        ]
    settings = analysis["settings"]
    asked = settings["differentiated"]
    models = [short(str(settings["models"][name]), 60) for name in ("student", "teacher")]
    counted = {name: number(settings[name], 0) for name in ("positions", "rows")}
    counted |= {name: number(asked[name], 0) for name in ("evenly", "matched")}
    note = (
        f"{' beside '.join(models)}: {counted['positions']} positions of {counted['rows']} rows, temperature "
        f"{settings['temperature']:g}; the objectives at {counted['evenly']} of them, evenly, and at "
        f"{counted['matched']} more with a matched target ({settings['matched']}). Pushes are gradients on the logit "
        "of the teacher's top token: negative raises it. In brackets 95 % intervals over rows."
    )
    head, rows = table(analysis)
    return Section(str(analysis["headline"]), "", [], _findings(analysis), pictures, head, rows, note)


def numbers(analysis: Analysis) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Name, value and interval of every mean over all positions, and of every objective's.

    Raises:
        DrklError: the analysis is not what `drkl analyze` writes.
    """
    return _checked(_numbers, analysis)


def _numbers(analysis: Analysis) -> list[tuple[str, float, tuple[float, float] | None]]:
    named = {f"analysis {name}": found for name, found in analysis["totals"].items()}
    for row in analysis["objectives"]:
        named |= {f"analysis {row['objective']} {name}": one for name, one in row.items() if isinstance(one, Mapping)}
    rows = []
    for name, found in named.items():
        value = as_number(found["value"])
        if value is not None:
            ends = found["interval"]
            rows.append((name, value, None if ends is None else (float(ends[0]), float(ends[1]))))
    return rows


def table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """The objectives' pushes: the head, and a row for each."""
    head = ["objective", "target's push", "tail's push", "target's push, matched", "tail's push, matched",
            "norm of the tail term's gradient", "loss from p_t > .99"]  # fmt: skip
    keys = ("target_push", "tail_push", "matched_target_push", "matched_tail_push", "tail_force")
    rows = []
    for one in analysis["objectives"]:
        sure = as_number(one["sure"]["value"])
        share = number(None if sure is None else 100 * sure, 1)
        rows.append([short(str(one["objective"]), 60), *(_with_interval(one[key]) for key in keys), f"{share} %"])
    return head, rows


def _with_interval(found: Mapping[str, Any], digits: int = 4) -> str:
    text = number(as_number(found["value"]), digits)
    ends = found["interval"]
    return text if ends is None else f"{text} [{number(ends[0], digits)}, {number(ends[1], digits)}]"


def _drawn(analysis: Analysis) -> list[Drawn]:
    makers = (_push, _rest, *(_histogram(name) for name in SYMBOLS), _gamma, _objectives, _sure, _reliability)
    return [drawn for make in makers if (drawn := make(analysis))]


def _matched_bins(analysis: Analysis, key: str) -> list[tuple[float, float, tuple[float, float] | None, int]]:
    """Mean p_t, value, interval and number of the matched positions of each bin of p_t that has some."""
    found = []
    for row in analysis["by_target"]:
        x, y = as_number(row["p_t"]["value"]), as_number(row[key]["value"])
        if row["matched"] and x is not None and y is not None:
            found.append((x, y, row[key]["interval"], int(row["matched"])))
    return found


def _push(analysis: Analysis) -> Drawn | None:
    bins = _matched_bins(analysis, "force")
    if not bins:
        return None
    figure, ax = _axes("q_t (1-q_t) K")
    _points(ax, bins, TAIL)
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, max(max(y, (ends or (y, y))[1]) for _, y, ends, _ in bins) * 1.1 or 1)
    ax.set_xlabel("p_t, the teacher's top probability")
    shown = ", ".join(f"{y:.3f} at p_t {x:.2f} ({count})" for x, y, _, count in bins)
    alt = f"Mean upward force of reverse KL's tail where the target is matched: {shown}."
    caption = "q_t (1-q_t) K on the mean, upwards; DRKL's is 0. The area is the number of positions"
    return Drawn("push", figure, "How hard reverse KL pushes a matched target up", caption, alt)


def _rest(analysis: Analysis) -> Drawn | None:
    bins = _matched_bins(analysis, "rests_at")
    if not bins:
        return None
    figure, ax = _axes("q_t at rest")
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    for x, y, _, _ in bins:
        ax.plot([x, x], [x, y], color=TAIL, linewidth=1, alpha=0.6)
    _points(ax, bins, TAIL)
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("p_t, the teacher's top probability")
    shown = ", ".join(f"{y:.2f} for {x:.2f}" for x, y, _, _ in bins)
    alt = f"The target probability at which reverse KL comes to rest with the tail as it is: {shown}."
    caption = "with the tail held as it is; dashed: where DRKL comes to rest, the teacher's own"
    return Drawn("rest", figure, "Where reverse KL comes to rest", caption, alt)


def _histogram(symbol: str) -> Callable[[Analysis], Drawn | None]:
    def draw(analysis: Analysis) -> Drawn | None:
        found = analysis["distributions"][symbol]
        if found["histogram"] is None:
            return None
        edges, counts = found["histogram"]["edges"], found["histogram"]["positions"]
        figure, ax = _axes("share of positions", 200)
        total = sum(counts)
        ax.stairs([count / total for count in counts], edges, fill=True, color=TARGET, alpha=0.55)
        median = found["quantiles"]["0.5"]
        ax.axvline(median, color=INK, linewidth=1.4)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        ax.set_xlabel("nats")
        ax.locator_params(axis="x", nbins=6)
        title, meaning = SYMBOLS[symbol]
        quarters = f"a quarter below {found['quantiles']['0.25']:.2f}, a quarter above {found['quantiles']['0.75']:.2f}"
        alt = f"{title}: median {median:.2f}, {quarters} nats."
        beyond = "" if not found["infinite"] else f"; infinite at {found['infinite']} positions"
        caption = f"{meaning}; line: median {number(median, 2)}, mean {number(as_number(found['mean']), 2)}{beyond}"
        return Drawn(symbol, figure, title, caption, alt)

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
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.set_xlabel("\N{GREEK SMALL LETTER GAMMA}")
    ax.text(0.96, 0.06, "stronger than reverse KL", ha="right", color=INK, fontsize=11)
    ax.text(0.04, 0.9, "weaker", color=INK, fontsize=11)
    here = analysis["totals"]
    shares = [100 * float(here[name]["value"]) for name in ("stronger", "weaker")]
    alt = f"At gamma {gamma:g} DRKL's tail is stronger at {shares[0]:.0f} % and weaker at {shares[1]:.0f} %."
    caption = f"share of positions on each side of 1-q_t = \N{GREEK SMALL LETTER GAMMA}; line: {gamma:g}"
    return Drawn("gamma", figure, "Where DRKL supervises the tail harder", caption, alt)


def _objectives(analysis: Analysis) -> Drawn:
    rows = analysis["objectives"]
    figure, axes = new_figure(1090, 84 + 22 * len(rows), ncols=2, sharey=True)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 26 / (84 + 22 * len(rows))))  # type: ignore[union-attr,call-arg]
    for ax, kind, title in zip(
        axes, ("matched_", ""), ("where the target is matched", "at all positions"), strict=True
    ):
        tidy(ax, grid="x")
        ax.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            for key, color, marker, off in (("target_push", TARGET, "o", -0.16), ("tail_push", TAIL, "D", 0.16)):
                value, ends = as_number(row[kind + key]["value"]), row[kind + key]["interval"]
                if value is None:
                    continue
                if ends is not None:
                    ax.plot(ends, [place + off] * 2, color=color, linewidth=1.2, alpha=0.6)
                ax.plot([value], [place + off], marker, color=color, markersize=5.5)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set_xlabel("\N{LEFTWARDS ARROW} raises the target  |  lowers it \N{RIGHTWARDS ARROW}")
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_yticks(range(len(rows)), [_name(row) for row in rows])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.locator_params(axis="x", nbins=5)
    for key, color, marker in (("from the target", TARGET, "o"), ("from the tail", TAIL, "D")):
        axes[1].plot([], [], marker, color=color, markersize=5.5, label=key)
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(1, 1), ncols=2, frameon=False,
        fontsize=11, labelcolor=INK, borderaxespad=0,
    )  # fmt: skip
    said = [f"{_name(row)} {_value(row['matched_target_push'])} and {_value(row['matched_tail_push'])}" for row in rows]
    alt = f"Mean push on the target's logit where it is matched, from the target and from the tail: {'; '.join(said)}."
    caption = "mean gradient on the logit of the teacher's top token; hairlines are 95 % intervals"
    return Drawn("objectives", figure, "What every objective would do to the target", caption, alt, wide=True)


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
    ax.set_yticks(range(len(known)), [name for name, *_ in known])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(known) - 0.4, -0.6)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.locator_params(axis="x", nbins=5)
    shown = ", ".join(f"{name} {100 * value:.0f} %" for name, value, _ in known)
    alt = f"Share of each loss from positions with p_t above .99, which are {100 * share:.0f} %: {shown}."
    caption = (
        f"share of the loss from p_t > .99, with 95 % intervals; line: {number(100 * share, 1)} % of the positions"
    )
    return Drawn("sure", figure, "How much comes from where the teacher is certain", caption, alt)


def _reliability(analysis: Analysis) -> Drawn | None:
    found = analysis["reliability"]
    figure, ax = _axes("accuracy", 300)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    said = []
    styles = (("teacher", COLORS["teacher"], "D", (0, (5, 2))), ("student", COLORS["after"], "o", "-"))
    for name, color, marker, dash in styles:
        columns = [found[name][key] for key in ("tokens", "confidence", "accuracy")]
        bins = [row for row in zip(*columns, strict=True) if row[0]]
        total = sum(row[0] for row in bins)
        if not total:
            return None
        x, y = [row[1] for row in bins], [row[2] for row in bins]
        ax.plot(x, y, color=color, linewidth=1.4, alpha=0.7, linestyle=dash)
        sizes = [14 + 500 * row[0] / total for row in bins]
        ax.scatter(x, y, s=sizes, color=color, alpha=0.55, linewidths=0, marker=marker, label=name)
        said.append(f"{name} {number(as_number(found[name]['ece']), 3)}")
    legend = ax.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([36])  # type: ignore[union-attr]
    ax.set_xlim(0, 1.04)
    ax.set_ylim(0, 1.04)
    ax.set_xlabel("confidence, the highest probability")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    alt = f"Accuracy by confidence of student and teacher. Calibration error: {', '.join(said)}."
    caption = f"how often the top token comes true; below the dashed line: surer than right. ECE: {', '.join(said)}"
    return Drawn("reliability", figure, "Are they right as often as they are sure?", caption, alt)


def _name(row: Mapping[str, Any]) -> str:
    return short(str(row["objective"]), 24)


def _value(found: Mapping[str, Any]) -> str:
    return number(as_number(found["value"]), 4)


def _axes(upwards: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure, ax = new_figure(WIDTH, height)
    tidy(ax)
    ax.set_ylabel(upwards, fontsize=11, color=MUTED)
    return figure, ax


def _points(ax: Axes, bins: Sequence[tuple[float, float, tuple[float, float] | None, int]], color: str) -> None:
    most = max(count for *_, count in bins)
    for x, y, ends, count in bins:
        if ends is not None:
            ax.plot([x, x], ends, color=color, linewidth=1.4, alpha=0.7)
        ax.scatter([x], [y], s=16 + 130 * count / most, color=color, alpha=0.75, linewidths=0, zorder=3)
    ax.plot([x for x, *_ in bins], [y for _, y, *_ in bins], color=color, linewidth=1, alpha=0.5)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
