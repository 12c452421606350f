"""Tell of memory that ran out, with what needs less of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from drkl.errors import DrklError

_WORDS = ("can't allocate memory", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the words of a RuntimeError: of torch on a processor, of a driver, of Apple's GPU, and of cuBLAS."""

LOADING = (
    "A smaller model or dtype needs less: bf16 is half of fp32. A teacher of which a cache was made (`drkl cache`, "
    "teacher.cache) or that a server has (teacher.server) is not loaded at all."
)
"""What needs less memory where models are loaded."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that memory ran out, and no DrklError has told of it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, DrklError):
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def reason_of(error: BaseException) -> str:
    """The words of an error, shortened to what was asked for and how much there is."""
    words = " ".join(str(error).split()).partition(" See documentation")[0].partition(" If reserved but")[0]
    return (words[:300] or type(error).__name__).rstrip(".")


@contextmanager
def memory_told(what: str, cure: str | Callable[[], str], kind: type[DrklError] = DrklError) -> Iterator[None]:
    """Raise a DrklError in the place of an error that says that memory ran out inside.

    Args:
        what: what it ran out in: "as the teacher is loaded".
        cure: what needs less, in whole sentences.
        kind: of the error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = cure if isinstance(cure, str) else cure()
        raise kind(f"The memory ran out {what} ({reason_of(error)}). {told}") from error


def told_of_trial(model: nn.Module) -> AbstractContextManager[None]:
    """The same where a model is tried before it is used."""
    return memory_told(f"as a {type(model).__name__} is tried on a few tokens", LOADING)
