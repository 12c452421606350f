"""Seeded logits, and the few lines that every test here would otherwise repeat."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drkl.objectives import Objective
from tests.objectives.cases import Case

VOCAB = 7


def logits(rows: int = 6, vocab: int = VOCAB, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (float64) and labels; from flat to peaked rows, no ties."""
    generator = np.random.default_rng(seed)
    spread = scale * np.linspace(0.2, 3.0, rows)[:, None]
    student = torch.from_numpy(generator.normal(size=(rows, vocab)) * spread)
    teacher = torch.from_numpy(generator.normal(size=(rows, vocab)) * spread)
    return student, teacher, torch.from_numpy(generator.integers(0, vocab, rows))


def value(objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return objective(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), labels)


def value_and_grad(objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd, through the log-softmax."""
    leaf = student.clone().requires_grad_()
    values = value(objective, leaf, teacher, labels)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad


def closed_form(objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    grad = student.clone()
    values = objective.value_and_grad_(grad, teacher.clone(), labels)
    return values, grad


def by_hand(case: Case, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> np.ndarray:
    """The reference at each position."""
    rows = zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    return np.array([float(case.expected(z, y, label, temperature)) for z, y, label in rows])


DETACHED = [
    ("drkl.objectives.decoupled", "tail_weight"),
    ("drkl.objectives.adaptive", "head_share"),
    ("drkl.objectives.adaptive", "token_weights"),
]
"""Every function whose result is a weight without a gradient."""


def hold_weights(monkeypatch: Any, objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Fix the detached weights at what they are for these inputs, so that differences can check the gradient."""
    for module_name, name in DETACHED:
        module = importlib.import_module(module_name)  # for a name that the package has too, as a function
        held: list[Tensor] = []
        original: Callable[..., Tensor] = getattr(module, name)

        def record(*args: Any, original: Callable[..., Tensor] = original, held: list[Tensor] = held) -> Tensor:
            held.append(original(*args))
            return held[-1]

        with monkeypatch.context() as patch:
            patch.setattr(module, name, record)
            value(objective, student, teacher, labels)
        if held:
            again = itertools.cycle(held)  # one evaluation calls it as often, in the same order
            monkeypatch.setattr(module, name, lambda *args, again=again: next(again))


def confident(log_odds: float, vocab: int = 6, seed: int = 3) -> np.ndarray:
    """Logits whose class 0 has these log-odds against the rest, exactly up to float64."""
    rest = np.random.default_rng(seed).normal(size=vocab - 1) * 2
    highest = rest.max()
    log_rest = highest + math.log(np.exp(rest - highest).sum())
    return np.concatenate([[log_odds + log_rest], rest])
