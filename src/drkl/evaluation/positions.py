"""Teacher-forced metrics: both models read the held-out responses. q = student, p = teacher; nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drkl.evaluation.bootstrap import Interval, Resampled
from drkl.evaluation.calibration import Bins, bin_of, mass_bins, width_bins
from drkl.evaluation.declared import HEAD_MASS, OVERLAP, RANKS, TOKEN_KEYS
from drkl.evaluation.row_sums import RowSums
from drkl.losses.common import check_vocabularies
from drkl.models.readout import CHUNK, Readout, read_logits
from drkl.objectives.decoupled import GAMMA
from drkl.positions import comparison_statistics

NUM_BINS = 30
"""Number of bins of the histograms."""
PROFILE_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
AT_ONCE = 16
"""Positions whose statistics are taken together: as many as fit into a processor's cache."""

_OWN = ("nll", "accuracy", "entropy", "confidence", "brier")
_TOKENS = ("fkl", "rkl", "tvd", "agreement", "overconfidence", "target_gap", "teacher_entropy", "teacher_confidence")
_COMPARED = (
    "js", "tail_rkl", "tail_fkl", "target_log_odds_gap", "q_t", "p_t", "rest", "tail_mass", "overlap",
    "rank_correlation",
)  # fmt: skip
_PROFILE = tuple(f"profile_{rank}" for rank in PROFILE_RANKS)
_SUMMED = tuple(
    name for name in (*_OWN, *_TOKENS, *_COMPARED) if name not in ("q_t", "p_t", "rest", "rank_correlation")
)


