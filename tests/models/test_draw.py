from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch

from drkl.models.draw import Draw


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
