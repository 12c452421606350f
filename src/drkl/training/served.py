"""What a run asks of a served teacher, and the rows that it is asked for ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from drkl.data.collate import teacher_inputs
from drkl.data.stored import JoinedRows, column
from drkl.errors import DrklError
from drkl.losses import IGNORE_INDEX
from drkl.losses.config import LossConfig
from drkl.losses.topk import objective_on_classes
from drkl.models.forward import lm_head
from drkl.models.load import source_of
from drkl.objectives import Objective
from drkl.rollouts.config import PREFIX, RolloutsConfig
from drkl.teachers.served import Question, ServedTeacher, questions_of
from drkl.teachers.served_checks import PROMPTS, check_distributions, check_length, check_vocabulary
from drkl.training.arguments import DistillationConfig

if TYPE_CHECKING:
    from drkl.training.pair import Pair

OF_TRAINING = ("sampled", "places")
"""What the training loop adds to a batch."""


def check_settings(objective: Objective, loss: LossConfig, rollouts: RolloutsConfig) -> None:
    """Raise DrklError where a run asks of a served teacher what a server does not give."""
    if rollouts.is_on and rollouts.source != "student":
        raise DrklError(
            f"{PREFIX}source is {rollouts.source!r}, and the teacher is served: drkl asks its server for the "
            "distributions in a text, and not to write one. Set it to 'student', or load the teacher here."
        )
    if loss.kd_weight == 0 or not objective.needs_teacher:
        return
    objective_on_classes(objective)
    if loss.temperature != 1:
        raise DrklError(
            f"The temperature of the loss is {loss.temperature:g}, and the teacher is served: a server gives "
            "probabilities at temperature 1 alone, and from the most probable ones those at another cannot be had. "
            "Leave temperature at 1, or use a teacher that is loaded here or a cache of one."
        )


def check_served_kind(kind: str, k: int | None, top_k: int, temperatures: Sequence[float]) -> int:
    """Return the k of a cache of a served teacher, or raise DrklError where a server has not what it asks for."""
    if kind != "topk":
        raise DrklError(
            "The teacher is served, and a server gives no hidden states. Set kind to 'topk' to cache its most probable "
            "tokens."
        )
    if k not in (None, top_k):
        raise DrklError(
            f"k is {k} and teacher.top_k {top_k}: both say how many tokens are asked for. Give one of them."
        )
    if other := [t for t in temperatures if t != 1]:
        raise DrklError(
            f"A temperature of {other[0]:g} is asked for, and the teacher is served: a server gives probabilities at "
            "temperature 1 alone. Leave temperatures out."
        )
    return top_k


def settle_served(
    teacher: Any, model: Any, student: PreTrainedModel, tokenizer: Any, args: DistillationConfig
) -> str | None:
    """The folder or id that stands for a served teacher; None for any other, or where the student in memory does.

    Args:
        teacher: the teacher.
        model: the student, as it was passed.
        student: the student.
        tokenizer: the one that was passed; None for none.
        args: how to train.

    Raises:
        DrklError: its server cannot be reached or serves another model, or nothing can stand for it.
    """
    if not isinstance(teacher, ServedTeacher):
        return None
    check_settings(args.make_objective(), args.loss_config, args.rollouts)
    teacher.remember_up_to(args.teacher_remember_mb)
    teacher.settle(str(model) if isinstance(model, (str, Path)) else source_of(student), student.config, tokenizer)
    return teacher.source or None


def check_served(pair: Pair, args: DistillationConfig) -> None:
    """Raise DrklError where the teacher is served, and its server is not one for this pair; no other is asked.

    Args:
        pair: models and rows. Its teacher is told which ids both models have.
        args: how to train.
    """
    teacher = pair.teacher
    if not isinstance(teacher, ServedTeacher):
        return
    teacher.vocab_size = pair.vocab_size or lm_head(pair.student).vocab_size
    if teacher.top_k >= teacher.vocab_size:
        raise DrklError(
            f"teacher.top_k is {teacher.top_k}, and student and teacher are compared on {teacher.vocab_size} ids; "
            f"expected at most {teacher.vocab_size - 1}."
        )
    rows = JoinedRows(pair.rows, pair.eval_rows)
    check_lengths(pair, rows)
    check_vocabulary(teacher, pair.words)
    check_distributions(teacher, [row.teacher_prompt_ids or row.prompt_ids for row in rows[:PROMPTS]])


def check_lengths(pair: Pair, rows: Sequence[Any]) -> None:
    """Raise DrklError where the teacher is served, and its server cannot read the longest of some rows."""
    if isinstance(pair.teacher, ServedTeacher):
        lengths = _longest(rows, pair.max_new_tokens, pair.room.decoder)
        row_id = max(rows[int(number)].id for number in np.flatnonzero(lengths == lengths.max()))
        check_length(pair.teacher, int(lengths.max()), row_id)


def _longest(rows: Sequence[Any], max_new_tokens: int, context: int | None) -> NDArray[np.int32]:
    """Tokens of each row as the teacher reads it, or with the longest answer that may be sampled, `[rows]`."""
    prompts = np.maximum.reduce([column(rows, name) for name in ("prompt", "sampling", "teacher")])
    sampled = prompts + max_new_tokens if max_new_tokens else np.zeros_like(prompts)
    if context is not None:
        sampled = np.minimum(sampled, context)
    return np.maximum(prompts + column(rows, "response"), sampled)


def questions_in(batches: Iterable[Mapping[str, Any]]) -> list[Question]:
    """What a served teacher is asked for batches of `collate`."""
    questions = []
    for batch in batches:
        labels = batch["labels"]
        inputs, keep = teacher_inputs({name: value for name, value in batch.items() if name not in OF_TRAINING})
        questions += questions_of(inputs, keep, labels[labels != IGNORE_INDEX])
    return questions
