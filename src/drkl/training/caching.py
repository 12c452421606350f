"""Run a teacher over the rows of a run once, in the micro-batches that training would run, and keep what it knows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationMixin

from drkl._version import __version__
from drkl.data.batching import split_rows
from drkl.data.rows import Rows
from drkl.data.stored import column
from drkl.disk import writing
from drkl.errors import DrklError
from drkl.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from drkl.models.forward import decoder_start, lm_head
from drkl.models.load import words_of
from drkl.models.readout import SHORT_TOKENS_PER_BATCH, Batch, batch_rows, to_batch
from drkl.teachers.cached import SERVED, TeacherCache, add_states, check_same_text, folder_of, write_states
from drkl.teachers.served import ServedTeacher
from drkl.teachers.shards import GO_ON, filling
from drkl.teachers.stored import Stored, check_kind, topk_to_store
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair, make_pair
from drkl.training.plan import plan_run
from drkl.training.served import check_served_kind


def cache_teacher(
    teacher_model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    model: Any,
    output_dir: str | Path,
    args: DistillationConfig | None = None,
    processing_class: Any = None,
    kind: str = "hidden",
    k: int | None = None,
    temperatures: Sequence[float] = (),
    part: int = 0,
    parts: int = 1,
    fill: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherCache | None:
    """Write what a teacher knows of the rows of a run into a folder, and open it.

    Args:
        teacher_model: the teacher, as `DistillationTrainer` takes it. Of a cache of hidden states one of kind ``topk``
            is made without running the teacher.
        train_dataset: training rows, likewise; all of them are read, whatever ``max_steps`` is.
        eval_dataset: held-out rows, likewise.
        model: the student, likewise; it is left as it is. Its context decides how long a row may be.
        output_dir: the folder of the cache; a pass that was killed goes on in it.
        args: of the run that will read the cache: lengths, template, and the size of a step.
        processing_class: as `DistillationTrainer` takes it.
        kind: ``hidden`` keeps the teacher's last hidden states, which are exact for every objective at every
            temperature. ``topk`` keeps its ``k`` largest logits, and what all others add up to.
        k: of kind ``topk``, from 1 to the vocabulary less 1; None is 64.
        temperatures: of kind ``topk``, further temperatures that a loss may have; those of ``args`` and 1 are there.
        part: the part of the cache that this process writes, from 0.
        parts: the number of parts.
        fill: add the rows that a finished cache in ``output_dir`` lacks, in place of making one; its kind stays.
        progress: called with the batches that are read, and that are to be read.

    Returns:
        The cache; None where other parts of it are not there yet.

    Raises:
        DrklError: what `DistillationTrainer` refuses, another cache in the folder, a kind with a setting that is
            another's, values that are not finite, or a disk that is full.
    """
    folder = folder_of(output_dir, "output_dir")
    args = DistillationConfig(output_dir=str(output_dir)) if args is None else args
    check_kind(kind, k, temperatures)
    check_same_text(args.rollouts.is_on)
    if isinstance(teacher_model, ServedTeacher) and not fill:
        check_served_kind(kind, k, teacher_model.top_k, temperatures)
    with filling(folder) if fill else contextlib.nullcontext():
        pair = make_pair(model, teacher_model, args, train_dataset, eval_dataset, processing_class)
        return write_cache(
            [(pair, args)], folder, kind=kind, k=k, temperatures=temperatures, part=part, parts=parts, fill=fill,
            progress=progress,
        )  # fmt: skip


def write_cache(
    runs: Sequence[tuple[Pair, DistillationConfig]],
    folder: Path,
    *,
    kind: str = "hidden",
    k: int | None = None,
    temperatures: Sequence[float] = (),
    part: int = 0,
    parts: int = 1,
    fill: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherCache | None:
    """Write the cache of one or several stages with one teacher; arguments as `cache_teacher`'s.

    To fill a cache, the caller holds it (`drkl.teachers.shards.filling`).
    """
    check_kind(kind, k, temperatures)
    pair = runs[0][0]
    if pair.teacher is None:
        raise DrklError("There is no teacher to cache; expected a teacher_model.")
    if isinstance(pair.teacher, TeacherCache):
        check_made_of(pair.teacher, kind, fill=fill)
    if isinstance(pair.teacher, ServedTeacher) and not fill:
        k = check_served_kind(kind, k, pair.teacher.top_k, temperatures)
    for name, number, least in (("parts", parts, 1), ("part", part, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise DrklError(f"{name} is {number!r}; expected a whole number of at least {least}.")
    if part >= parts:
        raise DrklError(f"part is {part} of {parts}; expected a number from 0 to {parts - 1}.")
    if fill and (parts != 1 or kind != "hidden" or k is not None or temperatures):
        raise DrklError(
            "fill is true: one process adds rows to a cache, of the kind that it is. Leave part, parts, kind, k and "
            "temperatures out."
        )
    stored = _topk(runs, k, temperatures) if kind == "topk" else None
    every = _Batches(runs)
    about = {
        "drkl": __version__,
        "teacher": _about_teacher(pair),
        "tokenizer": {"fingerprint": tokenizer_fingerprint(pair.words)},
        "data": [_data_settings(own, args) for own, args in runs],
    }
    if fill:
        assert not isinstance(pair.teacher, TeacherCache), "a cache is refused above"
        add_states(folder, pair.teacher, every, about, progress=progress)
        return TeacherCache.open(folder)
    finished = write_states(
        folder,
        pair.teacher,
        every,
        about,
        stored=stored,
        part=part,
        parts=parts,
        files=lambda to: _write_description(to, pair),
        progress=progress,
    )
    return TeacherCache.open(folder) if finished else None


def check_made_of(cache: TeacherCache, kind: str, *, fill: bool = False) -> None:
    """Raise DrklError unless a cache of this kind can be made of another cache: largest logits of hidden states."""
    if cache.kind == "hidden" and kind == "topk" and not fill:
        return
    raise DrklError(
        f"The teacher is the cache {str(cache.folder)!r}, of kind {cache.kind}. Of a cache of hidden states one of "
        "kind topk can be made; for anything else give the teacher itself (leave teacher.cache out)."
    )


def _about_teacher(pair: Pair) -> dict[str, Any]:
    if isinstance(pair.teacher, TeacherCache):
        return dict(pair.teacher.manifest["teacher"])
    assert pair.teacher is not None
    if isinstance(pair.teacher, ServedTeacher):  # no more is known of it than its name
        return {"name": pair.teacher_name, "fingerprint": f"{SERVED}{pair.teacher.name}"}
    return {"name": pair.teacher_name, "fingerprint": model_fingerprint(pair.teacher.model)}


def _topk(runs: Sequence[tuple[Pair, DistillationConfig]], k: int | None, temperatures: Sequence[float]) -> Stored:
    pair = runs[0][0]
    assert pair.teacher is not None
    classifies = pair.classes is not None
    shared = pair.vocab_size or (0 if classifies else lm_head(pair.teacher.model).vocab_size)
    every = [*temperatures, *(args.temperature for _, args in runs)]
    if isinstance(pair.teacher, ServedTeacher):
        shared, every = pair.teacher.vocab_size, []
    return topk_to_store(k, every, shared, pair.teacher.model.dtype, classifies=classifies)


def _data_settings(pair: Pair, args: DistillationConfig) -> dict[str, Any]:
    return {"template": args.template, "turns": args.turns, **pair.lengths._asdict()}


def _write_description(folder: Path, pair: Pair) -> list[str]:
    """Write config, generation settings and tokenizer, so that the teacher's folder is not needed any more."""
    assert pair.teacher is not None
    teacher = pair.teacher.model
    with writing(folder, then=GO_ON), TemporaryDirectory(dir=folder, prefix=".part-files-") as whole:
        teacher.config.save_pretrained(whole)
        if isinstance(teacher, GenerationMixin):
            teacher.generation_config.save_pretrained(whole)
        words_of(pair.teacher_tokenizer or pair.tokenizer).save_pretrained(whole, save_jinja_files=False)
        names = sorted(path.name for path in Path(whole).iterdir())
        for name in names:
            os.replace(Path(whole) / name, folder / name)
    return names


