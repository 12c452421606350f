"""A teacher of an evaluation that is read from its cache: its own numbers on held-out rows, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drkl.errors import DrklError
from drkl.evaluation.bookkeeping import Source
from drkl.evaluation.store import fingerprint
from drkl.models.forward import decoder_start
from drkl.models.readout import Readout, readout_of
from drkl.processes import ALONE, Share
from drkl.teachers.cached import TeacherCache
from drkl.teachers.shards import is_cache

NOTE = "teacher_note"
"""The key of an evaluation's settings that says what was left out, and why."""


def as_cache(teacher: Any) -> TeacherCache | None:
    """The cache that stands for a teacher, open or by its folder; None where it is a model."""
    if isinstance(teacher, TeacherCache):
        return teacher
    if isinstance(teacher, str | Path) and is_cache(str(teacher)):
        return TeacherCache.open(teacher)
    return None


def read_cached(
    cache: TeacherCache,
    rows: Sequence[Any],
    *,
    pad_id: int,
    vocab_size: int | None = None,
    merged_ids: Sequence[int] = (),
    share: Share = ALONE,
    whole: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Readout:
    """What `drkl.models.readout.read` gives of the teacher itself, from its cache of hidden states."""
    states: Callable[..., Any] = cache.states
    return readout_of(
        states, cache.head, rows, pad_id=pad_id, decoder_start=decoder_start(cache.model), vocab_size=vocab_size,
        merged_ids=merged_ids, share=share, whole=whole, progress=progress,
    )  # fmt: skip


def cache_fingerprint(cache: TeacherCache) -> str:
    """A hash of what a cache has; another one of the same rows may differ in last digits."""
    return fingerprint(cache=cache.manifest["files"])


def put_cache(
    models: dict[str, Source],
    facts: dict[str, Any],
    cache: TeacherCache,
    rows: Sequence[Any],
    load: str,
    *,
    classifies: bool,
    start_missing: bool = False,
) -> None:
    """Let a cache stand for the teacher among models, and say in the facts what is left out then.

    Args:
        models: by name; changed. Without a teacher where the cache has not its whole distribution.
        facts: settings for the record; changed.
        cache: the teacher's.
        rows: those that are measured.
        load: what loads the teacher, in a sentence.
        classifies: whether the models are classifiers, which write nothing.
        start_missing: whether the student before training is made of the teacher's weights, and left out for that.

    Raises:
        DrklError: the cache lacks rows.
    """
    facts["models"] = {**facts["models"], "teacher": cache.manifest["teacher"]["name"]}
    where, left = repr(str(cache.folder)), []
    if cache.kind == "hidden":
        way_out = f"{load} drkl.cache_teacher(..., fill=True) adds rows to a cache."
        cache.check_rows(rows, decoder_start(cache.model), "held-out rows", way_out)
        models["teacher"], facts["teacher_cache"] = cache, str(cache.folder)
        why = f"The teacher is read from the cache {where}, which has no weights"
        left = [] if classifies else ["its answers are left out"]
    else:
        del models["teacher"], facts["models"]["teacher"]
        why = f"The cache {where} has the teacher's {cache.manifest['k']} largest logits, which give no exact numbers"
        left = ["the teacher is left out"]
    if start_missing:
        start = "the student before training, which is made of the teacher's weights"
        left.append(f"so is {start}" if left else f"{start}, is left out")
    if left:
        facts[NOTE] = f"{why}: {', and '.join(left)}. {load}"


def no_distribution(note: str) -> DrklError:
    """The error of an analysis beside a teacher that is left out."""
    return DrklError(f"The analysis compares the student with the whole distribution of its teacher. {note}")
