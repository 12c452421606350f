"""The folder of a study: what was asked when its first cell began, and what of that may be another by now."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from drkl.display import shell_word
from drkl.errors import DrklError
from drkl.models.precision import pick_device
from drkl.runs import RunFolder, locked, read_sealed, read_yaml, write_json, write_yaml
from drkl.sealed import sealed
from drkl.studies.definition import SEED, Definition, read_definition
from drkl.studies.grid import same, text_of, words
from drkl.studies.plan import Plan, Planned, digest, given, study_yaml
from drkl.studies.records import Record, cell_record
from drkl.studies.starts import cache_for
from drkl.training.environment import describe_environment, now
from drkl.training.settings import changes, flat

FOR_REPORTS = ("baseline", "decide", "smallest_difference", "predictions", "primary")
"""Fields of a study that no run reads: they may be others later, which is said."""
ADDED, REMOVED = " has also ", " has no longer "
"""What is said of values that a study's file has, and had not, since its first cell began; and the other way round."""


def base_yaml(folder: Path) -> Path:
    """The base with the study's settings, as it was run."""
    return folder / "base.yaml"


def read_environment(folder: Path) -> dict[str, Any]:
    """Return what ``env.json`` of a study says; nothing where it has not begun.

    Keys: the versions, as in a run's; ``command``; ``began``, the call that began its first cell; ``predicted`` then
    and ``predicted_now`` at the latest call (see `predicted`); ``changes``, each with ``when`` and ``what`` was another
    in the study's file since.
    """
    path = folder / "env.json"
    return read_sealed(path) if path.exists() else {}


def settings_digest(plan: Plan, planned: Planned) -> str:
    """The digest of all that a cell's numbers depend on."""
    cache = cache_for(plan, planned)
    shared = {"start": plan.definition.shared.start, "teacher_cache": None if cache is None else cache.kind}
    return digest({"config": given(planned.config), "shared": shared})


def predicted(path: Path) -> dict[str, Any] | None:
    """Return the ``commit`` and the ``date`` of the last commit of a study's file, and whether it ``is_changed`` since.

    Both are None where the file was never committed. Without git, or outside of a checkout: None.
    """
    last = ""
    try:
        is_changed = bool(_git(path, "status", "--porcelain", "--ignored", "--", path.name))
        with suppress(subprocess.CalledProcessError):  # nothing was ever committed
            last = _git(path, "log", "-1", "--pretty=%H %cI", "--", path.name)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, _, date = last.partition(" ")
    return {"commit": commit or None, "date": date or None, "is_changed": is_changed}


