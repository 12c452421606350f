"""Run what is missing of a study: each cell in processes of its own, one failure stopping nobody else."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from drkl.config import Config
from drkl.disk import CannotWrite
from drkl.errors import DrklError
from drkl.kept import note_removed
from drkl.locks import EVALUATION, STUDY, TRAINING, InUse, holding, is_held
from drkl.runs import RunFolder
from drkl.signals import deferred, said_of
from drkl.studies.commands import Commands, Failed
from drkl.studies.folder import settings_digest
from drkl.studies.plan import Plan, Planned
from drkl.studies.records import ENDED_BY_SIGNAL, Record, began_at, cell_record
from drkl.studies.starts import (
    Cache,
    Start,
    cache_for,
    cell_config,
    check_not_remade,
    check_same,
    drop_weights,
    make_init,
    start_for,
    weights_of,
)

TICK = 0.2
"""Seconds between two looks at what runs."""
Work = Iterator[None]


class Words(Protocol):
    """The words of the commands that a study runs, after ``drkl``."""

    def train(self, config: Path) -> list[str]:
        """Train the run of a config, or go on with it."""

    def cache(self, config: Path, folder: Path, kind: str, temperatures: Sequence[float]) -> list[str]:
        """Write a cache of the teacher for the run of a config."""

    def evaluate(self, run: Path, teacher: str | None) -> list[str]:
        """Evaluate a run's teacher and student; ``teacher`` is loaded where the run read its cache."""


@dataclass(frozen=True)
class Now:
    """How far a study is, for a front end."""

    of: int
    """The cells of this call."""
    done: int
    failed: int
    running: tuple[tuple[str, str, int, int | None], ...]
    """By cell: what is done for it, the optimiser step, and how many there are."""
    seconds_left: float | None
    """What is left for this process; None before a cell has finished."""


@dataclass
class Listener:
    """Hooks for a front end; each does nothing by default."""

    on_message: Callable[[str], None] = lambda text: None
    on_progress: Callable[[Now], None] = lambda now: None


@dataclass
class Outcome:
    """What a call has come to."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """The last message by cell."""
    elsewhere: list[str] = field(default_factory=list)
    """Cells that other processes work on."""


def part_of(plan: Plan, number: int, of: int) -> list[Planned]:
    """The cells of one part of a study, the parts numbered from 1: whole seeds as far as there are enough.

    Every cell is in one part, and a seed is divided only where there are more parts than seeds.
    """
    seeds = list(dict.fromkeys(planned.seed for planned in plan.cells))
    if of <= len(seeds):
        own = seeds[number - 1 :: of]
        return [planned for planned in plan.cells if planned.seed in own]
    place = (number - 1) % len(seeds)
    share = len(range(place, of, len(seeds)))
    cells = [planned for planned in plan.cells if planned.seed == seeds[place]]
    return cells[(number - 1) // len(seeds) :: share]


def run_study(
    plan: Plan,
    words: Words,
    *,
    part: tuple[int, int] = (1, 1),
    commands: Commands | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Run the cells of a study, or of a part of it, that are not finished and that nobody else works on.

    A signal is handed to the commands that run, which save what they have; the study ends once they have.

    Args:
        plan: of the study, whose folder is settled.
        words: of the commands.
        part: which part, and of how many.
        commands: starts them; several at once with ``jobs``.
        listener: hooks for a front end.

    Raises:
        DrklError: what is noted of a cell is damaged, or cannot be written.
        Stopped: a signal came.
    """
    runner = _Runner(plan, words, commands or Commands(), listener or Listener(), part_of(plan, *part))
    return runner.run()


