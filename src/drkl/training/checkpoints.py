"""Find the checkpoint to go on from, and delete checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from drkl.errors import DrklError
from drkl.runs import RunFolder, read_json, write_json

MARKER = "complete.json"
"""Written into a checkpoint last of all; a folder without it was cut off in writing and does not count."""


def mark_complete(checkpoint: Path, step: int, num_tokens: int) -> None:
    """Make a checkpoint count; ``num_tokens`` are those trained on so far."""
    write_json(checkpoint / MARKER, {"step": step, "num_tokens": num_tokens})


def tokens_seen(checkpoint: Path) -> int:
    """Return the number of tokens trained on up to a checkpoint."""
    return int(read_json(checkpoint / MARKER)["num_tokens"])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones are removed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return max(folder.glob("checkpoint-*"), key=step_of, default=None)


def wanted_checkpoint(run: RunFolder, wanted: str | Path | bool | None) -> Path | None:
    """The checkpoint to go on from: a folder, or for True the newest of the run; None where nothing is wanted.

    Raises:
        DrklError: there is none.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        newest = newest_checkpoint(run.checkpoints_path)
        if newest is None:
            raise DrklError(f"There is no whole checkpoint in {str(run.checkpoints_path)!r} to resume from.")
        return newest
    path = Path(str(wanted))
    if not (path / "trainer_state.json").is_file():
        raise DrklError(f"{str(path)!r} is no checkpoint; expected a folder checkpoints/checkpoint-N of this run.")
    return path


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that it counts as whole or not at all, wherever the removal is cut off."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path, keep: int, best: Path | None) -> None:
    """Remove the oldest checkpoints but ``keep``; the best and the newest stay."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=step_of)
    names = {checkpoints[-1].name} | ({best.name} if best is not None else set())
    spare = [path for path in checkpoints if path.name not in names]
    for path in spare[: max(0, len(checkpoints) - keep)]:
        discard(path)


def keep_only(folder: Path, best_step: int | None) -> None:
    """Remove all but the best of a finished run; that one may still be asked for, the others cannot."""
    for path in folder.glob("checkpoint-*"):
        if step_of(path) != best_step:
            discard(path)


@contextmanager
def readable_weights(checkpoint: str) -> Iterator[None]:
    """Name the checkpoint in what goes wrong as its weights are read."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise DrklError(
            f"The weights of {checkpoint!r} cannot be used: {reason}. Remove that checkpoint to go on from the one "
            "before it."
        ) from error
