"""A teacher that was run before: what it knew is read from a cache, and its body is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from drkl.data.classification import LabelledRow
from drkl.data.collate import each_row
from drkl.data.stored import StoredRows
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.losses.topk import TopK
from drkl.models.load import load_config, without_weights
from drkl.models.memory import memory_told
from drkl.models.precision import DTYPES
from drkl.models.readout import Batch, to_batch
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.teachers.served import ServedTeacher
from drkl.teachers.shards import (
    DIGEST_BYTES,
    MANIFEST,
    CacheRow,
    RowPlace,
    ShardFiller,
    ShardReader,
    ShardWriter,
    differences,
    has_kinds,
    save_whole,
)
from drkl.teachers.stored import Stored, StoredStates, StoredTopK, stored_in

HEAD = "head.safetensors"
SHARD_BYTES = 64 * 2**20
"""Values of a shard, about."""
ADD_ROWS = (
    "Let teacher.fill_cache: true (in Python drkl.cache_teacher(..., fill=True)) load the teacher and add these rows, "
    "or leave them out."
)
CACHING = "A smaller training.tokens_per_step or data.max_tokens makes smaller batches; teacher.dtype=bf16 halves it."
"""What needs less memory where a teacher reads rows for its cache."""
SERVED = "served as "
"""What stands, with the name that a server has for it, for the fingerprint of a teacher whose weights are not here."""
_KINDS: dict[str, type] = {"kind": str, "teacher": dict, "tokenizer": dict, "data": list}


class TeacherCache:
    """A teacher's hidden states and output head, or its k largest logits, as `drkl.cache_teacher` wrote them.

    It stands wherever a live teacher stands in training. ``model`` is the teacher without weights, for its config.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """
        Args:
            folder: the cache's.
            device: of the head.

        Raises:
            DrklError: it is no finished cache, or one of another version.
        """
        self.folder, self._rows, self._device = folder, ShardReader(folder), torch.device(device)
        stored = stored_in(self.manifest)
        if stored is None or not has_kinds(self.manifest, _KINDS):
            raise DrklError(
                f"{str(folder / MANIFEST)!r} does not describe the hidden states of a teacher, nor its largest logits. "
                "Make the cache again."
            )
        self.stored = stored
        """What is known at each position."""
        self._rows.check_descriptions()
        has_head = isinstance(stored, StoredStates) and stored.has_head
        self.model = _without_weights(folder, stored)
        self.pad_id: int | None = None
        self.head = _read_head(self._rows, device) if has_head else None

    @classmethod
    def open(cls, folder: str | Path, device: torch.device | str = "cpu") -> TeacherCache:
        """Open the cache of a folder; the arguments are those of the class."""
        return cls(folder_of(folder, "folder"), device)

    @classmethod
    def of(cls, config: TeacherConfig, device: torch.device | str = "cpu") -> TeacherCache:
        """Open the cache of a config.

        Raises:
            DrklError: it is no finished cache, or one of another teacher.
        """
        assert config.cache is not None
        cache = cls(Path(config.source), device)
        name = cache.manifest["teacher"]["name"]
        if name != config.model:
            raise DrklError(
                f"teacher.model is {config.model!r}, and the cache {config.cache!r} is of {name!r}. Set "
                "teacher.model to that, or make a cache of this one with `drkl cache`."
            )
        what = "states" if cache.kind == "hidden" else "logits of a teacher"
        if config.dtype != "auto" and DTYPES[config.dtype] != cache.model.dtype:
            raise DrklError(
                f"teacher.dtype is {config.dtype}, and the cache {config.cache!r} has {what} in "
                f"{cache.manifest['dtype']}. Leave teacher.dtype out, or make a cache in that dtype with `drkl cache`."
            )
        return cache

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the cache is of."""
        return self._rows.manifest

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self._device

    @property
    def kind(self) -> str:
        """``hidden``, or ``topk``."""
        return self.stored.kind

    @property
    def k(self) -> int | None:
        """How many logits are known at a position, with the others in sum; None for all."""
        return self.stored.k if isinstance(self.stored, StoredTopK) else None

    def to(self, device: torch.device | str) -> TeacherCache:
        """Move the head to a device, in place, and return the cache."""
        self._device = torch.device(device)
        self.head = None if self.head is None else self.head.to(device)
        return self

    def hidden_at(
        self, batch: Mapping[str, Tensor], keep: Tensor, *, labels: Tensor | None = None, remember: bool = True
    ) -> Tensor | TopK:
        """Return what is known at the `n` positions where ``keep`` `[batch, tokens]` is true.

        Args:
            batch: what the teacher reads.
            keep: the positions.
            labels: `[n]`, the tokens observed there, for their logits in a `TopK`.
            remember: without effect.

        Returns:
            The last hidden states `[n, hidden]`, or the `TopK` of a cache of that kind.

        Raises:
            DrklError: the cache lacks a row, a position of one, or the logit of another label.
        """
        del remember  # everything is remembered already
        found = [self._read(row) for row in rows_of(batch, keep, labels if self.stored.labelled else None)]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise DrklError(
                f"The cache {str(self.folder)!r} lacks {len(found) - len(parts)} of the {len(found)} rows of a batch. "
                "It was made from other rows, or with another template, tokenizer or length: make it again from these."
            )
        if not parts:
            return self.stored.empty().to(keep.device)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self.stored.restored(tensors, with_labels=labels is not None).to(keep.device)

    def check_rows(
        self, rows: Sequence[Row | LabelledRow], decoder_start: int | None, what: str, way_out: str = ADD_ROWS
    ) -> None:
        """Raise DrklError unless the cache has all rows.

        Args:
            rows: tokenised rows.
            decoder_start: of an encoder-decoder; None for others.
            what: the rows, in a sentence: "training rows".
            way_out: what to do, in a sentence.
        """
        missing = self._missing(rows, decoder_start)
        lacking = [name for name, row in missing if self._places(row._replace(labels=None)) is None]
        if lacking:
            facts = {"kind": self.kind} | ({"k": self.manifest["k"]} if "k" in self.manifest else {})
            settings = ", ".join(f"{name} {value}" for name, value in (self.manifest["data"][0] | facts).items())
            raise DrklError(
                f"The cache {str(self.folder)!r} lacks {len(lacking):,} of {len(rows):,} {what}, first {lacking[0]!r}. "
                f"It was made from other rows, or with other settings than {settings} or another tokenizer. {way_out}"
            )
        if missing:
            raise DrklError(
                f"The cache {str(self.folder)!r} has {len(missing):,} of {len(rows):,} {what} with another last token, "
                f"first {missing[0][0]!r}, and so not the logit of theirs. {way_out}"
            )

    def lacking(self, rows: Sequence[Row | LabelledRow], decoder_start: int | None) -> list[str]:
        """The ids of the rows that the cache has not; arguments as `check_rows`'s."""
        return [name for name, _ in self._missing(rows, decoder_start)]

    def has(self, row: CacheRow) -> bool:
        """Whether the cache has all positions of a row."""
        return self._places(row) is not None

    def _missing(self, rows: Sequence[Row | LabelledRow], decoder_start: int | None) -> list[tuple[str, CacheRow]]:
        # Rows on disk are looked up once for all runs: what a finished cache has it keeps.
        stored = rows if isinstance(rows, StoredRows) else None
        facts = [self.manifest["files"], decoder_start, self.stored.labelled]
        fact = f"cached-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}"
        if stored is not None and stored.is_known(fact):
            return []
        wanted = ((row.id, row_of(row, decoder_start, labelled=self.stored.labelled)) for row in rows)
        missing = [(name, row) for name, row in wanted if not self.has(row)]
        if stored is not None and not missing:
            stored.note(fact)
        return missing

    def states(self, batch: Batch) -> Tensor | TopK:
        """Return what is known at the positions that are read of some rows, on the cache's device."""
        read = batch.for_teacher
        return self.hidden_at(read.inputs, read.keep, labels=batch.labels).to(self._device)

    def _places(self, row: CacheRow) -> list[tuple[RowPlace, CacheRow]] | None:
        """Where the positions of a row lie, and what of it lies there; None where one is nowhere."""
        found = []
        for place in self._rows.find(row.digest):
            labels = None if row.labels is None else self._rows.labels(place)
            known = None if labels is None else tuple(labels.tolist())
            found.append((place, CacheRow(row.digest, tuple(self._rows.positions(place).tolist()), known)))
        entries = {entry for _, held in found for entry in held.entries}
        return found if found and entries.issuperset(row.entries) else None

    def _read(self, row: CacheRow) -> dict[str, Tensor] | None:
        """The tensors of a row; None where the cache lacks it."""
        found = self._places(row)
        if found is None:
            return None
        parts = [self._rows.read(place) for place, _ in found]
        values = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        held = [entry for _, own in found for entry in own.entries]
        if held == row.entries:
            return values
        order = {entry: place for place, entry in enumerate(held)}
        places = [order[entry] for entry in row.entries]
        return {name: value[places] for name, value in values.items()}