class _Runner:
    def __init__(
        self, plan: Plan, words: Words, commands: Commands, listener: Listener, cells: Sequence[Planned]
    ) -> None:
        self.plan, self.words, self.commands, self.listener, self.cells = plan, words, commands, listener, cells
        self.outcome = Outcome()
        self.doing: dict[str, str] = {}
        """What is done for each cell that is worked on."""
        self.broken: dict[Path, str] = {}
        """Starts and caches that could not be made in this call, and why."""
        self.spent: list[float] = []
        """Seconds of each cell that was finished in this call."""

    def run(self) -> Outcome:
        adopt(self.plan, self.cells)
        waiting = [planned for planned in self.cells if not cell_record(planned.folder.root).is_done]
        self.outcome.done = len(self.cells) - len(waiting)
        working: dict[str, Any] = {}
        with deferred() as signals:
            signals.begin()
            try:
                while (waiting or working) and not (self.commands.ended_by and not working):
                    if signals.signum and not self.commands.ended_by:
                        self.listener.on_message(f"{said_of(signals.signum)}: what runs is saved.")
                        self.commands.signal(signals.signum)
                    while waiting and len(working) < self.commands.jobs and not self.commands.ended_by:
                        planned = waiting.pop(0)
                        working[planned.cell.name] = self._work(planned)
                    self._step(working)
                    self._tell(len(waiting))
                    time.sleep(TICK if working else 0)
            except BaseException:
                self._give_up(working)
                raise
            signals.end()
        return self.outcome

    def _step(self, working: dict[str, Any]) -> None:
        for name, work in list(working.items()):
            try:
                next(work)
            except StopIteration:
                del working[name]
                self.doing.pop(name, None)

    def _give_up(self, working: dict[str, Any]) -> None:
        """End what runs, after an error of the study itself."""
        self.commands.signal(self.commands.ended_by or signal.SIGTERM)
        while any(process.poll() is None for process in self.commands.running):
            time.sleep(TICK)
        for work in working.values():
            with closing(work):
                pass

    def _tell(self, waiting: int) -> None:
        running = []
        for planned in self.cells:
            if (what := self.doing.get(planned.cell.name)) is not None:
                step = planned.folder.last_step() if what == "train" else 0
                running.append((planned.cell.name, what, step, planned.config.training.max_steps))
        left = None
        if self.spent:
            ahead = sum(1 - step / of / 2 if of else 1.0 for _, _, step, of in running)
            left = (waiting + ahead) * sum(self.spent) / len(self.spent) / self.commands.jobs
        outcome = self.outcome
        self.listener.on_progress(Now(len(self.cells), outcome.done, len(outcome.failed), tuple(running), left))

    # A cell -----------------------------------------------------------------------------------------------------

    def _work(self, planned: Planned) -> Work:
        """All of one cell, unless another process works on it."""
        name, folder = planned.cell.name, planned.folder.root
        try:
            for tries in range(2):  # who looks at a lock holds it for a moment
                try:
                    with holding(folder, STUDY):
                        yield from self._cell(planned)
                    return
                except InUse:
                    if tries == 0:
                        yield
            self.outcome.elsewhere.append(name)
        except Failed as failed:
            self._note_failed(name, failed.message)
        except CannotWrite:
            raise
        except DrklError as error:  # of this cell's own files
            self._note_failed(name, str(error))

    def _note_failed(self, name: str, message: str) -> None:
        if not self.commands.ended_by:
            self.outcome.failed[name] = message
            self.listener.on_message(f"{name} has failed: {message}")

    def _end(self, record: Record, failed: Failed) -> None:
        """Note how a try has failed; what a signal ended has not."""
        if self.commands.ended_by or failed.status in ENDED_BY_SIGNAL:
            record.end(128 + self.commands.ended_by if self.commands.ended_by else failed.status)
        else:
            record.end(failed.status, failed.message)

    def _cell(self, planned: Planned) -> Work:
        name, record = planned.cell.name, cell_record(planned.folder.root)
        if record.is_done:
            self.outcome.done += 1
            return
        _check_is_own(record)
        yield from self._free(planned.folder.root, name)
        start, cache = start_for(self.plan, planned), cache_for(self.plan, planned)
        config = cell_config(planned, start, cache)
        facts: dict[str, Any] = {}
        if not (record.has_begun and _is_trained(planned.folder)):  # what is trained needs neither start nor cache
            try:
                facts = yield from self._begin_with(planned, start, cache, config)
            except Failed as failed:
                if not self.commands.ended_by and failed.status not in ENDED_BY_SIGNAL:
                    record.not_begun(failed.message, axes=planned.cell.axes)
                raise
        record.begin(config.values("json"), **facts)
        began = time.monotonic()
        try:
            yield from self._train_and_evaluate(planned, config, record.read()["start"])
        except Failed as failed:
            self._end(record, failed)
            raise
        record.end(0)
        self.spent.append(time.monotonic() - began)
        self.outcome.done += 1
        self.listener.on_message(f"{name} is done ({self.outcome.done} of {len(self.cells)}).")
        self._drop(planned, start)

    def _begin_with(self, planned: Planned, start: Start | None, cache: Cache | None, config: Config) -> Any:
        """See that what a cell needs is there, and return what is to be noted of it."""
        self.doing[planned.cell.name] = "start"
        known = yield from self._start(start, planned)
        seconds = {"start": round(_seconds_of(known) / known.get("cells", 1), 1)}
        if cache is not None:
            self.doing[planned.cell.name] = "cache"
            yield from self._cache(cache, config)
            seconds["cache"] = round(_seconds_of(cache.record.read()) / self._sharing(cache, cache_for), 1)
        return {
            "axes": planned.cell.axes, "settings_digest": settings_digest(self.plan, planned),
            "start": known.get("digest"), "start_key": None if start is None else start.key,
            "cache": None if cache is None else str(cache.folder),
            "seconds": seconds,
        }  # fmt: skip

    def _train_and_evaluate(self, planned: Planned, config: Config, digest: str | None) -> Work:
        name, folder = planned.cell.name, planned.folder
        record = cell_record(folder.root)
        if not _is_trained(folder):
            self.doing[name] = "train"
            self.listener.on_message(f"{name}: training.")
            yield from self.commands.run(record, "train", self.words.train(record.config_path))
        _check_began(folder, digest, config)
        if not folder.eval_path.is_file():
            self.doing[name] = "evaluate"
            teacher = config.teacher
            loaded = teacher.model if teacher is not None and teacher.cache is not None else None
            yield from self.commands.run(record, "evaluate", self.words.evaluate(folder.root, loaded))

    def _free(self, folder: Path, name: str) -> Work:
        """Wait for a command that an earlier study has left behind, for the stages of a start too, and for a cache."""
        said = False
        while any(is_held(place, *names) for place, names in _locks_of(folder)):
            if not said:
                self.listener.on_message(f"{name}: another process still works in {folder}; waiting for it.")
            said = True
            if self.commands.ended_by:
                raise Failed(128 + self.commands.ended_by, said_of(self.commands.ended_by))
            yield

    # What is shared -----------------------------------------------------------------------------------------------

    def _start(self, start: Start | None, planned: Planned) -> Any:
        """See that a start is there, and return what is noted of it."""
        if start is None:
            return {}
        record = start.record

        def make() -> Work:
            check_not_remade(self.plan, start)
            self.listener.on_message(f"{start.key}: the start of the cells of seed {planned.seed}.")
            record.begin(
                start.config.values("json"), key=start.key, seed=planned.seed, cells=self._sharing(start, start_for)
            )
            for run in start.runs:
                record.rewrite(run.values("json"))
                yield from self.commands.run(record, "train", self.words.train(record.config_path))
            began = time.monotonic()
            if start.is_made and not start.runs:
                make_init(start)
            found = weights_of(start)
            check_same(self.plan, start, found)
            record.add("train", time.monotonic() - began)
            record.end(0, digest=found)

        def is_there() -> bool:
            return record.is_finished and start.has_weights

        yield from self._made(record, is_there, make)
        return record.read()

    def _sharing(self, made: Start | Cache, made_for: Callable[[Plan, Planned], Start | Cache | None]) -> int:
        """The number of cells that begin from a start, or read a cache."""
        return sum(1 for other in self.plan.cells if (own := made_for(self.plan, other)) and own.key == made.key)

    def _cache(self, cache: Cache, config: Config) -> Work:
        record = cache.record
        without = config.teacher.model_copy(update={"cache": None}) if config.teacher is not None else None

        def make() -> Work:
            self.listener.on_message(f"{cache.key}: the cache of the teacher ({cache.kind}).")
            values = config.model_copy(update={"teacher": without}).values("json")
            record.begin(values, key=cache.key, kind=cache.kind)
            words = self.words.cache(record.config_path, cache.folder, cache.kind, cache.temperatures)
            yield from self.commands.run(record, "train", words)
            record.end(0)

        yield from self._made(record, lambda: record.is_finished, make)

    def _made(self, record: Record, is_there: Callable[[], bool], make: Callable[[], Work]) -> Work:
        """Make something that cells share, or wait while another process does."""
        while not _or_failed(is_there):
            if record.folder in self.broken:
                raise Failed(1, self.broken[record.folder])
            try:
                with holding(record.folder, STUDY):
                    yield from self._free(record.folder, record.folder.name)
                    if not is_there():
                        yield from self._make(record, make)
            except InUse:
                if self.commands.ended_by:
                    raise Failed(128 + self.commands.ended_by, said_of(self.commands.ended_by)) from None
                yield

    def _make(self, record: Record, make: Callable[[], Work]) -> Work:
        what = {"start": "Its start", "cache": "Its teacher's cache"}[record.kind]
        not_made = f"{what} {record.folder.name} could not be made"
        try:
            yield from make()
        except Failed as failed:
            self._end(record, failed)
            message = f"{not_made}: {failed.message}"
            if not self.commands.ended_by:
                self.broken[record.folder] = message
            raise Failed(failed.status, message) from None
        except CannotWrite:
            raise
        except (DrklError, RuntimeError, ValueError, MemoryError) as error:  # a student that does not fit, for instance
            message = str(error)
            if not isinstance(error, DrklError):
                message = f"{not_made}: {type(error).__name__}: {error}"
            if record.readable().get("tries"):
                record.end(2, message)
            self.broken[record.folder] = message
            raise Failed(2, message) from error

    # What is not kept ---------------------------------------------------------------------------------------------

    def _drop(self, planned: Planned, start: Start | None) -> None:
        """Remove the student of a cell that was evaluated, and its start once no cell needs it."""
        if self.plan.definition.keep_students:
            return
        note_removed(planned.folder)
        for path in (planned.folder.student_path, planned.folder.checkpoints_path):
            shutil.rmtree(path, ignore_errors=True)
        # A folder that the study's file names may have the starts of other studies.
        if start is None or not start.is_made or self.plan.definition.shared.dir is not None:
            return
        for other in self.plan.cells:
            own = start_for(self.plan, other)
            if own is not None and own.key == start.key and not cell_record(other.folder.root).is_done:
                return
        if start.record.folder.is_relative_to(self.plan.shared):
            drop_weights(start)


