"""With which tokens student and teacher stop, and what the teacher gives every token where finished rows end.

It is read once, before training. The warning that rows end otherwise than the teacher, the check that both models mean
the same by a finished answer, and the ends that the student is saved with all go by these numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.ends import as_ids, end_positions, special_tokens
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses.topk import TopK
from drkl.models.ends import listed_ends, stops_of
from drkl.models.forward import decoder_start
from drkl.models.load import source_of
from drkl.models.memory import memory_told
from drkl.models.pair import own_tokenizer
from drkl.models.readout import READING, batches, logits_of
from drkl.teachers.teacher import Teacher

ROWS = 16
"""Finished rows that are read."""
SURE = 0.5
"""A special token that nothing calls an end is a stop token of a teacher that gives it at least this on average."""


class Stops(NamedTuple):
    """The stop tokens of both models, and the teacher's probabilities after ``n`` turns of finished rows."""

    student: list[int]
    """Those of the student as it came; empty where they were not asked for."""
    teacher: list[int]
    """Those of the teacher: of its settings, its tokenizer and its template, and special ones of which it is sure."""
    labels: Tensor
    """`[n]`, the tokens that end the turns."""
    logp: Tensor
    """`[n, vocab]`, the teacher's log-probabilities there, over all of its ids."""
    num_rows: int
    """The rows that were read; 0 where none is finished."""


def read_stops(
    student: PreTrainedModel | None,
    teacher: Teacher,
    rows: Iterable[Row],
    tokenizer: Any,
    taught: Iterable[int],
    *,
    pad_id: int,
    teacher_tokenizer: Any = None,
) -> Stops:
    """Find out with which tokens two models stop, and ask the teacher at the ends of a few finished rows.

    Args:
        student: as it came, before any end is added to its settings; None does not ask for its stop tokens.
        teacher: a language model, on its device.
        rows: the data's; the first `ROWS` whose response is whole are read, each at the end of every learnt turn.
        tokenizer: the run's.
        taught: the ids that the rows end with where they are whole.
        pad_id: fills batches; its value changes nothing.
        teacher_tokenizer: the teacher's own; None where it has none but the run's.
    """
    theirs = teacher_stops(teacher.model, tokenizer if teacher_tokenizer is None else teacher_tokenizer)
    own: list[int] = []
    if student is not None:
        same = source_of(student) and source_of(student) == source_of(teacher.model)
        own = theirs if same else student_stops(student, tokenizer)
    ends = {*taught, *own, *theirs}
    whole = list(itertools.islice((row for row in rows if row.trained_ids and row.trained_ids[-1] in ends), ROWS))
    if not whole:
        return Stops(own, theirs, torch.empty(0, dtype=torch.long), torch.empty(0, 0), 0)
    labels, logp = _read(teacher, whole, ends, pad_id)
    mean, size = logp.exp().mean(0), logp.shape[1]
    sure = [i for i in sorted(special_tokens(tokenizer).values()) if i < size and float(mean[i]) >= SURE]
    # Where the head is smaller than the tokenizer, the teacher never writes the ids beyond.
    theirs = [token for token in dict.fromkeys([*theirs, *sure]) if token < size]
    return Stops(own, theirs, labels, logp, len(whole))


@torch.no_grad()
def _read(teacher: Teacher, rows: list[Row], ends: set[int], pad_id: int) -> tuple[Tensor, Tensor]:
    places = {
        n: [place for place in end_positions(row) if row.trained_ids[place] in ends] for n, row in enumerate(rows)
    }
    labels, logp = [], []
    for batch in batches(rows, pad_id=pad_id, decoder_start=decoder_start(teacher.model), positions=places):
        labels.append(batch.labels)
        with memory_told(f"as the teacher reads {batch.size()}", READING):
            states = teacher.states(batch)
            if isinstance(states, TopK):
                logp.append(_spread(states, batch.labels).cpu())
            else:
                logp.append(logits_of(states, teacher.head).float().log_softmax(-1).cpu())
    return torch.cat(labels), torch.cat(logp)


def _spread(known: TopK, labels: Tensor) -> Tensor:
    """The log-probabilities `[n, vocab]` of a few logits and the labels', and of all others that of no mass."""
    classes = known.classes(1.0).log_softmax(-1)
    logp = classes.new_full((len(known), known.vocab_size + 1), -math.inf)
    logp.scatter_(-1, known.ids.masked_fill(known.ids < 0, known.vocab_size), classes[:, :-1])
    if known.label_logits is not None:
        log_z = known.logits[:, 0] - classes[:, 0]
        logp.scatter_(-1, labels.to(logp.device).unsqueeze(-1), (known.label_logits - log_z).unsqueeze(-1))
    return logp[:, :-1]


def student_stops(student: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that a student stops with as it came, whatever tokenizer wrote the rows.

    They are the eos of the tokenizer in the folder it starts from and the ends that its settings list; where nothing
    else says anything the run's eos, or the end of its chat template.

    Args:
        student: before any end is added to its settings.
        tokenizer: the run's.

    Raises:
        DrklError: nothing ends its answers.
    """
    own, source = own_tokenizer(student, tokenizer), source_of(student)
    words = tokenizer if own is None else own
    ids = [] if own is None else as_ids(own.eos_token_id)
    ids += listed_ends(student, words)
    if source and Path(source).is_dir():  # a student with random weights has the settings of a config alone
        ids += listed_ends(source, words)
    return list(dict.fromkeys(ids or as_ids(tokenizer.eos_token_id) or stops_of(student, tokenizer)))


def teacher_stops(teacher: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that a teacher stops with: its tokenizer's eos, the end of its chat template, those it lists.

    Args:
        teacher: a language model.
        tokenizer: the teacher's own, or else the run's.
    """
    try:
        return stops_of(teacher, tokenizer)
    except DrklError:  # a template that takes no conversation of one question and its answer
        return list(dict.fromkeys([*as_ids(tokenizer.eos_token_id), *listed_ends(teacher, tokenizer)]))
