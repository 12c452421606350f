"""What a study will take: the time and the disk of the cells that are missing, from those that are finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drkl.display import number
from drkl.studies.cells import State
from drkl.studies.grid import group_of, same
from drkl.studies.plan import Plan, Planned
from drkl.studies.records import Record, cell_record
from drkl.studies.running import offered
from drkl.studies.starts import cache_for, start_for, why_live

_PARTS = ("train", "evaluate")


@dataclass(frozen=True)
class Price:
    """The cells of a study, or of a part of it, with their states, and what the missing ones take."""

    states: Mapping[str, tuple[State, str | None]]
    """By cell, with the last message of one that failed, or where another study has it."""
    seconds: Mapping[str, float | None]
    """By cell that is not done: what it takes from its beginning on; None where nothing tells."""
    shared: Mapping[str, float | None]
    """By start and cache that is not there, likewise."""
    jobs: int
    disk: float | None
    """Bytes that the missing cells take; None where none has finished."""
    live: Mapping[str, str]
    """Cells that read the teacher itself beside a study's cache of it, each with the reason."""
    of: int
    """The cells of the whole study."""

    @property
    def total(self) -> float | None:
        """Seconds until the study is whole, several cells at once; None where nothing tells."""
        each = [*self.seconds.values(), *self.shared.values()]
        known = [value for value in each if value is not None]
        return sum(known) / self.jobs if len(known) == len(each) else None

    def lines(self) -> list[str]:
        """The states and the price in words."""
        width = max(map(len, self.states), default=0)
        lines = []
        for name, (state, why) in self.states.items():
            text = state if why is None else f"{state}: {why}"
            takes = "" if self.seconds.get(name) is None else f"  {_time(self.seconds[name])}"
            lines.append(f"{name:{width}}  {text}{takes}")
        if self.live:
            reasons = dict.fromkeys(self.live.values())
            for reason in reasons:
                names = ", ".join(name for name, why in self.live.items() if why == reason)
                lines.append(f"The teacher itself is read by {names}: {reason}.")
        return lines + self._sums()

    def _sums(self) -> list[str]:
        left = len(self.seconds)
        if not left:
            what = "The study is whole" if len(self.states) == self.of else _part_is_whole(len(self.states))
            return [f"{what}: nothing is left to run."]
        lines = [f"{left} of {len(self.states)} cells are left, and of what they share {_counted(self.shared)}."]
        unknown = [name for name, value in self.shared.items() if value is None]
        if all(value is None for value in self.seconds.values()):
            lines.append("No cell has finished yet: run one first, and it tells what the others take.")
        elif self.total is None:
            known = sum(v for v in (*self.seconds.values(), *self.shared.values()) if v is not None) / self.jobs
            lines.append(f"That is {_time(known)}, and what no one knows yet: {', '.join(unknown)}.")
        else:
            at_once = f", {self.jobs} cells at once" if self.jobs > 1 else ""
            lines.append(f"That is {_time(self.total)}{at_once}, at the pace of the cells that are finished.")
        if self.disk is not None:
            lines.append(f"They will take {number(self.disk / 2**20, 0)} MiB of disk.")
        return lines


def price(plan: Plan, cells: Sequence[Planned], jobs: int = 1) -> Price:
    """Price the cells of a study, or of a part of it, that are not finished; nothing is written.

    A cell whose record is damaged counts as failed.

    Args:
        plan: of the study.
        cells: those that count.
        jobs: how many run at once. Each is taken to be as fast as one alone.
    """
    known = {planned.cell.name: cell_record(planned.folder.root).readable() for planned in plan.cells}
    states = {planned.cell.name: cell_record(planned.folder.root).state() for planned in cells}
    for name, (path, _) in offered(plan, cells).items():
        states[name] = "done", f"in {path}"
    finished = [planned for planned in plan.cells if cell_record(planned.folder.root).is_done]
    left = [planned for planned in cells if states[planned.cell.name][0] != "done"]
    seconds = {planned.cell.name: _seconds(planned, finished, known) for planned in left}
    disks = [_bytes_in(planned.folder.root) for planned in finished if "run" not in known[planned.cell.name]]
    live = {}
    if plan.definition.shared.teacher_cache is not None:
        live = {p.cell.name: why for p in cells if (why := why_live(plan, p)) is not None}
    disk = sum(disks) / len(disks) * len(left) if disks else None
    return Price(states, seconds, _shared(plan, left), jobs, disk, live, len(plan.cells))


def _part_is_whole(cells: int) -> str:
    if not cells:
        return "No cell is in this part"
    return "The only cell of this part is done" if cells == 1 else f"All {cells} cells of this part are done"


def _seconds(planned: Planned, finished: Sequence[Planned], known: Mapping[str, Any]) -> float | None:
    """The mean over the finished cells of the same kind, else over all of them."""
    alike = [other for other in finished if same(group_of(other.cell.axes), group_of(planned.cell.axes))] or finished
    sums = [sum(known[other.cell.name]["seconds"].get(part, 0.0) for part in _PARTS) for other in alike]
    return sum(sums) / len(sums) if sums else None


def _shared(plan: Plan, left: Sequence[Planned]) -> dict[str, float | None]:
    """The starts and caches that cells still need, each once."""
    every: dict[str, Record] = {}
    needed: dict[str, Record] = {}
    for planned in plan.cells:
        start, cache = start_for(plan, planned), cache_for(plan, planned)
        own = {} if start is None or not start.is_made else {f"the start {start.key}": start.record}
        own |= {} if cache is None else {f"the cache {cache.key}": cache.record}
        every |= own
        needed |= own if planned in left else {}
    took: dict[str, list[float]] = {"start": [], "cache": []}
    known = {name: record.readable() for name, record in every.items()}
    finished = [name for name, own in known.items() if own.get("finished") is not None]
    for name in finished:
        took[every[name].kind].append(known[name]["seconds"].get("train", 0.0))
    missing = {name: record for name, record in needed.items() if name not in finished}
    means = {kind: sum(values) / len(values) if values else None for kind, values in took.items()}
    return {name: means[record.kind] for name, record in missing.items()}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _counted(shared: Mapping[str, Any]) -> str:
    starts = sum(name.startswith("the start") for name in shared)
    caches = len(shared) - starts
    words = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in ((starts, "start"), (caches, "cache"))
             if count]  # fmt: skip
    return " and ".join(words) or "nothing"


def _time(seconds: float | None) -> str:
    """A time in words: hours with a digit, minutes below two hours."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
