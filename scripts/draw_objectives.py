"""Draw the figures of docs/objectives from the objectives themselves: `python scripts/draw_objectives.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import drkl
from drkl.objectives import Objective
from drkl.reporting.plotting import GRID, INK, MUTED, PAPER, new_figure, plot_style, svg_text, tidy

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "objectives" / "figures"
# Okabe and Ito's palette, safe for the colour-blind; the line's dash tells the colours apart without colour.
COLORS = ["#0068a8", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#2b2a27"]
DASHES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (3, 1)), (0, (1, 2))]
TOKENS = 48


def gradient(objective: Objective, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """On the student's logits `[n, vocab]`, by autograd."""
    leaf = student_logits.clone().requires_grad_()
    values = objective(leaf.log_softmax(-1), teacher_logits.log_softmax(-1), None)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return grad


def plain_numbers(*axes: Any) -> None:
    """Write 0.001, not a formula, at the ticks of logarithmic axes."""
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def comparing() -> dict[str, Objective]:
    """Every registered objective that compares with a teacher, at its defaults."""
    objectives = {name: drkl.make_objective(name) for name in drkl.OBJECTIVES}
    return {name: objective for name, objective in objectives.items() if objective.needs_teacher}


def two_hills() -> Tensor:
    """A teacher `[1, TOKENS]` with a narrow and a wide hill of tokens, as log-probabilities."""
    place = torch.arange(TOKENS, dtype=torch.float64)
    narrow = 0.55 * torch.exp(-0.5 * ((place - 12) / 2.0) ** 2) / 2.0
    wide = 0.45 * torch.exp(-0.5 * ((place - 33) / 4.0) ** 2) / 4.0
    return (narrow + wide + 1e-5).log().log_softmax(-1).unsqueeze(0)


def fitted(objective: Objective, teacher: Tensor, steps: int = 4000) -> Tensor:
    """The single hill `[TOKENS]` that gradient descent reaches from a wide start; its centre and width are free."""
    place = torch.arange(TOKENS, dtype=torch.float64)
    centre = torch.tensor(22.0, dtype=torch.float64, requires_grad=True)
    log_width = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([centre, log_width], lr=0.02)
    for _ in range(steps):
        logits = -0.5 * ((place - centre) / log_width.exp()) ** 2
        value = objective(logits.log_softmax(-1).unsqueeze(0), teacher, None).sum()
        adam.zero_grad()
        value.backward()
        adam.step()
    return (-0.5 * ((place - centre) / log_width.exp()) ** 2).softmax(-1).detach()


def draw_fits() -> Any:
    """The part of two hills that a student with one hill fits, for each objective."""
    teacher = two_hills()
    objectives = comparing()
    columns = 4
    rows = -(-len(objectives) // columns)
    figure, axes = new_figure(820, 150 * rows, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(objectives) :]:
        ax.set_visible(False)
    for ax, (name, objective) in zip(axes.flat, objectives.items(), strict=False):
        tidy(ax, size=9)
        ax.fill_between(range(TOKENS), teacher.exp()[0], color=GRID, step="mid", label="teacher")
        ax.plot(fitted(objective, teacher), color=COLORS[0], linewidth=1.8, label="student")
        ax.set_title(name, color=INK, fontsize=11, loc="left", pad=3)
        ax.set_xticks([])
        ax.set_ylim(0, 0.13)
        ax.set_yticks([0, 0.1])
    axes[0, 0].legend(frameon=False, fontsize=9, labelcolor=MUTED, loc="upper right")
    return figure


def draw_forces() -> Any:
    """The gradient on one token's logit, against what the student gives it, where the teacher gives it 1 %."""
    probability = torch.logspace(-6, -0.002, 400, dtype=torch.float64)
    logits = torch.stack((probability.log(), (1 - probability).log()), -1)
    teacher = torch.tensor([[0.01, 0.99]], dtype=torch.float64).log().expand_as(logits)
    figure, ax = new_figure(560, 330)
    tidy(ax)
    names = ["fkl", "rkl", "gjs", "sfkl", "srkl", "tvd", "ab"]
    for name, color, dash in zip(names, COLORS, DASHES, strict=True):
        force = -gradient(drkl.make_objective(name), logits, teacher)[:, 0]
        ax.plot(probability, force, color=color, linestyle=dash, linewidth=1.8, label=name)
    ax.axvline(0.01, color=MUTED, linewidth=0.8)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1e-3, linscale=0.6)
    plain_numbers(ax.xaxis, ax.yaxis)
    ax.set_xlabel("student's probability of the token (teacher's: 0.01)")
    ax.set_ylabel("force on its logit, up is positive", color=MUTED)
    ax.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left")
    return figure


