"""What a sparse teacher costs a student: three objectives from hidden states and from the teacher's top 16, 64 and 256.

    python -m scripts.run_teacher_cache    # caches, trains, evaluates with the real teacher; finished parts are kept
    python -m scripts.run_teacher_cache --only rkl-hidden rkl-16

All students start from one warmed-up student, which learnt from the teacher itself. Everything is run by the command
line, so that each run can be repeated alone: its env.json has the command.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from drkl.evaluation.result import Evaluation
from drkl.reporting.plotting import MUTED, PAPER, svg_text
from drkl.runs import read_json, write_text
from drkl.teachers.stored import StoredStates, StoredTopK
from scripts.draw_figures import BLUE, GREEN, ORANGE, finish, legend_above, panels
from scripts.run_on_policy import distill, drkl

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs/teacher-cache")
WARMUP = FOLDER / "warmup"
RESULTS = Path("docs/results/teacher-cache")
FIGURE = Path("docs/figures/teacher-cache.svg")
SIZES = Path("docs/figures/teacher-cache-sizes.svg")
TEACHER = "smollm2-135m-instruct"
OBJECTIVES = ("fkl", "rkl", "drkl")
KINDS = ("16", "64", "256", "hidden")
STEPS = 120
WARM = (
    "run.name=warmup", "objective.name=fkl", "training.max_steps=90", "training.learning_rate=7e-4",
    "training.eval_every=45", "training.save_every=45", "stages=[]", f"run.dir={FOLDER}",
)  # fmt: skip
SETTINGS = (
    "stages=[]", f"run.dir={FOLDER}", f"training.max_steps={STEPS}", "training.eval_every=60", "training.save_every=60",
    "student.init=pretrained", "student.layers=null", f"student.model={WARMUP / 'student'}", "teacher.remember_mb=0",
)  # fmt: skip
EVALUATION = ("--sweep", "none", "--prompts", "8", "--samples", "2")
METRICS = {
    "rkl": ("reverse KL", "nats"), "fkl": ("forward KL", "nats"), "overconfidence": ("overconfidence", "probability"),
    "entropy": ("entropy", "nats"),
}  # fmt: skip
COLUMNS = ("objective", "teacher", "bytes_per_position", "model", "metric", "value", "low", "high")
COLORS = dict(zip(OBJECTIVES, (GREEN, ORANGE, BLUE), strict=True))
MARKERS = dict(zip(OBJECTIVES, "s^o", strict=True))


def names() -> list[str]:
    """The twelve runs."""
    return [f"{objective}-{kind}" for objective in OBJECTIVES for kind in KINDS]


def cache_of(kind: str) -> Path:
    """Where a cache lies."""
    return FOLDER / f"cache-{kind}"


def make_cache(kind: str) -> None:
    """Write a cache, or go on with it; those of largest logits are made of the one of hidden states."""
    words = ["--output", str(cache_of(kind))]
    if kind != "hidden":
        words += ["--kind", "topk", "--k", kind, f"teacher.cache={cache_of('hidden')}"]
    drkl("cache", "quickstart", *SETTINGS, *words)


def train(name: str) -> None:
    """Train one run, or go on with it."""
    objective, kind = name.split("-")
    distill(
        FOLDER / name, *SETTINGS, f"run.name={name}", f"objective.name={objective}",
        f"teacher.cache={cache_of(kind)}",
    )  # fmt: skip


def bytes_per_position(kind: str) -> float:
    """Bytes of the values of a cache for each position."""
    manifest = read_json(cache_of(kind) / "manifest.json")
    values = sum(file["bytes"] for name, file in manifest["files"].items() if name.startswith("values"))
    return float(values / manifest["positions"])


def table() -> str:
    """The numbers of all students, of the warmed-up one and of the teacher, as csv."""
    lines: list[dict[str, Any]] = []
    for name in names():
        objective, kind = name.split("-")
        evaluation = Evaluation.load(FOLDER / name)
        about = {"objective": objective, "teacher": kind, "bytes_per_position": round(bytes_per_position(kind), 1)}
        lines += [{**about, **line} for line in numbers(evaluation, "student")]
    first = Evaluation.load(FOLDER / names()[0])
    for model in ("before", "teacher"):
        lines += [{"objective": "", "teacher": "", "bytes_per_position": "", **line} for line in numbers(first, model)]
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def numbers(evaluation: Evaluation, model: str) -> list[dict[str, Any]]:
    """The metrics of one model, with intervals."""
    found = []
    for metric in (*METRICS, "agreement", "nll", "distinct_2", "self_bleu", "rouge_l", "ended"):
        value = evaluation.value(model, metric)
        if value is None:
            continue
        interval = evaluation.interval(model, metric)
        low, high = ("", "") if interval is None else (f"{interval[0]:.5f}", f"{interval[1]:.5f}")
        found.append({"model": model, "metric": metric, "value": f"{value:.5f}", "low": low, "high": high})
    return found


def draw(text: str) -> str:
    """The figure from the csv: the student's distance from the real teacher over the bytes of a position."""
    rows = list(csv.DictReader(io.StringIO(text)))
    note = (
        "SmolLM2-135M-Instruct and ten of its layers, 120 steps on Dolly from one warmed-up student, one seed; bars: "
        "95 % intervals over 100 held-out rows.\nOpen marks and dashed lines: from hidden states, which are exact, at "
        "1,152 bytes a position. Dotted: the warmed-up student."
    )
    title = "What a student loses with a teacher known on k tokens"
    figure, axes = panels(1000, 420, title, note, legend_row=24, ncols=len(METRICS))
    handles: dict[str, Any] = {}
    for ax, (metric, (words, unit)) in zip(axes, METRICS.items(), strict=True):
        values = [row for row in rows if row["metric"] == metric]
        (start,) = (float(row["value"]) for row in values if row["model"] == "before")
        ax.axhline(start, color=MUTED, linewidth=1, linestyle=(0, (1, 1.5)))
        for shift, objective in zip((0.94, 1.0, 1.06), OBJECTIVES, strict=True):
            mine = [row for row in values if row["objective"] == objective]
            known = [row for row in mine if row["teacher"] != "hidden"]
            (exact,) = (row for row in mine if row["teacher"] == "hidden")
            look: dict[str, Any] = {"color": COLORS[objective], "marker": MARKERS[objective], "elinewidth": 0.8}
            handles[objective] = _bars(ax, known, shift, linewidth=1.4, markersize=5, **look)
            _bars(ax, [exact], shift, linewidth=0, markersize=6, markerfacecolor=PAPER, **look)
            ax.axhline(float(exact["value"]), color=COLORS[objective], linewidth=0.8, linestyle=(0, (5, 2)))
        sizes = {float(row["bytes_per_position"]): row["teacher"] for row in values if row["teacher"].isdigit()}
        ax.set_xscale("log")
        ax.set_xticks(list(sizes), [f"k={kind}\n{size:,.0f}" for size, kind in sizes.items()], fontsize=9)
        ax.minorticks_off()
        finish(ax, f"{words}, {unit}", "bytes a position")
    legend_above(figure, list(handles.values()), list(handles), 80)
    return svg_text(figure)


