"""Checkpoints: whole, by the sizes and checksums of their files, or of no use; and which one a run goes on from.

`drkl.training.placing` writes and removes them. What has the name of a checkpoint and no ``complete.json`` of that step
was not written by drkl, and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerState

from drkl.errors import DrklError
from drkl.folders import check_files, checksum, describe_files
from drkl.models.memory import is_out_of_memory
from drkl.runs import RunFolder, write_json
from drkl.training.feeding import Fed
from drkl.training.sharding import FSDP_WEIGHTS

MARKER = "complete.json"
"""Written into a checkpoint last of all, with the sizes and checksums of its other files."""
_NAME = re.compile("checkpoint-(0|[1-9][0-9]{0,17})")
_OWN_CHECKSUM = "xxh3"
"""In the marker: the checksum of what else it says."""
_log = logging.getLogger("drkl")


class Found(NamedTuple):
    """The newest whole checkpoint of a folder, or None, and why newer ones were passed over: ``(name, reason)``."""

    path: Path | None
    passed_over: list[tuple[str, str]]


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
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the run is trained on, and how: `drkl.training.inputs`."""
    skipped: int = 0
    """Steps that were left out, as their loss or gradient was not finite."""
    skipped_in_row: int = 0
    """Those since the last step that was taken."""
    extra: bool = False
    """Whether an end from outside is why it was written; it stands beside those that were asked for."""
    evaluation_due: bool = False
    """Whether the evaluation after the step is still to be done."""
    save_due: bool = False
    """Whether the step is one that is saved after its evaluation."""
    texts: str | None = None
    """The `texts_digest` of the answers that were kept until then."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `describe_files` says of the checkpoint's other files."""

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
    """Write down how far a run has come, and what the files of its checkpoint are, into the checkpoint."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    values = asdict(replace(reached, files=describe_files(checkpoint)))
    write_json(checkpoint / MARKER, values | {_OWN_CHECKSUM: _checksum_of(values)})


def _checksum_of(values: Mapping[str, Any]) -> str:
    return checksum(json.dumps(values, sort_keys=True).encode())


def reached_at(checkpoint: Path) -> Reached:
    """Return how far a checkpoint's run had come.

    Raises:
        DrklError: the file that says so is missing or damaged, or that of another checkpoint.
    """
    try:
        return _read_marker(checkpoint)
    except ValueError as error:
        raise DrklError(f"{str(checkpoint)!r} is not whole: {error}. Go on from another checkpoint.") from error


def _read_marker(checkpoint: Path) -> Reached:
    """The same; a ValueError says why not, in words that go on after the checkpoint's name."""
    path = checkpoint / MARKER
    if not path.is_file():
        raise ValueError(f"{MARKER} is missing")
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MARKER} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{MARKER} holds a {type(values).__name__}")
    if not {"files", _OWN_CHECKSUM} & {*values}:
        raise ValueError("an earlier drkl wrote it, without a list of its files")
    if values.pop(_OWN_CHECKSUM, None) != _checksum_of(values):
        raise ValueError(f"{MARKER} has another content than was written")
    try:
        changes = {"loss_sums": tuple(map(float, values["loss_sums"])), "fed": Fed(**values["fed"])}
        changes["inputs"] = dict(values["inputs"])
        reached = Reached(**values | changes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{MARKER} is that of another drkl ({error})") from error
    if reached.step != step_of(checkpoint):
        raise ValueError(f"{MARKER} is that of step {reached.step}")
    return reached


def is_own(path: Path) -> bool:
    """Whether drkl wrote what has a checkpoint's name; other people's things and links are neither read nor removed."""
    return _NAME.fullmatch(path.name) is not None and marked(path).get("step") == step_of(path)


def marked(path: Path) -> dict[str, Any]:
    """What a folder's marker says, damaged or not; nothing where there is no such folder or marker."""
    if path.is_symlink() or not (path / MARKER).is_file():
        return {}
    try:
        values = json.loads((path / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def damage(checkpoint: Path, *, optimizer: bool = False) -> str | None:
    """Return why a checkpoint is not whole, in words that go on after its name; None where it is.

    Args:
        checkpoint: its folder.
        optimizer: whether a run is to go on from it whose optimiser's state and schedule lie in files of their own.
    """
    try:
        reached = _read_marker(checkpoint)
        reasons = check_files(checkpoint, reached.files)
    except ValueError as error:
        return str(error)
    if reasons:
        return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    processes = len(reached.loss_sums)
    random = [f"rng_state_{number}.pth" for number in range(processes)] if processes > 1 else ["rng_state.pth"]
    by_accelerate = any(name.startswith(FSDP_WEIGHTS) for name in reached.files)  # `check_kind` refuses it by name
    apart = optimizer and not by_accelerate
    wanted = ["trainer_state.json", *(("optimizer.pt", "scheduler.pt", *random) if apart else ())]
    missing = [name for name in wanted if name not in reached.files]
    return f"it was saved without {' and '.join(missing)}, as with save_only_model" if missing else None


def find_checkpoint(folder: Path, *, optimizer: bool = False) -> Found:
    """Return the newest whole checkpoint of a run.

    Args:
        folder: ``checkpoints/`` of the run.
        optimizer: see `damage`.
    """
    passed_over: list[tuple[str, str]] = []
    for path in _named(folder):
        reason = "it is a link" if path.is_symlink() else None if path.is_dir() else "it is no folder"
        reason = reason or damage(path, optimizer=optimizer)
        if reason is None:
            return Found(path, passed_over)
        passed_over.append((path.name, reason))
    return Found(None, passed_over)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has something to go on from, or that it could go on from if it were not damaged."""
    folders = [path for path in _named(folder) if not path.is_symlink()]
    return any((path / name).is_file() for path in folders for name in (MARKER, "trainer_state.json"))


def _named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, the newest first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DrklError(f"Cannot read {str(folder)!r}: {error.strerror or error}.") from error
    return sorted((folder / name for name in names if _NAME.fullmatch(name)), key=step_of, reverse=True)


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that drkl wrote, damaged or not, the oldest first."""
    return [path for path in reversed(_named(folder)) if is_own(path)]


def wanted_checkpoint(run: RunFolder, wanted: str | Path | bool | None, *, optimizer: bool = False) -> Path | None:
    """The checkpoint to go on from: a folder, or for True the newest whole one of the run; None: nothing is wanted.

    Those that are passed over are named in warnings. Called in one process.

    Args:
        run: the run.
        wanted: what the user asked for.
        optimizer: see `damage`.

    Raises:
        DrklError: there is none, or the one that was named is damaged.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return _newest(run.checkpoints_path, optimizer)
    path = Path(str(wanted))
    if not (path.is_dir() and _NAME.fullmatch(path.name)):
        raise DrklError(f"{str(path)!r} is no checkpoint; expected a folder checkpoints/checkpoint-N of this run.")
    if reason := damage(path, optimizer=optimizer):
        raise DrklError(
            f"{str(path)!r} is not whole: {reason}. Name another checkpoint, or pass True for the newest whole one."
        )
    return path


def _newest(folder: Path, optimizer: bool) -> Path:
    path, passed_over = find_checkpoint(folder, optimizer=optimizer)
    if path is not None:
        for name, reason in passed_over:
            _log.warning("Warning: %s is passed over: %s.", name, reason)
        return path
    if not passed_over:
        raise DrklError(f"There is no whole checkpoint in {str(folder)!r} to resume from.")
    listed = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise DrklError(
        f"There is no whole checkpoint in {str(folder)!r} to resume from. {listed}. Put back what they lack; or move "
        "them out of that folder, and the run begins at its first step."
    )


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def check_state(checkpoint: Path) -> None:
    """Raise DrklError where transformers cannot read its part of a checkpoint."""
    with readable(str(checkpoint), "state"):
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def logged_until(checkpoint: Path) -> list[dict[str, Any]]:
    """What was logged until a checkpoint was written, as it says itself."""
    with readable(str(checkpoint), "state"):
        history: list[dict[str, Any]] = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return history


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what went wrong in a process, where torch's distributed checkpoints wrap it into what is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def readable(checkpoint: str, what: str) -> Iterator[None]:
    """Name the checkpoint in what goes wrong as ``what`` of it is read."""
    try:
        with plain_errors():
            yield
    except Exception as error:  # of torch, transformers and safetensors, each with errors of its own
        if is_out_of_memory(error):
            raise  # which is not the checkpoint's fault
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise DrklError(
            f"The {what} of {checkpoint!r} cannot be used: {reason}. Remove that checkpoint to go on from the one "
            "before it."
        ) from error
