"""Draw the figures of docs/article.md, each from the csv that is written beside it: `make figures`."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from drkl.reporting.plotting import INK, MUTED, PAPER, new_figure, plot_style, svg_text, tidy
from drkl.runs import write_text
from scripts.article_rows import ROWS, as_csv

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
# Of Okabe and Ito's palette, safe for the colour-blind; a dash tells two curves of a panel apart without colour.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
DASHED: Any = (0, (5, 2))
DOTTED: Any = (0, (1, 1.5))
DASHDOT: Any = (0, (6, 1.5, 1, 1.5))
Row = dict[str, Any]


def read_rows(text: str) -> list[Row]:
    """The rows of a csv, numbers as numbers."""
    return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def where(rows: Iterable[Row], **fixed: Any) -> list[Row]:
    """Those rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in fixed.items())]


def column(rows: Iterable[Row], key: str) -> list[Any]:
    return [row[key] for row in rows]


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """Its values, each once, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def panels(
    width: float, height: float, title: str, note: str, legend_row: float = 0, **subplots: Any
) -> tuple[Any, Any]:
    """A figure on paper and its axes, below a title, a note on the conditions, and space for a legend."""
    head = 46 + 16 * (note.count("\n") + 1) + legend_row
    figure, axes = new_figure(width, height, **subplots)
    figure.patch.set(facecolor=PAPER, alpha=1.0)
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0.006, 0.01, 0.988, 1 - head / height), wspace=0.04)
    figure.text(0.012, 1 - 12 / height, title, fontsize=14, color=INK, fontweight="bold", va="top")
    figure.text(0.012, 1 - 35 / height, note, fontsize=11, color=MUTED, va="top", linespacing=1.3)
    return figure, axes


def legend_above(figure: Any, handles: Sequence[Any], labels: Sequence[str], top: float) -> None:
    """One line of a legend for all panels, ``top`` pixels below the figure's edge."""
    corner = (0.012, 1 - top / (72 * figure.get_figheight()))
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=corner, frameon=False, borderaxespad=0, borderpad=0,
        ncols=len(labels), fontsize=11.5, labelcolor=INK, handlelength=2.4, columnspacing=1.8,
    )  # fmt: skip


def finish(ax: Any, title: str, x: str, y: str = "") -> None:
    """The panel's title and the names of its axes."""
    tidy(ax)
    ax.set_title(title, loc="left", fontsize=12, color=INK, pad=8)
    ax.set_xlabel(x)
    ax.set_ylabel(y, color=MUTED, fontsize=11)


def legend(ax: Any, place: str = "best", **more: Any) -> None:
    ax.legend(**{"frameon": False, "fontsize": 10.5, "labelcolor": INK, "loc": place, "handlelength": 2.6, **more})