def _bars(ax: Any, rows: list[dict[str, str]], shift: float, **look: Any) -> Any:
    """Values with their intervals, a little beside their place, so that three can be told apart."""
    x = [float(row["bytes_per_position"]) * shift for row in rows]
    y = [float(row["value"]) for row in rows]
    bars = [[abs(float(row["value"]) - float(row[end])) for row in rows] for end in ("low", "high")]
    return ax.errorbar(x, y, yerr=bars, **look)


def draw_sizes() -> str:
    """The figure of what a cache takes: bytes over positions, for hidden states of several widths and for top-k."""
    note = (
        "Computed from the formats: hidden states in bf16 take 2 bytes for each unit, a top-k cache at one temperature "
        "8 k + 8 bytes\n(more than 65,535 tokens). Full logits of 151,936 tokens in bf16 for comparison."
    )
    figure, axes = panels(1000, 520, "What a cache takes", note)
    positions = [1e5, 1e10]
    lines: dict[str, tuple[float, Any]] = {"full logits": (2 * 151_936, {"color": MUTED, "linestyle": ":"})}
    for width in (576, 2048, 4096, 8192):
        size = StoredStates(width, torch.bfloat16, has_head=True).bytes_per_position
        lines[f"hidden, {width:,} units"] = (size, {"color": BLUE})
    for k in (16, 64, 256):
        size = StoredTopK(k, (1.0,), 151_936, torch.bfloat16).bytes_per_position
        lines[f"k = {k}"] = (size, {"color": ORANGE, "linestyle": (0, (5, 2))})
    axes.set(xscale="log", yscale="log", xlim=(1e5, 1.2e11), ylim=(3e6, 1e16))
    for name, (each, style) in lines.items():
        axes.plot(positions, [count * each for count in positions], linewidth=1.6, **style)
        axes.text(1.15e10, 1e10 * each, name, color=style["color"], fontsize=10, va="center")
    axes.set_xticks([10.0**power for power in range(5, 11)], ["100k", "1M", "10M", "100M", "1G", "10G"])
    axes.set_yticks([1e9, 1e12, 1e15], ["1 GB", "1 TB", "1 PB"])
    axes.minorticks_off()
    finish(axes, "", "positions whose token is learnt")
    return svg_text(figure)


