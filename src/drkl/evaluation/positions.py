"""Teacher-forced metrics: both models read the held-out responses. q = student, p = teacher; nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drkl.data.batching import bucket_by_length
from drkl.data.collate import IGNORE_INDEX, collate
from drkl.data.tokenize import Row
from drkl.evaluation import bootstrap
from drkl.evaluation.calibration import NUM_BINS as NUM_CALIBRATION_BINS
from drkl.evaluation.calibration import Bins, bin_of, mass_bins, weighted_sums, width_bins
from drkl.evaluation.declared import HEAD_MASS, OVERLAP, RANKS, TOKEN_KEYS
from drkl.losses import LMHead
from drkl.losses.common import check_vocabularies
from drkl.models import forward
from drkl.positions import comparison_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_BINS = 30
"""Of the histograms."""
PROFILE_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
AT_ONCE = 16
"""Positions whose statistics are taken together: what a processor's cache holds of them."""

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
_RENAMED = {"overlap": f"overlap_{OVERLAP}"}


@dataclass(frozen=True)
class RowSums:
    """What the metrics are made of, row by row: sums over a row's positions, and its positions in the bins.

    ``sums`` has `[rows]` by name; ``num_tokens`` is `[rows]`.
    """

    num_tokens: np.ndarray
    sums: Mapping[str, np.ndarray]
    width: Bins
    mass: Bins

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric but those without a teacher's columns, `[m]` by name, for each of ``weights`` `[m, rows]`.

        A row's weight says how often it counts. Means are over tokens; NaN over none.
        """
        assert weights.shape[-1] == len(self.num_tokens), "a weight for each row"
        names = list(self.sums)
        totals = weighted_sums(weights, np.stack([self.sums[name] for name in names], -1))
        count = weights @ self.num_tokens
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = dict(zip(names, totals.T, strict=True))
            ranked = sums.pop("ranked", None)
            correlation = sums.pop("rank_correlation", None)
            means = {_RENAMED.get(name, name): total / count for name, total in sums.items()}
            if ranked is not None and correlation is not None:
                means["rank_correlation"] = np.where(ranked > 0, correlation / ranked, np.nan)
            if "teacher_entropy" in means:
                means["entropy_gap"] = means["entropy"] - means.pop("teacher_entropy")
                means["confidence_gap"] = means["confidence"] - means.pop("teacher_confidence")
        means["calibration_gap"] = means["confidence"] - means["accuracy"]
        means |= {"ece": self.width.ece(weights), "mce": self.width.mce(weights), "ece_mass": self.mass.ece(weights)}
        means["num_tokens"] = count
        return {key: means[key] for key in TOKEN_KEYS if key in means}

    def intervals(self, seed: int) -> dict[str, list[float]]:
        """95 % bootstrap intervals over rows by name, of those that have one; the number of tokens is no estimate."""
        found = bootstrap.intervals(self.metrics, len(self.num_tokens), seed)
        return {name: ends for name, ends in found.items() if name != "num_tokens"}

    def line(self, row: int, row_id: str) -> dict[str, Any]:
        """A row as json: its sums, an infinite one as text, and the bins it fills: [bin, n, confidence, accuracy]."""
        sums = {name: float(values[row]) for name, values in self.sums.items()}
        return {
            "row_id": row_id,
            "num_tokens": int(self.num_tokens[row]),
            "sums": {name: value if math.isfinite(value) else str(value) for name, value in sums.items()},
            "bins": {"width": _filled(self.width, row), "mass": _filled(self.mass, row)},
        }

    @classmethod
    def of_lines(cls, lines: Sequence[Mapping[str, Any]]) -> RowSums:
        """The sums that ``line`` wrote, in the order of the lines."""
        names = list(lines[0]["sums"]) if lines else [*_OWN]
        sums = {name: np.array([float(line["sums"][name]) for line in lines]) for name in names}
        num_tokens = np.array([float(line["num_tokens"]) for line in lines])
        return cls(
            num_tokens, sums, *(_read_bins([line["bins"][kind] for line in lines]) for kind in ("width", "mass"))
        )


class PositionTable:
    """What every held-out response position says about two models, kept as a few dozen numbers each.

    Nothing of the size of a vocabulary is kept. Positions may come, and tables may be merged, in any order.

    Args:
        gamma: DRKL's weight of the tail, for the share of positions where it strengthens the tail.
    """

    def __init__(self, gamma: float = 0.5) -> None:
        self.gamma = gamma
        self._parts: list[dict[str, np.ndarray]] = []
        self._in_order = False

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
        found = self.metrics(np.ones((1, self.num_rows)))
        values = {name: float(value[0]) for name, value in found.items()}
        table = {key: None if math.isnan(values.get(key, math.nan)) else values[key] for key in TOKEN_KEYS}
        return {**table, "num_tokens": self.num_tokens}

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric that there is, `[m]` by name, for each of ``weights`` `[m, rows]`: how often a row counts.

        The bins of equal mass are those of the whole table, however the rows are weighted.
        """
        return self.row_sums(weights.shape[-1]).metrics(weights)

    def intervals(self, seed: int) -> dict[str, list[float]]:
        """95 % bootstrap intervals over the rows, by name, of the metrics that have one."""
        return self.row_sums(self.num_rows).intervals(seed) if self.num_tokens else {}

    def reliability(self, bins: str = "width") -> dict[str, list[Any]]:
        """Per bin of confidence: ``tokens``, their mean ``confidence`` and ``accuracy`` (None in an empty bin).

        ``bins`` is ``width`` or ``mass``.
        """
        sums = self.row_sums(self.num_rows)
        return {"width": sums.width, "mass": sums.mass}[bins].reliability("tokens")

    def distributions(self, vocab_size: int) -> dict[str, list[int]]:
        """How many positions are in each bin of ``bin_edges``: of entropy and confidence and, with a teacher, q_t."""
        found, edges = self._columns, bin_edges(vocab_size)
        names = {"entropy": "entropy", "confidence": "confidence", "target": "q_t"}
        return {
            name: np.bincount(bin_of(found[column], edges[name]), minlength=NUM_BINS).tolist()
            for name, column in names.items()
            if column in found
        }

    def tail_profile(self) -> list[float | None]:
        """Mean q of the tokens at the teacher's ``PROFILE_RANKS``; None past the vocabulary and without a teacher."""
        found = self._columns
        if not self.num_tokens or _PROFILE[0] not in found:
            return [None] * len(_PROFILE)
        means = [float(found[name].mean()) for name in _PROFILE]
        return [None if math.isnan(value) else value for value in means]

    def rows(self, row_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The lines of ``heldout.jsonl``, one for each of ``row_ids``, which name the rows from 0 on."""
        sums = self.row_sums(len(row_ids))
        return [sums.line(number, row_id) for number, row_id in enumerate(row_ids)]

    @staticmethod
    def from_rows(lines: Sequence[Mapping[str, Any]]) -> RowSums:
        """Of the lines that ``rows`` gave, what has the same ``metrics``; row i is the i-th line."""
        return RowSums.of_lines(lines)

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
        """How many positions there are."""
        return sum(len(part["row"]) for part in self._parts)

    @property
    def num_rows(self) -> int:
        """One more than the highest row."""
        return 1 + max((int(part["row"].max()) for part in self._parts), default=-1)

    def row_sums(self, num_rows: int) -> RowSums:
        """The sums by row, of as many rows (at least ``num_rows`` of the table)."""
        assert num_rows >= self.num_rows, "a position's row is beyond the rows"
        found = self._columns
        row, confidence, accuracy = found["row"], found["confidence"], found["accuracy"]

        def by_row(values: np.ndarray) -> np.ndarray:
            return np.bincount(row, values, num_rows).astype(np.float64)

        sums = {name: by_row(found[name]) for name in _SUMMED if name in found}
        if "rank_correlation" in found:
            ranked = ~np.isnan(found["rank_correlation"])
            sums["rank_correlation"] = by_row(np.where(ranked, found["rank_correlation"], 0.0))
            sums["ranked"] = by_row(ranked.astype(np.float64))
            sums["stronger_tail_share"] = by_row((found["rest"] < self.gamma).astype(np.float64))
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
            whole = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
            # By every column, so that neither sums nor the bins of equals depend on who came first.
            order = np.lexsort([whole[name] for name in reversed(names)])
            self._parts, self._in_order = [{name: values[order] for name, values in whole.items()}], True
        return self._parts[0]

    def _add(self, part: dict[str, np.ndarray]) -> None:
        assert not self._parts or part.keys() == self._parts[0].keys(), "a teacher for all or none"
        self._parts.append(part)
        self._in_order = False


def bin_edges(vocab_size: int) -> dict[str, list[float]]:
    """The edges of the histograms, of equal width: entropy from 0 to log(vocab), the probabilities from 0 to 1."""
    tops = {"entropy": math.log(vocab_size), "confidence": 1.0, "target": 1.0}
    return {name: [top * i / NUM_BINS for i in range(NUM_BINS + 1)] for name, top in tops.items()}


@dataclass(frozen=True)
class HeldOutStates:
    """What a model makes of the held-out responses: enough to get every logit, without the model's body.

    ``hidden`` is `[n, hidden]` at the positions that predict a response token, ``labels`` `[n]` are those tokens and
    ``row_index`` `[n]` says which of the rows each belongs to, from 0.
    """

    hidden: Tensor
    labels: Tensor
    row_index: Tensor
    head: LMHead

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors by name, on the CPU, the head included: what safetensors saves."""
        head = self.head
        found = {"hidden": self.hidden, "labels": self.labels, "row_index": self.row_index, "head.weight": head.weight}
        if head.bias is not None:
            found["head.bias"] = head.bias
        if head.softcap is not None:
            found["head.softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
        found["head.scale"] = torch.tensor(head.scale, dtype=torch.float64)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], head: LMHead | None = None) -> HeldOutStates:
        """The states that ``to_tensors`` gave; with a ``head``, the names that start with ``head.`` may be missing."""
        if head is None:
            cap = tensors.get("head.softcap")
            head = LMHead(
                tensors["head.weight"],
                tensors.get("head.bias"),
                float(tensors["head.scale"]),
                None if cap is None else float(cap),
            )
        return cls(tensors["hidden"], tensors["labels"], tensors["row_index"], head)