class _Batches(Sequence[Batch]):
    """What the teacher reads in the first epoch of every run, and in the evaluations of held-out rows.

    Each is read and collated when it is asked for.
    """

    def __init__(self, runs: Sequence[tuple[Pair, DistillationConfig]]) -> None:
        self._places = [(pair, *where) for pair, args in runs for where in _places_of_batches(pair, args)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        pair, rows, places = self._places[place]
        some = [rows[number] for number in places.tolist()]
        start = decoder_start(pair.student)
        return to_batch(some, [*range(len(some))], pad_id=pair.pad_id, decoder_start=start)


def _places_of_batches(pair: Pair, args: DistillationConfig) -> Iterator[tuple[Any, NDArray[np.int32]]]:
    """The rows of each batch: which they are of, and their numbers."""
    rows: Any = pair.rows
    once = replace(args, max_steps=-1, num_train_epochs=1.0, dataloader_drop_last=False)
    # As one process trains, however many write the cache: it is the same then.
    steps, _ = plan_run(column(rows, "length"), once, world_size=1)
    for step in steps:
        for places in split_rows(step, args.gradient_accumulation_steps):
            yield rows, np.array(places, np.int32)
    heldout: Rows = pair.eval_rows
    for some in (heldout[: args.eval_rows], heldout[args.eval_rows :] if args.eval_rows is not None else []):
        for places in batch_rows(column(some, "length"), SHORT_TOKENS_PER_BATCH, args.per_device_eval_batch_size):
            yield some, np.array(places, np.int32)
