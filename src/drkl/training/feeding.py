"""What the processes' forward passes are fed: how much of it is padding, and how much waiting for another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drkl.data.collate import is_packed
from drkl.processes import gather

_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Fed:
    """Numbers of positions, of all processes."""

    fed: int = 0
    """Positions of the batches, padding included."""
    tokens: int = 0
    """Those that are tokens of rows."""
    room: int = 0
    """Positions that would have been fed in the same time if every process had had as many as the one with the most."""

    def shares(self) -> dict[str, float]:
        """What is logged: ``padding_share``, of the fed positions, and ``idle_share``, of the room."""
        if not self.fed:
            return {}
        return {"padding_share": 1 - self.tokens / self.fed, "idle_share": 1 - self.fed / self.room}


class Feeding:
    """Counts what this process is fed since the last line of the log, and adds it up over all of them."""

    def __init__(self) -> None:
        self.begin(Fed())

    def begin(self, before: Fed) -> None:
        """Count from what was fed ``before``."""
        self.before = before
        self._fed: list[int] = []
        self._tokens = 0

    def add(self, inputs: Mapping[str, Any], row_ids: Sequence[str]) -> None:
        """Add a forward pass; every process has as many of them. Without rows it is fed padding alone."""
        if is_packed(inputs):
            fed = tokens = inputs["input_ids"].numel()
        else:
            masks: list[Tensor] = [inputs[name] for name in _MASKS if name in inputs]
            fed, tokens = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
        self._fed.append(fed)
        self._tokens += tokens if row_ids else 0

    def mark(self) -> tuple[int, int]:
        """How far the count is, for `back_to`."""
        return len(self._fed), self._tokens

    def back_to(self, mark: tuple[int, int]) -> None:
        """Forget what was added since."""
        self._fed, self._tokens = self._fed[: mark[0]], mark[1]

    def of_all(self) -> Fed:
        """What all processes were fed. Every process has to ask."""
        parts = gather([(self._fed, self._tokens)])
        passes = list(zip(*(fed for fed, _ in parts), strict=True))
        before = self.before
        return Fed(
            before.fed + sum(map(sum, passes)),
            before.tokens + sum(tokens for _, tokens in parts),
            before.room + len(parts) * sum(map(max, passes)),
        )