def folder_of(value: Any, name: str) -> Path:
    """A folder that was given as ``name``; raise DrklError where it is no path."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise DrklError(f"{name} is {value!r}; expected the path of a folder.")
    return Path(value)


def rows_of(batch: Mapping[str, Tensor], keep: Tensor, labels: Tensor | None = None) -> list[CacheRow]:
    """What a teacher reads in each row of a batch, padding aside, and at which positions its states are kept.

    A row that keeps none is left out: it is padding of the batch itself.

    Args:
        batch: the inputs of a batch of `drkl.data.collate.collate`, padded or packed.
        keep: as large as its labels.
        labels: `[n]`, the tokens observed at the positions, where rows that differ in them are others.
    """
    observed = None if labels is None else labels.tolist()
    rows = []
    before = 0
    for read, kept in each_row({name: value.cpu() for name, value in batch.items()}, keep.cpu()):
        positions = tuple(np.flatnonzero(kept.numpy()).tolist())
        if not positions:
            continue
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for ids in read:
            tokens = ids.numpy().astype("<i8")
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        own = None if observed is None else tuple(observed[before : before + len(positions)])
        rows.append(CacheRow(digest.digest(), positions, own))
        before += len(positions)
    return rows


def row_of(row: Row | LabelledRow, decoder_start: int | None, *, labelled: bool = False) -> CacheRow:
    """A row as `rows_of` finds it in a batch, with its labels where those are asked for."""
    batch = to_batch([row], [0], pad_id=0, decoder_start=decoder_start)
    (found,) = _rows_in(batch, labelled=labelled)
    return found


def check_same_text(samples: bool) -> None:
    """Raise DrklError where a run samples answers, of which a cache has no states."""
    if samples:
        raise DrklError(
            "rollout_share is above 0: the student writes new text at every step, and a teacher cache has the data's "
            "alone. Train with the teacher itself, or leave rollout_share out."
        )


def write_states(
    folder: Path,
    teacher: LiveTeacher | TeacherCache | ServedTeacher,
    batches: Sequence[Batch],
    about: Mapping[str, Any],
    *,
    stored: Stored | None = None,
    part: int = 0,
    parts: int = 1,
    files: Callable[[Path], Sequence[str]] = lambda folder: (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> bool:
    """Run a teacher over batches, each row once, and write what is to be kept; say whether the cache is finished.

    Args:
        folder: the cache's.
        teacher: on its device; a cache of states, for largest logits made of them.
        batches: as training reads them and in its order; each is asked for twice.
        about: what the cache is of.
        stored: what is kept at each position; None is the teacher's states.
        part: the part that this process writes, from 0.
        parts: the number of parts.
        files: writes further files of the cache into the folder, and returns their names.
        progress: called with the batches that are read, and that are to be read.

    Raises:
        DrklError: the folder holds another cache, values are not finite, or the disk is full.
    """
    if stored is None:
        assert isinstance(teacher, LiveTeacher), "a server has no states"
        stored = states_of(teacher)
    shards, members = _plan(batches, stored)
    with ShardWriter(folder, {**stored.described(), **about}, shards, part=part, parts=parts) as writer:
        _write(writer, teacher, batches, stored, shards, members, progress)
        head = teacher.head if isinstance(stored, StoredStates) else None
        return writer.finish(lambda: [*_write_head(folder, head), *files(folder)])


def add_states(
    folder: Path,
    teacher: LiveTeacher | ServedTeacher,
    batches: Sequence[Batch],
    about: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Run a teacher over the batches that have rows which a finished cache lacks, add these, and return their number.

    Args:
        folder: the cache's; the caller holds it (`filling`).
        teacher: the cache's, on its device.
        batches: as in `write_states`.
        about: what a cache of these batches would be of.
        progress: as in `write_states`.

    Raises:
        DrklError: the cache is of another teacher or tokenizer, values are not finite, or the disk is full.
    """
    cache = TeacherCache.open(folder)
    _check_same(cache, teacher, about)
    shards, members = _plan(batches, cache.stored, cache.has)
    if not shards[0]:
        return 0
    with ShardFiller(cache._rows, shards, about["data"]) as writer:
        _write(writer, teacher, batches, cache.stored, shards, members, progress)
        writer.finish()
    return sum(map(len, shards))


