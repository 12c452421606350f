"""Format numbers for people."""

from __future__ import annotations

import math
from typing import Any

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


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
