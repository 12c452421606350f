"""Checks before a run writes anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def check_same_config(run: RunFolder, given: Mapping[str, Any]) -> None:
    """Raise DrklError where a run was made by another config than one that is to go on with it.

    Args:
        run: its ``config.yaml`` has every value settled.
        given: the other one's values, settled likewise.
    """
    if different := next(_differences(run.read_config(), given), None):
        name, there, here = different
        raise DrklError(
            f"The run folder {str(run.root)!r} was made by another config: {name} is {there!r} there, and {here!r} is "
            "asked for. Replace it, choose another run.name, or go on with it as it was configured."
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**here, **there}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(there.get(key), here.get(key), inner)
        return
    moved = name in ("run.dir", "run.name")
    # What was left to be settled: here it still is, or the run was cut off before it was written there.
    open_yet = name == "training.warmup_steps" and None in (there, here)
    open_yet |= name.startswith("training.arguments.") and there is None
    if there != here and not moved and not open_yet:
        yield name, there, here


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
