"""Helpers of every evaluation: models on their device, progress, times, versions, finite numbers."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedModel

from drkl._version import __version__
from drkl.errors import DrklError
from drkl.models.fingerprint import model_fingerprint
from drkl.models.forward import in_eval_mode
from drkl.models.sharded import runs_together
from drkl.processes import Share
from drkl.teachers.cached import TeacherCache

Progress = Callable[[str, int, int], None]
"""Called with ("teacher: sampling", done, total)."""
Report = Callable[[str, int], Callable[[int], None] | None]
Loadable = PreTrainedModel | Callable[[], PreTrainedModel]
"""A model in memory, or a function that loads one."""
Source = Loadable | TeacherCache
"""The same, or the cache of a teacher."""


@contextmanager
def placed(source: Loadable, device: str | torch.device) -> Iterator[PreTrainedModel]:
    """A model on its device in eval mode. One in memory is afterwards where and as it was; a loaded one is dropped."""
    if not isinstance(source, PreTrainedModel):
        loaded: Any = source()
        yield loaded.to(device).eval()
        return
    if runs_together(source):
        raise DrklError(
            f"The weights of the {type(source).__name__} lie in parts in several processes, and rows are divided over "
            "whole models. Save it, and give the folder."
        )
    model: Any = source
    before, wanted = next(model.parameters()).device, torch.device(device)
    # A quantised model refuses every move, even one to where it is.
    moves = before.type != wanted.type or wanted.index not in (None, before.index)
    try:
        with in_eval_mode(model):
            yield model.to(wanted) if moves else model
    finally:
        if moves:
            model.to(before)


def check_same_weights(name: str, model: PreTrainedModel, share: Share) -> None:
    """Raise DrklError unless every process has the same weights of a model, whole."""
    if share.is_divided:
        share.check_same(f"weights of the {name}", model_fingerprint(model))


def reporter(name: str, on_progress: Progress | None) -> Report:
    """From (part, total) to what a loop calls with the number of things that it has done."""

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
    """The versions of drkl, Python and the packages that compute the numbers."""
    names = ("torch", "transformers", "tokenizers", "numpy", *packages)
    return {
        "drkl": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
