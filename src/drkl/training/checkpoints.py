"""Find the checkpoint to go on from, and delete checkpoints."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from transformers import TrainerState

from drkl.errors import DrklError
from drkl.runs import RunFolder, read_json, write_json
from drkl.training.feeding import Fed

MARKER = "complete.json"
"""Written into a checkpoint last of all; a folder without it was cut off in writing and does not count."""
_NAME = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Reached:
    """How far a run has come at a checkpoint, beside what transformers keeps of it."""

    step: int
    num_tokens: int = 0
    """Tokens trained on so far."""
    logged_step: int | None = None
    """The step of the last training line of the log; None: ``step``."""
    loss_sums: tuple[float, ...] = ()
    """The losses of the steps since then, summed in each process."""
    plan: str | None = None
    """The `plan_digest` of the steps so far."""
    fed: Fed = field(default_factory=Fed)
    """What the processes were fed since ``logged_step``."""
    skipped: int = 0
    """Steps that were left out, as their loss or gradient was not finite."""
    skipped_in_row: int = 0
    """Those since the last step that was taken."""

    def loss_sum(self, process: int, processes: int) -> float:
        """The sum of one process: its own, or the mean where the run goes on with another number of processes."""
        sums = self.loss_sums
        return sums[process] if len(sums) == processes else fmean(sums) if sums else 0.0


def plan_digest(steps: Sequence[Sequence[int]]) -> str:
    """A hash of the numbers of the rows of steps: of their text as a list of lists, which is never there whole."""
    digest = hashlib.sha256(b"[")
    for number, rows in enumerate(steps):
        digest.update(f"{', ' if number else ''}{list(rows)}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def mark_complete(checkpoint: Path, reached: Reached) -> None:
    """Make a checkpoint count."""
    write_json(checkpoint / MARKER, asdict(reached))


def reached_at(checkpoint: Path) -> Reached:
    """Return how far a checkpoint's run had come.

    Raises:
        DrklError: the file that says so is missing or broken.
    """
    path = checkpoint / MARKER
    try:
        values = read_json(path)
        fed = Fed(**values.get("fed", {}))
        return Reached(**values | {"loss_sums": tuple(map(float, values.get("loss_sums", ()))), "fed": fed})
    except (AttributeError, TypeError, ValueError) as error:
        raise DrklError(
            f"{str(path)!r} does not say how far the run had come ({error}). Remove that checkpoint to go on from the "
            "one before it."
        ) from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones are removed."""
    for path in _checkpoints(folder):
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return max(_checkpoints(folder), key=step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    """Those of a run; a copy under another name is the user's own."""
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]


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
    if not ((path / "trainer_state.json").is_file() and _NAME.fullmatch(path.name)):
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
    checkpoints = sorted(_checkpoints(folder), key=step_of)
    names = {checkpoints[-1].name} | ({best.name} if best is not None else set())
    spare = [path for path in checkpoints if path.name not in names]
    for path in spare[: max(0, len(checkpoints) - keep)]:
        discard(path)


def keep_only(folder: Path, best_step: int | None) -> None:
    """Remove all but the best of a finished run; that one may still be asked for, the others cannot."""
    for path in _checkpoints(folder):
        if step_of(path) != best_step:
            discard(path)


def check_checkpoint(checkpoint: Path, *, optimizer: bool) -> None:
    """Raise DrklError where a run cannot go on from here: without them transformers would go on with fresh ones.

    Args:
        checkpoint: its folder.
        optimizer: whether the optimiser's state and the schedule's lie in files of their own.
    """
    wanted = ("optimizer.pt", "scheduler.pt") if optimizer else ()
    missing = [name for name in wanted if not (checkpoint / name).is_file()]
    if missing:
        raise DrklError(
            f"{str(checkpoint)!r} has no {' and no '.join(missing)} (saved with save_only_model, or removed), so a run "
            "cannot go on from it. Go on from another checkpoint, or start a new run with the model in it."
        )
    with readable(str(checkpoint), "state"):
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


@contextmanager
def readable(checkpoint: str, what: str) -> Iterator[None]:
    """Name the checkpoint in what goes wrong as ``what`` of it is read."""
    try:
        yield
    except Exception as error:  # of torch, transformers and safetensors, each with errors of its own
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise DrklError(
            f"The {what} of {checkpoint!r} cannot be used: {reason}. Remove that checkpoint to go on from the one "
            "before it."
        ) from error
