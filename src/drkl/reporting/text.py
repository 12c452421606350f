"""Making untrusted text and numbers fit to be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass

from drkl.display import ABSENT, number

# Controls cannot stand in HTML, lone surrogates cannot be written as UTF-8, and the bidirectional overrides
# would reorder what stands beside them. Plain RTL marks and letters are left alone.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


@dataclass(frozen=True)
class Clipped:
    """A text cut for display, and how many characters were left out."""

    text: str
    hidden: int


def clean(text: str) -> str:
    """Return ``text`` with what a page cannot hold made visible: NUL as ``␀``, U+202E as ``[U+202E]``."""
    return _UNSHOWABLE.sub(_stand_in, text.replace("\r\n", "\n").replace("\r", "\n"))


def _stand_in(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"


def clip(text: str, limit: int) -> Clipped:
    """Cut a text to at most ``limit`` characters."""
    return Clipped(text, 0) if len(text) <= limit else Clipped(text[:limit], len(text) - limit)


def short(text: str, limit: int = 40) -> str:
    """One line of at most ``limit`` characters, for labels."""
    line = " ".join(clean(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return ABSENT if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def count(value: float | None, noun: str, plural: str | None = None) -> str:
    """``count(1, "row")`` is "1 row", ``count(2000, "row")`` is "2,000 rows"."""
    many = plural or noun + "s"
    return f"{number(value, 0)} {noun if value == 1 else many}"


def magnitude(value: float | None) -> str:
    """A large count in short: 134515008 is "135M"."""
    if value is None:
        return ABSENT
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: "13 min 46 s"."""
    if seconds is None:
        return ABSENT
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