class PositionTable:
    """Two models at every held-out response position, kept as a few dozen numbers for each.

    Nothing of the size of a vocabulary is kept. Positions may be added, and tables merged, in any order.

    Args:
        gamma: DRKL's weight of the tail, for the share of positions where it strengthens the tail.
    """

    def __init__(self, gamma: float = GAMMA) -> None:
        self.gamma = gamma
        self._parts: list[dict[str, np.ndarray]] = []
        self._in_order = False
        self._row_sums: RowSums | None = None

    def update(self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, rows: Tensor) -> None:
        """Add positions.

        Args:
            student_logits: `[n, vocab]`.
            teacher_logits: `[n, vocab]`, or None throughout.
            labels: `[n]`, the observed tokens; every one counts.
            rows: `[n]`, which held-out row each position is of, from 0.

        Raises:
            DrklError: the vocabularies differ.
        """
        if teacher_logits is not None:
            check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
        for start in range(0, len(labels), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            columns = _values(
                student_logits[part], None if teacher_logits is None else teacher_logits[part], labels[part]
            )
            self._add({"row": rows[part].cpu().numpy().astype(np.int64), **columns})

    def merge(self, other: PositionTable) -> None:
        """Add the positions of another table."""
        assert self.gamma == other.gamma, "one gamma"
        for part in list(other._parts):
            self._add(part)

    def compute(self) -> dict[str, float | None]:
        """Every metric by its key (``TOKEN_KEYS``): infinite where it is, None without a teacher or over nothing."""
        if not self.num_tokens:
            return {**dict.fromkeys(TOKEN_KEYS), "num_tokens": 0}
        metrics = self.metrics(np.ones((1, self.num_rows)))
        values = {name: float(value[0]) for name, value in metrics.items()}
        table = {key: None if math.isnan(values.get(key, math.nan)) else values[key] for key in TOKEN_KEYS}
        return {**table, "num_tokens": self.num_tokens}

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric that there is, `[m]` by name, for each of ``weights`` `[m, rows]`: how often a row counts.

        The bins of equal mass are those of the whole table, however the rows are weighted.
        """
        return self.row_sums(weights.shape[-1]).metrics(weights)

    def intervals(self, seed: int) -> dict[str, Interval]:
        """95 % bootstrap intervals over the rows, by name, of the metrics that have one."""
        intervals = Resampled.of(self.metrics, self.num_rows, seed).intervals()
        return {key: ends for key, ends in intervals.items() if key != "num_tokens"}

    def distributions(self, vocab_size: int) -> dict[str, list[int]]:
        """Count the positions in each bin of ``bin_edges``: by entropy, by confidence and, with a teacher, by q_t."""
        columns, edges = self._columns, bin_edges(vocab_size)
        names = {"entropy": "entropy", "confidence": "confidence", "target": "q_t"}
        return {
            name: np.bincount(bin_of(columns[column], edges[name]), minlength=NUM_BINS).tolist()
            for name, column in names.items()
            if column in columns
        }

    def tail_profile(self) -> list[float | None]:
        """Mean q of the tokens at the teacher's ``PROFILE_RANKS``; None past the vocabulary and without a teacher."""
        columns = self._columns
        if not self.num_tokens or _PROFILE[0] not in columns:
            return [None] * len(_PROFILE)
        means = [float(columns[name].mean()) for name in _PROFILE]
        return [None if math.isnan(value) else value for value in means]

    def rows(self, row_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The lines of ``heldout.jsonl``, one for each of ``row_ids``, which name the rows from 0 on."""
        return self.row_sums(len(row_ids)).lines(row_ids)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole table as arrays by name, for a file of safetensors."""
        return {**self._columns, "gamma": np.array([self.gamma])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PositionTable:
        """The table that ``to_arrays`` gave."""
        table = cls(float(arrays["gamma"][0]))
        if len(arrays["row"]):
            table._add({name: values for name, values in arrays.items() if name != "gamma"})
        return table

    @property
    def num_tokens(self) -> int:
        """The number of positions."""
        return sum(len(part["row"]) for part in self._parts)

    @property
    def num_rows(self) -> int:
        """One more than the highest row."""
        return 1 + max((int(part["row"].max()) for part in self._parts), default=-1)

    def row_sums(self, num_rows: int) -> RowSums:
        """The sums by row, of as many rows (at least ``num_rows`` of the table)."""
        assert num_rows >= self.num_rows, "a position's row is beyond the rows"
        if self._row_sums is None or len(self._row_sums) != num_rows:
            self._row_sums = self._sum_rows(num_rows)
        return self._row_sums

    def _sum_rows(self, num_rows: int) -> RowSums:
        columns = self._columns
        row, confidence, accuracy = columns["row"], columns["confidence"], columns["accuracy"]

        def by_row(values: np.ndarray) -> np.ndarray:
            return np.bincount(row, values, num_rows).astype(np.float64)

        sums = {name: by_row(columns[name]) for name in _SUMMED if name in columns}
        if "rank_correlation" in columns:
            ranked = ~np.isnan(columns["rank_correlation"])
            sums["rank_correlation"] = by_row(np.where(ranked, columns["rank_correlation"], 0.0))
            sums["ranked"] = by_row(ranked.astype(np.float64))
            sums["stronger_tail_share"] = by_row((columns["rest"] < self.gamma).astype(np.float64))
        width, mass = (
            Bins.of(bins(confidence), confidence, accuracy, row, num_rows) for bins in (width_bins, mass_bins)
        )
        return RowSums(by_row(np.ones(len(row))), sums, width, mass)

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        if not self._parts:
            return {"row": np.empty(0, np.int64), **{name: np.empty(0) for name in _OWN}}
        if not self._in_order:
            names = sorted(self._parts[0])  # a file may have them in another order
            columns = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
            # By every column, so that neither sums nor the bins of equals depend on who came first.
            order = np.lexsort([columns[name] for name in reversed(names)])
            self._parts, self._in_order = [{name: values[order] for name, values in columns.items()}], True
        return self._parts[0]

    def _add(self, part: dict[str, np.ndarray]) -> None:
        assert not self._parts or part.keys() == self._parts[0].keys(), "a teacher for all or none"
        self._parts.append(part)
        self._in_order, self._row_sums = False, None


def bin_edges(vocab_size: int) -> dict[str, list[float]]:
    """The edges of the histograms, of equal width: entropy from 0 to log(vocab), the probabilities from 0 to 1."""
    tops = {"entropy": math.log(vocab_size), "confidence": 1.0, "target": 1.0}
    return {name: [top * i / NUM_BINS for i in range(NUM_BINS + 1)] for name, top in tops.items()}


def compare(
    student: Readout,
    teacher: Readout | None,
    *,
    chunk_tokens: int = CHUNK,
    progress: Callable[[int], None] | None = None,
    gamma: float = GAMMA,
    temperatures: np.ndarray | None = None,
) -> PositionTable:
    """Compare two models at every position, ``chunk_tokens`` rows of logits at a time.

    ``compare(teacher, teacher)`` gives the teacher its own column: its distances are exactly 0. ``temperatures``
    `[rows]` divide the student's logits at the positions of each row; 1 changes nothing, to the last bit.

    Raises:
        DrklError: the vocabularies differ.
    """
    if teacher is not None:
        check_vocabularies(student.num_outputs, teacher.num_outputs)
    table = PositionTable(gamma)
    for part, logits, teacher_logits, labels in read_logits(student, teacher, chunk_tokens):
        rows = student.row_index[part]
        if temperatures is not None:
            logits = logits / torch.from_numpy(temperatures)[rows, None].to(logits)
        table.update(logits, teacher_logits, labels, rows)
        if progress is not None:
            progress(len(labels))
    return table


def _values(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> dict[str, np.ndarray]:
    values = comparison_statistics(
        student_logits,
        teacher_logits,
        labels,
        head_mass=HEAD_MASS,
        overlap=OVERLAP,
        ranks=RANKS,
        profile_ranks=PROFILE_RANKS,
    )
    statistics = {**values.tokens._asdict(), **values._asdict()}
    names = _OWN if teacher_logits is None else (*_OWN, *_TOKENS, *_COMPARED)
    columns = {name: statistics[name].double().cpu().numpy() for name in names}
    if values.profile is not None:
        columns |= dict(zip(_PROFILE, values.profile.double().cpu().numpy().T, strict=True))
    return columns