def matched_target(count: int = 60, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits whose target has the same probability in both, and tails that differ."""
    generator = torch.Generator().manual_seed(3)
    tails = 1.5 * torch.randn(2, vocab - 1, generator=generator, dtype=torch.float64)
    log_tails = tails.log_softmax(-1)
    inside = torch.linspace(0.35, 0.999, count, dtype=torch.float64)
    rows = [
        torch.cat((inside.log().unsqueeze(-1), (1 - inside).log().unsqueeze(-1) + log_tail), -1)
        for log_tail in log_tails
    ]
    return inside, rows[0], rows[1]


def draw_push() -> Any:
    """The force on a target that already matches, against its probability."""
    inside, student, teacher = matched_target()
    figure, ax = new_figure(560, 330)
    tidy(ax)
    names = ["rkl", "srkl", "gjs", "ab", "fkl", "dkd", "drkl"]
    for name, color, dash in zip(names, COLORS, DASHES, strict=True):
        force = -gradient(drkl.make_objective(name), student, teacher)[:, 0]
        ax.plot(inside, force, color=color, linestyle=dash, linewidth=1.8, label=name)
    ax.set_xlabel("q_t = p_t, the target's probability in both models")
    ax.set_ylabel("force on the target's logit", color=MUTED)
    ax.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


def draw_tail() -> Any:
    """The force on the tail as a multiple of reverse KL's, against the target's probability."""
    inside, student, teacher = matched_target()
    reverse = gradient(drkl.make_objective("rkl"), student, teacher)
    target_part = student.softmax(-1) * reverse[:, :1] / (1 - inside).unsqueeze(-1)
    tail = (reverse + target_part)[:, 1:].norm(dim=-1)  # the tail without its share of the target's gradient
    figure, ax = new_figure(560, 330)
    tidy(ax)
    forms: list[tuple[str, dict[str, Any]]] = [
        ("gamma = 1", {"gamma": 1.0}),
        ("gamma = 0.5", {}),
        ("gamma = 0.1", {"gamma": 0.1}),
        ('weight = "student"', {"weight": "student"}),
        ('weight = "floor"', {"weight": "floor"}),
    ]
    for (label, params), color, dash in zip(forms, COLORS, DASHES, strict=False):
        force = gradient(drkl.make_objective("drkl", **params), student, teacher)[:, 1:].norm(dim=-1)
        ax.plot(inside, force / tail, color=color, linestyle=dash, linewidth=1.8, label=label)
    ax.set_yscale("log")
    plain_numbers(ax.yaxis)
    ax.set_xlabel("q_t = p_t, the target's probability in both models")
    ax.set_ylabel("force on the tail, times reverse KL's", color=MUTED)
    ax.legend(frameon=False, fontsize=10, labelcolor=INK)
    return figure


FIGURES = {"fits": draw_fits, "forces": draw_forces, "target-push": draw_push, "tail-weight": draw_tail}


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--only", choices=list(FIGURES), nargs="*", default=list(FIGURES))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        with plot_style(text_as_paths=True):
            figure = FIGURES[name]()
            figure.patch.set(facecolor=PAPER, alpha=1.0)
            (arguments.output / f"{name}.svg").write_text(svg_text(figure), encoding="utf-8")
        print(arguments.output / f"{name}.svg")


if __name__ == "__main__":
    main()
