"""Format numbers and escape untrusted text for HTML, Markdown and csv."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drkl.display import ABSENT, clean, number, without_markdown

_NUMBER = re.compile(r"-?[\d.]+(?:e[+-]?\d+)?")
_COMMANDS = re.compile(r"(`[^`]*`)")


@dataclass(frozen=True)
class Clipped:
    """A text cut for display, and how many characters were left out."""

    text: str
    hidden: int


def clip(text: str, limit: int) -> Clipped:
    """Cut a text to at most ``limit`` characters."""
    return Clipped(text, 0) if len(text) <= limit else Clipped(text[:limit], len(text) - limit)


def short(text: str, limit: int = 40) -> str:
    """One line of at most ``limit`` characters, for labels."""
    line = " ".join(clean(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def joined(parts: Sequence[str]) -> str:
    """``["a", "b", "c"]`` as "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def percent(value: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return ABSENT if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def count(value: float, noun: str) -> str:
    """``count(1, "row")`` is "1 row", ``count(2000, "row")`` is "2,000 rows"."""
    return f"{number(value, 0)} {noun if value == 1 else noun + 's'}"


def magnitude(value: float) -> str:
    """A large count in short: 134515008 is "135M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "13 min 46 s"."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def markdown_words(text: str) -> str:
    """Our own text with commands in backquotes, which stay."""
    pieces = _COMMANDS.split(" ".join(clean(text).split()))
    return "".join(piece if place % 2 else without_markdown(piece) for place, piece in enumerate(pieces))


def markdown_code(lines: Iterable[str]) -> str:
    """A fenced block of shell commands, a line each."""
    text = clean("\n".join(" ".join(line.split("\n")) for line in lines))
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{text}\n{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table of escaped cells; all but the first ``left`` columns are aligned to the right."""
    rule = [":--" if place < left else "--:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A csv file; no text in it is a formula to a spreadsheet. None becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_csv_cell(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _csv_cell(cell: Any) -> Any:
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell):
        return cell
    return f"'{clean(cell)}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else clean(cell)
