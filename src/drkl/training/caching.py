"""Compute a teacher's hidden states for the rows of a run once, in the micro-batches that training would run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from drkl._version import __version__
from drkl.data.batching import split_rows
from drkl.data.collate import collate, teacher_inputs
from drkl.data.rows import Rows
from drkl.errors import DrklError
from drkl.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from drkl.models.forward import decoder_start
from drkl.models.load import words_of
from drkl.models.readout import SHORT_TOKENS_PER_BATCH, batches
from drkl.teachers.cached import TeacherCache, add_states, check_same_text, write_states
from drkl.teachers.live import LiveTeacher
from drkl.teachers.shards import filling, writing
from drkl.training.arguments import DistillationConfig
from drkl.training.pair import Pair, make_pair
from drkl.training.plan import plan_run

Batch = tuple[Mapping[str, Tensor], Tensor]


def cache_teacher(
    teacher_model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    model: Any,
    output_dir: str | Path,
    args: DistillationConfig | None = None,
    processing_class: Any = None,
    part: int = 0,
    parts: int = 1,
    fill: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherCache | None:
    """Write the hidden states of a teacher for the rows of a run into a folder, and open it.

    Args:
        teacher_model: the teacher, as `DistillationTrainer` takes it.
        train_dataset: training rows, likewise; all of them are read, whatever ``max_steps`` is.
        eval_dataset: held-out rows, likewise.
        model: the student, likewise; it is left as it is. Its context decides how long a row may be.
        output_dir: the folder of the cache; a pass that was killed goes on in it.
        args: of the run that will read the cache: lengths, template, and the size of a step.
        processing_class: as `DistillationTrainer` takes it.
        part: the part of the cache that this process writes, from 0.
        parts: the number of parts.
        fill: add the rows that a finished cache in ``output_dir`` lacks, in place of making one.
        progress: called with the batches that are read, and that are to be read.

    Returns:
        The cache; None where other parts of it are not there yet.

    Raises:
        DrklError: what `DistillationTrainer` refuses, another cache in the folder, states that are not finite, or a
            disk that is full.
    """
    args = DistillationConfig(output_dir=str(output_dir)) if args is None else args
    check_same_text(args.rollouts.is_on)
    folder = Path(output_dir)
    with filling(folder) if fill else contextlib.nullcontext():
        pair = make_pair(model, teacher_model, args, train_dataset, eval_dataset, processing_class)
        return write_cache([(pair, args)], folder, part=part, parts=parts, fill=fill, progress=progress)


def write_cache(
    runs: Sequence[tuple[Pair, DistillationConfig]],
    folder: Path,
    *,
    part: int = 0,
    parts: int = 1,
    fill: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherCache | None:
    """Write the cache of one or several stages with one teacher; arguments as `cache_teacher`'s.

    To fill a cache, the caller holds it (`drkl.teachers.shards.filling`).
    """
    pair = runs[0][0]
    if not isinstance(pair.teacher, LiveTeacher):
        raise DrklError("There is no teacher to cache; expected a teacher_model with weights.")
    if not 0 <= part < parts:
        raise DrklError(f"part is {part} of {parts}; expected a number from 0 to {parts - 1}.")
    if fill and parts != 1:
        raise DrklError(f"part is {part} of {parts}, and fill is true; one process fills a cache. Leave part out.")
    every = _Batches(runs)
    about = {
        "drkl": __version__,
        "teacher": {"name": pair.teacher_name, "fingerprint": model_fingerprint(pair.teacher.model)},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(pair.words)},
        "data": [_data_settings(own, args) for own, args in runs],
    }
    if fill:
        add_states(folder, pair.teacher, every, about, progress=progress)
        return TeacherCache.open(folder)
    finished = write_states(
        folder,
        pair.teacher,
        every,
        about,
        part=part,
        parts=parts,
        files=lambda to: _write_description(to, pair),
        progress=progress,
    )
    return TeacherCache.open(folder) if finished else None


def _data_settings(pair: Pair, args: DistillationConfig) -> dict[str, Any]:
    return {"template": args.template, "turns": args.turns, **pair.lengths._asdict()}


def _write_description(folder: Path, pair: Pair) -> list[str]:
    """Write config, generation settings and tokenizer, so that the teacher's folder is not needed any more."""
    assert pair.teacher is not None
    teacher = pair.teacher.model
    with writing(folder), TemporaryDirectory(dir=folder, prefix=".part-files-") as whole:
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

    Each is collated when it is asked for, so that the rows of a run are in memory once.
    """

    def __init__(self, runs: Sequence[tuple[Pair, DistillationConfig]]) -> None:
        self._rows = [(pair, rows) for pair, args in runs for rows in _rows_of_batches(pair, args)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        pair, rows = self._rows[place]
        return teacher_inputs(collate(rows, pad_id=pair.pad_id, decoder_start=decoder_start(pair.student)))


def _rows_of_batches(pair: Pair, args: DistillationConfig) -> Iterator[list[Any]]:
    rows: Any = pair.rows
    once = replace(args, max_steps=-1, num_train_epochs=1.0, dataloader_drop_last=False)
    # As one process trains, however many write the cache: it is the same then.
    steps, _ = plan_run([row.length for row in rows], once, world_size=1)
    for step in steps:
        for places in split_rows(step, args.gradient_accumulation_steps):
            yield [rows[place] for place in places]
    heldout: Rows = pair.eval_rows
    for some in (heldout[: args.eval_rows], heldout[args.eval_rows :] if args.eval_rows is not None else []):
        read = batches(
            some,
            pad_id=pair.pad_id,
            decoder_start=decoder_start(pair.student),
            tokens_per_batch=SHORT_TOKENS_PER_BATCH,
            rows_per_batch=args.per_device_eval_batch_size,
        )
        for one in read:
            yield [some[place] for place in one.rows]