def _check_same(cache: TeacherCache, teacher: LiveTeacher | ServedTeacher, about: Mapping[str, Any]) -> None:
    """Raise DrklError where a teacher or a tokenizer is not the one that a cache is of."""
    if cache.manifest["tokenizer"] != about["tokenizer"]:
        raise other_tokenizer(cache.folder)
    if isinstance(teacher, ServedTeacher):
        known = StoredTopK(teacher.top_k, (1.0,), teacher.vocab_size or 0, cache.stored.dtype)
        if other := differences(cache.stored.described(), known.described()):
            raise DrklError(
                f"The teacher's server does not give what the cache {str(cache.folder)!r} has: {other}. Make a cache "
                "of what it gives, or set teacher.top_k to the cache's k."
            )
    elif teacher.model.dtype != cache.stored.dtype:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (teacher.model.dtype, cache.stored.dtype)]
        raise DrklError(
            f"The teacher is in {dtypes[0]}, and the cache {str(cache.folder)!r} is of one in {dtypes[1]}. Load the "
            "teacher in that dtype."
        )
    check_weights(cache.manifest, cache.folder, about["teacher"]["name"], about["teacher"]["fingerprint"])


def check_weights(manifest: Mapping[str, Any], folder: Path, teacher: str, fingerprint: str) -> None:
    """Raise DrklError where the weights of a teacher are not those that a cache is of.

    Args:
        manifest: of the cache.
        folder: of the cache.
        teacher: the teacher's name.
        fingerprint: `drkl.models.fingerprint.model_fingerprint` of it. The weights of a served one are not known, so
            that a cache of it may be of any.
    """
    own = manifest["teacher"]
    if own["fingerprint"].startswith(SERVED) and not fingerprint.startswith(SERVED):
        return
    if own["fingerprint"] != fingerprint:
        raise DrklError(
            f"The teacher {teacher!r} is not the one of the cache {str(folder)!r}, which is of {own['name']!r}: its "
            f"weights or its config differ (fingerprint {fingerprint[:12]}, not {own['fingerprint'][:12]}). Use the "
            "teacher that the cache was made of, or make a cache of this one with `drkl cache`."
        )


