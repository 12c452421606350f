from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy as scipy_entropy

from drkl.errors import DrklError
from drkl.evaluation.fidelity import (
    FIDELITY_KEYS,
    NUM_BINS,
    FidelityMetrics,
    HeldOutStates,
    bin_edges,
    compare,
    held_out_states,
)
from drkl.losses import LMHead
from tests.evaluation import tiny


def logits(seed: int, count: int = 37, vocab: int = 11, width: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=width, size=(count, vocab))).float()


def observed(count: int = 37, vocab: int = 11) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(vocab, size=count))


def reference(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Every metric from its equation, in float64."""
    q, p = (np.exp(log_softmax(x.double().numpy(), -1)) for x in (student, teacher))
    at = np.arange(len(q))
    top_q, top_p = q.argmax(-1), p.argmax(-1)
    return {
        "fkl": scipy_entropy(p, q, axis=-1).mean(),
        "rkl": scipy_entropy(q, p, axis=-1).mean(),
        "tvd": 0.5 * np.abs(p - q).sum(-1).mean(),
        "agreement": (top_q == top_p).mean(),
        "nll": -np.log(q[at, labels]).mean(),
        "accuracy": (top_q == labels.numpy()).mean(),
        "entropy": scipy_entropy(q, axis=-1).mean(),
        "confidence": q.max(-1).mean(),
        "overconfidence": (q[at, top_q] - p[at, top_q]).mean(),
        "confidence_gap": q.max(-1).mean() - p.max(-1).mean(),
        "entropy_gap": scipy_entropy(q, axis=-1).mean() - scipy_entropy(p, axis=-1).mean(),
        "target_gap": (q[at, top_p] - p[at, top_p]).mean(),
        "num_tokens": len(q),
    }


def metrics(student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, step: int) -> FidelityMetrics:
    out = FidelityMetrics()
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        out.update(student[part], None if teacher is None else teacher[part], labels[part])
    return out


@pytest.mark.parametrize("step", [1, 5, 37, 100])
@pytest.mark.parametrize("width", [0.1, 2.0, 30.0])
def test_metrics_are_those_of_their_equations(step: int, width: float) -> None:
    student, teacher, labels = logits(0, width=width), logits(1, width=width), observed()
    got = metrics(student, teacher, labels, step).compute()
    assert tuple(got) == FIDELITY_KEYS
    expected = reference(student, teacher, labels)
    assert got == {key: pytest.approx(value, rel=2e-5, abs=2e-7) for key, value in expected.items()}


def test_a_model_against_itself_is_exactly_no_distance() -> None:
    teacher = logits(1)
    got = metrics(teacher, teacher, observed(), 5).compute()
    zero = ("fkl", "rkl", "tvd", "overconfidence", "confidence_gap", "entropy_gap", "target_gap")
    assert {key: got[key] for key in zero} == dict.fromkeys(zero, 0.0)
    assert got["agreement"] == 1


def test_without_a_teacher_what_needs_one_is_none() -> None:
    student, labels = logits(0), observed()
    got = metrics(student, None, labels, 5).compute()
    expected = reference(student, student, labels)
    for key in FIDELITY_KEYS:
        if key in ("nll", "accuracy", "entropy", "confidence", "num_tokens"):
            assert got[key] == pytest.approx(expected[key], rel=2e-5)
        else:
            assert got[key] is None


def test_no_positions_no_means() -> None:
    got = metrics(logits(0, 0), logits(1, 0), observed(0), 5)
    assert got.compute() == {**dict.fromkeys(FIDELITY_KEYS), "num_tokens": 0}
    assert got.distributions() == {"entropy": [0] * NUM_BINS, "confidence": [0] * NUM_BINS}


def test_tokens_that_both_exclude_count_nothing() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=8)
    for x in (student, teacher):
        x[:, 8:] = -torch.inf
    got = metrics(student, teacher, labels, 5).compute()
    assert got == {
        key: pytest.approx(value, rel=2e-5, abs=2e-7)
        for key, value in reference(student[:, :8], teacher[:, :8], labels).items()
    }


def test_a_token_that_one_excludes_makes_one_direction_infinite_and_nothing_nan() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=10)
    teacher[:, 10] = -torch.inf
    got = metrics(student, teacher, labels, 5).compute()
    assert got["rkl"] == math.inf
    assert all(math.isfinite(value) for key, value in got.items() if key != "rkl" and value is not None)
    got = metrics(teacher, student, labels, 5).compute()
    assert got["fkl"] == math.inf and math.isfinite(got["rkl"] or 0)


def test_probabilities_that_underflow_give_no_nan() -> None:
    student, teacher, labels = logits(0), logits(1), observed(vocab=10)
    student[:, 0] += 200
    teacher[:, 1] += 1e4
    got = metrics(student, teacher, labels, 5).compute()
    assert all(value is not None and math.isfinite(value) for value in got.values())
    assert got["rkl"] == pytest.approx(1e4, rel=0.01)


def test_bf16_logits_are_widened_first() -> None:
    student, teacher, labels = logits(0).bfloat16(), logits(1).bfloat16(), observed()
    assert (
        metrics(student, teacher, labels, 5).compute() == metrics(student.float(), teacher.float(), labels, 5).compute()
    )


def test_histograms_are_numpys() -> None:
    student, labels = logits(0, 500, width=3.0), observed(500)
    got = metrics(student, None, labels, 64).distributions()
    q = np.exp(log_softmax(student.double().numpy(), -1))
    edges = bin_edges(11)
    assert edges["entropy"][-1] == pytest.approx(math.log(11)) and edges["confidence"][-1] == 1
    assert got["entropy"] == np.histogram(scipy_entropy(q, axis=-1), edges["entropy"])[0].tolist()
    assert got["confidence"] == np.histogram(q.max(-1), edges["confidence"])[0].tolist()
    assert sum(got["entropy"]) == sum(got["confidence"]) == 500


def test_the_ends_of_the_histograms_are_inside() -> None:
    flat, sure = torch.zeros(3, 7), torch.tensor([[1e4, *[0.0] * 6]])
    out = FidelityMetrics()
    out.update(flat, None, torch.zeros(3, dtype=torch.long))
    out.update(sure, None, torch.zeros(1, dtype=torch.long))
    assert out.distributions()["entropy"] == [1, *[0] * (NUM_BINS - 2), 3]
    assert out.distributions()["confidence"][-1] == 1


def test_vocabularies_that_differ_are_refused() -> None:
    with pytest.raises(DrklError, match="The teacher scores 12 tokens and the student 11"):
        FidelityMetrics().update(logits(0), logits(1, vocab=12), observed())
    states = [HeldOutStates(torch.zeros(2, 3), torch.zeros(2), LMHead(torch.zeros(v, 3))) for v in (5, 6)]
    with pytest.raises(DrklError, match="The teacher scores 6 tokens and the student 5"):
        compare(states[0], states[1])


def plain_logits(model: torch.nn.Module, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row through the model's own forward."""
    parts, labels = [], []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            parts.append(model(ids).logits[0, len(row.prompt_ids) - 1 : -1])
        labels.append(ids[0, len(row.prompt_ids) :])
    return torch.cat(parts), torch.cat(labels)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_models_are_compared_at_the_response_tokens(tokens_per_batch: int) -> None:
    student, teacher, rows = tiny.gpt2(0), tiny.llama(1), tiny.rows()
    read: list[int] = []
    states = [
        held_out_states(m, rows, pad_id=0, tokens_per_batch=tokens_per_batch, progress=read.append)
        for m in (student, teacher)
    ]
    assert sum(read) == 2 * len(rows)
    (z, labels), (y, _) = plain_logits(student, rows), plain_logits(teacher, rows)
    assert states[0].labels.tolist() == labels.tolist()
    torch.testing.assert_close(states[0].head.logits(states[0].hidden), z)
    compared: list[int] = []
    got = compare(states[0], states[1], chunk_tokens=7, progress=compared.append)
    assert got.compute() == {k: pytest.approx(v, abs=1e-9) for k, v in reference(z, y, labels).items()}
    assert sum(compared) == len(labels) == sum(len(row.response_ids) for row in rows)


def test_padding_changes_nothing() -> None:
    model, rows = tiny.llama(), tiny.rows()
    first, second = (held_out_states(model, rows, pad_id=pad) for pad in (0, 7))
    torch.testing.assert_close(first.hidden, second.hidden)


def test_the_teacher_is_at_no_distance_from_itself() -> None:
    states = held_out_states(tiny.llama(), tiny.rows(), pad_id=0)
    got = compare(states, states, chunk_tokens=5).compute()
    assert (got["fkl"], got["rkl"], got["tvd"], got["agreement"], got["entropy_gap"]) == (0, 0, 0, 1, 0)


def test_the_model_must_be_in_eval_mode() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        held_out_states(tiny.llama().train(), tiny.rows(), pad_id=0)
