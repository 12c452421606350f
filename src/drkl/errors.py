"""The error for mistakes that a user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DrklError(ValueError):
    """A message for the user: what was expected, what came, why it matters, the way out.

    The command line prints it without a traceback and exits with status 2.
    """


class Halted(DrklError):
    """A run that was begun has stopped, and may be resumed where it was saved last."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
