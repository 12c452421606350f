"""Checks before a run writes anything."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.locks import LOCKS
from drkl.models.precision import has_device
from drkl.runs import RunFolder


class RunExists(DrklError):
    """The run folder exists already."""


def check_folder(run: RunFolder, mode: str) -> None:
    """Raise DrklError where a run of this mode (new, overwrite, resume) must not touch the folder."""
    if mode == "resume":
        if run.is_finished():
            raise DrklError(f"The run {str(run.root)!r} is finished; there is nothing to resume.")
        return
    if not (run.root.exists() or run.root.is_symlink()):
        return
    if run.root.is_dir() and not run.root.is_symlink() and {path.name for path in run.root.iterdir()} <= LOCKS:
        return  # it is empty but for who works in it now, or was killed before
    if mode == "new":
        raise RunExists(f"The run folder {str(run.root)!r} exists. Replace it, resume it, or choose another run.name.")
    if run.root.is_symlink() or not run.root.is_dir():
        raise DrklError(f"{str(run.root)!r} is no folder, so it is not replaced.")
    if any(run.root.iterdir()) and not run.config_path.is_file():
        raise DrklError(
            f"{str(run.root)!r} exists and is no run folder (it has no config.yaml), so it is not replaced."
        )


def check_there(run: RunFolder) -> None:
    """Raise FileNotFoundError where the folder of a run that trains is gone."""
    if not run.root.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run.root))


def check_apart(cache: str | Path, run: RunFolder) -> None:
    """Raise DrklError where a teacher cache lies in the folder of a run, with which it would be removed."""
    folder, root = Path(cache).expanduser().absolute(), run.root.absolute()
    if folder.resolve().is_relative_to(root.resolve()):
        raise DrklError(
            f"The cache {str(cache)!r} lies in the run folder {str(run.root)!r}, which is the run's alone: replacing "
            "the run would remove it. Choose a folder elsewhere for the cache."
        )


def check_device(name: str) -> None:
    """Raise DrklError where this machine has no such device."""
    if not has_device(name):
        raise DrklError(f"run.device is {name!r}, which this machine (or this torch) does not have; try auto or cpu.")


def check_disk(run: RunFolder, student: PreTrainedModel) -> None:
    """Raise DrklError without room for three checkpoints (best, newest, the one being written) and the student.

    A checkpoint is weights and two Adam moments; those that are there already take no new room.
    """
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    needed = weights * (3 * 3 + 1)
    there = next(p for p in (run.root, *run.root.absolute().parents) if p.exists())
    held = sum(p.stat().st_size for p in Path(run.checkpoints_path).rglob("*") if p.is_file())
    free = shutil.disk_usage(there).free + held
    if free < needed:
        raise DrklError(
            f"Checkpoints of this student need about {needed / 1e9:.1f} GB where {str(run.root)!r} lies; "
            f"{free / 1e9:.1f} GB are free. Make room, or put the run elsewhere with run.dir=FOLDER."
        )
