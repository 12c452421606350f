"""Checkpoints written, moved and removed, so that one with its name is whole wherever that is cut off.

One is written into ``.writing/checkpoint-N`` and renamed once it is on the disk; one that is to go is first renamed to
``.removed-checkpoint-N``.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from drkl.folders import free_name, sync, sync_tree
from drkl.training.checkpoints import MARKER, is_own, marked, own_checkpoints, step_of

_STAGING, _REMOVED = ".writing", ".removed-"
_log = logging.getLogger("drkl")


def staging(folder: Path) -> Path:
    """Where checkpoints are written before they count."""
    return folder / _STAGING


def place(written: Path) -> None:
    """Make a checkpoint count that is written and marked: on the disk first, then under its name.

    One of that step that is there already is replaced; what drkl did not write is moved out of the way.

    Raises:
        OSError: it cannot be written to the disk, or not be moved.
    """
    sync_tree(written)
    target = written.parents[1] / written.name
    if is_own(target):
        discard(target)
    elif os.path.lexists(target):
        _move_aside(target, "is no checkpoint of this run, and its name is wanted")
    written.rename(target)
    sync(target.parent)
    with suppress(OSError):
        written.parent.rmdir()


def set_aside_later(folder: Path, step: int) -> None:
    """Move the checkpoints of later steps aside: a run that goes on after this step writes its own."""
    for path in own_checkpoints(folder):
        if step_of(path) > step:
            _move_aside(path, f"is later than step {step}, from which the run goes on")


def _move_aside(path: Path, why: str) -> None:
    aside = free_name(path.with_name(f"{path.name}-aside"))
    path.rename(aside)
    _log.warning("Warning: %s %s. It is now called %s.", path.name, why, aside.name)


def tidy(folder: Path) -> None:
    """Remove what was cut off in writing, or in removing."""
    for path in (staging(folder), *folder.glob(f"{_REMOVED}checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint: it counts as whole or not at all, wherever that is cut off. What others put into it stays.

    Raises:
        OSError: it cannot be removed.
    """
    if others := _others(checkpoint):
        kept = free_name(checkpoint.with_name(f"{checkpoint.name}-others"))
        for name in others:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).rename(kept / name)
        _log.warning("Warning: %s goes; what drkl did not write into it is now in %s.", checkpoint.name, kept.name)
    gone = free_name(checkpoint.with_name(f"{_REMOVED}{checkpoint.name}"))
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _others(checkpoint: Path) -> list[Path]:
    """The files in a checkpoint that drkl did not write, where that is known; hidden ones are nobody's."""
    known = marked(checkpoint).get("files")
    if not isinstance(known, dict):
        return []
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir()]
    own = {*known, MARKER}
    return [name for name in names if name.as_posix() not in own and not any(part[0] == "." for part in name.parts)]


def rotate(folder: Path, keep: int, best: int | None, newest: int) -> None:
    """Remove the oldest checkpoints but ``keep``.

    Args:
        folder: where they are.
        keep: how many stay, at least.
        best: the step of one that stays.
        newest: the step of another, the last that the run has come to; later ones are not this run's business yet.
    """
    drop_extras(folder, but=newest)
    there = [path for path in own_checkpoints(folder) if step_of(path) <= newest and not is_extra(path)]
    spare = [path for path in there if step_of(path) not in (best, there and step_of(there[-1]))]
    for path in spare[: max(0, len(there) - keep)]:
        discard(path)


def is_extra(checkpoint: Path) -> bool:
    """Whether an end from outside is why a checkpoint was written, beside those that were asked for."""
    return bool(marked(checkpoint).get("extra"))


def drop_extras(folder: Path, but: int | None = None) -> None:
    """Remove the checkpoints that ends from outside left up to a step, ``but`` that one; of None all."""
    for path in own_checkpoints(folder):
        if is_extra(path) and (but is None or step_of(path) < but):
            discard(path)


def keep_only(folder: Path, best: int | None) -> None:
    """Remove the checkpoints of a finished run but the best, which may be asked for; where that is not there, none."""
    tidy(folder)
    if best is None or not is_own(folder / f"checkpoint-{best}"):
        return
    for path in own_checkpoints(folder):
        if step_of(path) != best:
            discard(path)
