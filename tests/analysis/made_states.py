"""Made-up logits of a student and a teacher with known properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from drkl.analysis.analyze import named_objectives
from drkl.analysis.result import Analysis
from drkl.analysis.states import Observed, observe
from drkl.analysis.tables import make_tables
from drkl.evaluation.findings import of_analysis
from drkl.models.readout import Readout

ROWS, PER_ROW, VOCAB = 40, 8, 24
NAMES = ("rkl", "fkl", "drkl", "ce", "srkl", "drkl@student")


def readings(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> tuple[Readout, Readout]:
    rows = torch.arange(len(labels)) // PER_ROW
    both = [torch.from_numpy(logits).double() for logits in (student, teacher)]
    return tuple(Readout(logits, torch.from_numpy(labels), rows, head=None) for logits in both)  # type: ignore[return-value]


def teacher_logits(spread: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Logits `[n, vocab]` and labels drawn from them: a teacher that is calibrated."""
    generator = np.random.default_rng(5)
    logits = spread * generator.normal(size=(ROWS * PER_ROW, VOCAB))
    draws = generator.random((len(logits), 1))
    labels = (softmax(logits, -1).cumsum(-1) < draws).sum(-1)
    return logits, labels, generator


def with_other_tails(teacher: np.ndarray, generator: np.random.Generator, spread: float = 1.5) -> np.ndarray:
    """The same probability of the top token, the rest shared out otherwise."""
    student = teacher + spread * generator.normal(size=teacher.shape)
    rows, top = np.arange(len(teacher)), teacher.argmax(-1)
    rest = [logits.copy() for logits in (student, teacher)]
    for logits in rest:
        logits[rows, top] = -np.inf
    shift = np.logaddexp.reduce(rest[1], -1) - np.logaddexp.reduce(rest[0], -1)
    student += shift[:, None]
    student[rows, top] = teacher[rows, top]
    return student


def analysed(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, *, gamma: float = 0.5, seed: int = 1, **choices: Any
) -> tuple[Observed, Analysis]:
    """The observations, and the analysis that is made of them."""
    observed = observe(*readings(student, teacher, labels), named_objectives(NAMES), **choices)
    tables = make_tables(observed, gamma=gamma, seed=seed)
    return observed, Analysis(tables, of_analysis(tables))
