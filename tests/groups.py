"""A group of processes that are threads of one: what each of them gives and gets, without a launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from drkl.processes import Place, Share


def in_group(count: int, work: Callable[[Share], Any]) -> list[Any]:
    """What ``work`` returns, or the error that it raises, in each of ``count`` processes that share it."""
    barrier, parts = threading.Barrier(count, timeout=900), [list[Any]()] * count

    def gather(number: int, own: list[Any]) -> list[Any]:
        parts[number] = own
        barrier.wait()
        every = [item for part in parts for item in part]
        barrier.wait()
        return every

    def run(number: int) -> Any:
        try:
            return work(Share(Place(number, count), lambda own: gather(number, own)))
        except threading.BrokenBarrierError:
            raise
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
