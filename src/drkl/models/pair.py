"""Check that two models are a pair: one kind, one vocabulary, and rows that both can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from drkl.data.classification import LabelledRow
from drkl.data.seq2seq import take_languages
from drkl.data.stored import column
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.config import StudentConfig
from drkl.models.context import context_of, contexts_of
from drkl.models.forward import decoder_start, is_encoder_decoder
from drkl.models.load import load_config, load_tokenizer, source_of, words_of
from drkl.models.student import source_model, student_config


def check_families(student: StudentConfig, teacher_name: str | None, tokenizer: Any = None, **options: Any) -> None:
    """Raise DrklError where the models of a config are of two kinds; reads their configs alone.

    Args:
        student: the ``student`` section.
        teacher_name: the teacher; None for none.
        tokenizer: the run's, for a student that is made from its config alone.
        options: what the teacher is loaded with.
    """
    if teacher_name is None:
        return
    name = student.model_type or source_model(student, teacher_name)
    teacher = load_config(teacher_name, **options)
    check_same_family(student_config(student, teacher_name, tokenizer), teacher, name, teacher_name)


def check_same_family(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Raise DrklError where an encoder-decoder and a decoder-only model are to be compared.

    Args:
        student: the student's model config.
        teacher: the teacher's model config.
        student_name: what an error calls the student.
        teacher_name: what an error calls the teacher.
    """
    if is_encoder_decoder(student) != is_encoder_decoder(teacher):
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        raise DrklError(
            f"The student {student_name!r} is {kinds[is_encoder_decoder(student)]} and the teacher "
            f"{teacher_name!r} {kinds[is_encoder_decoder(teacher)]}: they read a row in different ways, so their "
            "positions cannot be compared. Choose both of one kind."
        )
    if decoder_start(student) != decoder_start(teacher):
        raise DrklError(
            f"The student's decoder starts with the token {decoder_start(student)} and the teacher's with "
            f"{decoder_start(teacher)}; one batch feeds both. Set decoder_start_token_id to the same in both configs."
        )


class SharedTokens(NamedTuple):
    """The number of ids, from 0, that mean the same in both tokenizers, and whether one of the two has more."""

    num_ids: int
    one_has_more: bool


def check_tokenizers(
    student: StudentConfig, teacher_name: str | None, *, classifier: bool = False
) -> SharedTokens | None:
    """Compare the tokenizers of models that were trained separately; None where there is one tokenizer only.

    Raises:
        DrklError: an id that means one token to the student and another to the teacher.
    """
    if teacher_name is None or student.init == "random":
        return None
    source = source_model(student, teacher_name)
    if source == teacher_name:
        return None
    ours, theirs = (load_tokenizer(name, classifier=classifier) for name in (source, teacher_name))
    return SharedTokens(*shared_tokens(ours, theirs, source, teacher_name))


def shared_tokens(student: Any, teacher: Any, student_name: str, teacher_name: str) -> tuple[int, bool]:
    """Return how many ids, from 0, mean the same token in two tokenizers, and whether one continues after that.

    Raises:
        DrklError: an id that means different tokens, or two tokenizers neither of which is the beginning of the other.
    """
    theirs, ours = ({i: token for token, i in t.get_vocab().items()} for t in (teacher, student))
    if theirs == ours:
        return max(ours) + 1, False
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    # All ids that differ belong to one tokenizer and come after all of the other's: tokens added at the end.
    if differ[0] and (differ[0] > max(ours) or differ[0] > max(theirs)):
        return differ[0], True
    first = ", ".join(f"{i}: student {ours.get(i)!r}, teacher {theirs.get(i)!r}" for i in differ[:3])
    raise DrklError(
        f"The vocabularies differ: the student {student_name!r} has {len(ours)} tokens, the teacher {teacher_name!r} "
        f"{len(theirs)} (first ids that differ: {first}). One batch feeds both models, so an id has to be one "
        "token to both; choose a student of the teacher's family."
    )


def own_tokenizer(model: PreTrainedModel, tokenizer: Any) -> Any:
    """The tokenizer that lies beside a model; None where there is none, or one of another vocabulary.

    Args:
        model: in memory.
        tokenizer: the run's.
    """
    if not (source := source_of(model)):
        return None
    try:
        own = load_tokenizer(source)
        shared_tokens(words_of(tokenizer), own, "run", source)
    except DrklError:
        return None
    take_languages(own, words_of(tokenizer))  # both read one text, whose language was set on the run's
    return own


