"""Processes that run one program together, as torchrun and accelerate start them: who one is, and how work is shared.

The process group is torch.distributed's. Without one there is one process, and each function does the plain thing.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from drkl.errors import DrklError

T = TypeVar("T")


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
        _raise_in_all(error)
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
            _raise_in_all(error)
    values = {piece: value for piece, value, _ in reversed(every)}
    return [values[piece] for piece in range(pieces)]


def _raise_in_all(error: Exception) -> NoReturn:
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
    if error is None or "torch" not in sys.modules:
        return False
    from torch import distributed

    text = str(error)
    lost = isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    return lost or isinstance(error, distributed.DistError) or lost_another(error.__cause__ or error.__context__)


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
