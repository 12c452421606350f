"""The part of some work that one process of several does, and how all parts come together.

Work is cut into the same pieces whoever does it, each piece is done by one process, and the results are put together in
the order of the pieces: a number is then the same to the last bit for any number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from drkl.errors import DrklError

Item = TypeVar("Item")
Result = TypeVar("Result")

_TOLD = "Every process of the group knows of this error."
_WAIT = timedelta(days=1)
"""A process that ends closes its connections, which is noticed at once; one that works is waited for."""


class Failure(NamedTuple):
    """What a process sends in the place of its part."""

    process: int
    text: str


@dataclass(frozen=True)
class Share:
    """One of several processes that work together; by default one that is alone.

    Every process calls the same methods in the same order. An error in one of them is raised in all.
    """

    process: int = 0
    processes: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """From one list in each process to their concatenation, in every process."""
    first_alone: bool = False
    """The first process does everything, as where a server does the work."""

    @classmethod
    def of_group(cls, *, first_alone: bool = False) -> Share:
        """The share of this process in the process group of `torch.distributed`; all the work where there is none."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), _gather, first_alone)

    @property
    def is_first(self) -> bool:
        """Whether this process says and writes what one of them alone has to."""
        return self.process == 0

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that this process works on."""
        if self.first_alone:
            return items if self.is_first else []
        return items[self.process :: self.processes]

    def together(self, work: Callable[[], Sequence[Result]]) -> list[Result]:
        """The results of every process, one process after the other, in all of them."""
        try:
            part = list(work())
        except Exception as error:
            self._tell(error)
            raise
        return self._exchange(part)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the result of each item, in their order, in every process; each is worked on by one of them."""
        for start in range(0, len(items), self.processes):
            mine = items[start : start + self.processes][self.process : self.process + 1]
            yield from self.together(partial(_each, work, mine))

    def first(self, work: Callable[[], Result]) -> Result:
        """What the first process alone computes, in every process."""
        [found] = self.together(lambda: [work()] if self.is_first else [])
        return found

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """All processes leave the block together: with the error of one of them where there was one."""
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise
        self._exchange([])

    def check_same(self, what: str, value: str) -> None:
        """Raise DrklError unless ``value``, which stands for ``what``, is the same in every process."""
        if len({*self.together(lambda: [value])}) > 1:
            raise self._known(
                DrklError(
                    f"The processes of the group have different {what}. They divide one piece of work: give each of "
                    "them the same models, rows and settings."
                )
            )

    def _exchange(self, part: list[Any]) -> list[Any]:
        if self.processes == 1:
            return part
        parts = self.gather(part)
        for item in parts:
            if isinstance(item, Failure):
                raise self._known(DrklError(item.text))
        return parts

    def _tell(self, error: Exception) -> None:
        """Let the others know of an error, who wait for this process's part."""
        if self.processes == 1 or is_told(error):
            return
        text = str(error) if isinstance(error, DrklError) else f"Process {self.process} failed: {error!r}"
        with contextlib.suppress(DrklError):  # they may be gone
            self.gather([Failure(self.process, text)])
        self._known(error)

    def _known(self, error: Exception) -> Any:
        error.add_note(_TOLD)
        return error


ALONE = Share()


def _each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [work(item) for item in items]


def is_told(error: BaseException | None) -> bool:
    """Whether every process of the group knows of an error, or of the one that it was made of."""
    while error is not None:
        if _TOLD in getattr(error, "__notes__", ()):
            return True
        error = error.__cause__
    return False


def launched() -> tuple[int, int]:
    """This process's number, from 0, and how many a launcher such as torchrun started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), processes) if processes > 1 else (0, 1)


def join_launched() -> Share:
    """Join the processes that a launcher such as torchrun started, each with a GPU of its own where there are some.

    What they exchange goes through the CPU, so that there may be more of them than GPUs.
    """
    if launched()[1] > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_WAIT)
    return Share.of_group()


def _gather(own: list[Any]) -> list[Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(parts, own)
    except RuntimeError as error:
        lost = DrklError(
            "Another process of the group ended, or does not answer. What it said before tells why; where it said "
            f"nothing, see that every process calls the same function. ({str(error).splitlines()[0][:200]})"
        )
        lost.add_note(_TOLD)
        raise lost from error
    return [item for part in parts for item in part]