def shared_vocabulary(
    student: int, teacher: int, tokens: SharedTokens | None, tokenizer: Any, rows: Sequence[Row | LabelledRow]
) -> dict[str, int] | None:
    """Return the ids that two heads of these sizes are compared on; None for all of them.

    Args:
        student: the ids that the student scores.
        teacher: the ids that the teacher scores.
        tokens: what their tokenizers share.
        tokenizer: the one that made the rows.
        rows: all of them.

    Raises:
        DrklError: a row with a token that only one of the tokenizers has, or that one of the heads does not score.
    """
    if student == teacher and not (tokens and tokens.one_has_more):
        return None
    known = tokens.num_ids if tokens is not None else 1 + max(tokenizer.get_vocab().values())
    shared = min(known, student, teacher)
    tops = column(rows, "top")
    if len(beyond := np.flatnonzero(tops >= shared)):
        row, top = rows[int(beyond[0])], int(tops[beyond[0]])
        raise DrklError(
            f"Row {row.id!r} has the token {tokenizer.convert_ids_to_tokens(top)!r} (id {top}), but the student "
            f"and the teacher share the ids 0 to {shared - 1} only. Take such rows out, or choose a student with "
            "the teacher's tokenizer."
        )
    return {"shared": shared, "student": student, "teacher": teacher}


def check_rows(rows: Sequence[Row | LabelledRow], configs: Mapping[str, Any]) -> None:
    """Check that every model has embeddings for the rows' tokens, and a context long enough for them.

    Args:
        rows: all of them, of one kind.
        configs: the models' configs, by what errors call the models.

    Raises:
        DrklError: a row is too long for a model, or has a token that it does not know.
    """
    separate = isinstance(rows[0], Row) and rows[0].encoder_decoder
    for role, config in sorted(configs.items(), key=lambda item: context_of(item[1]) or math.inf):
        (_check_sides if separate else _check_length)(rows, config, role)
    tops = column(rows, "top")
    top = int(tops.max())
    for role, config in configs.items():
        if top >= (size := config.get_text_config().vocab_size):
            row_id = max(rows[int(number)].id for number in np.flatnonzero(tops == top))
            raise DrklError(
                f"Row {row_id!r} has the token id {top}, but the {role} has embeddings for ids 0 to {size - 1} "
                "only: its tokenizer belongs to another model."
            )


def _check_length(rows: Sequence[Any], config: Any, role: str) -> None:
    context, lengths = context_of(config), column(rows, "length")
    if context is None or lengths.max() <= context:
        return
    longest = rows[int(lengths.argmax())]
    message = f"Row {longest.id!r} has {longest.length} tokens and the {role}'s context {context}."
    if isinstance(longest, LabelledRow):
        raise DrklError(f"{message} Set data.max_tokens to at most {context}.")
    shortest = int(column(rows, "prompt").min())
    if shortest >= context:
        raise DrklError(
            f"{message} The shortest prompt has {shortest} tokens, so no row fits: shorten the prompts, or choose "
            "models with a longer context."
        )
    raise DrklError(
        f"{message} Set data.max_tokens to at most {context}, and data.max_prompt_tokens below that: the shortest "
        f"prompt has {shortest} tokens."
    )


def _check_sides(rows: Sequence[Any], config: Any, role: str) -> None:
    """The same of an encoder-decoder, whose encoder reads the prompts and whose decoder the responses."""
    for side, context, option in zip(
        ("prompt", "response"), contexts_of(config), ("max_prompt_tokens", "max_tokens"), strict=True
    ):
        lengths = column(rows, side)
        longest = int(lengths.argmax())
        if context is not None and lengths[longest] > context:
            whose = "encoder" if side == "prompt" else "decoder"
            raise DrklError(
                f"Row {rows[longest].id!r} has a {side} of {lengths[longest]} tokens and the {role}'s {whose} a "
                f"context of {context}. Set data.{option} to at most {context}; the shortest {side} has "
                f"{lengths.min()} tokens."
            )
