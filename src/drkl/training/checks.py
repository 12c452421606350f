"""What is checked before a run writes anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from drkl.data.labelled import LabelledRow
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.models.config import StudentConfig
from drkl.models.forward import decoder_start, is_encoder_decoder
from drkl.models.load import load_config, load_tokenizer, shared_tokens
from drkl.models.precision import has_device
from drkl.models.student import source_model, student_config
from drkl.runs import RunFolder


def check_folder(run: RunFolder, mode: str) -> None:
    """Raise DrklError where a run of this mode (new, overwrite, resume) must not touch the folder."""
    if mode == "resume":
        if run.is_finished():
            raise DrklError(f"The run {str(run.root)!r} is finished; there is nothing to resume.")
        return
    if not (run.root.exists() or run.root.is_symlink()):
        return
    if mode == "new":
        raise DrklError(
            f"The run folder {str(run.root)!r} exists. `--overwrite` replaces it, `--resume {run.root}` continues it, "
            "run.name=OTHER makes another."
        )
    if run.root.is_symlink() or not run.root.is_dir():
        raise DrklError(f"{str(run.root)!r} is no folder, so it is not replaced.")
    if any(run.root.iterdir()) and not run.config_path.is_file():
        raise DrklError(
            f"{str(run.root)!r} exists and is no run folder (it has no config.yaml), so it is not replaced."
        )


def check_device(name: str) -> None:
    """Raise DrklError where this machine has no such device."""
    if not has_device(name):
        raise DrklError(f"run.device is {name!r}, which this machine (or this torch) does not have; try auto or cpu.")


def check_families(student: StudentConfig, teacher_name: str | None, tokenizer: Any = None) -> None:
    """Raise DrklError where an encoder-decoder and a decoder-only model are to be compared."""
    if teacher_name is None:
        return
    ours, theirs = student_config(student, teacher_name, tokenizer), load_config(teacher_name)
    if is_encoder_decoder(ours) != is_encoder_decoder(theirs):
        kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
        name = student.model_type or source_model(student, teacher_name)
        raise DrklError(
            f"The student {name!r} is {kinds[is_encoder_decoder(ours)]} and the teacher "
            f"{teacher_name!r} {kinds[is_encoder_decoder(theirs)]}: they read a row in different ways, so their "
            "positions cannot be compared. Choose both of one kind."
        )
    if decoder_start(ours) != decoder_start(theirs):
        raise DrklError(
            f"The student's decoder starts with the token {decoder_start(ours)} and the teacher's with "
            f"{decoder_start(theirs)}; one batch feeds both. Set decoder_start_token_id to the same in both configs."
        )


class SharedTokens(NamedTuple):
    """How many ids, from 0, mean the same in both tokenizers, and whether one of the two has more."""

    num_ids: int
    one_has_more: bool


def check_tokenizers(
    student: StudentConfig, teacher_name: str | None, *, classifier: bool = False
) -> SharedTokens | None:
    """Compare the tokenizers of weights that were learnt apart; None where there is one tokenizer only.

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


def shared_vocabulary(
    student: int, teacher: int, tokens: SharedTokens | None, tokenizer: Any, rows: Sequence[Row | LabelledRow]
) -> dict[str, int] | None:
    """The ids that two heads of these sizes are compared on; None for all of them.

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
    for row in rows:
        if (top := max(row.all_ids)) >= shared:
            raise DrklError(
                f"Row {row.id!r} has the token {tokenizer.convert_ids_to_tokens(top)!r} (id {top}), but the student "
                f"and the teacher share the ids 0 to {shared - 1} only. Take such rows out, or choose a student with "
                "the teacher's tokenizer."
            )
    return {"shared": shared, "student": student, "teacher": teacher}


def check_rows(rows: Sequence[Row | LabelledRow], model_config: Any, whose: str) -> None:
    """Raise DrklError where a model has no embedding for a row's tokens, or no room for them."""
    text = model_config.get_text_config()
    longest = max(rows, key=lambda row: row.length)
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and longest.length > context:
        raise DrklError(
            f"Row {longest.id!r} has {longest.length} tokens and the {whose}'s context {context}. Set data.max_tokens "
            f"to at most {context}."
        )
    top = max((max(row.all_ids), row.id) for row in rows)
    if top[0] >= text.vocab_size:
        raise DrklError(
            f"Row {top[1]!r} has the token id {top[0]}, but the {whose} has embeddings for ids 0 to "
            f"{text.vocab_size - 1} only: its tokenizer belongs to another model."
        )


def check_disk(run: RunFolder, student: PreTrainedModel) -> None:
    """Raise DrklError without room for three checkpoints (best, newest, the one being written) and the student.

    A checkpoint is weights and two Adam moments; those that are there already take no new room.
    """
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    needed = weights * (3 * 3 + 1)
    there = next(p for p in (run.root, *run.root.absolute().parents) if p.exists())
    held = sum(p.stat().st_size for p in Path(run.checkpoints_path).rglob("*") if p.is_file())
    free = shutil.disk_usage(there).free + held
    if free < needed:
        raise DrklError(
            f"Checkpoints of this student need about {needed / 1e9:.1f} GB where {str(run.root)!r} lies; "
            f"{free / 1e9:.1f} GB are free. Make room, or put the run elsewhere with run.dir=FOLDER."
        )
