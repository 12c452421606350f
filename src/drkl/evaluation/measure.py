"""What every evaluation does besides measuring: progress, times, versions, and infinities kept out of json."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from drkl._version import __version__

Progress = Callable[[str, int, int], None]
"""Called with ("teacher: sampling", done, total)."""
Report = Callable[[str, int], Callable[[int], None] | None]

MODELS = ("teacher", "before", "warmup", "after", "student")
"""The models of an evaluation in their order: a run's teacher, its student before, between and after; or an outside
pair's teacher and student."""
TRAINED = ("after", "student")


def reporter(name: str, on_progress: Progress | None) -> Report:
    """Of (part, total) make what a loop calls with the number of things it has done."""

    def part(what: str, total: int) -> Callable[[int], None] | None:
        if on_progress is None:
            return None
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            on_progress(f"{name}: {what}", done, total)

        on_progress(f"{name}: {what}", 0, total)
        return advance

    return part


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add how long the block takes."""
    started = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started


def finite(value: float | None) -> float | None:
    """The value, or None for what is not finite."""
    # Json has no infinity; a distance is infinite where one model excludes a token that the other does not.
    return value if value is None or math.isfinite(value) else None


def free_memory(device: str | torch.device) -> None:
    """Give back what a dropped model held."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def versions(*packages: str) -> dict[str, str]:
    """The versions of drkl, Python and what the numbers come from."""
    names = ("torch", "transformers", "tokenizers", "numpy", *packages)
    return {
        "drkl": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