def _git(path: Path, *words: str) -> str:
    command = ["git", "-C", str(path.absolute().parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def settle(plan: Plan, command: Sequence[str] | None) -> list[str]:
    """Write what is asked into the study's folder, and return what is another than when its first cell began.

    Args:
        plan: of the study.
        command: the command line, for the record.

    Raises:
        DrklError: cells have begun, and something is another that moves their numbers; the folder cannot be made.
    """
    folder = plan.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DrklError(f"The study's folder {str(folder)!r} cannot be made: {error.strerror}.") from error
    with locked(folder / ".settle.lock", wait=True):
        env = read_environment(folder)
        notes = check_same(plan)
        stamp = predicted(plan.path)
        if not env.get("began") or not _has_begun(folder):
            made = describe_environment(pick_device(plan.base.run.device))
            env = made | {"command": command and [*command], "began": now(), "predicted": stamp, "changes": []}
        elif notes:
            env = env | {"changes": [*env["changes"], {"when": now(), "what": notes}]}
        write_yaml(base_yaml(folder), plan.base.values("json"))
        write_yaml(study_yaml(folder), plan.definition.model_dump(mode="json"))
        if env | {"predicted_now": stamp} != read_environment(folder):
            write_json(folder / "env.json", sealed(env | {"predicted_now": stamp}), lasting=True)
    return notes


def check_same(plan: Plan) -> list[str]:
    """Return what is another in a study whose first cell has begun, as far as it may be; nothing is written.

    Raises:
        DrklError: something is another that moves the numbers of cells that have begun.
    """
    known = study_yaml(plan.folder)
    begun = {record.folder.name: record for record in _begun(plan.folder)}
    if not known.exists() or not begun:
        return []
    then = read_definition(known)
    found = list(_of_base(plan)) + list(_of_shared(then, plan.definition))
    cells = {planned.cell.name: planned for planned in plan.cells}
    for name, record in begun.items():
        if name not in cells:
            found.append(f"the cell {name} is none of the study's any more")
        elif not found and record.readable().get("settings_digest") != settings_digest(plan, cells[name]):
            now_words = words(cells[name].cell.axes)
            found.append(f"the cell {name} has other settings than it began with (now {now_words})")
    found += [line for line in _of_variants(then, plan.definition) if found]
    if found:
        where = shell_word(plan.folder)
        raise DrklError(
            f"The study in {str(plan.folder)!r} began with something else than {plan.path} has now: "
            f"{'; '.join(found)}. Cells that have begun cannot be compared with others then. Put it back, give the "
            f"study another name, or remove these cells' folders in {where}/cells."
        )
    return list(_allowed(then, plan.definition))


def _begun(folder: Path) -> Iterator[Record]:
    """The cells that have begun; not those whose start could not be made, nor those with a damaged record."""
    for record in _records(folder):
        if record.readable().get("settings_digest") is not None:
            yield record


def _records(folder: Path) -> list[Record]:
    cells = folder / "cells"
    return [cell_record(path) for path in sorted(cells.iterdir())] if cells.is_dir() else []


def _has_begun(folder: Path) -> bool:
    """Whether there is anything of a cell, be it a damaged record or results that were copied."""
    return any(record.has_begun or RunFolder(record.folder).eval_path.exists() for record in _records(folder))


def _of_base(plan: Plan) -> Iterator[str]:
    """What is another in the base."""
    from drkl.config import load_config

    then = load_config(read_yaml(base_yaml(plan.folder)))[0]
    before, after = (dict(flat(_whole(config))) for config in (given(then), given(plan.base)))
    for line in changes(before, after):
        yield f"the base's {line}"


def _whole(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without sections in which nothing is given."""
    return {name: value for name, value in values.items() if value not in ({}, None)}


def _of_shared(then: Definition, now: Definition) -> Iterator[str]:
    for name in ("start", "teacher_cache"):
        before, after = getattr(then.shared, name), getattr(now.shared, name)
        if before != after:
            yield f"shared.{name}: {before} then, {after} now"


def _of_variants(then: Definition, now: Definition) -> Iterator[str]:
    for name, settings in then.variants.items():
        if name in now.variants and now.variants[name] != settings:
            yield f"variants.{name}: {words(settings)} then, {words(now.variants[name])} now"


def _allowed(then: Definition, now: Definition) -> Iterator[str]:
    """What is another, and moves no number of a cell that has begun."""
    for key in dict.fromkeys([*then.axes, *now.axes]):
        yield from _moved(f"axes.{key}", then.axes.get(key, []), now.axes.get(key, []))
    yield from _moved("variants", list(then.variants), list(now.variants))
    yield from _of_variants(then, now)
    for name in FOR_REPORTS:
        if getattr(then, name) != getattr(now, name):
            yield f"{name} is another"
    for name in ("dir", "cells"):
        if getattr(then.shared, name) != getattr(now.shared, name):
            yield f"shared.{name} is another"


def _moved(place: str, then: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    """The values that were added, and those that are gone."""
    for what, these, others in ((ADDED, now, then), (REMOVED, then, now)):
        if found := [text_of(value) for value in these if not any(same(value, other) for other in others)]:
            yield f"{place}{what}{', '.join(found)}"


def changed_fields(changes: Iterable[Mapping[str, Any]]) -> list[str]:
    """The fields that ``changes`` of ``env.json`` says are others, of those that move what was asked.

    That are the fields that reports read, and ``axes`` and ``variants`` where something is gone or has other settings;
    what was only added is none of them.
    """
    lines = [line for one in changes for line in one.get("what", [])]
    moved = [
        name for name in ("axes", "variants")
        if any(line.startswith((f"{name}.", f"{name} ")) and ADDED not in line for line in lines)
    ]  # fmt: skip
    return [*(name for name in FOR_REPORTS if f"{name} is another" in lines), *moved]


def has_more_seeds(changes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether ``changes`` of ``env.json`` says that seeds were added."""
    return any(line.startswith(f"axes.{SEED}{ADDED}") for one in changes for line in one.get("what", []))
