from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch

from drkl.models.draw import Draw, descend, nucleus


def pick(logits: Sequence[float], draws: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scores = torch.tensor([logits]).repeat(len(draws), 1)
    return Draw(draws[:, None], temperature)([scores], range(len(draws)), 0).numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 13])
def test_shares_of_the_picks_are_the_probabilities(size: int, temperature: float) -> None:
    rng = np.random.default_rng(size)
    logits = np.float32(rng.normal(size=size)).astype(float)
    logits[size // 2] = -np.inf if size > 2 else 0.0
    probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(pick(logits.tolist(), rng.random((20_000, 24)), temperature), minlength=size)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    if size > 1:
        assert scipy.stats.chisquare(counts[possible], 20_000 * probs[possible]).pvalue > 1e-3


def test_a_token_without_probability_is_never_picked() -> None:
    edges = np.array([[0.0] * 24, [np.nextafter(1.0, 0.0)] * 24, [1.0] * 24])
    assert pick([-np.inf, 1.0, -np.inf, 2.0, -np.inf], edges).tolist() == [1, 3, 3]
    assert pick([-1e4, 1e4, -1e4], edges).tolist() == [1, 1, 1]
    assert pick([-np.inf, 3.0], edges).tolist() == [1, 1, 1]


def test_rounding_of_the_logits_hardly_moves_a_pick() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=20_000)
    draws = rng.random((200, 24))
    picks = [pick((logits + 3e-5 * rng.normal(size=20_000)).tolist(), draws) for _ in range(2)]
    assert (picks[0] != picks[1]).sum() <= 1


@pytest.mark.parametrize("size", [255, 256, 257, 300, 512, 513, 5000])
def test_the_walk_halves_a_range_of_ids_at_each_level(size: int) -> None:
    """Blocks of a large vocabulary change nothing in the tree."""
    rng = np.random.default_rng(size)
    weights = rng.integers(0, 50, (40, size)).astype(float)  # their sums are exact
    draws = rng.random((40, 24))
    expected = []
    for row, numbers in zip(weights, draws, strict=True):
        low, width = 0, 2 ** int(np.ceil(np.log2(size)))
        for u in numbers[: int(np.log2(width))]:
            width //= 2
            left, both = row[low : low + width].sum(), row[low : low + 2 * width].sum()
            low = low if u * both < left else low + width
        expected.append(low)
    assert descend(torch.tensor(weights, dtype=torch.float32), torch.tensor(draws)).tolist() == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [1, 5, 256, 3000])
def test_a_nucleus_is_the_smallest_set_that_reaches_top_p(size: int, top_p: float) -> None:
    rng = np.random.default_rng(size)
    weights = rng.integers(1, 1000, (6, size)) ** rng.integers(1, 3, (6, 1)).astype(
        float
    )  # ties, in flat rows and peaked
    expected = np.zeros_like(weights)
    for row, kept in zip(weights, expected, strict=True):
        total = 0.0
        for index in np.argsort(-row, kind="stable"):
            kept[index] = row[index]
            total += row[index]
            if total >= top_p * row.sum():
                break
    assert np.array_equal(nucleus(torch.tensor(weights), top_p).numpy(), expected)
