"""Whether the teacher ends an answer with the token that the rows teach."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from drkl.data.ends import end_positions, special_tokens
from drkl.data.tokenize import Row
from drkl.models.forward import decoder_start, in_eval_mode
from drkl.models.readout import batches, logits_of
from drkl.teachers.live import LiveTeacher

ROWS = 16
"""Rows that are read for it."""
FACTOR = 10.0
"""The teacher means another end where it gives that one so many times the probability of the taught one, and so many
times what a token has on average; a teacher that would go on writing means none."""
SURE = 0.5
"""A special token that nothing calls an end is one where the teacher gives it at least this."""


class Ends(NamedTuple):
    """The probabilities that the teacher gives the taught ends, and its own most probable other, after a turn."""

    taught: str
    taught_probability: float
    own: str | None
    own_probability: float
    num_ends: int
    vocab_size: int
    own_id: int | None = None

    @property
    def differ(self) -> bool:
        """Whether the teacher means another token than the rows."""
        least = FACTOR * max(self.taught_probability, 1 / self.vocab_size)
        return self.own is not None and self.own_probability > least

    def warning(self) -> str:
        """The sentence for the user where they differ."""
        return (
            f"The rows end a turn with {self.taught!r}, and the teacher with {self.own!r}: at the ends of "
            f"{self.num_ends} turns it gives {self.taught!r} a mean probability of {self.taught_probability:.2g} and "
            f"{self.own!r} {self.own_probability:.2g}. The student learns the teacher's, which is added to those that "
            "stop it. To teach one end alone, write the rows as the teacher writes its turns: data.template: chat with "
            "the teacher's tokenizer and chat template (in Python template and processing_class), or set the "
            "tokenizer's eos_token."
        )

    def as_record(self) -> dict[str, Any]:
        """For ``env.json``."""
        record = self._asdict() | {"differ": self.differ}
        del record["own_id"]
        return record


@torch.no_grad()
def compare_ends(
    teacher: LiveTeacher,
    rows: Sequence[Row],
    tokenizer: Any,
    known: Iterable[int],
    *,
    pad_id: int,
    merged_ids: Sequence[int] = (),
) -> Ends | None:
    """Read the ends of a few turns with the teacher; None where no row has a whole turn.

    Args:
        teacher: a language model, on its device.
        rows: the training rows; the first `ROWS` that end with a special token are read.
        tokenizer: names the special tokens.
        known: the ids that end an answer by the teacher's settings and the template.
        pad_id: fills batches; its value changes nothing.
        merged_ids: ids that mean one end, so that none of them is another where the rows end with one of them.
    """
    specials = {number: text for text, number in special_tokens(tokenizer).items()}
    whole = list(itertools.islice((row for row in rows if row.trained_ids and row.trained_ids[-1] in specials), ROWS))
    places = {}
    for number, row in enumerate(whole):
        trained = row.trained_ids
        places[number] = [place for place in end_positions(row) if trained[place] in specials]
    if not whole:
        return None
    labels, logits = [], []
    head = teacher.head
    with in_eval_mode(teacher.model):
        for batch in batches(whole, pad_id=pad_id, decoder_start=decoder_start(teacher.model), positions=places):
            labels.append(batch.labels)
            logits.append(logits_of(batch.for_teacher.states(teacher.model), head).float().softmax(-1).cpu())
    observed, probabilities = torch.cat(labels), torch.cat(logits)
    size = probabilities.shape[1]
    taught = sorted(set(observed.tolist()), key=observed.tolist().count, reverse=True)
    mean = probabilities.mean(0)
    ends = set(known)
    alike = set(merged_ids) if set(merged_ids) & set(taught) else set()
    others = [
        token
        for token in specials
        if token < size and token not in taught and token not in alike and (token in ends or float(mean[token]) >= SURE)
    ]
    own = max(others, key=lambda token: float(mean[token]), default=None)
    return Ends(
        taught=" or ".join(specials[token] for token in taught),
        taught_probability=float(probabilities.gather(1, observed.clamp(max=size - 1)[:, None]).mean()),
        own=None if own is None else specials[own],
        own_probability=0.0 if own is None else float(mean[own]),
        num_ends=len(observed),
        vocab_size=size,
        own_id=own,
    )