@torch.no_grad()
def held_out_states(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_id: int,
    tokens_per_batch: int = 2048,
    vocab_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeldOutStates:
    """Run a model over the rows once and keep the hidden states of the response positions, in the order of the rows.

    Args:
        model: on its device, in eval mode.
        rows: at least one.
        pad_id: fills batches; its value changes nothing.
        tokens_per_batch: rows of like length go together, up to this many tokens with padding.
        vocab_size: keep the head of the first so many ids only, those that the compared models share.
        progress: called after each batch with the number of rows in it.
    """
    assert rows, "at least one held-out row"
    assert not model.training, "dropout would make every number a random one"
    kept: list[Tensor | None] = [None] * len(rows)
    start, head = forward.decoder_start(model), forward.lm_head(model)
    for group in bucket_by_length([row.length for row in rows], tokens_per_batch):
        batch = collate([rows[i] for i in group], pad_id=pad_id, decoder_start=start)
        inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        hidden = forward.hidden_states(model, inputs)
        for position, index in enumerate(group):
            keep = inputs["labels"][position] != IGNORE_INDEX
            # To the cpu: the states wait there while other models take the device.
            kept[index] = hidden[position][keep].cpu()
        if progress is not None:
            progress(len(group))
    labels = torch.tensor([token for row in rows for token in row.trained_ids])
    row_index = torch.repeat_interleave(torch.tensor([len(row.trained_ids) for row in rows]))
    head = head if vocab_size is None else head.trimmed(vocab_size)
    return HeldOutStates(torch.cat([states for states in kept if states is not None]), labels, row_index, head)


@torch.no_grad()
def compare(
    student: HeldOutStates,
    teacher: HeldOutStates | None,
    *,
    chunk_tokens: int = 256,
    progress: Callable[[int], None] | None = None,
    gamma: float = 0.5,
) -> PositionTable:
    """Compare two models at every position, ``chunk_tokens`` rows of logits at a time.

    ``compare(teacher, teacher)`` is how the teacher gets its own column: its distances are exactly 0.

    Raises:
        DrklError: the vocabularies differ.
    """
    if teacher is not None:
        check_vocabularies(student.head.vocab_size, teacher.head.vocab_size)
        assert torch.equal(student.labels, teacher.labels), "both models read the same rows"
    table = PositionTable(gamma)
    for start in range(0, len(student.labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        student_logits = _logits(student, part)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = student_logits if teacher is student else _logits(teacher, part).to(student_logits.device)
        labels = student.labels[part].to(student_logits.device)
        table.update(student_logits, teacher_logits, labels, student.row_index[part])
        if progress is not None:
            progress(len(labels))
    return table


def _logits(states: HeldOutStates, part: slice) -> Tensor:
    return states.head.logits(states.hidden[part].to(states.head.weight.device))


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
    found = {**values.tokens._asdict(), **values._asdict()}
    names = _OWN if teacher_logits is None else (*_OWN, *_TOKENS, *_COMPARED)
    columns = {name: found[name].double().cpu().numpy() for name in names}
    if values.profile is not None:
        columns |= dict(zip(_PROFILE, values.profile.double().cpu().numpy().T, strict=True))
    return columns


def _filled(bins: Bins, row: int) -> list[list[Any]]:
    return [
        [
            int(number),
            int(bins.counts[row, number]),
            float(bins.confidence[row, number]),
            float(bins.accuracy[row, number]),
        ]
        for number in np.flatnonzero(bins.counts[row])
    ]


def _read_bins(rows: Sequence[Sequence[Sequence[float]]]) -> Bins:
    table = np.zeros((3, len(rows), NUM_CALIBRATION_BINS))
    for row, filled in enumerate(rows):
        for number, *sums in filled:
            table[:, row, int(number)] = sums
    return Bins(*table)
