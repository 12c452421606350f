"""Checks before a run writes anything."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from drkl.errors import DrklError
from drkl.folders import free_name
from drkl.kept import check_student
from drkl.locks import LOCKS
from drkl.models.precision import has_device
from drkl.runs import OF_A_STUDY, RunFolder, check_no_link

_log = logging.getLogger("drkl")


class RunExists(DrklError):
    """The run folder exists already."""


def check_folder(run: RunFolder, mode: str) -> None:
    """Raise DrklError where a run of this mode (new, overwrite, resume) must not touch the folder."""
    if mode == "resume":
        if is_over(run):
            raise DrklError(f"The run {str(run.root)!r} is finished; there is nothing to resume.")
        check_links(run, mode)
        return
    if not (run.root.exists() or run.root.is_symlink()):
        return
    if run.root.is_dir() and not run.root.is_symlink() and all(_is_nothing(run, path) for path in run.root.iterdir()):
        return  # it is empty but for who works in it now, or was killed before the run began
    if mode == "new":
        raise RunExists(f"The run folder {str(run.root)!r} exists. Replace it, resume it, or choose another run.name.")
    if run.root.is_symlink() or not run.root.is_dir():
        raise DrklError(f"{str(run.root)!r} is no folder, so it is not replaced.")
    if any(run.root.iterdir()) and not run.config_path.is_file():
        raise DrklError(
            f"{str(run.root)!r} exists and is no run folder (it has no config.yaml), so it is not replaced."
        )
    check_links(run, mode)


def _is_nothing(run: RunFolder, path: Path) -> bool:
    """Whether this is all that a run leaves that ends before its config is written, or what a study keeps there."""
    of_study = [name for names in OF_A_STUDY.values() if (run.root / names[0]).is_file() for name in names]
    if of_study and path == run.root / "stages":
        return True  # of a start, each a run of its own
    if path in (run.checkpoints_path, run.root / "stages"):
        return path.is_dir() and not path.is_symlink() and all(_is_leftover(run, inner) for inner in path.iterdir())
    is_of_study = path.name in of_study or path.name.startswith(tuple(f".{name}." for name in of_study))
    return not path.is_dir() and (is_of_study or _is_leftover(run, path))


def _is_leftover(run: RunFolder, path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return all(_is_leftover(run, inner) for inner in path.iterdir())
    return path.name in LOCKS or path.name.startswith(f".{run.config_path.name}.")


def check_links(run: RunFolder, mode: str) -> None:
    """Raise DrklError where what a run overwrites or adds to is a link to something that may be somebody's own.

    A link to an empty folder, on another disk say, is written through, and so is one to checkpoints: of those only
    the run's own are read or removed.

    Args:
        run: a run folder that is there.
        mode: overwrite or resume.

    Raises:
        DrklError: a part of it is such a link.
    """
    for stage in (*run.stages(), run):
        folders = [stage.analysis_folder, stage.parts_path, stage.root / "stages"]
        if mode == "overwrite" or not stage.is_finished():
            folders.append(stage.student_path)
        for path in folders:
            if not path.is_dir() or any(path.iterdir()):
                check_no_link(path)
        check_no_link(stage.train_log_path)
        check_no_link(stage.rollouts_path)


def check_there(run: RunFolder) -> None:
    """Raise FileNotFoundError where the folder of a run that trains is gone."""
    if not run.root.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run.root))


def is_over(run: RunFolder) -> bool:
    """Whether a run that is to go on has ended; called in one process.

    Where nothing says so and there is no student yet, it has not: an ``env.json`` that is damaged is moved aside.

    Raises:
        DrklError: it has a student, which is not the one that its run wrote, or nothing says whether it is.
    """
    try:
        env, reason = run.read_env(), "is not there"
    except DrklError as error:
        env, reason = {}, f"is damaged ({error})"
    if env:
        if finished := run.is_finished():
            check_student(run.student_path)
        return finished
    if run.student_path.exists():
        raise DrklError(
            f"The run {str(run.root)!r} has a student, and its env.json, which says whether it has ended, {reason}. "
            "Bring env.json back from a copy. Without one: use the student as it is, a model of its own; or move "
            "student/ away, and the run goes on from its newest checkpoint."
        )
    if os.path.lexists(run.env_path):
        aside = free_name(run.env_path.with_name(f"{run.env_path.name}.damaged"))
        run.env_path.rename(aside)
        _log.warning("Warning: %s %s: it is now %s, and a new one is made.", run.env_path, reason, aside.name)
    return False


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