def other_tokenizer(folder: Path) -> DrklError:
    """The error of a cache that was made with another tokenizer than the run's."""
    return DrklError(
        f"The cache {str(folder)!r} was made with another tokenizer: its ids mean other tokens. Use the one that lies "
        "in the cache, or make the cache again."
    )


def _write(
    writer: ShardWriter,
    teacher: LiveTeacher | TeacherCache | ServedTeacher,
    batches: Sequence[Batch],
    stored: Stored,
    shards: Sequence[Sequence[CacheRow]],
    members: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> None:
    """Write the shards of a plan that are not there yet."""
    todo = writer.missing
    read = stored.reader(teacher) if todo else None
    if isinstance(teacher, ServedTeacher):
        teacher.expect(batches[place] for number in todo for place in members[number])
    done, of = 0, sum(len(members[number]) for number in todo)
    for number in todo:
        assert read is not None
        found: dict[CacheRow, dict[str, Tensor]] = {}
        wanted = Counter(shards[number])
        for place in members[number]:
            batch = batches[place]
            rows = _rows_in(batch, labelled=stored.labelled)
            counts = [len(row.positions) for row in rows]
            with memory_told(f"as the teacher reads {batch.size()}", CACHING):
                columns = {name: value.split(counts) for name, value in read(batch).items()}
            for line, row in enumerate(rows):
                if row in wanted:
                    found.setdefault(row, {name: column[line] for name, column in columns.items()})
            done += 1
            progress(done, of)
        names = found[shards[number][0]] if found else {}
        writer.write(number, {name: torch.cat([found[row][name] for row in shards[number]]) for name in names})


def states_of(teacher: LiveTeacher | TeacherCache) -> StoredStates:
    """What is kept of a teacher's states."""
    head = teacher.head
    width = int(teacher.model.config.num_labels or 0) if head is None else int(head.weight.shape[1])
    return StoredStates(width, teacher.model.dtype, head is not None)


def _rows_in(batch: Batch, *, labelled: bool) -> list[CacheRow]:
    read = batch.for_teacher
    return rows_of(read.inputs, read.keep, batch.labels if labelled else None)


def _plan(
    batches: Sequence[Batch], stored: Stored, known: Callable[[CacheRow], bool] = lambda row: False
) -> tuple[list[list[CacheRow]], list[list[int]]]:
    """The rows of each shard, each row where it comes first, and the batches that a shard's rows are in.

    Rows that are ``known`` are in no shard.
    """
    positions = max(1, SHARD_BYTES // stored.bytes_per_position)
    shards: list[list[CacheRow]] = [[]]
    members: list[list[int]] = [[]]
    seen: set[CacheRow] = set()
    count = 0
    for place, batch in enumerate(batches):
        rows = dict.fromkeys(_rows_in(batch, labelled=stored.labelled))
        new = [row for row in rows if row not in seen and not known(row)]
        seen.update(new)
        if not new:
            continue
        if count >= positions:
            shards.append([])
            members.append([])
            count = 0
        shards[-1] += new
        members[-1].append(place)
        count += sum(len(row.positions) for row in new)
    return shards, members


def _write_head(folder: Path, head: LMHead | None) -> list[str]:
    if head is None:
        return []
    tensors = {"weight": head.weight, "scale": torch.tensor(head.scale, dtype=torch.float64)}
    if head.bias is not None:
        tensors["bias"] = head.bias
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
    save_whole(folder / HEAD, {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    return [HEAD]


def _read_head(rows: ShardReader, device: torch.device | str) -> LMHead:
    tensors = load_file(rows.check(HEAD), device=str(device))
    values: dict[str, Any] = {name: float(value) if value.ndim == 0 else value for name, value in tensors.items()}
    return LMHead(**values)


def _without_weights(folder: Path, stored: Stored) -> PreTrainedModel:
    classifier = isinstance(stored, StoredStates) and not stored.has_head
    return without_weights(load_config(folder), stored.dtype, str(folder), classifier=classifier)
