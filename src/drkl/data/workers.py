"""Work on many things in several processes, with the results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from drkl.errors import DrklError

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerEnded(DrklError):
    """A process was ended from outside; what the others finished is good."""


def num_cores() -> int:
    """The processors that this process may use; 1 where processes are not forked."""
    # Elsewhere the libraries that are loaded here do not outlive a fork, and a new process would run the user's script.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], processes: int) -> Iterator[Result]:
    """Yield ``work(task)`` for every task, in order, worked on by several processes at once.

    ``work`` and what it refers to is there in each process as it is here; tasks and results are sent.

    Raises:
        WorkerEnded: a process was ended from outside.
    """
    if processes == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("fork")
    begin = (work, os.getpid())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=begin)
    try:
        yield from _results(pool, iter(tasks), 2 * processes)
    except BrokenProcessPool as error:
        raise WorkerEnded(
            "A process that reads and tokenises rows was ended from outside, most often because memory ran out. What "
            "it had finished is kept: start again to go on, on fewer cores (taskset -c 0-3 …) if memory is short."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: Iterator[Any], at_once: int) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    fault: Exception | None = None
    while True:
        try:
            task = next(tasks)
        except StopIteration:
            break
        except DrklError as error:  # after the results of what came before
            fault = error
            break
        with warnings.catch_warnings():
            # Newer Pythons warn of forks beside threads; no thread of this process holds what a worker needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pending.append(pool.submit(_run, task))
        if len(pending) >= at_once:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
    if fault is not None:
        raise fault


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    helps(parent)


def helps(parent: int) -> None:
    """Called in a process that works for another one: it ends without a word, and with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process where its parent was killed, which could not say so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: Any) -> Any:
    assert _work is not None
    return _work(task)
