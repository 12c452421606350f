"""The statistics of a position, against numpy and scipy."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from drkl.objectives.divergences import GeneralizedJensenShannon
from drkl.objectives.logspace import most_probable, split
from drkl.positions import (
    TargetStatistics,
    comparison_statistics,
    distribution,
    entropy,
    target_statistics,
    token_statistics,
)
from tests.objectives import tensors
from tests.rounding import assert_near, rounding


def by_numpy(z: np.ndarray, y: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    q, p = scipy.special.softmax(z, -1), scipy.special.softmax(y, -1)
    rows, best, target = np.arange(len(z)), z.argmax(-1), y.argmax(-1)
    return {
        "nll": -np.log(q[rows, labels]),
        "accuracy": (best == labels).astype(float),
        "entropy": scipy.stats.entropy(q, axis=-1),
        "confidence": q.max(-1),
        "fkl": scipy.stats.entropy(p, q, axis=-1),
        "rkl": scipy.stats.entropy(q, p, axis=-1),
        "tvd": 0.5 * np.abs(p - q).sum(-1),
        "agreement": (best == target).astype(float),
        "overconfidence": q[rows, best] - p[rows, best],
        "target_gap": q[rows, target] - p[rows, target],
        "teacher_entropy": scipy.stats.entropy(p, axis=-1),
        "teacher_confidence": p.max(-1),
    }


def test_statistics() -> None:
    student, teacher, labels = tensors.logits(rows=30, seed=1)
    teacher[:10] = student[:10] + 0.3 * teacher[:10]  # some positions agree
    labels[5:15] = student[5:15].argmax(-1)
    expected = by_numpy(student.numpy(), teacher.numpy(), labels.numpy())
    found = token_statistics(student, teacher, labels)._asdict()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-10, atol=1e-13, err_msg=key)
    assert {0.0, 1.0} == set(expected["agreement"]) == set(expected["accuracy"])


def test_without_a_teacher_its_columns_are_none() -> None:
    student, teacher, labels = tensors.logits()
    alone = token_statistics(student, None, labels)
    both = token_statistics(student, teacher, labels)
    for one, other in zip(alone[:4], both[:4], strict=True):
        assert_near(one, other, terms=student.shape[-1])
    assert alone[4:] == (None,) * 8


def test_statistics_are_detached_and_in_fp32() -> None:
    student, teacher, labels = tensors.logits()
    found = token_statistics(student.bfloat16().requires_grad_(), teacher.bfloat16(), labels)
    assert all(x is not None and x.dtype == torch.float32 and not x.requires_grad for x in found)
    wide = token_statistics(student.bfloat16().float(), teacher.bfloat16().float(), labels)
    for one, other in zip(found, wide, strict=True):
        assert_near(one, other, terms=student.shape[-1])


def test_excluded_tokens_make_no_nan() -> None:
    student = torch.tensor([[1.0, -math.inf, 0.0], [1.0, 0.5, 0.0]])
    teacher = torch.tensor([[2.0, -math.inf, 0.0], [2.0, -math.inf, 0.0]])
    found = token_statistics(student, teacher, torch.tensor([0, 0]))
    assert not any(x.isnan().any() for x in found if x is not None)
    assert found.rkl is not None and found.rkl.tolist()[1] == math.inf and math.isfinite(found.rkl.tolist()[0])
    np.testing.assert_allclose(found.entropy[0], scipy.stats.entropy(scipy.special.softmax([1.0, 0.0])), rtol=1e-6)


def test_ties_go_to_the_lowest_index() -> None:
    found = token_statistics(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([1]))
    assert found.agreement is not None and float(found.agreement) == float(found.accuracy) == 1.0
    missed = token_statistics(torch.tensor([[0.0, 3.0, 3.0]]), None, torch.tensor([2]))
    assert float(missed.accuracy) == 0.0


def test_positions_may_be_none() -> None:
    student, teacher, labels = (x[:0] for x in tensors.logits())
    assert all(x is not None and x.shape == (0,) for x in token_statistics(student, teacher, labels))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float) -> None:
    student, teacher = torch.tensor([[size, 0.0, 1.0]]), torch.tensor([[0.0, size, 1.0]])
    found = token_statistics(student, teacher, torch.tensor([0]))
    assert all(x is not None and x.isfinite().all() for x in found)


def test_shapes_are_checked_under_pytest() -> None:
    student, teacher, labels = tensors.logits()
    with pytest.raises(jaxtyping.TypeCheckError):
        token_statistics(student, teacher[:, :3], labels)


RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)


def compared_by_numpy(z: np.ndarray, y: np.ndarray, label: int) -> dict[str, float]:
    """One position, each number from its equation, in float64 from float64 logits; ranks by a stable full sort."""
    q, p = scipy.special.softmax(z), scipy.special.softmax(y)
    vocab, t = len(z), int(np.argmax(y))
    rest = np.arange(vocab) != t
    tail_q, tail_p = scipy.special.log_softmax(z[rest]), scipy.special.log_softmax(y[rest])
    order = np.argsort(-y, kind="stable")
    head = order[: int(np.argmax(np.cumsum(p[order]) >= 0.9)) + 1]
    k = min(10, vocab)
    top_q = np.argsort(-z, kind="stable")[:k]
    among = order[1:100]
    flat = len(among) < 2 or np.ptp(z[among]) == 0 or np.ptp(y[among]) == 0
    logit_q = z[t] - scipy.special.logsumexp(z[rest])
    return {
        "brier": float(((q - np.eye(vocab)[label]) ** 2).sum()),
        "js": float(jensenshannon(q, p)) ** 2,
        "tail_rkl": float((np.exp(tail_q) * (tail_q - tail_p)).sum()),
        "tail_fkl": float((np.exp(tail_p) * (tail_p - tail_q)).sum()),
        "target_log_odds_gap": logit_q - (y[t] - scipy.special.logsumexp(y[rest])),
        "q_t": q[t],
        "p_t": p[t],
        "rest": scipy.special.expit(-logit_q),
        "tail_mass": float(np.delete(q, head).sum()),
        "overlap": len(set(top_q) & set(order[:k])) / k,
        "rank_correlation": math.nan if flat else scipy.stats.spearmanr(z[among], y[among]).statistic,
        **{f"profile_{r}": q[order[r - 1]] if r <= vocab else math.nan for r in RANKS},
    }


def columns(found: object) -> dict[str, np.ndarray]:
    values = {key: value for key, value in found._asdict().items() if key != "tokens"}  # type: ignore[attr-defined]
    profile = values.pop("profile")
    return {key: value.numpy() for key, value in values.items()} | {
        f"profile_{r}": profile[:, i].numpy() for i, r in enumerate(RANKS)
    }


def check_compared(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **tolerance: float) -> None:
    # Rows whose mass reaches .9 within what a sum of the vocabulary may be off would be decided by rounding.
    p = scipy.special.softmax(teacher.double().numpy(), -1)
    nearest = np.abs(np.cumsum(-np.sort(-p, -1), -1) - 0.9).min(-1)
    clear = nearest > rounding(p.shape[-1], 1.0, student.dtype)
    assert clear.sum() >= len(p) / 3
    student, teacher, labels = student[clear], teacher[clear], labels[clear]
    found = columns(comparison_statistics(student, teacher, labels))
    each = [
        compared_by_numpy(z, y, label)
        for z, y, label in zip(student.double().numpy(), teacher.double().numpy(), labels.tolist(), strict=True)
    ]
    assert found.keys() == each[0].keys()
    for key, values in found.items():
        np.testing.assert_allclose(values, [one[key] for one in each], err_msg=key, **tolerance)


@pytest.mark.parametrize("vocab", [2, 3, 7, 10, 11, 101, 400, 1203])
def test_comparison_is_that_of_the_equations(vocab: int) -> None:
    student, teacher, labels = tensors.logits(rows=12, vocab=vocab, seed=vocab)
    student[:4] = teacher[:4] + 0.3 * student[:4]
    check_compared(student, teacher, labels, rtol=1e-9, atol=1e-12)
    tokens = comparison_statistics(student, teacher, labels).tokens
    for one, other in zip(tokens, token_statistics(student, teacher, labels), strict=True):
        assert_near(one, other, terms=vocab)


def test_comparison_in_fp32() -> None:
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in tensors.logits(12, 1500, seed=3))
    check_compared(student, teacher, labels, rtol=2e-4, atol=1e-6)


def test_equal_tokens_rank_by_their_ids() -> None:
    # As of logits in bf16: whole runs of tokens are equal, and the 1,000th ties with the 1,001st.
    generator = np.random.default_rng(5)
    student, teacher = (torch.from_numpy(generator.integers(0, 4, (10, 2503)).astype(float)) for _ in range(2))
    labels = torch.arange(10)
    check_compared(student, teacher, labels, rtol=1e-9, atol=1e-12)
    check_compared(student, torch.zeros(10, 2503).double(), labels, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(1, 12), st.integers(1, 4))
def test_most_probable_is_a_stable_sort(values: list[int], count: int, spare: int) -> None:
    row = torch.tensor([values]).float()
    expected = np.argsort(-row.numpy(), kind="stable")[:, :count]
    assert most_probable(row, count, spare=spare).ids.tolist() == expected.tolist()


def test_a_position_worked_by_hand() -> None:
    # p's head of 0.9 is the first three tokens; its tail is (.625, .25, .125), that of q (.2, .4, .4).
    student, teacher = (
        torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.1, 0.2, 0.2], [0.6, 0.25, 0.1, 0.05])
    )
    found = columns(comparison_statistics(student, teacher, torch.tensor([2])))
    tail = 0.2 * math.log(0.2 / 0.625) + 2 * 0.4 * math.log(0.4) - 0.4 * (math.log(0.25) + math.log(0.125))
    expected = {
        "brier": 0.25 + 0.01 + 0.64 + 0.04,
        "tail_rkl": tail,
        "target_log_odds_gap": 0.0 - math.log(1.5),
        "tail_mass": 0.2,
        "overlap": 1.0,
        # q's ranks of the tokens 2, 3, 4 are 1, 2.5, 2.5; p's are 3, 2, 1.
        "rank_correlation": -1.5 / math.sqrt(1.5 * 2),
        "profile_2": 0.1,
    }
    assert {key: float(found[key][0]) for key in expected} == pytest.approx(expected, rel=1e-12)


def test_a_model_compared_with_itself() -> None:
    student, _, labels = tensors.logits(rows=20, vocab=300)
    for logits in (student, student.float(), student.bfloat16()):
        found = comparison_statistics(logits, logits, labels)
        # Differences of a number and itself; JS alone has a logarithm of 2 in it.
        for name in ("tail_rkl", "tail_fkl", "target_log_odds_gap"):
            assert not getattr(found, name).any(), name
        assert found.js is not None
        assert_near(found.js, torch.zeros_like(found.js), terms=300)
        assert (found.overlap == 1).all() and (found.rank_correlation == 1).all()  # type: ignore[union-attr]


def test_without_a_teacher_only_brier() -> None:
    student, teacher, labels = tensors.logits()
    alone, both = comparison_statistics(student, None, labels), comparison_statistics(student, teacher, labels)
    assert_near(alone.brier, both.brier, terms=student.shape[-1])
    assert alone[2:] == (None,) * 11


def test_comparison_where_tokens_are_excluded() -> None:
    out = -math.inf
    student = torch.tensor([[1.0, out, 0.0, 2.0], [1.0, 0.5, 0.0, 2.0], [out, out, 3.0, out], [0.0, 1.0, 2.0, 3.0]])
    teacher = torch.tensor([[2.0, out, 0.0, 1.0], [2.0, out, 0.0, 1.0], [2.0, 0.0, 3.0, 1.0], [3.0, out, out, out]])
    found = columns(comparison_statistics(student, teacher, torch.tensor([0, 0, 2, 1])))
    assert not any(
        np.isnan(values).any()
        for key, values in found.items()
        if key not in ("rank_correlation",) and "profile" not in key
    )
    q, p = scipy.special.softmax(student.numpy(), -1), scipy.special.softmax(teacher.numpy(), -1)
    np.testing.assert_allclose(found["js"], jensenshannon(q, p, axis=-1) ** 2, rtol=1e-5)
    # Row 1: the teacher excludes what the student has. Row 2: the student has no tail. Row 3: the teacher has none.
    assert found["tail_rkl"][1:].tolist() == [math.inf, 0.0, math.inf]
    assert math.isfinite(found["tail_fkl"][1]) and found["tail_fkl"][2:].tolist() == [math.inf, 0.0]
    assert found["target_log_odds_gap"][2:].tolist() == [math.inf, -math.inf]
    both = comparison_statistics(student[2:3], student[2:3], torch.tensor([2]))
    assert [float(x) for x in (both.tail_rkl, both.tail_fkl, both.target_log_odds_gap)] == [0.0] * 3  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_comparison_of_huge_logits(size: float) -> None:
    student, teacher = torch.tensor([[size, 0.0, 1.0, 0.5]]), torch.tensor([[0.0, size, 1.0, 0.3]])
    found = columns(comparison_statistics(student, teacher, torch.tensor([0])))
    assert all(np.isfinite(values).all() for key, values in found.items() if "profile" not in key)
    if size > 0:
        assert found["js"] == pytest.approx(math.log(2)) and found["target_log_odds_gap"] == pytest.approx(
            -2e4, rel=1e-3
        )


def test_the_tail_at_high_confidence_keeps_its_digits() -> None:
    # (RKL - B) / (1 - q_t) would have none left: 1 - q_t is 1e-9 here.
    student = torch.from_numpy(np.stack([tensors.confident(22, seed=1), tensors.confident(18, seed=2)]))
    teacher = torch.from_numpy(np.stack([tensors.confident(15, seed=3), tensors.confident(20, seed=4)]))
    expected = [compared_by_numpy(z, y, 0) for z, y in zip(student.numpy(), teacher.numpy(), strict=True)]
    found = columns(comparison_statistics(student.float(), teacher.float(), torch.tensor([0, 0])))
    for key in ("tail_rkl", "tail_fkl", "target_log_odds_gap", "rest", "tail_mass"):
        np.testing.assert_allclose(found[key], [one[key] for one in expected], rtol=2e-5, err_msg=key)


def at_target(z: torch.Tensor, y: torch.Tensor, target: torch.Tensor, temperature: float = 1.0) -> TargetStatistics:
    student, teacher = (split(distribution(logits, temperature).logp, target) for logits in (z, y))
    return target_statistics(student, teacher, target)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_statistics_at_any_target_and_temperature(temperature: float) -> None:
    student, teacher, labels = tensors.logits(rows=20, vocab=30, seed=4)
    found = at_target(student, teacher, labels, temperature)
    rows, rest = np.arange(20), np.ones((20, 30), bool)
    rest[rows, labels.numpy()] = False
    q, p = (scipy.special.softmax(logits.numpy() / temperature, -1) for logits in (student, teacher))
    tail_q, tail_p = (x[rest].reshape(20, 29) / x[rest].reshape(20, 29).sum(-1, keepdims=True) for x in (q, p))
    pairs = [np.stack([x[rows, labels], 1 - x[rows, labels]], -1) for x in (q, p)]
    expected = {
        "q_t": pairs[0][:, 0],
        "p_t": pairs[1][:, 0],
        "rest": pairs[0][:, 1],
        "B": scipy.stats.entropy(*pairs, axis=-1),
        "K": scipy.stats.entropy(tail_q, tail_p, axis=-1),
        "K_forward": scipy.stats.entropy(tail_p, tail_q, axis=-1),
        "D": scipy.special.logit(pairs[0][:, 0]) - scipy.special.logit(pairs[1][:, 0]),
    }
    assert found._asdict().keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(getattr(found, key), values, rtol=1e-9, atol=1e-13, err_msg=key)
    np.testing.assert_allclose(entropy(distribution(student, temperature)), scipy.stats.entropy(q, axis=-1), rtol=1e-10)


@pytest.mark.parametrize("odds", [0.0, 15.0, 22.0, 200.0])
def test_target_statistics_keep_their_digits_at_high_confidence(odds: float) -> None:
    # Target log-odds of exactly `odds` and odds + 1 over tails of two and three equal classes.
    tails = ([0.0, 0.0, -1e4], [0.0, 0.0, 0.0])
    logits = [[odds + c + math.log(n), *tail] for c, n, tail in zip((0.0, 1.0), (2, 3), tails, strict=True)]
    student, teacher = (torch.tensor([row]) for row in logits)
    found = at_target(student, teacher, torch.tensor([0]))
    log_q, log_p = (scipy.special.log_expit([s, -s]) for s in (odds, odds + 1.0))
    expected = float((np.exp(log_q) * (log_q - log_p)).sum())
    # A log-probability of size `odds` is rounded to a few units in its last place.
    close = 8 * (odds + 2) * torch.finfo(torch.float32).eps
    assert float(found.D) == pytest.approx(-1.0, abs=close)
    assert float(found.K) == pytest.approx(math.log(1.5), abs=close)
    assert float(found.B) == pytest.approx(expected, rel=4 * close, abs=1e-37)
    assert float(found.rest) == pytest.approx(float(np.exp(log_q[1])), rel=close, abs=1e-37)


def test_js_is_the_objectives() -> None:
    student, teacher, labels = tensors.logits(rows=30, vocab=50)
    expected = GeneralizedJensenShannon()(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    torch.testing.assert_close(comparison_statistics(student, teacher, labels).js, expected)


def test_nothing_to_compare() -> None:
    student, teacher, labels = (x[:0] for x in tensors.logits())
    found = comparison_statistics(student, teacher, labels)
    assert all(x is not None and len(x) == 0 for x in found[1:])
