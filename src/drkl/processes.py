"""Processes that run one program together, as torchrun and accelerate start them: who one is, and how work is shared.

The process group is torch.distributed's. Without one there is one process, and each function does the plain thing.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from drkl.errors import DrklError
from drkl.signals import CutShort

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """One of several processes.

    >>> Place(1, 3).share_of(5), Place(2, 3).share_of(5, even=True)
    ([1, 4], [2, 4])
    """

    number: int = 0
    """From 0; the first speaks and writes for all."""
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share_of(self, pieces: int, *, even: bool = False) -> list[int]:
        """The numbers of the pieces of work that are this process's.

        Args:
            pieces: how many there are.
            even: every process has the same number, as where the models' weights are spread over the processes and
                each forward pass is one of all of them: a process without a piece repeats the last one.
        """
        own = list(range(self.number, pieces, self.count))
        return [*own, pieces - 1] if even and len(own) < -(-pieces // self.count) else own


def launched() -> Place:
    """This process among those that were started together, known before they have spoken with each other."""
    try:
        return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise DrklError(f"RANK or WORLD_SIZE of the environment is no whole number ({error}); unset both.") from error


def joined() -> Place:
    """This process in the process group; one of one where there is no group."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return Place()
    return Place(distributed.get_rank(), distributed.get_world_size())


def gather(part: Iterable[T]) -> list[T]:
    """The parts of all processes, one after the other in their order, in every process."""
    from torch import distributed

    own = list(part)
    if (count := joined().count) == 1:
        return own
    parts: list[Any] = [None] * count
    distributed.all_gather_object(parts, own)
    return [item for one in parts for item in one]


def first_alone(work: Callable[[], T]) -> T:
    """Call ``work`` in the first process alone, once all have come here; every process returns its value.

    Raises:
        Exception: what ``work`` raised, in every process.
    """
    if (place := joined()).count == 1:
        return work()
    gather([0])
    outcomes: list[tuple[Any, Exception | None]] = gather([_outcome(work) if place.is_first else (None, None)])
    value, error = outcomes[0]
    if error is not None:
        raise_in_all(error)
    found: T = value
    return found


def shared_work(pieces: int, work: Callable[[int], T], *, even: bool = False) -> list[T]:
    """``[work(0), work(1), ...]`` in every process, each piece worked out in one of them.

    Args:
        pieces: how many there are.
        work: makes the value of a piece from its number; the value has to be pickled.
        even: see `Place.share_of`.

    Raises:
        Exception: that of the first piece that failed, in every process.
    """
    place = joined()
    if place.count == 1:
        return [work(piece) for piece in range(pieces)]
    found: list[tuple[int, Any, Exception | None]] = []
    for piece in place.share_of(pieces, even=even):
        value, error = _outcome(lambda piece=piece: work(piece))  # type: ignore[misc]
        found.append((piece, value, error))
        if error is not None and not even:
            break
    every = sorted(gather(found), key=lambda one: one[0])
    for _, _, error in every:
        if error is not None:
            raise_in_all(error)
    values = {piece: value for piece, value, _ in reversed(every)}
    return [values[piece] for piece in range(pieces)]


def raise_in_all(error: Exception) -> NoReturn:
    """Raise an error that every process raises, so that one of them speaks for all."""
    error.raised_in_all = True  # type: ignore[attr-defined]
    raise error


