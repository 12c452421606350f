"""Write numbers for people, and untrusted text where it can be read and does nothing."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"
# Controls cannot stand in HTML, lone surrogates cannot be written as UTF-8, and the bidirectional overrides
# would reorder what stands beside them. Plain RTL marks and letters are left alone.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<!\w)_|_(?!\w))")


def shell_word(value: Any) -> str:
    """A path, or another value, as a word of a command line that can be pasted.

    What a terminal does not show as it is stands in the escapes of bash and zsh.

    >>> shell_word("runs/a b"), shell_word("-x/y")
    ("'runs/a b'", './-x/y')
    >>> print(shell_word("a\\nb"))
    $'a\\nb'
    """
    text = str(value)
    return _quoted(f"./{text}" if text.startswith("-") else text)


def shell_line(words: Iterable[Any]) -> str:
    """The words of a command as a line that can be pasted; options stay what they are.

    >>> print(shell_line(["drkl", "distill", "-v", "runs/a b"]))
    drkl distill -v 'runs/a b'
    >>> print(shell_line(["drkl", "report", "a\x1b"]))
    drkl report $'a\x1b'
    """
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(text: str) -> str:
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_in_escapes, text))}'"


def _in_escapes(character: str) -> str:
    """A character inside ``$'...'``."""
    if character.isprintable():
        return f"\\{character}" if character in "'\\" else character
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return named.get(character) or "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def as_number(value: Any) -> float | None:
    """The value as a finite float, or None for anything else (null, NaN, text, booleans)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a real minus sign and thousands commas; an en dash where there is none."""
    if value is None:
        return ABSENT
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def clean(text: str) -> str:
    """Return ``text`` with what a page cannot hold made visible: NUL as ``␀``, U+202E as ``[U+202E]``."""
    return _UNSHOWABLE.sub(_stand_in, text.replace("\r\n", "\n").replace("\r", "\n"))


def _stand_in(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"


def without_markdown(text: str) -> str:
    """Return ``text``, a part of a line, with everything escaped that Markdown or HTML would read."""
    return _SPECIAL.sub(r"\\\1", text)


def markdown_text(text: str) -> str:
    """One line in which nothing is Markdown or HTML."""
    return without_markdown(" ".join(clean(text).split()))


def markdown_name(text: str) -> str:
    """A name as code on one line, in a cell of a table too; nothing in it is Markdown or HTML."""
    line = " ".join(clean(text).split()).replace("|", r"\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"