def plain_numbers(*axes: Any) -> None:
    """Write 0.001, not a formula, at the ticks of logarithmic axes."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_flow(rows: Sequence[Row]) -> Any:
    """Arrows of gradient descent on the target's logit over (p_t, q_t), and where it rests."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mismatches = distinct(rows, "K")
    figure, axes = panels(
        1120, 405, "Reverse KL comes to rest above the teacher, by K nats of log-odds; DRKL at the teacher",
        "Arrows: −∂L/∂z_t, a step of gradient descent on the target's logit with the tails held K = KL(q^‖p^) apart; "
        "length as its square root. V = 50, τ = 1, γ = 0.5.",
        legend_row=24, ncols=len(mismatches) + 1, sharey=True,
    )  # fmt: skip
    fields = [("rkl", K, f"reverse KL, K = {K:g}") for K in mismatches] + [("drkl", mismatches[-1], "DRKL, every K")]
    for ax, (name, K, title) in zip(axes, fields, strict=True):
        _draw_field(ax, where(rows, objective=name, K=K))
        finish(ax, title, "p_t, teacher", "q_t, student" if ax is axes[0] else "")
        ax.grid(visible=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    handles = [
        Line2D([], [], color=INK, linewidth=2.4), Line2D([], [], color=INK, linewidth=1.1, linestyle=DASHED),
        Patch(color=YELLOW, alpha=0.3, linewidth=0),
        Line2D([], [], color=ORANGE, linewidth=0, marker="^", markersize=8),
        Line2D([], [], color=BLUE, linewidth=0, marker="v", markersize=8),
    ]  # fmt: skip
    names = ["at rest", "q_t = p_t", "above the teacher and still pushed up", "up", "down"]
    legend_above(figure, handles, names, top=60)
    return figure


def _draw_field(ax: Any, rows: Sequence[Row]) -> None:
    p_t = distinct(rows, "p_t")
    at_rest = [where(rows, p_t=x)[0]["rest_q_t"] for x in p_t]
    ends_p, ends_q = [0.0, *p_t, 1.0], [0.0, *at_rest, 1.0]
    ax.fill_between(ends_p, ends_p, ends_q, color=YELLOW, alpha=0.3, linewidth=0)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1.1, linestyle=DASHED)
    ax.plot(ends_p, ends_q, color=INK, linewidth=2.4)
    for color, sign in ((ORANGE, -1), (BLUE, 1)):
        some = [row for row in rows if row["push"] * sign > 1e-9 and row["p_t"] in p_t[::2]]
        steps = [-sign * abs(row["push"]) ** 0.5 for row in some]
        ax.quiver(
            column(some, "p_t"), column(some, "q_t"), [0] * len(some), steps, color=color, pivot="mid", angles="xy",
            scale_units="xy", scale=14, width=0.0065, headwidth=4.5, headlength=4.5, headaxislength=4, minlength=0.4,
        )  # fmt: skip


def draw_aligned(rows: Sequence[Row]) -> Any:
    """The push on an aligned target, and the gradient on the tail, against the tails' mismatch."""
    figure, (left, right) = panels(
        900, 400, "With the target aligned, reverse KL still pushes it up for as long as the tails differ",
        "q_t = p_t, V = 50, τ = 1, γ = 0.5. At K = 0 student and teacher are equal and every gradient is 0, under both "
        "objectives.",
        ncols=2,
    )  # fmt: skip
    for q_t, dash in zip(distinct(rows, "q_t"), (DOTTED, DASHED, "-"), strict=True):
        some = where(rows, objective="rkl", q_t=q_t)
        _draw_both(left, right, some, color=ORANGE, linestyle=dash, linewidth=2, label=f"reverse KL, q_t = {q_t:g}")
    # Where the target is aligned DRKL's gradient does not depend on q_t: the rows of one show those of all.
    some = where(rows, objective="drkl", q_t=rows[0]["q_t"])
    _draw_both(left, right, some, color=BLUE, linewidth=2.6, label="DRKL, every q_t")
    finish(left, "on the target's logit: q_t (1−q_t) K, and 0", "K = KL(q^‖p^), nats", "−∂L/∂z_t, up raises the target")
    finish(
        right,
        "on the tail's logits: both act for as long as the tails differ",
        "K = KL(q^‖p^), nats",
        "norm of ∂L/∂z over the tail",
    )
    legend(left, "upper left")
    legend(right, "upper left")
    return figure


def _draw_both(left: Any, right: Any, rows: Sequence[Row], **style: Any) -> None:
    left.plot(column(rows, "K"), [-row["push"] for row in rows], **style)
    right.plot(column(rows, "K"), column(rows, "tail_norm"), **style)


