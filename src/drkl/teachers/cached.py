"""A teacher whose hidden states were computed before: they are read from a cache, and its body is never loaded."""

from __future__ import annotations

import hashlib
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
from drkl.data.collate import collate, teacher_inputs
from drkl.data.tokenize import Row
from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.models.load import load_config, model_class
from drkl.models.precision import DTYPES
from drkl.models.readout import Batch
from drkl.teachers.config import TeacherConfig
from drkl.teachers.live import LiveTeacher
from drkl.teachers.shards import (
    DIGEST_BYTES,
    MANIFEST,
    CacheRow,
    RowPlace,
    ShardFiller,
    ShardReader,
    ShardWriter,
    has_kinds,
    save_whole,
)

HEAD = "head.safetensors"
SHARD_BYTES = 64 * 2**20
"""Values of a shard, about."""
STATES = "states"
ADD_ROWS = (
    "Let teacher.fill_cache: true (in Python drkl.cache_teacher(..., fill=True)) load the teacher and add these rows, "
    "or leave them out."
)
_KINDS: dict[str, type] = {
    "kind": str, "width": int, "dtype": str, "head": bool, "teacher": dict, "tokenizer": dict, "data": list,
}  # fmt: skip


class TeacherCache:
    """A teacher's hidden states and output head, read from the folder that `drkl.cache_teacher` wrote.

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
        self.folder, self._rows = folder, ShardReader(folder)
        if not (has_kinds(self.manifest, _KINDS) and self.manifest["kind"] == "hidden"):
            raise DrklError(
                f"{str(folder / MANIFEST)!r} does not describe the hidden states of a teacher. Make the cache again."
            )
        self._rows.check_descriptions()
        self.model = _without_weights(folder, self._rows.manifest)
        self.pad_id: int | None = None
        self.head = _read_head(self._rows, device) if self._rows.manifest["head"] else None

    @classmethod
    def open(cls, folder: str | Path, device: torch.device | str = "cpu") -> TeacherCache:
        """Open the cache of a folder; the arguments are those of the class."""
        return cls(Path(folder), device)

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
        if config.dtype != "auto" and DTYPES[config.dtype] != cache.model.dtype:
            raise DrklError(
                f"teacher.dtype is {config.dtype}, and the cache {config.cache!r} has states in "
                f"{cache.manifest['dtype']}. Leave teacher.dtype out, or make a cache in that dtype with `drkl cache`."
            )
        return cache

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the cache is of."""
        return self._rows.manifest

    def hidden_at(self, batch: Mapping[str, Tensor], keep: Tensor, *, remember: bool = True) -> Tensor:
        """Return the last hidden states `[n, hidden]` at the positions where ``keep`` `[batch, tokens]` is true.

        Raises:
            DrklError: the cache lacks a row, or a position of one.
        """
        del remember  # everything is remembered already
        parts = []
        lacking = 0
        for row in rows_of(batch, keep):
            states = self._states(row)
            lacking += states is None
            parts.append(torch.empty(0) if states is None else states)
        if lacking:
            raise DrklError(
                f"The cache {str(self.folder)!r} lacks {lacking} of the {len(parts)} rows of a batch. It was made from "
                "other rows, or with another template, tokenizer or length: make it again from these."
            )
        if not parts:
            return torch.empty(0, self._rows.manifest["width"], dtype=self.model.dtype, device=keep.device)
        return torch.cat(parts).to(keep.device)

    def check_rows(
        self, rows: Sequence[Row | LabelledRow], decoder_start: int | None, what: str, way_out: str = ADD_ROWS
    ) -> None:
        """Raise DrklError unless the cache has the states of all rows.

        Args:
            rows: tokenised rows.
            decoder_start: of an encoder-decoder; None for others.
            what: the rows, in a sentence: "training rows".
            way_out: what to do, in a sentence.
        """
        lacking = self.lacking(rows, decoder_start)
        if lacking:
            settings = ", ".join(f"{name} {value}" for name, value in self.manifest["data"][0].items())
            raise DrklError(
                f"The cache {str(self.folder)!r} lacks {len(lacking):,} of {len(rows):,} {what}, first {lacking[0]!r}. "
                f"It was made from other rows, or with other settings than {settings} or another tokenizer. {way_out}"
            )

    def lacking(self, rows: Sequence[Row | LabelledRow], decoder_start: int | None) -> list[str]:
        """The ids of the rows of which the cache has no states; arguments as `check_rows`'s."""
        return [row.id for row in rows if self._find(row_of(row, decoder_start)) is None]

    def has(self, row: CacheRow) -> bool:
        """Whether the cache has the states at all positions of a row."""
        return self._find(row) is not None

    def states(self, batch: Batch) -> Tensor:
        """Return the states `[n, hidden]` at the positions that are read of some rows, on the head's device."""
        device = torch.device("cpu") if self.head is None else self.head.weight.device
        return self.hidden_at(batch.for_teacher.inputs, batch.for_teacher.keep).to(device)

    def _find(self, row: CacheRow) -> tuple[list[RowPlace], list[int]] | None:
        """Where a row lies, and the positions that are there, in their order; None where one of its own is missing."""
        places = self._rows.find(row.digest)
        held = [position for place in places for position in self._rows.positions(place).tolist()]
        return (places, held) if places and set(held).issuperset(row.positions) else None

    def _states(self, row: CacheRow) -> Tensor | None:
        found = self._find(row)
        if found is None:
            return None
        places, held = found
        values = torch.cat([self._rows.read(place)[STATES] for place in places])
        if held == [*row.positions]:
            return values
        order = {position: place for place, position in enumerate(held)}
        return values[[order[position] for position in row.positions]]


