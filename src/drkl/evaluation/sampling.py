"""The answers of a model to prompts, batch by batch; a batch that was finished before is read instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drkl.data.tokenize import Row
from drkl.evaluation.answers import Answer
from drkl.evaluation.store import Store, fingerprint
from drkl.models.generate import sample_texts
from drkl.processes import Share

Advance = Callable[[int], None] | None
"""Called with the token slots that are done."""


class Drawn(NamedTuple):
    """The answers of a batch: samples ``numbers`` of each of the prompts at the places ``group``."""

    temperature: float
    seed: int
    group: list[int]
    numbers: range

    @property
    def size(self) -> int:
        return len(self.group) * len(self.numbers)


@dataclass(frozen=True)
class Sampler:
    """Samples the answers of one model; several processes share the batches, and have all answers each."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Row]
    stops: Sequence[int]
    max_new_tokens: int
    mark: str
    """Stands for the model's weights."""
    store: Store | None
    share: Share
    report: Callable[[float], Advance]
    """From a temperature to what is told of its progress; called when its first batch is due."""
    _advances: dict[float, Advance] = field(default_factory=dict)

    def answers(self, batches: Sequence[Drawn]) -> Iterator[list[list[Answer]]]:
        """Yield the answers of each batch, `[prompts][numbers]`."""
        found = self.share.first(lambda: [self._read(batch) for batch in batches])
        missing = [batch for batch, known in zip(batches, found, strict=True) if known is None]
        made = zip(missing, self.share.map(self._make, missing), strict=True)
        own = {id(batch) for batch in missing[self.share.place.number :: self.share.place.count]}
        for batch, known in zip(batches, found, strict=True):
            if known is None:
                _, answers = next(made)
                if self.store is not None and self.share.is_first:
                    self.store.write_lines(self._key(batch), [_kept(one) for pool in answers for one in pool])
            else:
                many = len(batch.numbers)
                answers = [known[start : start + many] for start in range(0, len(known), many)]
            advance = self._advance(batch)
            if advance is not None and id(batch) not in own:
                advance(batch.size * self.max_new_tokens)
            yield answers

    def _advance(self, batch: Drawn) -> Advance:
        if batch.temperature not in self._advances:
            self._advances[batch.temperature] = self.report(batch.temperature)
        return self._advances[batch.temperature]

    def _key(self, batch: Drawn) -> str:
        rows = [self.prompts[i] for i in batch.group]
        return fingerprint(
            kind="answers with their tokens", model=self.mark,
            prompts=fingerprint(value=[[row.id, row.sampling_ids] for row in rows]),
            seed=batch.seed, temperature=batch.temperature, samples=[batch.numbers.start, batch.numbers.stop],
            device=self.model.device.type, max_new_tokens=self.max_new_tokens, stops=self.stops,
        )  # fmt: skip

    def _read(self, batch: Drawn) -> list[Answer] | None:
        lines = None if self.store is None else self.store.read_lines(self._key(batch))
        if lines is None or len(lines) != batch.size:
            return None
        return [Answer(line["text"], line["num_tokens"], line["ended"], tuple(line["token_ids"])) for line in lines]

    def _make(self, batch: Drawn) -> list[list[Answer]]:
        rows = [self.prompts[i] for i in batch.group]
        generations = sample_texts(
            self.model,
            self.tokenizer,
            [row.sampling_ids for row in rows],
            samples_per_prompt=len(batch.numbers),
            first_sample=batch.numbers.start,
            sampling_temperature=batch.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=batch.seed,
            batch_size=batch.size,
            keys=[row.id for row in rows],
            stop_ids=self.stops,
            progress=self._advance(batch),
        )
        return [
            [Answer(text.text, text.num_tokens, text.finished, text.token_ids) for text in pool] for pool in generations
        ]


def _kept(answer: Answer) -> dict[str, Any]:
    """What is kept of an answer, for the next time that it is needed."""
    return {
        "text": answer.text, "num_tokens": answer.num_tokens, "ended": answer.ended, "token_ids": [*answer.token_ids],
    }  # fmt: skip