def students_table(text: str) -> str:
    """The students of the study as a table for a page, from the csv."""
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = ("rkl", "fkl", "agreement", "overconfidence", "entropy")
    names = ("reverse KL", "forward KL", "same top token", "overconfidence", "entropy")
    head = ["objective", "teacher known by", "bytes a position", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    keys = [("", "", "before"), *((objective, kind, "student") for objective in OBJECTIVES for kind in KINDS[::-1])]
    for objective, kind, model in keys:
        mine = {
            row["metric"]: row for row in rows
            if (row["objective"], row["teacher"], row["model"]) == (objective, kind, model)
        }  # fmt: skip
        known = {"": "", "hidden": "hidden states"}.get(kind, f"k = {kind}")
        size = mine["rkl"]["bytes_per_position"]
        cells = [objective or "warm-up", known, f"{float(size):,.0f}" if size else ""]
        cells += [f"{float(mine[column]['value']):.3f}" for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """The tables of docs/teacher-cache.md by their marks."""
    return {"sparse-students": students_table((ROOT / RESULTS / "table.csv").read_text(encoding="utf-8"))}


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=names(), default=names())
    chosen = parser.parse_args().only
    if not (WARMUP / "student").is_dir():
        drkl("distill", "quickstart", *WARM)
    for kind in dict.fromkeys(["hidden", *(name.split("-")[1] for name in chosen)]):
        make_cache(kind)
    for name in chosen:
        train(name)
    for name in chosen:
        if not (FOLDER / name / "eval.json").is_file():
            drkl("evaluate", str(FOLDER / name), f"teacher.model={TEACHER}", *EVALUATION)
    if chosen == names():
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(RESULTS / "table.csv", table())
        write_text(SIZES, draw_sizes())
        write_text(FIGURE, draw((RESULTS / "table.csv").read_text()))
        for name in names():
            shutil.copy(FOLDER / name / "eval.json", RESULTS / f"{name}.eval.json")
        for objective, kind in ((objective, kind) for objective in OBJECTIVES for kind in KINDS[:-1]):
            pair = f"{objective}-hidden", f"{objective}-{kind}"
            target = RESULTS / f"compare-{pair[0]}-{kind}.md"
            drkl("compare", *(str(FOLDER / name) for name in pair), "--format", "md", "--output", str(target))


if __name__ == "__main__":
    main()