def rows_of(batch: Mapping[str, Tensor], keep: Tensor) -> list[CacheRow]:
    """What a teacher reads in each row of a batch, padding aside, and at which positions its states are kept.

    A row that keeps none is left out: it is padding of the batch itself.

    Args:
        batch: ``input_ids`` and ``attention_mask`` `[batch, tokens]`, and those of a decoder where there is one.
        keep: `[batch, tokens]`; of a classifier `[batch, 1]`.
    """
    pairs = [("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")]
    read = [(batch[ids].cpu().numpy(), batch[mask].cpu().numpy() != 0) for ids, mask in pairs if ids in batch]
    rows = []
    for number, kept in enumerate(keep.cpu().numpy()):
        positions = tuple(np.flatnonzero(kept).tolist())
        if not positions:
            continue
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for ids, mask in read:
            tokens = ids[number][mask[number]].astype("<i8")
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        rows.append(CacheRow(digest.digest(), positions))
    return rows


def row_of(row: Row | LabelledRow, decoder_start: int | None) -> CacheRow:
    """A row as `rows_of` finds it in a batch."""
    (found,) = rows_of(*teacher_inputs(collate([row], pad_id=0, decoder_start=decoder_start)))
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
    teacher: LiveTeacher,
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    about: Mapping[str, Any],
    *,
    part: int = 0,
    parts: int = 1,
    files: Callable[[Path], Sequence[str]] = lambda folder: (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> bool:
    """Run a teacher over batches, each row once, and write its states; say whether the cache is finished.

    Args:
        folder: the cache's.
        teacher: on its device.
        batches: inputs and kept positions, as training reads them and in its order; each is asked for twice.
        about: what the cache is of.
        part: the part that this process writes, from 0.
        parts: the number of parts.
        files: writes further files of the cache into the folder, and returns their names.
        progress: called with the batches that are read, and that are to be read.

    Raises:
        DrklError: the folder holds another cache, states are not finite, or the disk is full.
    """
    described = {**_described(teacher), **about}
    shards, members = _plan(batches, _positions_of_a_shard(teacher))
    with ShardWriter(folder, described, shards, part=part, parts=parts) as writer:
        _write(writer, teacher, batches, shards, members, progress)
        return writer.finish(lambda: [*_write_head(folder, teacher.head), *files(folder)])


def add_states(
    folder: Path,
    teacher: LiveTeacher,
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]],
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
        DrklError: the cache is of another teacher or tokenizer, states are not finite, or the disk is full.
    """
    cache = TeacherCache.open(folder)
    _check_same(cache, {**_described(teacher), **about})
    shards, members = _plan(batches, _positions_of_a_shard(teacher), cache.has)
    if not shards[0]:
        return 0
    with ShardFiller(cache._rows, shards, about["data"]) as writer:
        _write(writer, teacher, batches, shards, members, progress)
        writer.finish()
    return sum(map(len, shards))


def _check_same(cache: TeacherCache, wanted: Mapping[str, Any]) -> None:
    """Raise DrklError where a teacher is not the one that a cache is of."""
    found, name = cache.manifest, str(cache.folder)
    if found["tokenizer"] != wanted["tokenizer"]:
        raise other_tokenizer(name)
    if found["dtype"] != wanted["dtype"]:
        raise DrklError(
            f"The teacher is in {wanted['dtype']}, and the cache {name!r} has states in {found['dtype']}. Load the "
            "teacher in that dtype."
        )
    check_weights(found, wanted["teacher"]["name"], wanted["teacher"]["fingerprint"], name)


def check_weights(manifest: Mapping[str, Any], teacher: str, fingerprint: str, folder: str) -> None:
    """Raise DrklError where a teacher's fingerprint is not the one in the manifest of a cache."""
    own = manifest["teacher"]
    if own["fingerprint"] != fingerprint:
        raise DrklError(
            f"The teacher {teacher!r} is not the one of the cache {folder!r}, which is of {own['name']!r}: its weights "
            f"or its config differ (fingerprint {fingerprint[:12]}, not {own['fingerprint'][:12]}). Use the teacher "
            "that the cache was made of, or make a cache of this one with `drkl cache`."
        )


