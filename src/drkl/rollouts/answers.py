"""What is asked of a model that writes answers, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """A prompt to be answered once."""

    key: str
    """The row's id. With ``stream`` and the seed it decides the random numbers of the answer, and nothing else does."""
    stream: int
    """The pass over the rows."""
    prompt_ids: tuple[int, ...]
    """As the student reads the prompt."""
    teacher_prompt_ids: tuple[int, ...]
    """As the teacher reads it."""
    max_new_tokens: int
    """Longest answer, its end included."""


@dataclass(frozen=True)
class Answer:
    """The tokens of one answer."""

    token_ids: tuple[int, ...]
    """Ends with a stop token where it is finished; one that was cut has none."""
    finished: bool
    logprobs: tuple[float, ...] = ()
    """Each token's log-probability before temperature and top_p, in nats; empty where the writer does not say."""


class Writer(Protocol):
    """Writes answers with the weights of now."""

    def write(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Return one answer to each request, in order.

        Args:
            requests: the prompts; in any order.
            seed: of the random streams.
            progress: called with the number of answers that were finished since the last call.
        """
        ...
