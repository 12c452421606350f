"""A sweep over toy settings and objectives: one csv file for each finished pair, so that it can be continued."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drkl.data.workers import helps
from drkl.errors import DrklError
from drkl.folders import checksum
from drkl.objectives import OBJECTIVES
from drkl.objectives.variants import Variant
from drkl.runs import read_json, write_text
from drkl.toy.dynamics import ToyProblem, ToySetting
from drkl.toy.metrics import METRICS

COLUMNS = ("setting", "objective", "gamma", "seed", "step", *METRICS)
_log = logging.getLogger("drkl")
Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with (a setting's name, objectives done, objectives in all)."""

DEFAULT_OBJECTIVES = (
    *OBJECTIVES,
    *(f"drkl:{gamma}" for gamma in (0.1, 0.25, 1.0)),
    "drkl@student", "drkl@floor",
    *(f"rkl+fkl:{gamma}" for gamma in (0.1, 0.25, 0.5, 1.0)),
    *(f"rkl+gjs:{gamma}" for gamma in (0.1, 0.25, 0.5, 1.0)),
)  # fmt: skip
"""Every registered objective with its defaults (drkl's gamma is 0.5), and decoupled ones at several gammas."""


@dataclass(frozen=True)
class _Job:
    """One objective in one setting, and the file for its rows."""

    setting: ToySetting
    seeds: tuple[int, ...]
    variant: Variant
    points: int
    path: Path


def sweep(
    settings: Sequence[ToySetting],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    output: Path,
    *,
    points: int = 40,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[Row]:
    """Run every objective in every setting, except those that ``output`` has already; return all rows.

    Writes ``parts/SETTING/OBJECTIVE.csv`` as each is done, then ``toy.csv`` with all rows and ``ends.csv`` with the
    last step's mean and spread over seeds. A result that is there and damaged is made anew. The results do not depend
    on ``jobs``, the number of processes (of one thread each).

    Raises:
        DrklError: ``output`` holds results of other settings or seeds, or cannot be written to.
    """
    tasks = []
    for setting in settings:
        folder = output / "parts" / setting.name
        _check_folder(folder, setting, seeds, points)
        tasks += [_Job(setting, tuple(seeds), v, points, folder / f"{v.slug}.csv") for v in variants]
    missing = [task for task in tasks if not _is_there(task)]
    done = Counter(task.setting.name for task in tasks) - Counter(task.setting.name for task in missing)
    for task in _run_all(missing, jobs):
        done[task.setting.name] += 1
        if on_progress is not None:
            on_progress(task.setting.name, done[task.setting.name], len(variants))
    rows = [row for task in tasks for row in read_csv(task.path)]
    write_text(output / "toy.csv", to_csv(rows))
    write_text(output / "ends.csv", to_csv(ends(rows)))
    return rows


def _run_all(tasks: Sequence[_Job], jobs: int) -> Iterator[_Job]:
    """Run the tasks; yield each as it is done."""
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        try:
            with _one_thread():
                for task in tasks:
                    _run(task)
                    yield task
        finally:
            _problem.cache_clear()
        return
    # Not forked: a fork of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))
    try:
        with _without_ctrl_c():
            running = {pool.submit(_run, task): task for task in tasks}
        for future in as_completed(running):
            future.result()
            yield running[future]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    torch.set_num_threads(1)
    helps(parent)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside are told of Ctrl-C once they can take it without a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a matrix product depend on the number of threads, and paths diverge from there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _problem(setting: ToySetting, seeds: tuple[int, ...]) -> ToyProblem:
    """The last setting's teachers and start, shared by all its objectives."""
    return ToyProblem(setting, seeds)


def _run(job: _Job) -> None:
    problem, variant = _problem(job.setting, job.seeds), job.variant
    gamma = "" if variant.gamma is None else variant.gamma
    head = {"setting": job.setting.name, "objective": variant.label, "gamma": gamma}
    text = to_csv([{**head, **row} for row in problem.run(variant.objective, points=job.points)])
    write_text(_seal_path(job), _seal(job, text.encode()) + "\n")
    write_text(job.path, text)


def _seal_path(job: _Job) -> Path:
    return job.path.with_suffix(".xxh3")


def _seal(job: _Job, data: bytes) -> str:
    """A checksum of a result, and of what it is a result of."""
    return checksum(_described(job.setting, job.seeds, job.points).encode() + data)


def _is_there(job: _Job) -> bool:
    """Whether a result was written before and is still that; of an earlier drkl, whether it can be read."""
    if not job.path.is_file():
        return False
    try:
        seal = _seal_path(job)
        if not seal.is_file():
            read_csv(job.path)
        elif seal.read_bytes().strip().decode() != _seal(job, job.path.read_bytes()):
            raise ValueError("its checksum is that of another content, or of other settings")
    except (OSError, ValueError, DrklError) as error:
        _log.warning("Warning: %s is damaged (%s), and is made anew.", job.path, error)
        return False
    return True


def _check_folder(folder: Path, setting: ToySetting, seeds: Sequence[int], points: int) -> None:
    """Write ``setting.json``, or compare with the one that is there: a csv must not mix two settings."""
    text = _described(setting, seeds, points)
    wanted = json.loads(text)
    path = folder / "setting.json"
    if not path.is_file():
        write_text(path, text)
        return
    present = read_json(path)
    if not isinstance(present, dict):
        raise DrklError(f"{path} holds a {type(present).__name__}; expected an object. Delete it.")
    other = [key for key, value in wanted.items() if present.get(key) != value]
    if other:
        raise DrklError(
            f"{str(folder)!r} holds results with {', '.join(f'{key} {present.get(key)}' for key in other)}, not "
            f"{', '.join(str(wanted[key]) for key in other)}. Give another output folder, or delete that one."
        )


def _described(setting: ToySetting, seeds: Sequence[int], points: int) -> str:
    """The text of ``setting.json``."""
    said = {**asdict(setting), "seeds": list(seeds), "points": points, "metrics": list(METRICS)}
    return json.dumps(said, indent=2) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as csv, numbers with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a csv that `sweep` wrote; ``gamma`` is empty where an objective has none.

    Raises:
        DrklError: the file is something else, or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            if (header := next(lines, [])) != list(COLUMNS):
                raise ValueError(f"its first line is {','.join(header)[:200]!r}")
            return [{key: _value(key, text) for key, text in zip(COLUMNS, line, strict=True)} for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise DrklError(
            f"{path} is not a csv that `drkl toy` wrote: {error}. Delete it, and run the same again."
        ) from error


def _value(column: str, text: str) -> str | int | float:
    if column in ("setting", "objective") or not text:
        return text
    return int(text) if column in ("seed", "step") else float(text)


def ends(rows: Sequence[Row]) -> list[Row]:
    """The last step of each objective in each setting: every metric's mean over seeds, and its spread (max - min)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["objective"], row["gamma"]), []).append(row)
    result = []
    for key, members in groups.items():
        last = max(row["step"] for row in members)
        at_end = [row for row in members if row["step"] == last]
        end = dict(zip(("setting", "objective", "gamma"), key, strict=True)) | {"seeds": len(at_end)}
        for metric in METRICS:
            values = np.array([row[metric] for row in at_end])
            end |= {metric: float(values.mean()), f"{metric}_spread": float(np.ptp(values))}
        result.append(end)
    return result