def other_tokenizer(folder: str) -> DrklError:
    """The error of a cache that was made with another tokenizer than the run's."""
    return DrklError(
        f"The cache {folder!r} was made with another tokenizer: its ids mean other tokens. Use the one that lies in "
        "the cache, or make the cache again."
    )


def _described(teacher: LiveTeacher) -> dict[str, Any]:
    return {"kind": "hidden", "width": _width(teacher), "dtype": str(teacher.model.dtype).removeprefix("torch."),
            "head": teacher.head is not None}  # fmt: skip


def _positions_of_a_shard(teacher: LiveTeacher) -> int:
    size = torch.empty(0, dtype=teacher.model.dtype).element_size() * _width(teacher)
    return max(1, SHARD_BYTES // size)


def _write(
    writer: ShardWriter,
    teacher: LiveTeacher,
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    shards: Sequence[Sequence[CacheRow]],
    members: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> None:
    """Write the shards of a plan that are not there yet."""
    todo = writer.missing
    done, of = 0, sum(len(members[number]) for number in todo)
    for number in todo:
        found: dict[CacheRow, Tensor] = {}
        wanted = Counter(shards[number])
        for place in members[number]:
            inputs, keep = batches[place]
            device = next(teacher.model.parameters()).device
            inputs = {name: value.to(device) for name, value in inputs.items()}
            states = teacher.hidden_at(inputs, keep.to(device), remember=False).cpu()
            rows = rows_of(inputs, keep)
            for row, own in zip(rows, states.split([len(row.positions) for row in rows]), strict=True):
                if row in wanted:
                    found.setdefault(row, own)
            done += 1
            progress(done, of)
        writer.write(number, {STATES: torch.cat([found[row] for row in shards[number]])})


def _plan(
    batches: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    positions: int,
    known: Callable[[CacheRow], bool] = lambda row: False,
) -> tuple[list[list[CacheRow]], list[list[int]]]:
    """The rows of each shard, each row where it comes first, and the batches that a shard's rows are in.

    Rows that are ``known`` are in no shard.
    """
    shards: list[list[CacheRow]] = [[]]
    members: list[list[int]] = [[]]
    seen: set[CacheRow] = set()
    count = 0
    for place, (inputs, keep) in enumerate(batches):
        new = [row for row in dict.fromkeys(rows_of(inputs, keep)) if row not in seen and not known(row)]
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


def _width(teacher: LiveTeacher) -> int:
    return int(teacher.model.config.num_labels or 0) if teacher.head is None else int(teacher.head.weight.shape[1])


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


def _without_weights(folder: Path, manifest: Mapping[str, Any]) -> PreTrainedModel:
    config = load_config(folder)
    config.dtype = getattr(torch, manifest["dtype"])
    kind = model_class(config, classifier=not manifest["head"])
    with torch.device("meta"):
        model = kind.from_config(config)
    model.name_or_path = str(folder)
    return model.eval()
