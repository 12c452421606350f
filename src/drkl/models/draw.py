"""Draw a token from logits by walking down a binary tree over the vocabulary.

At every node a uniform random number decides between the probabilities of the left and the right half. One number
compared with the cumulative sum would be simpler, but its 50,000 boundaries lie so close together that rounding inside
the model, which depends on the batch, changed one token in a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drkl.data.examples import hash_of_id
from drkl.errors import DrklError

DEPTH = 24
"""Random numbers per token: enough for a vocabulary of 2**24 tokens, and the same for every vocabulary."""

_BLOCK_DEPTH = 8
_NUCLEUS = 256
"""Most probable tokens among which the edge of a nucleus is looked for first."""


class BrokenLogits(DrklError):
    """Logits that a token is to be drawn from are not finite."""


def uniforms(seed: int, key: str, stream: int, count: int) -> np.ndarray:
    """The random numbers `[count, DEPTH]` in [0, 1) of an answer's first tokens: a function of its first arguments."""
    words = np.frombuffer(hash_of_id(key), dtype="<u4")
    return np.random.default_rng([seed, stream, *words.tolist()]).random((count, DEPTH))


class Draw:
    """Draws the next token of each row from one model's logits, or from a mixture of two models' distributions.

    With distributions p_i = softmax(logits_i / temperature) the token is drawn from sum_i shares_i p_i, restricted to
    the smallest set of most probable tokens whose probability reaches ``top_p``.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        temperature: float = 1.0,
        top_p: float = 1.0,
        shares: Sequence[float] = (1.0,),
        vocab_size: int | None = None,
    ) -> None:
        """``numbers``: `[rows, steps, DEPTH]` in [0, 1); ``vocab_size``: the ids that may be drawn are those below."""
        self.numbers = torch.from_numpy(numbers)
        self.temperature, self.top_p, self.shares, self.vocab_size = temperature, top_p, tuple(shares), vocab_size

    def __call__(self, logits: Sequence[Tensor], rows: Sequence[int], step: int) -> Tensor:
        """Return a token for each row `[rows]`.

        Args:
            logits: `[rows, vocab]` of each model; overwritten.
            rows: their numbers in ``numbers``.
            step: number of the token, from 0.
        """
        parts = [_likelihoods(scores[:, : self.vocab_size], self.temperature) for scores in logits]
        weights = parts[0] if len(parts) == 1 else _mixed(parts, self.shares)
        if self.top_p < 1:
            weights = nucleus(weights, self.top_p)
        return descend(weights, self.numbers[list(rows), step])


def most_probable(logits: Sequence[Tensor], rows: Sequence[int], step: int) -> Tensor:
    """The token `[rows]` with the largest logit, in the place of a draw."""
    _finite(logits[0].amax(-1))
    return logits[0].argmax(-1)


def _likelihoods(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities up to a factor per row; overwrites the logits."""
    peaks = logits.amax(-1, keepdim=True)
    _finite(peaks)
    logits = logits.sub_(peaks)
    return (logits if temperature == 1 else logits.div_(temperature)).exp_()


def _finite(peaks: Tensor) -> None:
    # NaN would go unnoticed: every comparison with it is false, and the answer a row of token 0.
    if not torch.isfinite(peaks).all():
        raise BrokenLogits(
            "The model's logits are not finite numbers: its weights are broken, or overflow their dtype."
        )


def _mixed(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    size = min(part.shape[-1] for part in parts)
    total = torch.zeros_like(parts[0][:, :size])
    for part, share in zip(parts, shares, strict=True):
        part = part[:, :size].to(total)
        total += part * (share / part.sum(-1, keepdim=True))
    return total


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Leave the smallest set of largest weights whose sum reaches ``top_p`` of the row's, and zeros; lower ids first.

    Args:
        weights: `[rows, vocab]`, at least 0.
        top_p: in (0, 1).
    """
    count, size, wide = min(_NUCLEUS, weights.shape[-1]), weights.shape[-1], _wide(weights)
    wanted = top_p * weights.sum(-1, keepdim=True, dtype=wide)
    while True:
        largest = weights.topk(count).values
        reached = largest.cumsum(-1, dtype=wide)
        if count == size or bool((reached[:, -1:] >= wanted).all()):
            break
        count = min(8 * count, size)
    kept = (reached < wanted).sum(-1, keepdim=True).clamp(max=count - 1) + 1
    edge = largest.gather(-1, kept - 1)
    above, at = weights > edge, weights == edge
    return weights * (above | (at & (at.cumsum(-1) <= kept - above.sum(-1, keepdim=True))))


def descend(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the leaf `[rows]` that a walk down the binary tree over each row's weights ends at.

    Args:
        weights: `[rows, vocab]`, at least 0, not all of a row.
        draws: `[rows, DEPTH]` in [0, 1]: one number for each level, from the root.
    """
    draws = draws.to(weights.device, _wide(weights))
    if weights.shape[-1] <= 2**_BLOCK_DEPTH:
        return _walk(weights, draws)
    # The levels near the leaves are summed for the block that the walk enters only.
    block = 2**_BLOCK_DEPTH
    missing = -weights.shape[-1] % block
    blocks = (torch.nn.functional.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, block))
    entered = _walk(blocks.sum(-1), draws)
    within = blocks[torch.arange(len(blocks), device=blocks.device), entered]
    return block * entered + _walk(within, draws[:, (blocks.shape[1] - 1).bit_length() :])


def _walk(weights: Tensor, draws: Tensor) -> Tensor:
    levels = [weights.to(draws.dtype)]
    while levels[-1].shape[-1] > 1:
        if levels[-1].shape[-1] % 2:
            levels[-1] = torch.nn.functional.pad(levels[-1], (0, 1))
        levels.append(levels[-1].unflatten(-1, (-1, 2)).sum(-1))
    node = torch.zeros(len(weights), 1, dtype=torch.long, device=weights.device)
    for depth, level in enumerate(reversed(levels[:-1])):
        left, right = level.gather(-1, 2 * node), level.gather(-1, 2 * node + 1)
        # right > 0: a draw rounded up to 1 must not lead where there is nothing.
        node = 2 * node + ((draws[:, depth, None] * (left + right) >= left) & (right > 0))
    return node.squeeze(-1)


def _wide(weights: Tensor) -> torch.dtype:
    """float64, so that sums add little to the model's own rounding; mps has none."""
    return torch.float32 if weights.device.type == "mps" else torch.float64
