"""Memory of a run by its parts, at each of the moments when it may need most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drkl.errors import DrklError

PARTS = {
    "student_weights": "student's weights",
    "gradients": "gradients",
    "optimiser": "optimiser's state",
    "teacher_weights": "teacher's weights",
    "teacher_states": "teacher's states that are kept",
    "activations": "activations",
    "loss": "loss: logits of a chunk, and what becomes of them",
    "buckets": "gradients on their way between processes",
    "gathered": "weights gathered from other processes",
    "answers": "answers that are written: cache and logits",
    "start": "files that the student is made from",
}
"""The parts by their keys, in the order in which they are shown."""
MOMENTS = {
    "start": "models loaded",
    "teacher": "teacher reads",
    "loss": "loss",
    "backward": "backward",
    "update": "update",
    "heldout": "held-out loss",
    "answers": "answers written",
}
"""The moments by their keys, in the order of a run."""

CURES = {
    "student_weights": "student.dtype=bf16 halves them; training.arguments.fsdp shards them over GPUs",
    "gradients": "a `peft` section (LoRA) or student.freeze_embeddings=true leaves most of them out; "
    "training.arguments.fsdp shards them over GPUs",
    "optimiser": "training.arguments.optim=adafactor (or sgd) keeps less, and so does a `peft` section (LoRA); "
    "training.arguments.fsdp shards it over GPUs",
    "teacher_weights": "`drkl cache` and teacher.cache=FOLDER train without the teacher, teacher.server asks one "
    "elsewhere, teacher.dtype=bf16 halves it, teacher.shard=true cuts it over several processes",
    "teacher_states": "a smaller teacher.remember_mb or training.eval_rows keeps fewer",
    "activations": "training.gradient_checkpointing=true keeps one input for each layer; "
    "training.arguments.gradient_accumulation_steps cuts a step into smaller micro-batches; data.max_tokens shortens "
    "rows",
    "loss": "student.freeze_embeddings=true leaves out the head's gradient where the head is tied; a cache of kind "
    "topk leaves out the teacher's logits",
    "buckets": "training.arguments.fsdp in place of plain DDP needs none",
    "gathered": "they are those of the largest layer and of the embeddings; a smaller vocabulary is the only cure",
    "answers": "a smaller rollouts.batch_size or rollouts.max_new_tokens needs less",
    "start": "student.init=pretrained, with a student that was cut before (drkl.prune) and saved in its own dtype, "
    "loads no more than itself",
}
"""What shrinks each part, by its key."""
_UNITS = (("GB", 1e9, 1), ("MB", 1e6, 0), ("kB", 1e3, 0))
"""Names, bytes and digits."""


@dataclass(frozen=True)
class Memory:
    """Bytes that each process needs, predicted.

    Attributes:
        processes: how many there are.
        device: of each process, ``cpu`` or ``cuda``, for example.
        moments: bytes of each part by its key in `PARTS`, for each moment by its key in `MOMENTS`.
        batch: the largest micro-batch that is planned.
        notes: what the numbers leave out.
    """

    processes: int
    device: str
    moments: Mapping[str, Mapping[str, int]]
    batch: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> str:
        """The key of the moment that needs most."""
        return max(self.moments, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """The sum of all parts at that moment."""
        return self.total(self.peak)

    @property
    def largest(self) -> str:
        """The key of the largest part at that moment."""
        parts = self.moments[self.peak]
        return max(parts, key=lambda name: parts[name])

    def total(self, moment: str) -> int:
        """The sum of all parts at a moment."""
        return sum(self.moments[moment].values())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, sums included."""
        return {
            "processes": self.processes,
            "device": self.device,
            "peak_bytes": self.peak_bytes,
            "peak": self.peak,
            "largest_micro_batch": dict(self.batch),
            "bytes": {name: {"sum": self.total(name), **parts} for name, parts in self.moments.items()},
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Memory:
        """What `to_json` gave."""
        moments = {
            name: {part: size for part, size in parts.items() if part != "sum"}
            for name, parts in values["bytes"].items()
        }
        batch, notes = values["largest_micro_batch"], tuple(values.get("notes", ()))
        return cls(values["processes"], values["device"], moments, batch, notes)

    def table(self) -> str:
        """The parts as lines of text, a column for each moment."""
        unit, size, digits = next(one for one in _UNITS if self.peak_bytes >= 10 * one[1] or one is _UNITS[-1])
        keys = [key for key in MOMENTS if key in self.moments]
        used = [part for part in PARTS if any(self.moments[key].get(part) for key in keys)]

        def cell(value: int) -> str:
            return f"{value / size:,.{digits}f}" if value else ""

        lines = [[f"{unit} of each process", *(MOMENTS[key] for key in keys)]]
        lines += [[PARTS[part], *(cell(self.moments[key].get(part, 0)) for key in keys)] for part in used]
        lines += [["sum", *(cell(self.total(key)) or "0" for key in keys)]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )

    def advice(self, available: int | None) -> str:
        """One sentence: whether it fits, or what is largest and which setting shrinks it.

        Args:
            available: bytes of the device; None where they are not known.
        """
        most = f"The most at once is {gigabytes(self.peak_bytes)}: {MOMENTS[self.peak]}"
        largest = f"{PARTS[self.largest].partition(':')[0]}, {gigabytes(self.moments[self.peak][self.largest])}"
        if available is None:
            return f"{most}. The largest part is: {largest}."
        where = "this machine" if self.device == "cpu" else f"a {self.device.upper()} device here"
        of_all = self.peak_bytes * (self.processes if self.device == "cpu" else 1)
        if of_all <= available:
            return f"{most}; {where} has {gigabytes(available)}."
        each = f" in each of {self.processes} processes" if self.device == "cpu" and self.processes > 1 else ""
        return (
            f"{most}{each}, and {where} has {gigabytes(available)}: it does not fit. The largest part is: {largest}. "
            f"What shrinks it: {CURES[self.largest]}."
        )


def gigabytes(size: int) -> str:
    """Bytes for people.

    >>> gigabytes(1_234_000_000), gigabytes(56_700_000)
    ('1.2 GB', '57 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def available_bytes(device: torch.device) -> int | None:
    """The memory of a device, all of it; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemTotal")), None)
    return None if found is None else 1024 * int(found)


def check_processes(processes: int | None) -> None:
    """Raise DrklError unless a number of processes is one."""
    if processes is not None and processes < 1:
        raise DrklError(f"processes is {processes}; expected a whole number of at least 1.")