FAMILIES: dict[str, dict[str, tuple[str, Any]]] = {
    "Kullback-Leibler, and cross-entropy": {
        "ce": (MUTED, DOTTED), "todi": (PINK, DASHDOT), "fkl": (BLUE, "-"), "symmetric_kl": (GREEN, DASHED),
        "akl": (YELLOW, DOTTED), "rkl": (ORANGE, "-"),
    },
    "mixtures and others": {
        "rkl": (ORANGE, "-"), "ab": (PINK, DASHDOT), "srkl": (BLUE, "-"), "sfkl": (SKY, DASHED), "gjs": (GREEN, DASHED),
        "tvd": (INK, DOTTED),
    },
    "decoupled": {"rkl": (ORANGE, "-"), "drkl": (BLUE, "-"), "dkd": (GREEN, DASHED)},
}  # fmt: skip


def draw_path(rows: Sequence[Row]) -> Any:
    """Value and gradient norm of all objectives on the way to the teacher."""
    figure, axes = panels(
        1100, 640, "Near the teacher every loss but tvd is a parabola; far from it they pull with very different force",
        "Student's logits: the teacher's + r × noise of standard deviation 3, r from 1 to 0. Zipf teacher, V = 1,000, "
        "τ = 1, each objective at its defaults (γ = 0.5, skew 0.1).\n"
        "At r = 0 every value and norm is 0; only ce, averaged over the teacher's labels, keeps the teacher's entropy.",
        nrows=2, ncols=3, sharex=True, sharey="row",
    )  # fmt: skip
    for above, below, (family, curves) in zip(*axes, FAMILIES.items(), strict=True):
        for name, (color, dash) in curves.items():
            some = [row for row in where(rows, objective=name) if row["left"] > 0]
            for ax, key in ((above, "value"), (below, "norm")):
                ax.plot(column(some, "left"), column(some, key), color=color, linestyle=dash, linewidth=1.9, label=name)
        first = above is axes[0, 0]
        finish(above, family, "", "value, nats" if first else "")
        finish(below, "", "r, distance left to the teacher", "norm of the gradient on the logits" if first else "")
        legend(above, "lower left")
        for ax in (above, below):
            ax.set(xscale="log", yscale="log")
            plain_numbers(ax.xaxis, ax.yaxis)
    axes[0, 0].invert_xaxis()
    return figure


MIXED: dict[str, tuple[str, Any, float]] = {
    "rkl": (ORANGE, DOTTED, 2.2), "srkl": (YELLOW, "-", 2.2), "drkl": (SKY, "-", 3.6), "drkl(skew)": (PINK, "-", 3.6),
    "decoupled(srkl, srkl)": (INK, DASHED, 1.6),
}  # fmt: skip


def draw_mixture(rows: Sequence[Row]) -> Any:
    """DRKL with SRKL, both ways, next to its parents."""
    figure, axes = panels(
        1120, 430, "Two ways to join DRKL and SRKL: one pushes an aligned target down, the other leaves it alone",
        "V = 50, τ = 1, γ = 0.5. Left: K = 1, skew 0.1. Middle: K = 1, tails held, p_t = 0.6. Right: skew 0.1, "
        "q_t = p_t = 0.6.",
        legend_row=26, ncols=3,
    )  # fmt: skip
    for ax, against in zip(axes, ("q_t", "skew", "share"), strict=True):
        for name, (color, dash, width) in MIXED.items():
            some = where(rows, objective=name, against=against)
            sign = -1 if against == "q_t" else 1
            ax.plot(column(some, "x"), [sign * row["y"] for row in some], color=color, linestyle=dash, linewidth=width,
                    label=name)  # fmt: skip
    push, stay, bound = axes
    handles, names = push.get_legend_handles_labels()
    legend_above(figure, handles, names, top=60)
    finish(push, "the push on an aligned target", "q_t = p_t", "−∂L/∂z_t, up raises the target")
    finish(stay, "where the target comes to rest", "skew, the student's share of the mixture", "q_t at rest")
    stay.annotate("p_t", (0.9, 0.6), (3, 0), textcoords="offset points", color=INK, fontsize=11, va="center")
    stay.set_ylim(0.25, 0.9)
    finish(bound, "the value, as the teacher drops half of the tail",
           "teacher's share of the tokens that hold half of q^", "value, nats")  # fmt: skip
    bound.set_xscale("log")
    bound.set_xticks([1e-8, 1e-6, 1e-4, 1e-2, 1])
    bound.set_xticks([], minor=True)
    plain_numbers(bound.xaxis)
    bound.invert_xaxis()
    return figure