def raised_in_all(error: BaseException | None) -> bool:
    """Whether every process raises an error, or one that led to it, so that one of them can speak for all."""
    return error is not None and (hasattr(error, "raised_in_all") or raised_in_all(error.__cause__))


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The value of some work, or what it raised in a form that can be sent."""
    try:
        return work(), None
    except Exception as error:
        if lost_another(error):
            raise
        try:
            sent = pickle.loads(pickle.dumps(error))
        except Exception:
            return None, DrklError(f"A process failed: {error!r}")
        return None, sent if type(sent) is type(error) else DrklError(f"A process failed: {error!r}")


def lost_another(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that another process has ended, as torch.distributed says it."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    seen: set[int] = set()  # an error that is raised from itself leads to itself
    while error is not None and id(error) not in seen:
        text = str(error)
        if isinstance(error, distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


_LONG = 60.0
"""Seconds after which a process says that it waits for the others to begin."""
_WAIT = timedelta(days=1)
"""A process that ends closes its connections, which is noticed at once; one that works is waited for."""


class Failure(NamedTuple):
    """What a process sends in the place of its part."""

    error: Exception


@dataclass(frozen=True)
class Share:
    """The part of some work that one process of several does, and how all parts come together.

    Work is cut into the same pieces whoever does it, each piece is done by one process, and the results are put
    together in the order of the pieces: a number is then the same to the last bit for any number of processes. Every
    process calls the same methods in the same order; an error in one of them is raised in all.
    """

    place: Place = Place()
    gather: Callable[[list[Any]], list[Any]] = gather
    """From one list in each process to their concatenation, in every process."""
    first_alone: bool = False
    """The first process does everything, as where a server does the work."""

    @classmethod
    def of_group(cls, *, first_alone: bool = False) -> Share:
        """The share of this process in the process group; all of the work where there is none."""
        return cls(joined(), first_alone=first_alone)

    @property
    def is_divided(self) -> bool:
        """Whether there are other processes."""
        return self.place.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what one of them alone has to."""
        return self.place.is_first

    def of(self, items: Sequence[T]) -> list[T]:
        """Those that this process works on."""
        if self.first_alone:
            return list(items) if self.is_first else []
        return [items[place] for place in self.place.share_of(len(items))]

    def together(self, work: Callable[[], Iterable[T]]) -> list[T]:
        """The results of every process, one process after the other, in all of them."""
        try:
            part = list(work())
        except Exception as error:
            self._tell(error)
            raise
        return self._exchange(part)

    def map(self, work: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
        """Yield the result of each item, in their order, in every process; each is worked on by one of them."""
        for start in range(0, len(items), self.place.count):
            mine = items[start : start + self.place.count][self.place.number :][:1]
            yield from self.together(partial(_each, work, mine))

    def first(self, work: Callable[[], T]) -> T:
        """What the first process alone computes, in every process."""
        [found] = self.together(lambda: [work()] if self.is_first else [])
        return found

    @contextmanager
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
        if not self.is_divided:
            return
        with _patience():
            values = self.together(lambda: [value])
        if len({*values}) == 1:
            return
        error = DrklError(
            f"The processes of the group have different {what}. They divide one piece of work: give each of them the "
            "same models, rows and settings."
        )
        raise_in_all(error)

    def _exchange(self, part: list[Any]) -> list[Any]:
        if not self.is_divided:
            return part
        try:
            parts = self.gather(part)
        except RuntimeError as error:
            lost = DrklError(
                "Another process of the group has ended, or does not answer. What it said tells why; where it said "
                "nothing, see that every process calls the same function."
            )
            raise lost from error
        for item in parts:
            if isinstance(item, Failure):
                raise_in_all(item.error)
        return parts

    def _tell(self, error: Exception) -> None:
        """Let the others know of an error, who wait for this process's part."""
        if not self.is_divided or raised_in_all(error) or lost_another(error):
            return
        with suppress(RuntimeError):  # they may be gone
            self.gather([Failure(_sendable(error, self.place))])
        error.raised_in_all = True  # type: ignore[attr-defined]


ALONE = Share()


@contextmanager
def _patience() -> Iterator[None]:
    """Say once what is waited for, where the block takes long: in one process alone it would have no end."""
    text = "drkl waits for the other processes of the group: every one of them has to call the same function."
    timer = threading.Timer(_LONG, logging.getLogger("drkl").warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join_launched() -> Share:
    """Join the processes that were started together into a group, each with a GPU of its own where there are some.

    What they exchange goes through the CPU, so that there may be more of them than GPUs.
    """
    if launched().count > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_WAIT)
    return Share.of_group()


def _each(work: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    return [work(item) for item in items]


def _sendable(error: Exception, place: Place) -> Exception:
    """An error as it can be sent to other processes."""
    with suppress(Exception):
        if isinstance(error, (DrklError, CutShort)) and type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    text = "".join(traceback.format_exception(error))
    return DrklError(f"Process {place.number} of {place.count}, counted from 0, failed:\n{text}")


@contextmanager
def speechless() -> Iterator[None]:
    """Inside, only errors are said: of several processes the first one speaks."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.getLogger("drkl").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tell_launcher(text: str) -> None:
    """Leave torchrun the message that it ends with, where torchrun started this process."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}))
