"""A sweep over toy settings and objectives: resumable, one csv file for each finished pair."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from drkl.analysis.toy import ToyProblem, ToySetting
from drkl.analysis.toy_metrics import METRICS
from drkl.errors import DrklError, did_you_mean
from drkl.objectives import OBJECTIVES, Objective, decoupled, make_objective
from drkl.runs import write_text

COLUMNS = ("setting", "objective", "gamma", "seed", "step", *METRICS)
Row = dict[str, str | int | float]
Progress = Callable[[str, int, int], None]

DEFAULT_OBJECTIVES = (
    *OBJECTIVES,
    *(f"drkl:{gamma}" for gamma in (0.1, 0.25, 1.0)),
    "drkl@student", "drkl@floor",
    *(f"rkl+fkl:{gamma}" for gamma in (0.1, 0.25, 0.5, 1.0)),
    *(f"rkl+gjs:{gamma}" for gamma in (0.1, 0.25, 0.5, 1.0)),
)  # fmt: skip
"""Every registered objective with its defaults (drkl's gamma is 0.5), and decoupled ones at several gammas."""


@dataclass(frozen=True)
class Variant:
    """An objective of a sweep, and how it is called there."""

    spec: str
    objective: Objective
    label: str
    gamma: float | None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.spec)


def parse_variant(spec: str) -> Variant:
    """Make the objective that ``spec`` names: NAME or F+G (target+tail), then ``~SKEW``, ``:GAMMA``, ``@WEIGHT``.

    >>> parse_variant("rkl+gjs:0.25").objective.gamma
    0.25
    """
    found = re.fullmatch(r"([a-z_]+)(?:\+([a-z_]+))?(?:~([0-9.]+))?(?::([0-9.eE+-]+))?(?:@([a-z]+))?", spec)
    if found is None:
        raise DrklError(
            f"There is no objective {spec!r}; expected NAME, drkl:GAMMA, drkl~SKEW, drkl@WEIGHT or F+G:GAMMA, as "
            "rkl+gjs:0.5."
        )
    name, tail, skew, number, weight = found.groups()
    options: dict[str, float | str] = {}
    for option, text, example in (("gamma", number, "drkl:0.1"), ("skew", skew, "drkl~0.1")):
        if text is not None:
            try:
                options[option] = float(text)
            except ValueError:
                raise DrklError(f"{spec!r}: {text!r} is no number; expected a {option}, as in {example}.") from None
    if weight is not None:
        options["weight"] = weight
    label = name if tail is None else f"{name}+{tail}"
    label += ("" if skew is None else f"~{skew}") + ("" if weight is None else f"@{weight}")
    if skew is not None and (tail is not None or name not in ("drkl", "srkl", "sfkl")):
        raise DrklError(f"{spec!r}: {name if tail is None else 'F+G'} has no skew; drkl, srkl and sfkl have.")
    if tail is not None:
        made: Objective = decoupled(name, tail, **options)  # type: ignore[arg-type]
    elif options.keys() - {"skew"} and name in OBJECTIVES and name != "drkl":
        raise DrklError(f"{spec!r}: {name} has no gamma and no weight; drkl and F+G have.")
    else:
        made = make_objective(name, **options)
    gamma = None if weight in ("student", "teacher") else getattr(made, "gamma", None)
    return Variant(spec, made, label, gamma)


def parse_variants(specs: Iterable[str]) -> list[Variant]:
    """`parse_variant` of each, once; what is the same objective under two names is named once too."""
    variants: dict[tuple[str, float | None], Variant] = {}
    for spec in specs:
        variant = parse_variant(spec)
        variants.setdefault((variant.label, variant.gamma), variant)
    return list(variants.values())


@dataclass(frozen=True)
class _Task:
    """One objective in one setting, and the file that its rows go to."""

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
    """Run every objective in every setting, but for those whose result lies in ``output`` already; return all rows.

    Writes ``parts/SETTING/OBJECTIVE.csv`` as each is done, then ``toy.csv`` with all rows and ``ends.csv`` with the
    last step's mean and spread over seeds. ``jobs`` processes of one thread each share the work: the results are the
    same for any number.

    Raises:
        DrklError: ``output`` holds results of other settings or seeds, or nobody can write there.
    """
    tasks = []
    for setting in settings:
        folder = output / "parts" / setting.name
        _claim(folder, setting, seeds, points)
        tasks += [_Task(setting, tuple(seeds), v, points, folder / f"{v.slug}.csv") for v in variants]
    missing = [task for task in tasks if not task.path.is_file()]
    done = Counter(task.setting.name for task in tasks if task.path.is_file())
    for task in _run_all(missing, jobs):
        done[task.setting.name] += 1
        if on_progress is not None:
            on_progress(task.setting.name, done[task.setting.name], len(variants))
    rows = [row for task in tasks for row in read_csv(task.path)]
    write_text(output / "toy.csv", to_csv(rows))
    write_text(output / "ends.csv", to_csv(ends(rows)))
    return rows


