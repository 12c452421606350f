"""Started in each of several processes: trains one config after the other, as `drkl distill` does."""

from __future__ import annotations

import os
import sys
import warnings

import torch

from drkl.config import load_config
from drkl.models.load import quiet_transformers
from drkl.teachers.live import LiveTeacher
from drkl.training import heldout
from drkl.training.run import distill

TOKENS = 24
"""Of a batch of held-out rows, so that there are several."""


def main() -> None:
    """The first word is added to the names of the runs; the others are configs."""
    warnings.simplefilter("ignore")
    heldout.SHORT_TOKENS_PER_BATCH = TOKENS
    torch.set_num_threads(1)
    quiet_transformers()
    name, *paths = sys.argv[1:]
    for path in paths:
        loaded, _ = load_config(path)
        loaded, _ = load_config(path, [f"run.name={loaded.run.name}-{name}"])
        distill(loaded.specs())
    count: int = LiveTeacher.batches_read  # type: ignore[attr-defined]
    os.write(1, f"batches that the teacher read: {count}\n".encode())  # at once, as two processes write


def count_batches() -> None:
    LiveTeacher.batches_read = 0  # type: ignore[attr-defined]
    hidden = LiveTeacher.hidden

    def counted(self: LiveTeacher, batch: object) -> object:
        LiveTeacher.batches_read += 1  # type: ignore[attr-defined]
        return hidden(self, batch)  # type: ignore[arg-type]

    LiveTeacher.hidden = counted  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    count_batches()
    main()
