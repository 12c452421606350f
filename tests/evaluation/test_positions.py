"""The table of held-out positions, against numpy, scipy and torchmetrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, logsumexp, rel_entr
from scipy.stats import entropy as scipy_entropy
from scipy.stats import spearmanr
from torchmetrics.functional.classification import multiclass_calibration_error

from drkl.errors import DrklError
from drkl.evaluation.declared import TOKEN_KEYS
from drkl.evaluation.positions import (
    NUM_BINS,
    PROFILE_RANKS,
    PositionTable,
    bin_edges,
    compare,
)
from drkl.evaluation.row_sums import RowSums
from drkl.losses import LMHead
from drkl.models.readout import Readout, read
from tests.evaluation import tiny
from tests.rounding import rounding

OWN = ("nll", "accuracy", "entropy", "confidence", "ece", "ece_mass", "mce", "brier", "calibration_gap", "num_tokens")
ROWS = 8


def logits(seed: int, count: int = 37, vocab: int = 11, width: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(100 + seed).normal(scale=width, size=(count, vocab))).float()


def observed(count: int = 37, vocab: int = 11) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(vocab, size=count))


def rows_of(count: int = 37) -> torch.Tensor:
    """Rows of different lengths; the last two stay empty."""
    return torch.from_numpy(np.sort(np.random.default_rng(4).integers(ROWS - 2, size=count)))


def calibration(confidence: np.ndarray, right: np.ndarray, members: list[np.ndarray]) -> tuple[float, float]:
    gaps = [abs(confidence[m].mean() - right[m].mean()) for m in members if len(m)]
    sizes = [len(m) for m in members if len(m)]
    return float(np.dot(gaps, sizes) / len(confidence)), max(gaps)


def reference(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, gamma: float = 0.5
) -> dict[str, float]:
    """Every metric from its equation, in float64."""
    z, y, labels = student.double().numpy(), teacher.double().numpy(), labels.numpy()  # type: ignore[assignment]
    q, p = (np.exp(log_softmax(x, -1)) for x in (z, y))
    at = np.arange(len(q))
    top_q, top_p = q.argmax(-1), p.argmax(-1)
    confidence, right = q.max(-1), (top_q == np.asarray(labels)).astype(float)
    width = [
        np.flatnonzero((low <= confidence * 15) & ((confidence * 15 < low + 1) | (low == 14))) for low in range(15)
    ]
    ece, mce = calibration(confidence, right, width)
    k_reverse, k_forward, gaps, outside, shared, correlations = [], [], [], [], [], []
    for i, t in enumerate(top_p):
        tail_q, tail_p = (np.delete(x[i], t) for x in (z, y))
        log_q, log_p = (log_softmax(x) for x in (tail_q, tail_p))
        k_reverse.append(rel_entr(np.exp(log_q), np.exp(log_p)).sum())
        k_forward.append(rel_entr(np.exp(log_p), np.exp(log_q)).sum())
        gaps.append((z[i, t] - logsumexp(tail_q)) - (y[i, t] - logsumexp(tail_p)))
        order = np.argsort(-y[i], kind="stable")
        mass = np.cumsum(p[i, order])
        assert np.abs(mass - 0.9).min() > 3e-6, "fp32 may not tell"
        outside.append(q[i, order[int(np.argmax(mass >= 0.9)) + 1 :]].sum())
        k = min(10, len(order))
        shared.append(len(set(order[:k]) & set(np.argsort(-z[i], kind="stable")[:k])) / k)
        if len(order) > 2:
            correlations.append(spearmanr(z[i, order[1:100]], y[i, order[1:100]]).statistic)
    return {
        "rkl": scipy_entropy(q, p, axis=-1).mean(),
        "fkl": scipy_entropy(p, q, axis=-1).mean(),
        "js": (jensenshannon(q, p, axis=-1) ** 2).mean(),
        "tvd": 0.5 * np.abs(p - q).sum(-1).mean(),
        "agreement": (top_q == top_p).mean(),
        "nll": -np.log(q[at, labels]).mean(),
        "accuracy": right.mean(),
        "entropy": scipy_entropy(q, axis=-1).mean(),
        "entropy_gap": scipy_entropy(q, axis=-1).mean() - scipy_entropy(p, axis=-1).mean(),
        "confidence": confidence.mean(),
        "confidence_gap": confidence.mean() - p.max(-1).mean(),
        "target_gap": (q[at, top_p] - p[at, top_p]).mean(),
        "overconfidence": (q[at, top_q] - p[at, top_q]).mean(),
        "target_log_odds_gap": float(np.mean(gaps)),
        "stronger_tail_share": (1 - q[at, top_p] < gamma).mean(),
        "ece": ece,
        "ece_mass": calibration(confidence, right, np.array_split(np.argsort(confidence, kind="stable"), 15))[0],
        "mce": mce,
        "brier": ((q - np.eye(q.shape[1])[labels]) ** 2).sum(-1).mean(),
        "calibration_gap": confidence.mean() - right.mean(),
        "tail_rkl": float(np.mean(k_reverse)),
        "tail_fkl": float(np.mean(k_forward)),
        "tail_mass": float(np.mean(outside)),
        "overlap_10": float(np.mean(shared)),
        "rank_correlation": float(np.mean(correlations)) if correlations else math.nan,
        "num_tokens": len(q),
    }


def tabulate(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    step: int = 100,
    rows: torch.Tensor | None = None,
    gamma: float = 0.5,
) -> PositionTable:
    out = PositionTable(gamma)
    rows = rows_of(len(labels)) if rows is None else rows
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        out.update(student[part], None if teacher is None else teacher[part], labels[part], rows[part])
    return out


@pytest.mark.parametrize("step", [1, 5, 37, 100])
@pytest.mark.parametrize("width", [0.1, 2.0, 30.0])
def test_metrics_are_those_of_their_equations(step: int, width: float) -> None:
    student, teacher, labels = logits(0, width=width), logits(1, width=width), observed()
    got = tabulate(student, teacher, labels, step, gamma=0.3).compute()
    assert tuple(got) == TOKEN_KEYS
    expected = reference(student, teacher, labels, gamma=0.3)
    assert got == {key: pytest.approx(value, rel=2e-5, abs=3e-7) for key, value in expected.items()}


def test_many_positions_of_a_vocabulary_beyond_every_rank() -> None:
    student, teacher, labels = logits(0, 90, 620, 3.0), logits(1, 90, 620, 3.0), observed(90, 620)
    labels[:40] = student[:40].argmax(-1)
    table = tabulate(student, teacher, labels)
    assert table.compute() == {
        key: pytest.approx(value, rel=2e-5, abs=3e-7) for key, value in reference(student, teacher, labels).items()
    }
    q = np.exp(log_softmax(student.double().numpy(), -1))
    order = np.argsort(-teacher.numpy(), axis=-1, kind="stable")
    expected = [np.take_along_axis(q, order, -1)[:, rank - 1].mean() for rank in PROFILE_RANKS]
    assert table.tail_profile() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("norm", ["l1", "max"])
@pytest.mark.parametrize("width", [1.0, 4.0])
def test_calibration_is_torchmetrics(norm: str, width: float) -> None:
    student, labels = logits(2, 400, 5, width), observed(400, 5)
    labels[:200] = student[:200].argmax(-1)
    probs = torch.softmax(student.double(), -1)
    assert not np.isclose(probs.amax(-1).numpy() * 15 % 1, 0, atol=1e-5).any(), "no value on an edge"
    expected = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm=norm)  # type: ignore[arg-type]
    got = tabulate(student, None, labels).compute()
    assert got["ece" if norm == "l1" else "mce"] == pytest.approx(float(expected), rel=1e-5)


def test_two_classes_have_a_tail_of_one_token() -> None:
    student, teacher, labels = logits(0, vocab=2), logits(1, vocab=2), observed(vocab=2)
    got, expected = tabulate(student, teacher, labels).compute(), reference(student, teacher, labels)
    expected.pop("rank_correlation")
    assert got.pop("rank_correlation") is None
    assert got == {key: pytest.approx(value, rel=2e-5, abs=3e-7) for key, value in expected.items()}
    assert got["tail_rkl"] == got["tail_fkl"] == 0 and got["overlap_10"] == 1
    assert tabulate(student, teacher, labels).tail_profile()[2:] == [None] * 8


def test_a_model_against_itself_is_exactly_no_distance() -> None:
    teacher = logits(1)
    got = tabulate(teacher, teacher, observed(), 5).compute()
    zero = ("fkl", "rkl", "tvd", "overconfidence", "confidence_gap", "entropy_gap", "target_gap", "tail_rkl",
            "tail_fkl", "target_log_odds_gap")  # fmt: skip
    # Differences of a number and itself; JS alone has a logarithm of 2 in it.
    assert {key: got[key] for key in zero} == dict.fromkeys(zero, 0.0)
    assert got["js"] == pytest.approx(0.0, abs=rounding(11, 1.0, torch.float32))
    assert got["agreement"] == got["overlap_10"] == got["rank_correlation"] == 1


def test_without_a_teacher_what_needs_one_is_none() -> None:
    student, labels = logits(0), observed()
    table = tabulate(student, None, labels, 5)
    got, expected = table.compute(), reference(student, student, labels)
    assert {key for key, value in got.items() if value is not None} == set(OWN)
    assert {key: got[key] for key in OWN} == {key: pytest.approx(expected[key], rel=2e-5) for key in OWN}
    assert table.metrics(np.ones((2, ROWS))).keys() == set(OWN) and table.intervals(0).keys() == {*OWN[:-1]}
    assert table.tail_profile() == [None] * 10 and table.distributions(11).keys() == {"entropy", "confidence"}


def test_no_positions_no_means() -> None:
    got = tabulate(logits(0, 0), logits(1, 0), observed(0), 5)
    assert got.compute() == {**dict.fromkeys(TOKEN_KEYS), "num_tokens": 0}
    assert got.distributions(11) == {"entropy": [0] * NUM_BINS, "confidence": [0] * NUM_BINS}
    assert got.intervals(0) == {} and got.rows([]) == [] and got.tail_profile() == [None] * 10
    assert (
        got.row_sums(0).width.reliability()[0] == [0] * 15
        and PositionTable.from_arrays(got.to_arrays()).num_tokens == 0
    )


def test_tokens_that_both_exclude_count_nothing() -> None:
    student, teacher, labels = logits(0, vocab=20), logits(1, vocab=20), observed(vocab=12)
    for x in (student, teacher):
        x[:, 12:] = -torch.inf
    got, alone = tabulate(student, teacher, labels, 5), tabulate(student[:, :12], teacher[:, :12], labels, 5)
    same, expected = got.compute(), reference(student[:, :12], teacher[:, :12], labels)
    for key in set(TOKEN_KEYS) - {"rank_correlation"}:  # the ranks go on among the excluded
        assert same[key] == pytest.approx(expected[key], rel=2e-5, abs=3e-7), key
    # q = exp(z - log sum exp z) <= 1: sums of 20 and of 12 terms, and a difference of logits, in fp32.
    bound = rounding(20 + 2 * int(student[:, :12].abs().max()), 1.0, torch.float32)
    assert got.tail_profile()[:5] == pytest.approx(alone.tail_profile()[:5], abs=bound)


def test_a_token_that_one_excludes_makes_one_direction_infinite_and_nothing_nan() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=10)
    teacher[:, 10] = -torch.inf
    got = tabulate(student, teacher, labels, 5).compute()
    assert got["rkl"] == got["tail_rkl"] == math.inf
    assert all(math.isfinite(value) for key, value in got.items() if "rkl" not in key and value is not None)
    got = tabulate(teacher, student, labels, 5).compute()
    assert got["fkl"] == math.inf and math.isfinite(got["rkl"] or 0)


def test_an_infinite_row_counts_only_where_it_is_drawn() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=10)
    teacher[rows_of() == 2, 10] = -torch.inf
    table = tabulate(student, teacher, labels)
    weights = np.ones((2, ROWS))
    weights[1, 2] = 0
    others = rows_of() != 2
    found = table.metrics(weights)
    expected = reference(student[others], teacher[others], labels[others])
    assert found["rkl"].tolist() == [math.inf, pytest.approx(expected["rkl"], rel=2e-5)]
    assert "rkl" not in table.intervals(0) and "fkl" in table.intervals(0)
    (line,) = [line for line in table.rows([f"r{i}" for i in range(ROWS)]) if line["row_id"] == "r2"]
    assert line["sums"]["rkl"] == "inf"
    again = RowSums.of_lines(table.rows([f"r{i}" for i in range(ROWS)])).metrics(weights)
    assert all(np.array_equal(again[key], found[key]) for key in found)


def test_probabilities_that_underflow_give_no_nan() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=10)
    student[:, 0] += 200
    teacher[:, 1] += 1e4
    got = tabulate(student, teacher, labels, 5).compute()
    assert all(value is not None and math.isfinite(value) for value in got.values())
    assert got["rkl"] == pytest.approx(1e4, rel=0.01)


def test_bf16_logits_are_widened_first() -> None:
    student, teacher, labels = logits(0).bfloat16(), logits(1).bfloat16(), observed()
    wide = tabulate(student.float(), teacher.float(), labels, 5)
    assert tabulate(student, teacher, labels, 5).compute() == wide.compute()


def test_a_weight_is_a_row_that_often() -> None:
    student, teacher, labels, rows = logits(0), logits(1), observed(), rows_of()
    table = tabulate(student, teacher, labels)
    weights = np.random.default_rng(1).multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=5).astype(float)
    found = table.metrics(weights)
    assert tuple(found) == TOKEN_KEYS
    for number, drawn in enumerate(weights.astype(int)):
        again = np.concatenate([np.tile(np.flatnonzero(rows == row), times) for row, times in enumerate(drawn)])
        expected = reference(student[again], teacher[again], labels[again])
        expected.pop("ece_mass")
        assert {key: found[key][number] for key in expected} == pytest.approx(expected, rel=2e-5, abs=3e-7)


def test_bins_of_equal_mass_are_those_of_the_whole_table() -> None:
    student, labels, rows = logits(0), observed(), rows_of()
    q = np.exp(log_softmax(student.double().numpy(), -1))
    confidence, right = q.max(-1), (q.argmax(-1) == labels.numpy()).astype(float)
    bins = np.empty(37, int)
    for number, members in enumerate(np.array_split(np.argsort(confidence), 15)):
        bins[members] = number
    weights = np.array([[0.0, 2, 1, 0, 3, 1, 1, 0]])
    each = weights[0][rows.numpy()]
    gaps = [abs((each * (bins == b)) @ (confidence - right)) for b in range(15)]
    assert tabulate(student, None, labels).metrics(weights)["ece_mass"] == pytest.approx(
        sum(gaps) / each.sum(), rel=1e-5
    )


def test_compute_is_every_row_once() -> None:
    table = tabulate(logits(0), logits(1), observed())
    found = table.metrics(np.ones((1, table.num_rows)))
    assert table.compute() == {key: value[0] for key, value in found.items()}


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 5), st.booleans(), st.data())
@pytest.mark.slow
def test_order_and_merging_change_nothing(seed: int, count: int, vocab: int, coarse: bool, data: st.DataObject) -> None:
    student, teacher, labels = logits(seed, count, vocab), logits(seed + 1, count, vocab), observed(count, vocab)
    if coarse:  # many equal confidences
        student, teacher = student.round().clamp(-1, 1), teacher.round().clamp(-1, 1)
    rows = torch.from_numpy(np.random.default_rng(seed).integers(4, size=count))
    # Position by position: a processor's vectors may round the last few of a chunk differently.
    expected = tabulate(student, teacher, labels, 1, rows)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    where = data.draw(st.integers(0, count))
    parts = [tabulate(*(x[part] for x in (student, teacher, labels)), step=1, rows=rows[part]) for part in
             (order[:where], order[where:])]  # fmt: skip
    merged = PositionTable()
    for part in reversed(parts):
        merged.merge(PositionTable.from_arrays(part.to_arrays()))
    assert merged.compute() == expected.compute()
    assert merged.row_sums(4).mass.reliability() == expected.row_sums(4).mass.reliability()
    names = [f"r{i}" for i in range(5)]
    assert merged.rows(names) == expected.rows(names)
    # Another numbering of the rows, and each of them twice.
    again = tabulate(student, teacher, labels, 1, 3 - rows).metrics(np.full((1, 4), 2.0))
    for key, value in expected.compute().items():
        factor = 2 if key == "num_tokens" else 1
        if value is not None and key != "ece_mass":
            assert again[key][0] == pytest.approx(factor * value, rel=1e-9, abs=1e-12), key


def test_lines_hold_what_the_metrics_need() -> None:
    table = tabulate(logits(0), logits(1), observed(), gamma=0.2)
    names = [f"id-{i}" for i in range(ROWS)]
    text = [json.dumps(line, allow_nan=False) for line in table.rows(names)]
    lines = [json.loads(line) for line in text]
    assert [line["row_id"] for line in lines] == names and lines[-1]["num_tokens"] == 0
    assert [line["num_tokens"] for line in lines] == np.bincount(rows_of(), minlength=ROWS).tolist()
    again = RowSums.of_lines(lines)
    weights = np.random.default_rng(2).integers(0, 3, (6, ROWS)).astype(float)
    found = table.metrics(weights)
    assert {key: value.tolist() for key, value in again.metrics(weights).items()} == {
        key: value.tolist() for key, value in found.items()
    }
    own = tabulate(logits(0), None, observed())
    assert RowSums.of_lines(own.rows(names)).metrics(weights).keys() == set(OWN)


def test_a_table_survives_a_file(tmp_path: Path) -> None:
    for teacher in (logits(1), None):
        table = tabulate(logits(0), teacher, observed(), gamma=0.25)
        save_file(table.to_arrays(), tmp_path / "t.safetensors")
        again = PositionTable.from_arrays(load_file(tmp_path / "t.safetensors"))
        assert again.compute() == table.compute() and again.gamma == 0.25
        assert again.intervals(3) == table.intervals(3) and again.tail_profile() == table.tail_profile()


def test_intervals_are_of_rows() -> None:
    # All positions of a row alike: their number must not narrow the interval. A mean of 200 rows with p = 1/2.
    right = np.random.default_rng(0).integers(2, size=200)
    labels = torch.from_numpy(np.repeat(1 - right, 20))
    student = torch.tensor([[1.0, 0.0]]).expand(4000, 2)
    table = tabulate(student, None, labels, rows=torch.arange(200).repeat_interleave(20))
    low, high = table.intervals(0)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.1)
    assert table.intervals(0) == table.intervals(0) != table.intervals(1)


def test_reliability() -> None:
    student, labels = logits(0, 400, width=3.0), observed(400)
    table = tabulate(student, None, labels)
    q = np.exp(log_softmax(student.double().numpy(), -1))
    confidence, right = q.max(-1), q.argmax(-1) == labels.numpy()
    sums = table.row_sums(table.num_rows)
    width, mass = (
        dict(zip(("tokens", "confidence", "accuracy"), bins.reliability(), strict=True))
        for bins in (sums.width, sums.mass)
    )
    assert width["tokens"] == np.histogram(confidence, np.arange(16) / 15)[0].tolist()
    assert mass["tokens"] == [len(part) for part in np.array_split(confidence, 15)]
    for number, members in enumerate(np.array_split(np.argsort(confidence), 15)):
        assert mass["confidence"][number] == pytest.approx(confidence[members].mean(), rel=1e-5)
        assert mass["accuracy"][number] == pytest.approx(right[members].mean(), rel=1e-9)
    assert width["tokens"][0] == 0 and width["confidence"][0] is None and width["accuracy"][0] is None


def test_histograms_are_numpys() -> None:
    student, teacher, labels = logits(0, 500, width=3.0), logits(1, 500, width=3.0), observed(500)
    got = tabulate(student, teacher, labels, 64).distributions(11)
    q = np.exp(log_softmax(student.double().numpy(), -1))
    edges = bin_edges(11)
    assert edges["entropy"][-1] == pytest.approx(math.log(11)) and edges["confidence"][-1] == edges["target"][-1] == 1
    assert got["entropy"] == np.histogram(scipy_entropy(q, axis=-1), edges["entropy"])[0].tolist()
    assert got["confidence"] == np.histogram(q.max(-1), edges["confidence"])[0].tolist()
    q_t = np.take_along_axis(q, teacher.numpy().argmax(-1)[:, None], -1)
    assert got["target"] == np.histogram(q_t, edges["target"])[0].tolist()


def test_the_ends_of_the_histograms_are_inside() -> None:
    flat, sure = torch.zeros(3, 7), torch.tensor([[1e4, *[0.0] * 6]])
    out = PositionTable()
    out.update(flat, None, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    out.update(sure, None, torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    assert out.distributions(7)["entropy"] == [1, *[0] * (NUM_BINS - 2), 3]
    assert out.distributions(7)["confidence"][-1] == 1


def test_vocabularies_that_differ_are_refused() -> None:
    with pytest.raises(DrklError, match="The teacher scores 12 tokens and the student 11"):
        PositionTable().update(logits(0), logits(1, vocab=12), observed(), rows_of())
    zeros = torch.zeros(2, dtype=torch.long)
    states = [Readout(torch.zeros(2, 3), zeros, zeros, LMHead(torch.zeros(v, 3))) for v in (5, 6)]
    with pytest.raises(DrklError, match="The teacher scores 6 tokens and the student 5"):
        compare(states[0], states[1])


def test_a_teacher_for_all_or_none() -> None:
    with pytest.raises(AssertionError, match="all or none"):
        tabulate(logits(0), None, observed()).merge(tabulate(logits(0), logits(1), observed()))
    with pytest.raises(AssertionError, match="gamma"):
        PositionTable(0.5).merge(PositionTable(0.2))


def test_models_are_compared_at_the_response_tokens() -> None:
    student, teacher, rows = tiny.gpt2(0), tiny.llama(1), tiny.rows()
    ours, theirs = (read(model, rows, pad_id=0) for model in (student, teacher))
    compared: list[int] = []
    got = compare(ours, theirs, chunk_tokens=7, progress=compared.append)
    everything = slice(None)
    expected = reference(ours.logits(everything), theirs.logits(everything), ours.labels)
    assert got.compute() == {k: pytest.approx(v, rel=1e-9, abs=1e-9) for k, v in expected.items()}
    lengths = [len(row.response_ids) for row in rows]
    assert [line["num_tokens"] for line in got.rows([row.id for row in rows])] == lengths
    assert sum(compared) == len(ours.labels) == sum(lengths)


def test_the_teacher_is_at_no_distance_from_itself() -> None:
    states = read(tiny.llama(), tiny.rows(), pad_id=0)
    got = compare(states, states, chunk_tokens=5).compute()
    assert (got["fkl"], got["rkl"], got["tvd"], got["agreement"], got["entropy_gap"]) == (0, 0, 0, 1, 0)