def _run_all(tasks: Sequence[_Task], jobs: int) -> Iterator[_Task]:
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
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        running = {pool.submit(_run, task): task for task in tasks}
        for future in as_completed(running):
            future.result()
            yield running[future]
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A product of matrices differs in its last bits with the number of threads, and paths part from there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _problem(setting: ToySetting, seeds: tuple[int, ...]) -> ToyProblem:
    """The last setting's teachers and start, which the tasks of a setting share."""
    return ToyProblem(setting, seeds)


def _run(task: _Task) -> None:
    problem, variant = _problem(task.setting, task.seeds), task.variant
    gamma: str | float = "" if variant.gamma is None else variant.gamma
    head: Row = {"setting": task.setting.name, "objective": variant.label, "gamma": gamma}
    rows: list[Row] = [{**head, **row} for row in problem.run(variant.objective, points=task.points)]
    write_text(task.path, to_csv(rows))


def _claim(folder: Path, setting: ToySetting, seeds: Sequence[int], points: int) -> None:
    """Results of one folder have one setting, or a csv would mix what cannot be compared."""
    asked = {**setting.as_dict(), "seeds": list(seeds), "points": points, "metrics": list(METRICS)}
    path = folder / "setting.json"
    try:
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key, value in asked.items() if there.get(key) != value]
            if other:
                raise DrklError(
                    f"{str(folder)!r} holds results with {', '.join(f'{key} {there.get(key)}' for key in other)}, "
                    f"not {', '.join(str(asked[key]) for key in other)}. Give another --output, or delete that folder."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=2) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise DrklError(f"Cannot use {str(folder)!r} for results: {error}") from error


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as csv, numbers with six digits."""
    text = io.StringIO()
    columns = list(rows[0]) if rows else list(COLUMNS)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a csv that `sweep` wrote; ``gamma`` is empty where an objective has none."""
    rows: list[Row] = []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row: Row = {"setting": line["setting"], "objective": line["objective"]}
            row["gamma"] = float(line["gamma"]) if line["gamma"] else ""
            row |= {"seed": int(line["seed"]), "step": int(line["step"])}
            rows.append(row | {key: float(line[key]) for key in METRICS})
    return rows


def ends(rows: Sequence[Row]) -> list[Row]:
    """The last step of each objective in each setting: every metric's mean over seeds, and its spread (max - min)."""
    groups: dict[tuple[object, object, object], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["objective"], row["gamma"]), []).append(row)
    found: list[Row] = []
    for (setting, objective, gamma), members in groups.items():
        last = max(int(row["step"]) for row in members)
        at_end = [row for row in members if row["step"] == last]
        end: Row = {"setting": str(setting), "objective": str(objective), "gamma": gamma, "seeds": len(at_end)}  # type: ignore[dict-item]
        for key in METRICS:
            values = np.array([float(row[key]) for row in at_end])
            end[key] = float(values.mean())
            end[f"{key}_spread"] = float(np.ptp(values))
        found.append(end)
    return found


def split_list(option: str, text: str) -> list[str]:
    """The parts of a comma-separated option, each once.

    Raises:
        DrklError: there is none.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise DrklError(f"{option} is {text!r}; expected one value, or several with commas between.")
    return list(dict.fromkeys(found))


def parse_numbers(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated option.

    Raises:
        DrklError: one is no number, or there is none.
    """
    try:
        return [float(part) for part in split_list(option, text)]
    except DrklError:
        raise
    except ValueError:
        raise DrklError(f"{option} is {text!r}; expected numbers with commas between, as 4.15,1.4.") from None


def parse_words(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The words of a comma-separated option, each one of ``known``.

    Raises:
        DrklError: one is not, or there is none.
    """
    found = split_list(option, text)
    for word in found:
        if word not in known:
            raise DrklError(f"{option} has {word!r}; expected of {', '.join(known)}.{did_you_mean(word, known)}")
    return found