LEVELS = [0.02, 0.1, 0.2, 0.5, 1, 2, 5, 10, 50, 1000]
# Weaker to stronger: orange to blue through white, as light and as dark on both sides.
BANDS = ["#b35806", "#e08214", "#fdb863", "#fee0b6", "#d8e6f3", "#a6c8e4", "#5fa2cf", "#2b7bb5", "#0b4f8a"]


def draw_gamma(rows: Sequence[Row]) -> Any:
    """Where the tail is supervised more than by reverse KL, and where less."""
    figure, (left, right) = panels(
        1040, 440, "A constant γ strengthens the tail where q_t > 1−γ, and weakens it everywhere else",
        "Force on the tail as a multiple of reverse KL's: γ/(1−q_t). Measured on tails with K = 1, V = 50, τ = 1.",
        ncols=2, width_ratios=[1.15, 1],
    )  # fmt: skip
    constant = where(rows, weight="constant")
    q_t, gammas = distinct(constant, "q_t"), distinct(constant, "gamma")
    grid = [[math.log10(ratio) for ratio in column(where(constant, gamma=gamma), "ratio")] for gamma in gammas]
    levels = [math.log10(level) for level in LEVELS]
    left.contourf(q_t, gammas, grid, levels=levels, colors=BANDS)
    lines = left.contour(q_t, gammas, grid, levels=levels[1:-1], colors=INK, linestyles="solid",
                         linewidths=[2.4 if level == 0 else 0.6 for level in levels[1:-1]])  # fmt: skip
    left.clabel(
        lines,
        [level for level in lines.levels if level != 0],
        fmt=lambda level: f"×{10**level:.2g}",
        fontsize=10,
        colors=INK,
    )
    left.text(0.1, 0.24, "weaker than\nunder reverse KL", color=INK, fontsize=11.5, ha="center", va="center")
    left.text(0.986, 0.24, "stronger", color=PAPER, fontsize=11.5, ha="center", va="center")
    left.axhline(0.5, color=INK, linewidth=1, linestyle=DOTTED)
    finish(left, "dark line: as strong as reverse KL; dotted: γ = 0.5", "q_t, student", "γ")
    left.grid(visible=False)
    left.set_yscale("log")
    for gamma, color, dash in ((1.0, SKY, DASHED), (0.5, BLUE, "-"), (0.1, PINK, DASHDOT)):
        some = where(constant, gamma=gamma)
        right.plot(column(some, "q_t"), column(some, "ratio"), color=color, linestyle=dash, linewidth=2,
                   label=f"γ = {gamma:g}, constant")  # fmt: skip
    for name, label, color, dash in (("student", 'weight="student": 1−q_t, detached', ORANGE, "-"),
                                     ("floor", 'weight="floor": max(γ, 1−q_t), γ = 0.5', INK, DOTTED)):  # fmt: skip
        some = where(rows, weight=name)
        right.plot(column(some, "q_t"), column(some, "ratio"), color=color, linestyle=dash, linewidth=2.6, label=label)
    finish(right, "constants, and weights that follow q_t", "q_t, student", "force on the tail, times reverse KL's")
    right.set_yscale("log")
    legend(right, "upper left")
    for ax in (left, right):
        ax.set_xscale("logit")
        ax.set_xlim(q_t[0], q_t[-1])
        ax.set_xticks([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
        ax.set_xticks([], minor=True)
        plain_numbers(ax.xaxis, ax.yaxis)
    return figure


HEAT = {"rkl": ("reverse KL", ORANGE), "fkl": ("forward KL", GREEN), "drkl": ("DRKL, γ = 0.5", BLUE)}


def draw_temperature(rows: Sequence[Row]) -> Any:
    """Pushes and values at three temperatures, and how they fall."""
    figure, axes = panels(
        1200, 660, "As τ grows, reverse KL's push on an aligned target falls faster than its gradient as a whole",
        "V = 50, γ = 0.5. Both tails hold the same logits in two orders: at 0 on the x-axis q_t = p_t at every τ "
        "(0.6 at τ = 1).\nGradients are those on the logits before the division by τ, so each has a factor 1/τ. Pushes "
        "and values in the first three columns\nare times τ² (t2_scaling); without it they are 4 and 16 times smaller "
        "at τ = 2 and 4.",
        nrows=2, ncols=4,
    )  # fmt: skip
    for (above, below), (name, (label, color)) in zip(axes.T, HEAT.items(), strict=False):
        for T, dash in zip((1.0, 2.0, 4.0), ("-", DASHED, DOTTED), strict=True):
            some = where(rows, objective=name, against="offset", T=T)
            push = [-T * T * (row["target_push"] + row["tail_push"]) for row in some]
            style = {"color": color, "linestyle": dash, "linewidth": 2, "label": f"τ = {T:g}"}
            above.plot(column(some, "offset"), push, **style)
            below.plot(column(some, "offset"), [row["value"] * T * T for row in some], **style)
        first = name == "rkl"
        finish(above, label, "", "−∂L/∂z_t × τ², up raises the target" if first else "")
        finish(below, "", "student's z_t less the aligned one, nats", "value × τ², nats" if first else "")
        above.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
        above.set_ylim(-1.9, 1.0)
        below.set_ylim(0, 5.5)
        for ax in (above, below):
            ax.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
        legend(above, "lower left")
    _draw_decay(axes[0, 3], axes[1, 3], rows)
    return figure


def _draw_decay(above: Any, below: Any, rows: Sequence[Row]) -> None:
    for name, (label, color) in HEAT.items():
        some = where(rows, objective=name, against="temperature")
        T = column(some, "T")
        above.plot(T, column(some, "norm"), color=color, linewidth=2, label=f"{label}: norm")
        if name == "rkl":
            above.plot(T, [-row["tail_push"] for row in some], color=color, linewidth=2, linestyle=DASHED,
                       label=f"{label}: push on the target")  # fmt: skip
        below.plot(T, [row["value"] * row["T"] ** 2 for row in some], color=color, linewidth=2, label=label)
    finish(above, "q_t = p_t, against τ, without τ²", "", "gradient: norm over the logits, push")
    finish(below, "q_t = p_t, against τ", "temperature τ", "value × τ², nats")
    below.set_ylim(0, 2.1)
    legend(above, "lower left", fontsize=9.5)
    legend(below, "lower right")
    above.set_yscale("log")
    for ax in (above, below):
        ax.set_xscale("log")
        ax.set_xticks([1, 2, 4, 8, 16])
        ax.set_xticks([], minor=True)
    plain_numbers(above.xaxis, above.yaxis, below.xaxis)


DRAWN: dict[str, Callable[[Sequence[Row]], Any]] = {
    "article-1-flow": draw_flow,
    "article-2-aligned": draw_aligned,
    "article-3-path": draw_path,
    "article-4-mixture": draw_mixture,
    "article-5-gamma": draw_gamma,
    "article-6-temperature": draw_temperature,
}


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=list(DRAWN), nargs="*", default=list(DRAWN))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small lose more to a second thread than they gain
    for name in arguments.only:
        text = as_csv(ROWS[name]())
        write_text(arguments.output / f"{name}.csv", text)
        with plot_style(text_as_paths=True):
            write_text(arguments.output / f"{name}.svg", svg_text(DRAWN[name](read_rows(text))))
        print(arguments.output / f"{name}.svg")


if __name__ == "__main__":
    main()
