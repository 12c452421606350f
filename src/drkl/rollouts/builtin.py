"""Answers written by the models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from drkl.errors import DrklError
from drkl.models.generate import Reader, sample_ids
from drkl.models.precision import DTYPES
from drkl.rollouts.answers import Answer, Request
from drkl.signals import cut_short

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BuiltInWriter:
    """A `Writer` that samples from the student, from the teacher, or token by token from a mixture of both.

    An answer depends on the weights and on (seed, key, stream) alone: not on the other requests, their order or the
    batch size, except where rounding inside a model decides between two tokens. Neither the models' modes and settings
    nor torch's random state change.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel | None = None,
        source: Literal["student", "mixed", "teacher"] = "student",
        teacher_share: float = 0.2,
        stops: Sequence[int],
        sampling_temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 64,
        precision: str = "fp32",
        vocab_size: int | None = None,
        pad_id: int = 0,
        begin: Sequence[int] = (),
    ) -> None:
        """
        Args:
            model: the student, unwrapped, on its device.
            teacher: needed where the source is ``mixed`` or ``teacher``.
            source: writer of the answers.
            teacher_share: weight of the teacher's distribution in ``mixed``.
            stops: the ids that end an answer; of the student for ``student`` and ``mixed``, of the teacher for
                ``teacher``.
            sampling_temperature: > 0.
            top_p: in (0, 1].
            batch_size: answers written at once.
            precision: of the matrix products, as in training: ``fp32`` (that of the weights), ``bf16`` or ``fp16``.
            vocab_size: the ids that may be drawn are those below, which both models know.
            pad_id: fills batches.
            begin: the tokens that every answer of an encoder-decoder begins with (`answer_start`). They are given and
                not sampled, stand first in the answers and count towards ``max_new_tokens``.
        """
        assert source == "student" or teacher is not None, "mixed and teacher need the teacher"
        self.model, self.teacher, self.source, self.teacher_share = model, teacher, source, teacher_share
        self.stops, self.pad_id, self.begin, self.vocab_size = tuple(stops), pad_id, tuple(begin), vocab_size
        self.sampling_temperature, self.top_p = sampling_temperature, top_p
        self.batch_size, self.precision = batch_size, precision

    def write(
        self, requests: Sequence[Request], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Return one answer to each request, in order.

        Raises:
            DrklError: a prompt that is empty or leaves no room for its answer, or logits that are not finite.
        """
        least = len(self.begin) + 1
        for request in requests:
            if request.max_new_tokens < least:
                raise DrklError(
                    f"max_new_tokens is {request.max_new_tokens}; expected a whole number, at least {least}"
                    + (f": every answer begins with {least - 1} tokens that are given." if self.begin else ".")
                )

        def report(_: int, ended: int) -> None:
            cut_short()
            if progress is not None and ended:
                progress(ended)

        readers = self._readers(requests)
        with _autocast([reader.model for reader in readers], self.precision):
            written = sample_ids(
                readers,
                keys=[request.key for request in requests],
                streams=[request.stream for request in requests],
                limits=[request.max_new_tokens - len(self.begin) for request in requests],
                stops=self.stops,
                pad_id=self.pad_id,
                seed=seed,
                sampling_temperature=self.sampling_temperature,
                top_p=self.top_p,
                batch_size=self.batch_size,
                begin=self.begin,
                vocab_size=self.vocab_size,
                progress=report,
            )
        return [Answer((*self.begin, *ids), finished) for ids, finished in written]

    def _readers(self, requests: Sequence[Request]) -> list[Reader]:
        teacher_share = {"student": 0.0, "mixed": self.teacher_share, "teacher": 1.0}[self.source]
        readers = []
        if teacher_share < 1:
            prompts = [request.prompt_ids for request in requests]
            readers.append(Reader(self.model, prompts, 1 - teacher_share, "student"))
        if teacher_share > 0 and self.teacher is not None:
            prompts = [request.teacher_prompt_ids for request in requests]
            readers.append(Reader(self.teacher, prompts, teacher_share, "teacher"))
        return readers


@contextmanager
def _autocast(models: Sequence[PreTrainedModel], precision: str) -> Iterator[None]:
    """Matrix products in a precision inside the block, each weight converted once and not at every step."""
    # Autocast keeps what it has converted of parameters that are trained only.
    parameters = [p for model in models for p in model.parameters()] if precision != "fp32" else []
    frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        with torch.autocast(models[0].device.type, DTYPES[precision], enabled=precision != "fp32"):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False
        # What was converted without gradients may not be met by a training inside an outer autocast.
        torch.clear_autocast_cache()
