"""Answers by the models themselves, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from drkl.models.generate import sample_texts
from drkl.rollouts.answers import Answer, Request


class BuiltInWriter:
    """Writes answers with the student in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, stops: Sequence[int]) -> None:
        self._model, self._tokenizer, self._stops = model, tokenizer, list(stops)

    def write(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """As `Writer.write`."""
        answers = []
        for request in requests:
            sample = sample_texts(
                self._model, self._tokenizer, [request.prompt_ids], first_sample=request.stream,
                max_new_tokens=request.max_new_tokens, seed=seed, keys=[request.key], stop_ids=self._stops,
            )[0][0]  # fmt: skip
            answers.append(Answer(sample.token_ids, sample.finished))
        return answers