def _seconds_of(made: Mapping[str, Any]) -> float:
    """What it took to make a start or a cache, by its record; 0 where nothing was made."""
    return float(made.get("seconds", {}).get("train", 0.0))


def _is_trained(folder: RunFolder) -> bool:
    return folder.config_path.is_file() and folder.is_finished()


def _or_failed(is_there: Callable[[], bool]) -> bool:
    """Whether something is there; a damaged record of it fails those who need it."""
    try:
        return is_there()
    except DrklError as error:
        raise Failed(2, str(error)) from error


def _check_is_own(record: Record) -> None:
    """Raise DrklError where a cell's record is damaged, or is of another study's cell whose results are gone."""
    if "run" in record.read():
        raise DrklError(
            f"{record.state()[1]} It is a cell of another study: bring it back from a copy, or remove "
            f"{str(record.folder)!r}, and the cell is run here."
        )


def _locks_of(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Where the commands of a cell, a start or a cache may hold a lock, and the names of the locks there."""
    yield folder, [TRAINING, EVALUATION]
    for stage in RunFolder(folder).stages():
        yield stage.root, [TRAINING]
    for lock in folder.glob("cache/.part-*.lock"):
        yield lock.parent, [lock.name]


def offered(plan: Plan, cells: Sequence[Planned]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the finished cells of other studies that equal ones of this study: by name a run folder, and its record.

    Args:
        plan: of the study; its definition names the other studies.
        cells: those that are looked for. What has begun already is left out.
    """
    known: dict[str, tuple[Path, dict[str, Any]]] = {}
    for other in plan.definition.shared.cells:
        for path in sorted((Path(other) / "cells").glob("*")):
            about = cell_record(path).readable()
            if cell_record(path).is_done and "run" not in about and "settings_digest" in about:
                known.setdefault(about["settings_digest"], (path, about))
    found = {}
    for planned in cells if known else ():
        one = known.get(settings_digest(plan, planned))
        if one is None or cell_record(planned.folder.root).has_begun:
            continue
        start = start_for(plan, planned)
        # With another start it would not be paired with the others of its seed.
        if start is None or start.record.readable().get("digest") in (None, one[1]["start"]):
            found[planned.cell.name] = one
    return found


def adopt(plan: Plan, cells: Sequence[Planned]) -> None:
    """Take what is `offered`. It stays where it is: a cell's record says ``run``, that folder from the study's."""
    others = offered(plan, cells)
    for planned in cells:
        if planned.cell.name in others:
            record, (path, about) = cell_record(planned.folder.root), others[planned.cell.name]
            with suppress(InUse), holding(record.folder, STUDY):
                if not record.has_begun:
                    where = os.path.relpath(path, plan.folder)
                    taken: dict[str, Any] = {"run": where, "began": began_at(about), "tries": []}
                    record.write(about | {"axes": planned.cell.axes} | taken)


def _check_began(folder: RunFolder, digest: str | None, config: Config) -> None:
    """Raise Failed where a cell began with other weights than its start has now."""
    found = ((folder.read_env().get("inputs") or {}).get("student") or {}).get("weights")
    if None in (found, digest) or config.peft is not None:  # an adapter's weights are counted with it
        return
    if found != digest:
        raise Failed(
            1,
            f"The cell began with weights of the digest {found}, and its start has {digest}: they are not the same. "
            "Remove the cell's folder, and it is run again.",
        )
